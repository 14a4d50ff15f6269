"""Reads the record files of a run by the same rules, joins records to clips, and keeps the sound ones."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.annotations import forms
from shards.annotations.fault import RowError
from shards.annotations.files import (
    annotation_files,
    parsed,
    stray_files,
    suffix_of,
    unparsed_rows,
)
from shards.annotations.records import rows_of
from shards.annotations.selection import Selection
from shards.errors import UserError
from shards.forked import cores, in_processes
from shards.progress import progress
from shards.read.banks import Banks, Place
from shards.read.timeline import Timeline, timeline_of
from shards.signed import canonical_json
from shards.text import some
from train.data.coordinates import resolved
from train.data.drops import BadRecords, Drop, reason_counts
from train.data.known import facts
from train.data.known.facts import Facts, LazyRecords, file_digest, stamps
from train.data.known.sealed import code_digest, versions
from train.data.mixtures import MixturePart
from train.data.records import Record, join, made_independent, records_of
from train.data.sources import as_banked, parse_source
from train.settings.config import DataSettings

Rows = Sequence[tuple[str, Any]]
"""Rows of a file, each after its place."""
PART = 4096
"""Rows that a process reads together."""
WORTH_DIVIDING = 2**22
"""Bytes of the smallest file that several processes read; a smaller one takes less than a second."""
FEWEST = 4
"""Cores from which on they do: their records are read again to be counted; one process keeps its own."""
SHOWN = 30
"""Most problems that are printed; a file in the wrong form has one for each of its rows."""


ELSEWHERE = {
    *("bank", "data_path", "data_config", "data_mixture", "splice_path", "splice", "eval_path"),
    *("augment", "mm_spatial_pool_stride", "fast_stride", "media_dir", "strip_prefix", "turns"),
}
"""Settings that decide nothing here, or by way of the entry, the banks, and `independent` alone."""
CODE = ("shards", "train/data", "train/settings")
"""The folders of the code that reads records."""


class Reading:
    """Reads datasets one after the other, and collects dropped records, notes and problems."""

    def __init__(self, settings: DataSettings, problems: list[str]) -> None:
        self.settings, self.problems = settings, problems
        self.bad = BadRecords(settings)
        self.drops: list[Drop] = []
        self.left_out: list[Drop] = []
        """Dropped records of the last dataset."""
        self.digest = ""
        """`file_digest` of the last file that was read to train on."""
        self.clipped: set[str] = set()
        """Places of records with a span that was ended with its clip."""
        self.passed_over: dict[str, None] = {}
        """Files without records, as a set in order."""

    def records(
        self, part: MixturePart, banks: Banks | None, *, held_out: bool = False
    ) -> Sequence[Record]:
        """Return the sound records of a dataset's files, joined to their clips.

        banks: those in which clips are searched; None where they could not be opened.
        """
        kept: Sequence[Record] = []
        sound: Sequence[Record]
        self.left_out = []
        for path in part.records:
            self.passed_over |= dict.fromkeys(map(str, stray_files(Path(path))))
            if held_out or banks is None:
                rows = rows_of(path, self.problems, part.chosen)
                how = Manner(self.settings, part, banks, self.independent(part))
                found, drops = self._file(path, rows, how)
                sound = found.kept
            else:
                sound, drops = self._known(path, part, banks)
            kept = [*kept, *sound] if kept else sound
            self.left_out += [replace(drop, held_out=held_out) for drop in drops]
        self.drops += self.left_out
        return kept

    def _known(
        self, path: str, part: MixturePart, banks: Banks
    ) -> tuple[Sequence[Record], list[Drop]]:
        """Return the sound records of a file and its drops; what was read before is not read again."""
        before = stamps(path)
        how = Manner(self.settings, part, banks, self.independent(part))
        self.digest = file_digest(path, part.chosen)
        size = sum(size for _, size, _, _ in before)
        key = how.key(path, self.digest) if size >= facts.WORTH_KEEPING else None
        known = facts.load(key) if key else None
        if key and (known or (size >= WORTH_DIVIDING and cores() >= FEWEST)):
            rows = unread_rows(path, part.chosen)
            found = known or self._in_parts(path, rows, how)
            # a file that is being written to is not the one that the digest is of
            if found and stamps(path) == before and len(rows) == found.rows:
                if not known:
                    facts.store(key, found)
                self.clipped |= set(found.clipped)
                return LazyRecords(found, banks, rows, how.records), [
                    Drop(**d) for d in found.drops
                ]
        problems = len(self.problems)
        read, drops = self._file(path, rows_of(path, self.problems, part.chosen), how)
        if key and len(self.problems) == problems and stamps(path) == before:
            found = Facts.of(path, read.places, read.kept, banks, read.clipped)
            if found and (found := found.without([asdict(drop) for drop in drops])):
                facts.store(key, found)
        return read.kept, drops

    def _in_parts(self, path: str, rows: Rows, how: "Manner") -> Facts | None:
        """Return the facts of a file, of which several processes read parts; None where one has to.

        That is where something is wrong that is not the fault of a single row, and where a record has a
        timeline.
        """
        parts = [rows[k : k + PART] for k in range(0, len(rows), PART)]
        if len(parts) < 2:
            return None
        errors, unbanked, read = list[RowError](), list[Drop](), list[Facts]()
        with progress(f"reading {Path(path).name}", "rows", len(rows)) as bar:
            for found in in_processes(partial(how.facts, path), parts, cores()):
                if found is None:
                    return None
                read.append(found[0])
                errors += found[1]
                unbanked += found[2]
                bar.update(found[0].rows)
        problems: list[str] = []
        drops = self.bad.judge(path, errors, len(rows), problems) + unbanked
        return None if problems else Facts.joined(read).without([asdict(drop) for drop in drops])

    def _file(
        self, path: str, rows: Iterable[tuple[str, Any]], how: "Manner"
    ) -> tuple["Found", list[Drop]]:
        """Return (what is in rows, drops)."""
        found = how.found(rows)
        self.problems += found.problems
        self.clipped |= found.clipped
        drops = self.bad.judge(path, found.errors, len(found.places), self.problems)
        return found, drops + found.unbanked

    def independent(self, part: MixturePart) -> bool:
        """Return whether a dataset's records have independent turns."""
        return (part.turns or self.settings.turns) == "independent"

    def sources(self, part: MixturePart, banks: Banks) -> list[Record]:
        """Return the sources of splices in a dataset's files, joined to their clips."""
        kept: list[Record] = []
        self.left_out = []
        for path in part.records:
            errors, unbanked, read = list[RowError](), list[tuple[Record, str]](), list[Record]()
            rows = list(rows_of(path, self.problems, part.chosen))
            for where, row in rows:
                try:
                    source = parse_source(row, where, self.settings, part.folders)
                    read.append(as_banked(source, banks, part.folders))
                except RowError as error:
                    errors.append(error)
            missing = self.settings.missing
            joined = join(read, banks, missing, self.problems, unbanked, part.folders)
            sound, clipped = all_finished(joined, errors, self.settings)
            kept += sound
            self.clipped |= clipped
            self.left_out += self.bad.judge(path, errors, len(rows), self.problems)
            self.left_out += [Drop.of_record(record, reason) for record, reason in unbanked]
        self.drops += self.left_out
        return kept

    def refuse(self) -> None:
        """Raise UserError that lists every problem, if there are any."""
        if self.problems:
            # a file in two datasets is read twice: its problems are listed once
            problems = shorten(list(dict.fromkeys(self.problems)))
            raise UserError.of(self.bad.advised(problems))

    @property
    def unique_drops(self) -> tuple[Drop, ...]:
        """Each record that was left out, once."""
        return tuple(dict.fromkeys(self.drops))

    def notes(self, listed: str) -> tuple[str, ...]:
        """Return notes on dropped, clipped and unread records; listed: the file that lists drops."""
        lines = []
        if held_out := reason_counts([drop.reason for drop in self.unique_drops if drop.held_out]):
            lines.append(f"held-out records left out: {held_out}")
        if self.drops and listed:
            lines.append(f"what is left out is listed in {listed}")
        if self.clipped:
            lines.append(f"{len(self.clipped)} records have spans that now end with their clip")
        if self.passed_over:
            lines.append(f"without records, and not read: {some(list(self.passed_over))}")
        return tuple(lines)


