"""Reads the record files of a run by the same rules, joins records to clips, and keeps the sound ones."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from shards.annotations import forms
from shards.annotations.fault import RowError, short
from shards.annotations.fields import is_empty, refuse_parts
from shards.annotations.files import annotation_files, stray_files, suffix_of, unparsed_rows
from shards.annotations.forms import MEDIA_TAG
from shards.annotations.records import check_inside, parse_row, rows_of
from shards.annotations.timeline import Cut
from shards.errors import UserError
from shards.format.samples import clip_id
from shards.read.banks import Banks, Place
from shards.read.timeline import Timeline, timeline_of
from shards.signed import canonical_json
from shards.text import some
from train.data.coordinates import resolved
from train.data.drops import BadRecords, Drop, reason_counts
from train.data.known import facts
from train.data.known.facts import Facts, LazyRecords, file_digest, stamps
from train.data.known.sealed import code_digest, versions
from train.data.markup import MARKUP
from train.data.mixtures import MixturePart
from train.data.records import (
    PLAIN,
    Record,
    Turn,
    join,
    known_id,
    made_independent,
    parse_record,
    records_of,
)
from train.data.spans import refuse_misspelt
from train.settings.config import DataSettings
from train.settings.folders import Folders

PHRASE = ("phrase", "caption")
SOURCE = "no source of splice"
EXPECTED = "one `video`, and its `phrase` or `caption`"
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
                sound, drops = self._file(path, rows, part, banks)[:2]
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
        large = sum(size for _, size, _, _ in before) >= facts.WORTH_KEEPING
        key = how.key(path, self.digest) if large else None
        if key and (known := facts.load(key)):
            every = list(unparsed_rows(path))
            chosen = [every[k] for k in part.chosen.of(len(every))]
            # a file that is being written to is not the one that the digest is of
            if stamps(path) == before and len(chosen) == known.rows:
                self.clipped |= set(known.clipped)
                drops = [Drop(**drop) for drop in known.drops]
                return LazyRecords(known, banks, chosen, how.record), drops
        problems = len(self.problems)
        places: list[str] = []
        rows = noting(rows_of(path, self.problems, part.chosen), places)
        kept, drops, clipped = self._file(path, rows, part, banks)
        if key and len(self.problems) == problems and stamps(path) == before:
            listed = [asdict(drop) for drop in drops]
            found = Facts.of(path, places, kept, banks, clipped, listed)
            if found:
                facts.store(key, found)
        return kept, drops

    def _file(
        self, path: str, rows: Iterable[tuple[str, Any]], part: MixturePart, banks: Banks | None
    ) -> tuple[list[Record], list[Drop], set[str]]:
        """Return the sound records of rows, drops, and the places of records that were clipped."""
        settings, errors, unbanked = self.settings, list[RowError](), list[tuple[Record, str]]()
        read = records_of(
            rows,
            self.problems,
            errors,
            allow_outside=settings.allow_outside,
            ignored=settings.ignore_fields,
            folders=part.folders,
        )
        # a row with several faults is one bad row: the limit counts rows
        count = len(read) + len({error.place for error in errors})
        kept, clipped = list[Record](), set[str]()
        # None: records are read all the same, so that their faults are reported
        # together with those of the banks
        if banks is not None:
            missing = settings.missing
            joined = join(read, banks, missing, self.problems, unbanked, part.folders)
            kept, clipped = self._resolved(joined, errors, independent=self.independent(part))
            self.clipped |= clipped
        drops = self.bad.judge(path, errors, count, self.problems)
        left_out = [Drop.of_record(record, reason) for record, reason in unbanked]
        return kept, drops + left_out, clipped

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
            sound, clipped = self._resolved(joined, errors)
            kept += sound
            self.clipped |= clipped
            self.left_out += self.bad.judge(path, errors, len(rows), self.problems)
            self.left_out += [Drop.of_record(record, reason) for record, reason in unbanked]
        self.drops += self.left_out
        return kept

    def _resolved(
        self, records: Sequence[Record], errors: list[RowError], *, independent: bool = False
    ) -> tuple[list[Record], set[str]]:
        kept, clipped = [], set()
        for record in records:
            own, was_clipped, faults = finished(record, self.settings, independent=independent)
            errors += faults
            if not faults:
                kept.append(own)
                if was_clipped:
                    clipped.add(own.where)
        return kept, clipped

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


def noting(rows: Iterable[tuple[str, Any]], places: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield rows one by one, and append the place of each to `places`."""
    for where, row in rows:
        places.append(where)
        yield where, row


def parse_source(data: Any, where: str, settings: DataSettings, folders: Folders = PLAIN) -> Record:
    """Return a source of splices: a record whose medium is a part of a clip, its turns the phrases.

    Raises RowError with its place and id.
    """
    # paths are checked without their prefix below: /data/videos/a.mp4 may become a.mp4
    lenient = settings.allow_outside or bool(folders.strip_prefix)
    ignored = settings.ignore_fields
    row = parse_row(data, where, allow_outside=lenient, media_only=True, ignored=ignored)
    try:
        given = {name: data[name] for name in PHRASE if not is_empty(data.get(name))}
        if len(given) != 1 or len(row.media) != 1:
            got = f"{len(row.media)} media, {len(given)} phrases"
            raise RowError(SOURCE, "a source of splice", got=got, expected=EXPECTED)
        ((name, value),) = given.items()
        phrases = value if isinstance(value, list) else [value]
        for phrase in phrases:
            if not isinstance(phrase, str) or MARKUP.search(phrase) or MEDIA_TAG.search(phrase):
                expected = "a text without tags and coordinates, or a list of some of one meaning"
                raise RowError(SOURCE, f"`{name}`", got=short(phrase), expected=expected)
            refuse_misspelt([("assistant", phrase)])
        refuse_parts(data, {"start", "end", *ignored})
        (medium,) = row.media
        if not settings.allow_outside:
            check_inside(folders.stripped(medium))
    except RowError as error:
        raise error.at(where, row.id) from None
    # without a full stop: phrases are put into the middle of questions
    texts = dict.fromkeys(" ".join(phrase.split()).removesuffix(".") for phrase in phrases)
    cut = Cut(medium, row.start, row.end)
    source = data.get("data_source")
    named = source if isinstance(source, str) else ""
    turns = tuple(Turn("assistant", text) for text in texts)
    return Record(row.id, (medium,), turns, "", where, named, (cut,))


def as_banked(source: Record, banks: Banks, folders: Folders) -> Record:
    """Return a source; where its part of a video is banked as a clip of its own, of that clip."""
    (cut,) = source.cuts
    id_ = clip_id(cut.video, cut.start, cut.end)
    if cut[1:] == (None, None) or known_id(id_, source.source, banks, (), folders) is None:
        return source
    return replace(source, clips=(id_,), cuts=(Cut(id_),))


@dataclass(frozen=True)
class Manner:
    """All that decides what is read of a file, beside the file itself and our code."""

    settings: DataSettings
    part: MixturePart
    banks: Banks
    independent: bool
    """Whether its records have independent turns."""

    def record(self, where: str, row: Any) -> Record:
        """Return the record of a sound row, as reading the whole file finds it."""
        settings, part = self.settings, self.part
        outside, ignored = settings.allow_outside, settings.ignore_fields
        record = parse_record(
            row, where, allow_outside=outside, ignored=ignored, folders=part.folders
        )
        problems: list[str] = []
        joined = join([record], self.banks, settings.missing, problems, folders=part.folders)
        assert joined, (where, problems)
        record, _, faults = finished(joined[0], settings, independent=self.independent)
        assert not faults, faults
        return record

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
