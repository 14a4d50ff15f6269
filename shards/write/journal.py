"""What is whole on the disk of a shard that is not finished: `<shard>.<token>.part` and `.journal`.

written = read_journal(shard, unit, fingerprint, token)
written.samples, written.failures

The journal has a head and then a line for each clip that is done with: a sample whose bytes are in
the part, or a clip that failed. Both files are synced, so that whoever comes after a writer that was
killed goes on after its last whole sample.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c

from shards.format.commits import SampleRecord, journal_path, part_path
from shards.format.quarantine import QuarantineEntry
from shards.signed import Json, canonical_json, write_atomic


@dataclass(frozen=True)
class JournalEntry:
    """A sample that is whole on the disk, in a shard that is not finished."""

    sample: SampleRecord
    underflowed: int
    """How many of its values the stored type rounded to zero."""

    def to_json(self) -> Json:
        return {"sample": self.sample.to_json(), "underflowed": self.underflowed}

    @classmethod
    def from_json(cls, data: Json) -> "JournalEntry":
        return cls(SampleRecord.from_json(data["sample"], "journal"), data["underflowed"])


@dataclass
class Written:
    """What one holder of a unit has done."""

    samples: list[JournalEntry] = field(default_factory=list)
    failures: list[QuarantineEntry] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        """Of the clips that are done with."""
        failed = {entry.key for entry in self.failures}
        return failed | {entry.sample.key for entry in self.samples}

    @property
    def end(self) -> int:
        """Where in the part the last whole sample ends."""
        return self.samples[-1].sample.end if self.samples else 0


def written_of(lines: Sequence[Json]) -> Written:
    """Return what the lines of a journal, its head first, tell of."""
    entries = [entry_of(line) for line in lines[1:]]
    return Written(
        [entry for entry in entries if isinstance(entry, JournalEntry)],
        [entry for entry in entries if isinstance(entry, QuarantineEntry)],
    )


def entry_of(line: Json) -> JournalEntry | QuarantineEntry:
    """Return what a line of a journal tells, after the head."""
    if "failure" in line:
        return QuarantineEntry.from_json(line["failure"], "journal")
    return JournalEntry.from_json(line)


def line_of(entry: JournalEntry | QuarantineEntry) -> bytes:
    """Return an entry as a line of a journal."""
    failed = isinstance(entry, QuarantineEntry)
    return checked_line(canonical_json({"failure": entry.to_json()} if failed else entry.to_json()))


def read_journal(shard: Path, unit: int, fingerprint: str, token: str = "") -> Written:
    """Return what is whole in the files of the holder with this token.

    What comes after a sample whose checksum is wrong does not count: a machine that lost its power may
    have kept the later bytes and not the earlier.
    """
    written, part = Written(), part_path(shard, token)
    if not journal_path(shard, token).exists() or not part.exists():
        return written
    lines = journal_lines(shard, token)
    if not lines or lines[0] != _head(unit, fingerprint):
        return written
    with open(part, "rb") as file:
        for entry in map(entry_of, lines[1:]):
            if isinstance(entry, QuarantineEntry):
                written.failures.append(entry)
                continue
            sample = entry.sample
            blob = file.read(sample.nbytes)
            if sample.offset != written.end or google_crc32c.value(blob) != sample.crc32c:
                break
            written.samples.append(entry)
    return written


def write_journal(
    shard: Path,
    unit: int,
    fingerprint: str,
    token: str,
    entries: Sequence[JournalEntry | QuarantineEntry],
) -> None:
    """Write a holder's journal anew."""
    head = checked_line(canonical_json(_head(unit, fingerprint)))
    write_atomic(journal_path(shard, token), head + b"".join(map(line_of, entries)))


def take_part(shard: Path, old: str, new: str, nbytes: int, over: bool) -> None:
    """Make so many bytes of another holder's part those of one's own, whose journal tells of them.

    over: whether the other is known to be at its end. Else it may wake, and write: it keeps its file.
    """
    source, target = part_path(shard, old), part_path(shard, new)
    if over:
        os.replace(source, target)
        return
    with open(source, "rb") as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 22)
        copy.truncate(nbytes)
        copy.flush()
        os.fsync(copy.fileno())


def journal_lines(shard: Path, token: str = "") -> list[Json]:
    """Return the lines of a journal up to one that was cut off: a head, then the entries."""
    lines: list[Json] = []
    for line in journal_path(shard, token).read_bytes().splitlines(keepends=True):
        body, _, check = line.rpartition(b" ")
        if not line.endswith(b"\n") or f"{google_crc32c.value(body):08x}\n".encode() != check:
            break
        lines.append(json.loads(body))
    return lines


def checked_line(body: bytes) -> bytes:
    return body + f" {google_crc32c.value(body):08x}\n".encode()


def _head(unit: int, fingerprint: str) -> Json:
    return {"unit": unit, "fingerprint": fingerprint}
