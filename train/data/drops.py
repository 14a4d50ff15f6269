"""Bad records: all refused in one message, or left out, counted and listed.

`dropped.jsonl` has a line for each record that was left out: `{file, row, id, reason, text, held_out}`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from model.settings import problem_of
from shards.annotations.fault import RowError, UnsupervisedError, split_place
from shards.signed import write_atomic
from train.data.coordinates import BEHIND
from train.data.records import Record
from train.settings.config import DataSettings

LIST = "dropped.jsonl"
"""The file in a run's folder."""


@dataclass(frozen=True)
class Drop:
    """A record that is left out, and why."""

    file: str
    row: str
    """Its line or index in the file."""
    id: str
    reason: str
    """A short text by which drops are counted."""
    text: str
    """The whole message."""
    held_out: bool = False
    """Whether it is a held-out record."""

    @classmethod
    def of(cls, error: RowError) -> "Drop":
        """Return the drop of a record with an error."""
        return cls(*split_place(error.place), error.id, error.reason, str(error))

    @classmethod
    def of_record(cls, record: Record, reason: str) -> "Drop":
        """Return the drop of a sound record, which is left out for a reason of the run's."""
        return cls(*split_place(record.where), record.id, reason, reason)


class BadRecords:
    """Refuses or drops the bad records of all files of a run, by its settings."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings
        self.refused: set[str] = set()
        """Places of refused records."""
        self.mute = False
        """Whether a refused record only lacks an answer."""

    def judge(
        self, path: str, errors: Sequence[RowError], rows: int, problems: list[str]
    ) -> list[Drop]:
        """Return the dropped records of a file; refused ones are added to `problems`.

        errors: of its records, one or more each. rows: number of rows of the file, bad ones included.
        """
        dropped: dict[str, RowError] = {}
        for error in errors:
            # the first fault of a record is the one that is listed
            if self._may_drop(error):
                dropped.setdefault(error.place, error)
                continue
            problems.append(str(error))
            self.refused.add(error.place)
            self.mute |= isinstance(error, UnsupervisedError)
        # records that a setting of their own lets go do not count: the limit is for surprises
        bad = [error for error in dropped.values() if not self._asked_for(error)]
        limit = self.settings.bad_record_limit
        if len(bad) > most_of(limit, rows):
            reasons = reason_counts([error.reason for error in bad])
            problems.append(
                f"{path}: {len(bad)} of {rows} records are bad ({reasons}), more than "
                f"bad_record_limit {limit} allows; the first: {bad[0]}"
            )
        return [Drop.of(error) for error in dropped.values()]

    def advised(self, problems: Sequence[str]) -> list[str]:
        """Return problems as lines to print, with advice on bad records if there are any."""
        if not self.refused:
            return list(problems)
        one = len(self.refused) == 1
        mute = ", or unsupervised: drop for those without an answer" if self.mute else ""
        advice = (
            f"correct {'it' if one else 'them'}, or set on_bad_record: drop, which leaves such records "
            f"out, counts them and lists them in {LIST}{mute}"
        )
        if len(problems) == 1:
            return [f"{problems[0]}; {advice}"]
        are = "is" if one else "s are"
        return [*problems, f"{len(self.refused)} bad record{' ' * one}{are} refused: {advice}"]

    def _may_drop(self, error: RowError) -> bool:
        return self.settings.on_bad_record == "drop" or self._asked_for(error)

    def _asked_for(self, error: RowError) -> bool:
        """Return whether a setting for this kind of error lets such records be dropped."""
        if isinstance(error, UnsupervisedError):
            return self.settings.unsupervised == "drop"
        return error.reason == BEHIND and self.settings.times_past_end == "drop"


def most_of(limit: str, rows: int) -> Fraction:
    """Return the number of bad rows that a limit allows: `100`, or `1%` of the rows."""
    # as fractions: 29% of 100 rows are 29, and in floats 28.999999999999996
    if limit.endswith("%"):
        return Fraction(limit[:-1]) / 100 * rows
    return Fraction(limit)


def reason_counts(reasons: Sequence[str]) -> str:
    """Return the count of each reason, the most frequent first: `3 no answer, 1 bad box`."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())


def write_drops(file: Path, drops: Sequence[Drop]) -> None:
    """Write the list of dropped records; without any, remove it."""
    # a list of an earlier start of the run would be read as this one's
    if not drops:
        file.unlink(missing_ok=True)
        return
    lines = [json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in drops]
    # backslashreplace: JSON may hold half a surrogate pair, which UTF-8 has no bytes for
    write_atomic(file, "".join(lines).encode(errors="backslashreplace"))


def add_record_flags(parser: argparse.ArgumentParser, *more: str) -> None:
    """Add the settings for bad records to a command with few flags of its own; more: names of others.

    All that a refusal advises has to be among a command's flags.
    """
    known = {item.name: item for item in fields(DataSettings)}

    def add(name: str, **options: Any) -> None:
        words = known[name].metadata["help"].replace("%", "%%")  # which argparse fills in
        parser.add_argument(f"--{name}", help=words, **options)

    for name in (*more, "unsupervised", "on_bad_record", "times_past_end"):
        add(name, choices=known[name].metadata["choices"], default=known[name].default)
    add("bad_record_limit", type=_limit, default=known["bad_record_limit"].default)
    add("ignore_fields", nargs="+", default=[], metavar="FIELD")
    add("allow_outside", action="store_true")


def _limit(text: str) -> str:
    item = next(item for item in fields(DataSettings) if item.name == "bad_record_limit")
    if problem := problem_of(item, text):
        raise argparse.ArgumentTypeError(problem)
    return text


def record_settings(args: argparse.Namespace) -> DataSettings:
    """Return the settings that were given by `add_record_flags`."""
    return DataSettings(
        missing=getattr(args, "missing", DataSettings.missing),
        unsupervised=args.unsupervised,
        on_bad_record=args.on_bad_record,
        times_past_end=args.times_past_end,
        bad_record_limit=args.bad_record_limit,
        ignore_fields=args.ignore_fields,
        allow_outside=args.allow_outside,
    )
