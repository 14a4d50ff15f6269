"""Refuse another project's package called `model`, `train` or `preprocess` in place of ours."""

import importlib.util
import sys
from pathlib import Path


def refuse_other_projects(*packages: str) -> None:
    """Exit with one line if Python would import another project's package of one of these names.

    `python -m` and `accelerate launch -m` put the working directory first on the path, and many projects
    have a `model/` or a `train/` there. Called by the packages' `__init__`, because any later import
    might already be of the other project.
    """
    home = Path(__file__).resolve().parents[1]
    for name in packages:
        # by its spec: importing the stranger would already run its code
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and Path(spec.origin).resolve().parents[1] != home:
            line = f"{spec.origin}: this {name!r} is not framebank's, which is in {home}"
            line += "; set PYTHONSAFEPATH=1, or start in another folder"
            print(f"error: {line}", file=sys.stderr)  # noqa: T201
            raise SystemExit(2)
