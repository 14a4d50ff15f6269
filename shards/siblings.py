"""The four packages are one product: another project's `model` or `train` must not pass for ours."""

import importlib.util
import sys
from pathlib import Path


def refuse_strangers(*packages: str) -> None:
    """End with one line where Python would import another project's package of one of these names.

    `python -m` and `accelerate launch -m` put the folder one stands in first on the path, and plenty
    of projects have a `model/` or a `train/` there. Called by the packages' `__init__`, since every
    later import might already be of the stranger.
    """
    home = Path(__file__).resolve().parents[1]
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and Path(spec.origin).resolve().parents[1] != home:
            line = f"{spec.origin}: this {name!r} is not framebank's, which is in {home}"
            line += "; set PYTHONSAFEPATH=1, or start in another folder"
            print(f"error: {line}", file=sys.stderr)  # noqa: T201
            raise SystemExit(2)
