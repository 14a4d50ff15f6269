"""What reading a record file found, kept on disk: the next run need not read all of its records.

A plan needs of a record its media and its lengths, not its text. So a file that was read before and has
not changed is not read again: its records are parsed as they are asked for, by the code that read them
at first. Kept are numbers, drops and digests, no texts. All that decides what is found is in the name of
the kept file (`reading.Manner`): what another file, setting, bank or version has left is never found.
"""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from shards.annotations.files import annotation_files, parsed
from shards.annotations.selection import ALL, Selection
from shards.annotations.timeline import REASON, Cut
from shards.errors import UserError
from shards.read.banks import Banks, Place
from shards.read.timeline import Timeline
from shards.signed import Json, canonical_json
from train.data.known.sealed import cache_root, read_sealed, write_sealed

Record = Any
"""A `train.data.records.Record`, whose module is above this folder: only its attributes are used."""

WORTH_KEEPING = 2**18
"""Bytes of the smallest file whose facts are kept: to read a smaller one takes no time."""


class Media(NamedTuple):
    """The media of a record, as `Record` has them."""

    clips: tuple[str, ...]
    places: tuple[Place | Timeline, ...]
    cuts: tuple[Cut, ...] = ()

    @property
    def media(self) -> int:
        return len(self.clips)


class Columns(NamedTuple):
    """Records and their media as arrays, all int64."""

    row: np.ndarray
    """`(records,)`, the row of each record that was kept."""
    media: np.ndarray
    """`(records,)`, media of each."""
    bank: np.ndarray
    """`(media,)`, the number of each medium's bank."""
    place: np.ndarray
    """`(media,)`, its row there."""


@dataclass(frozen=True)
class Facts:
    """What reading a file found."""

    rows: int
    """Rows that were chosen, bad ones included."""
    columns: Columns
    texts: bytes
    """`text_digests` of the records."""
    dialogues: bool
    """Whether any record has several questions."""
    clipped: list[str]
    """Places of records with a span that was ended with its clip."""
    drops: list[Json] = field(default_factory=list)
    """The fields of each `Drop`."""

    @classmethod
    def of(
        cls,
        path: str,
        places: Sequence[str],
        records: Sequence[Record],
        banks: Banks,
        clipped: Collection[str],
    ) -> "Facts | None":
        """Return the facts of a file's records; None for those with timelines, which have no one place.

        places: of its rows, `file:line`.
        """
        row_of = {place: row for row, place in enumerate(places)}
        if any(record.cuts for record in records) or len(row_of) < len(places):
            return None
        bank_of = {id(bank): number for number, bank in enumerate(banks.banks)}
        media = [place for record in records for place in record.places]
        columns = (
            [row_of[record.where] for record in records],
            [len(record.places) for record in records],
            [bank_of[id(place.bank)] for place in media if isinstance(place, Place)],
            [place.row for place in media if isinstance(place, Place)],
        )
        return cls(
            len(places),
            Columns(*(np.asarray(column, np.int64) for column in columns)),
            text_digests(path, records),
            has_dialogues(records),
            [record.where for record in records if record.where in clipped],
        )

    @classmethod
    def joined(cls, parts: Sequence["Facts"]) -> "Facts":
        """Return the facts of a file, of which each part has the rows after those of the one before."""
        begins = np.cumsum([0, *(part.rows for part in parts)])
        rows = [part.columns.row + first for part, first in zip(parts, begins, strict=False)]
        others = zip(*(part.columns[1:] for part in parts), strict=True)
        return cls(
            int(begins[-1]),
            Columns(np.concatenate(rows), *map(np.concatenate, others)),
            b"".join(part.texts for part in parts),
            any(part.dialogues for part in parts),
            [place for part in parts for place in part.clipped],
        )

    def without(self, drops: Sequence[Json]) -> "Facts | None":
        """Return the facts with what was left out; None where it may not be, the next time.

        drops: the fields of each `Drop`.
        """
        # a bad timeline may be one for want of a frame, and which frames are banked is not in the key
        if any(drop["reason"] == REASON for drop in drops):
            return None
        return replace(self, drops=list(drops))

    def to_bytes(self) -> bytes:
        head = {
            "rows": self.rows,
            "sizes": list(map(len, self.columns)),
            "texts": self.texts.hex(),
            "dialogues": self.dialogues,
            "clipped": self.clipped,
            "drops": self.drops,
        }
        return canonical_json(head) + b"\n" + b"".join(column.tobytes() for column in self.columns)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Facts":
        head, _, body = data.partition(b"\n")
        facts = json.loads(head)
        ends = np.cumsum(facts.pop("sizes")).tolist()
        values = np.frombuffer(body, np.int64)
        assert len(values) == ends[-1]
        texts = bytes.fromhex(facts.pop("texts"))
        return cls(columns=Columns(*np.split(values, ends[:-1])), texts=texts, **facts)


