"""Annotation files of any form, or of a grounding benchmark -> records, checked.

python -m train.convert records LLaVA-Video-178K/0_30_s_academic_v0_1 --out train.jsonl
python -m train.convert charades-sta charades_sta_train.txt --out train.jsonl
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from shards.annotations.forms import Json
from shards.errors import UserError
from train.data.dataset import local_copies, shorten
from train.data.importers import BOXES, IMPORTERS, imported
from train.data.records import checked_rows
from train.settings.exits import command


@command
def main(argv: Sequence[str]) -> None:
    """Write annotations as records of ours, or say what is wrong with them and write nothing."""
    args = parser().parse_args(argv)
    problems: list[str] = []
    rows: list[Json] = []
    if args.form == "records":
        for path in local_copies(args.inputs, problems):
            rows += checked_rows(path, problems, allow_outside=args.allow_outside)
    else:
        for name in args.inputs:
            rows += imported(args.form, Path(name), problems, getattr(args, "boxes", None))
    if problems:
        raise UserError.of(shorten(problems))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    args.out.write_text("".join(lines), encoding="utf-8")
    print(f"written: {args.out}: {len(rows)} records")  # noqa: T201


def parser() -> argparse.ArgumentParser:
    """Return the command line: `records`, and a form for each benchmark."""
    out = argparse.ArgumentParser(
        "python -m train.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    forms = out.add_subparsers(dest="form", required=True, metavar="FORM")
    for form in ("records", *IMPORTERS):
        about = "any form that training reads" if form == "records" else IMPORTERS[form][1].__doc__
        own = forms.add_parser(form, help=(about or form).splitlines()[0], description=about)
        own.add_argument("inputs", nargs="+", help="annotation files")
        own.add_argument("--out", required=True, type=Path, help="records to write (.jsonl)")
        if form == "records":
            own.add_argument(
                "--allow_outside", action="store_true", help="paths may leave their root"
            )
        if form == "refcoco":
            own.add_argument("--boxes", choices=BOXES, help="what bbox holds")
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
