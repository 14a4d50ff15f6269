"""Files of records, read one after the other by the same rules: joined to their clips, and sound."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shards.annotations.fault import RowError
from shards.annotations.files import ALL, Selection, stray_files
from shards.errors import UserError
from shards.read.banks import Banks
from train.data.coordinates import settled
from train.data.drops import BadRecords, Drop
from train.data.records import Record, join, read_records
from train.settings.config import DataSettings

SHOWN = 30
"""Problems that are printed; a file of the wrong form has one for each of its rows."""


class Reading:
    """Reads files of records one after the other, by the same rules, and keeps what becomes of them."""

    def __init__(self, settings: DataSettings, banks: Banks | None, problems: list[str]) -> None:
        self.settings, self.banks, self.problems = settings, banks, problems
        self.bad = BadRecords(settings)
        self.drops: list[Drop] = []
        self.left_out: list[Drop] = []
        """Of the last file."""
        self.clipped: set[str] = set()
        """Places of records."""
        self.passed_over: list[str] = []

    def records(
        self, path: str, chosen: Selection = ALL, *, held_out: bool = False
    ) -> list[Record]:
        """Return the records of a file or folder that are joined to their clips, and sound."""
        settings, errors, unbanked = self.settings, list[RowError](), list[tuple[Record, str]]()
        self.left_out = []
        self.passed_over += map(str, stray_files(Path(path)))
        read = read_records(
            path,
            self.problems,
            errors,
            allow_outside=settings.allow_outside,
            ignored=settings.ignore_fields,
            chosen=chosen,
        )
        rows = len(read) + len({error.place for error in errors})
        kept = []
        if self.banks is not None:
            joined = join(read, self.banks, settings.missing, self.problems, unbanked)
            kept = self._settled(joined, self.banks, errors)
        drops = self.bad.judge(path, errors, rows, self.problems)
        drops += [Drop.of_record(record, reason) for record, reason in unbanked]
        self.left_out = [replace(drop, held_out=held_out) for drop in drops]
        self.drops += self.left_out
        return kept

    def _settled(
        self, records: Sequence[Record], banks: Banks, errors: list[RowError]
    ) -> list[Record]:
        kept = []
        for record in records:
            seconds = [banks.clip(id_).info.duration for id_ in record.clips]
            clip = self.settings.times_past_end == "clip"
            settled_record, clipped, faults = settled(record, seconds, clip=clip)
            errors += faults
            if not faults:
                kept.append(settled_record)
                self.clipped |= {record.where} if clipped else set()
        return kept

    def refuse(self) -> None:
        """Raise UserError with every problem, if there is any."""
        if self.problems:
            # a file that is taken in two parts is read twice, and its problems are said once
            problems = shorten(list(dict.fromkeys(self.problems)))
            raise UserError.of(self.bad.advised(problems))

    @property
    def facts(self) -> dict[str, Any]:
        """What a `Dataset` says of how it was read."""
        return {
            "drops": tuple(dict.fromkeys(self.drops)),
            "clipped": len(self.clipped),
            "passed_over": tuple(dict.fromkeys(self.passed_over)),
        }


def shorten(problems: Sequence[str]) -> list[str]:
    """Return the first problems, and how many more there are."""
    if len(problems) <= SHOWN:
        return list(problems)
    return [*problems[:SHOWN], f"... and {len(problems) - SHOWN} more like these"]
