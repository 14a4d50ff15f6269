"""Annotation files of any form that we read -> records.

python -m train.convert LLaVA-Video-178K/0_30_s_academic_v0_1 --out train.jsonl
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from shards.annotations.forms import Json
from shards.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Write annotation files of any form as records of ours, or say what is wrong with them."""
    parser = argparse.ArgumentParser("train.convert", description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", help="annotation files, folders or Hub datasets")
    parser.add_argument("--out", required=True, type=Path, help="records to write (.jsonl)")
    parser.add_argument("--allow_outside", action="store_true", help="paths may leave their root")
    args = parser.parse_args(argv)
    from shards.annotations.files import local_copy
    from train.data.dataset import shorten
    from train.data.records import checked_rows
    from train.settings.config import refuse

    problems: list[str] = []
    rows: list[Json] = []
    for name in args.inputs:
        try:
            path = local_copy(name)
        except UserError as error:
            problems.append(str(error))
            continue
        rows += checked_rows(path, problems, allow_outside=args.allow_outside)
    if problems:
        refuse(shorten(problems))
    write_rows(args.out, rows)
    print(f"written: {args.out}: {len(rows)} records")  # noqa: T201


def write_rows(path: Path, rows: Sequence[Json]) -> None:
    """Write rows as jsonl."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
