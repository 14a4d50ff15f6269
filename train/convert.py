"""Annotation files of any form, or of a grounding benchmark -> records, checked.

python -m train.convert records LLaVA-Video-178K/0_30_s_academic_v0_1 --out train.jsonl
python -m train.convert charades-sta charades_sta_train.txt --out train.jsonl
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from shards.annotations.fault import RowError
from shards.annotations.forms import Json
from shards.errors import UserError
from shards.signed import write_atomic
from train.data.dataset import local_copies
from train.data.drops import (
    BadRecords,
    Drop,
    add_record_flags,
    reason_counts,
    record_settings,
    write_drops,
)
from train.data.importers import BOXES, IMPORTERS, imported
from train.data.reading import shorten
from train.data.records import checked_rows
from train.settings.exits import command
from train.settings.output import file_problem

OWN = ("split", "vidor", "rates")
"""Flags of one form alone."""


@command
def main(argv: Sequence[str]) -> None:
    """Write annotations as records of ours, or say what is wrong with them and write nothing."""
    args = parser().parse_args(argv)
    if problem := file_problem(args.out) or source_problem(args.out, args.inputs):
        raise UserError(problem)
    problems: list[str] = []
    rows: list[Json] = []
    settings = record_settings(args)
    # judged file by file: the limit of bad records is one of a file
    judged, drops = BadRecords(settings), list[Drop]()
    for path in local_copies(args.inputs, problems) if args.form == "records" else args.inputs:
        bad: list[RowError] = []
        if args.form == "records":
            made = checked_rows(path, problems, bad, settings)
        else:
            boxes = getattr(args, "boxes", None)
            own = {name: getattr(args, name, None) for name in OWN}
            own["times_past_end"] = settings.times_past_end
            made = imported(args.form, Path(path), problems, bad, boxes=boxes, **own)
            if not made and own["split"] and not (problems or bad):
                problems.append(f"{path}: no ref of the split {own['split']}")
        rows += made
        drops += judged.judge(path, bad, len(made) + len({e.place for e in bad}), problems)
    # nothing is written: half of the records would look like all of them
    if problems:
        raise UserError.of(judged.advised(shorten(problems)))
    why = reason_counts([drop.reason for drop in drops])
    if not rows:
        raise UserError("no record is left to write", got=f"{len(drops)} left out: {why}")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomic(args.out, "".join(lines).encode())
    # written without drops as well: a list of an earlier attempt must not stay beside
    listed = args.out.with_suffix(".dropped.jsonl")
    write_drops(listed, drops)
    left_out = f"; {len(drops)} left out ({why}), listed in {listed}" if drops else ""
    print(f"written: {args.out}: {len(rows)} records{left_out}")  # noqa: T201


def source_problem(out: Path, inputs: Sequence[str]) -> str | None:
    """Return why records may not be written to a file: it is read, or would be the next time; or None."""
    for place in map(Path, inputs):
        if place.exists() and out.resolve() == place.resolve():
            return f"{out}: is read, and would be written over; name another --out"
        if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
            return f"{out}: is within {place}, whose files are read; name an --out outside"
    return None


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
        add_record_flags(own)
        if form == "refcoco":
            own.add_argument("--boxes", choices=BOXES, help="what bbox holds")
            own.add_argument("--split", help="those of a split: train, val, testA ...")
        if form == "vidstg":
            own.add_argument("--vidor", required=True, help="VidOR's annotation folder, with boxes")
        if form == "llava-st":
            own.add_argument(
                "--rates", help="frames a second of the videos: a file of VidSTG, or {video: rate}"
            )
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