class LazyRecords(Sequence[Record]):
    """The records of a file, each parsed when it is asked for."""

    def __init__(
        self,
        facts: Facts,
        banks: Banks,
        rows: Sequence[tuple[str, Any]],
        read: Callable[[Iterable[tuple[str, Any]]], list[Record]],
    ) -> None:
        """rows: place and unparsed row of all that the file has. read: returns records of sound rows."""
        self.facts, self.banks, self._rows, self._read = facts, banks, rows, read

    def __len__(self) -> int:
        return len(self.facts.columns.row)

    @overload
    def __getitem__(self, k: int) -> Record: ...
    @overload
    def __getitem__(self, k: slice) -> Sequence[Record]: ...
    def __getitem__(self, k: int | slice) -> Record | Sequence[Record]:
        numbers = range(len(self))[k if isinstance(k, slice) else slice(k, k + 1 or None)]
        rows = [self._rows[row] for row in self.facts.columns.row[numbers].tolist()]
        # together: what they have in common is looked for once
        records = self._read((where, parsed(row)) for where, row in rows)
        for record, number in zip(records, numbers, strict=True):
            assert record.places == self.media[number].places, record.where
        return records if isinstance(k, slice) else records[0]

    @cached_property
    def media(self) -> list[Media]:
        """The media of each record."""
        banks, facts = self.banks.banks, self.facts.columns
        numbers = zip(facts.bank.tolist(), facts.place.tolist(), strict=True)
        places = [Place(banks[bank], row) for bank, row in numbers]
        ids = [place.bank.ids[place.row] for place in places]
        ends = np.cumsum(facts.media).tolist()
        return [
            Media(tuple(ids[end - count : end]), tuple(places[end - count : end]))
            for end, count in zip(ends, facts.media.tolist(), strict=True)
        ]


def media_of(records: Sequence[Record]) -> Sequence[Record | Media]:
    """Return the media of records, without parsing them where these are known."""
    return records.media if isinstance(records, LazyRecords) else records


def has_dialogues(records: Sequence[Record]) -> bool:
    """Return whether any record has several questions."""
    if isinstance(records, LazyRecords):
        return records.facts.dialogues
    return any(record.questions > 1 for record in records)


def texts_digest(path: str, records: Sequence[Record]) -> str:
    """Return a digest of records' texts as read, and of which rows of their file they are.

    A file's digest covers neither how it is read nor which of its records are kept. path: the file's,
    which is not in the digest.
    """
    lazy = records if isinstance(records, LazyRecords) else None
    digests = lazy.facts.texts if lazy else text_digests(path, records)
    return blake2b(digests, digest_size=16).hexdigest()


def text_digests(path: str, records: Sequence[Record]) -> bytes:
    """Return a digest of 16 bytes for each record: of its texts as read, and of its row."""
    path = str(Path(path))
    found = []
    for record in records:
        texts = [text for turn in record.turns for text in (turn.role, turn.text)]
        data = "\0".join([record.where.removeprefix(path), *texts])
        found.append(blake2b(data.encode(), digest_size=16).digest())
    return b"".join(found)


# -- the kept files


def load(key: str) -> Facts | None:
    """Return the facts that were kept under a key."""
    data = read_sealed(_file(key))
    return None if data is None else Facts.from_bytes(data)


def store(key: str, facts: Facts) -> None:
    write_sealed(_file(key), facts.to_bytes(), "records")


def _file(key: str) -> Path:
    return cache_root() / "framebank-records" / f"{key}.bin"


def stamps(path: str) -> list[tuple[str, int, int, int]]:
    """Return (file, size, time of change, inode) of a path's files; none where they cannot be read.

    They tell whether a file was written to in between.
    """
    found = []
    try:
        for file in annotation_files(Path(path)):
            stat = file.stat()
            found.append((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    except (OSError, UserError):  # reported where the file is read
        return []
    return found


def file_digest(path: str, chosen: Selection = ALL) -> str:
    """Return a digest of the bytes of a file or of a folder's annotations, and of the rows chosen."""
    digest = blake2b(digest_size=16)
    try:
        for file in annotation_files(Path(path)):
            digest.update(file.read_bytes())
    except (OSError, UserError):
        pass  # a problem by then, and counted as empty here
    if chosen != ALL:
        digest.update(repr(chosen).encode())
    return digest.hexdigest()