def unread_rows(path: str, chosen: Selection) -> Rows:
    """Return the chosen rows of a file, not parsed; none of a file that cannot be read."""
    try:
        every = list(unparsed_rows(path))
    except UserError:
        return []
    return [every[k] for k in chosen.of(len(every))]


def noting(rows: Iterable[tuple[str, Any]], places: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield rows one by one, and append the place of each to `places`."""
    for where, row in rows:
        places.append(where)
        yield where, row


class Found(NamedTuple):
    """What was found in rows of a file."""

    kept: list[Record]
    """The sound records, joined to their clips."""
    places: list[str]
    """Of all rows, bad ones included."""
    errors: list[RowError]
    """Faults of single rows, in the order of these."""
    unbanked: list[Drop]
    clipped: set[str]
    """Places of records with a span that was ended with its clip."""
    problems: list[str]
    """What else is wrong."""


@dataclass(frozen=True)
class Manner:
    """All that decides what is read of a file, beside the file itself and our code."""

    settings: DataSettings
    part: MixturePart
    banks: Banks | None
    """Those in which clips are searched; None where they could not be opened."""
    independent: bool
    """Whether its records have independent turns."""

    def found(self, rows: Iterable[tuple[str, Any]]) -> Found:
        """Return what is in rows, each given with its place."""
        settings, folders = self.settings, self.part.folders
        outside, ignored = settings.allow_outside, settings.ignore_fields
        problems, errors, unbanked = list[str](), list[RowError](), list[tuple[Record, str]]()
        places: list[str] = []
        noted = noting(rows, places)
        read = records_of(
            noted, problems, errors, allow_outside=outside, ignored=ignored, folders=folders
        )
        kept, clipped = list[Record](), set[str]()
        # without banks records are read all the same, so that their faults are reported with those of
        # the banks
        if self.banks is not None:
            joined = join(read, self.banks, settings.missing, problems, unbanked, folders)
            kept, clipped = all_finished(joined, errors, settings, independent=self.independent)
        order = {place: row for row, place in enumerate(places)}
        errors.sort(key=lambda error: order[error.place])
        drops = [Drop.of_record(record, reason) for record, reason in unbanked]
        return Found(kept, places, errors, drops, clipped, problems)

    def facts(self, path: str, rows: Rows) -> tuple[Facts, list[RowError], list[Drop]] | None:
        """Return (facts, faults, what is not banked) of some rows of a file, which are not parsed.

        None where they cannot be told by themselves: where more is wrong than single rows, and where a
        record has a timeline.
        """
        found = self.found((where, parsed(row)) for where, row in rows)
        assert self.banks
        known = Facts.of(path, found.places, found.kept, self.banks, found.clipped)
        return (known, found.errors, found.unbanked) if known and not found.problems else None

    def records(self, rows: Iterable[tuple[str, Any]]) -> list[Record]:
        """Return the records of sound rows, as reading the whole file finds them."""
        found = self.found(rows)
        assert not found.errors, found.errors[0]
        assert not found.problems, found.problems[0]
        return found.kept

    def key(self, path: str, digest: str) -> str | None:
        """Return a digest of all that decides what reading a file finds; None for code that is not ours.

        digest: `file_digest` of the file and the choice of its rows.
        """
        # a form that a user has added
        if any(form.__module__ != forms.__name__ for form in forms.FORMS.values()):
            return None
        files = annotation_files(Path(path))
        parquet = any(suffix_of(file) == ".parquet" for file in files)
        names = [item.name for item in fields(DataSettings) if item.name not in ELSEWHERE]
        assert self.banks
        own = {
            "code": code_digest(*CODE),
            "versions": versions(["numpy", *["pyarrow"] * parquet]),
            "path": path,  # records are named by their path and line
            "files": [[str(file), file.stat().st_size] for file in files],
            "digest": digest,
            "chosen": repr(self.part.chosen),
            "folders": repr(self.part.folders),
            "independent": self.independent,
            "settings": {name: getattr(self.settings, name) for name in names},
            "banks": [bank_digest(bank.columns) for bank in self.banks.banks],
            "quarantined": sorted(self.banks.quarantined()),
        }
        return blake2b(canonical_json(own), digest_size=16).hexdigest()


def bank_digest(columns: Any) -> str:
    """Return a digest of the ids and times of a bank's clips, in their order."""
    digest = blake2b(digest_size=16)
    for name in ("id", "id_offsets", "start", "end"):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()


def all_finished(
    records: Sequence[Record],
    errors: list[RowError],
    settings: DataSettings,
    *,
    independent: bool = False,
) -> tuple[list[Record], set[str]]:
    """Return (sound records, places of those that were clipped); adds faults to `errors`."""
    kept, clipped = [], set()
    for record in records:
        own, was_clipped, faults = finished(record, settings, independent=independent)
        errors += faults
        if not faults:
            kept.append(own)
            if was_clipped:
                clipped.add(own.where)
    return kept, clipped


def finished(
    record: Record, settings: DataSettings, *, independent: bool
) -> tuple[Record, bool, Sequence[RowError]]:
    """Return (record that was joined to its clips, ready for use; whether a span was clipped; faults)."""
    try:
        record = joined_on_timeline(made_independent(record) if independent else record)
    except RowError as error:
        return record, False, [error.at(record.where, record.id)]
    seconds = [seconds_of(place) for place in record.places]
    return resolved(record, seconds, clip=settings.times_past_end == "clip")


def seconds_of(place: Place | Timeline) -> float:
    """Return the duration of a medium."""
    return place.duration if isinstance(place, Place) else place.clip().info.duration


def joined_on_timeline(record: Record) -> Record:
    """Return a record with its clips joined to one medium, if it has a timeline."""
    if not record.cuts:
        return record
    places = [place for place in record.places if isinstance(place, Place)]
    return replace(record, places=(timeline_of(places, record.cuts),))


def shorten(problems: Sequence[str]) -> list[str]:
    """Return the first `SHOWN` problems, and a line with the number of others."""
    if len(problems) <= SHOWN:
        return list(problems)
    return [*problems[:SHOWN], f"... and {len(problems) - SHOWN} more like these"]
