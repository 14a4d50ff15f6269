"""The journal of an unfinished shard: which samples in its part file are complete.

written = read_journal(shard, unit, fingerprint, token)
written.samples, written.failures

`<shard>.<token>.part` holds samples, `<shard>.<token>.journal` a head and then a line for each finished
clip: a sample in the part, or a failure. Both files are synced after each clip, so that after a kill the
next writer continues after the last complete sample, and at most one clip is encoded twice.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c

from shards.errors import naming
from shards.format.commits import SampleRecord, journal_path, part_path
from shards.format.quarantine import QuarantineEntry
from shards.signed import Json, canonical_json, write_atomic


@dataclass(frozen=True)
class JournalEntry:
    """A complete sample of an unfinished shard."""

    sample: SampleRecord
    underflowed: int
    """Values that the stored type rounded to zero."""

    def to_json(self) -> Json:
        return {"sample": self.sample.to_json(), "underflowed": self.underflowed}

    @classmethod
    def from_json(cls, data: Json) -> "JournalEntry":
        return cls(SampleRecord.from_json(data["sample"], "journal"), data["underflowed"])


@dataclass
class Written:
    """The finished clips of one holder of a unit."""

    samples: list[JournalEntry] = field(default_factory=list)
    failures: list[QuarantineEntry] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        """Keys of the finished clips."""
        failed = {entry.key for entry in self.failures}
        return failed | {entry.sample.key for entry in self.samples}

    @property
    def end(self) -> int:
        """Offset in the part at which the last complete sample ends."""
        return self.samples[-1].sample.end if self.samples else 0


def written_of(lines: Sequence[Json]) -> Written:
    """Return the finished clips in the lines of a journal. lines: the head first."""
    entries = [entry_of(line) for line in lines[1:]]
    return Written(
        [entry for entry in entries if isinstance(entry, JournalEntry)],
        [entry for entry in entries if isinstance(entry, QuarantineEntry)],
    )


def entry_of(line: Json) -> JournalEntry | QuarantineEntry:
    """Return the entry in a line of a journal that is not its head."""
    if "failure" in line:
        return QuarantineEntry.from_json(line["failure"], "journal")
    return JournalEntry.from_json(line)


def line_of(entry: JournalEntry | QuarantineEntry) -> bytes:
    """Return an entry as a line of a journal."""
    failed = isinstance(entry, QuarantineEntry)
    return checked_line(canonical_json({"failure": entry.to_json()} if failed else entry.to_json()))


def read_journal(shard: Path, unit: int, fingerprint: str, token: str = "") -> Written:
    """Return the finished clips in the files of the holder with this token.

    Samples after one with a wrong checksum are ignored: after a power loss later bytes may be on the
    disk and earlier ones not.
    """
    written, part = Written(), part_path(shard, token)
    # both: lines about samples that are not there prove nothing
    if not journal_path(shard, token).exists() or not part.exists():
        return written
    lines = journal_lines(shard, token)
    # features of another plan or config may have the same keys: nothing of them is continued
    if not lines or lines[0] != _head(unit, fingerprint):
        return written
    with open(part, "rb") as file:
        for entry in map(entry_of, lines[1:]):
            if isinstance(entry, QuarantineEntry):
                written.failures.append(entry)
                continue
            sample = entry.sample
            blob = file.read(sample.nbytes)
            # no gap either: the tar must be what an uninterrupted writer would have written
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
    """Write a holder's journal from scratch, atomically."""
    head = checked_line(canonical_json(_head(unit, fingerprint)))
    write_atomic(journal_path(shard, token), head + b"".join(map(line_of, entries)))


def take_part(shard: Path, old: str, new: str, nbytes: int, over: bool) -> None:
    """Turn the first `nbytes` of an earlier holder's part into this holder's, whose journal lists them.

    over: whether the earlier holder is known to have ended. Otherwise it may resume and write, so its
    file is copied and left alone.
    """
    source, target = part_path(shard, old), part_path(shard, new)
    if over:
        # an ended holder writes no more: its file is taken as it is, without a copy
        os.replace(source, target)
        return
    with naming(target), open(source, "rb") as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 22)
        # what follows the last complete sample may still be written to by its holder
        copy.truncate(nbytes)
        copy.flush()
        os.fsync(copy.fileno())


def are_of(
    shard: Path, token: str, samples: Sequence[SampleRecord], digests: Mapping[str, str] | None
) -> bool:
    """Return whether a holder's samples are of the videos with these digests, by key."""
    if not samples or not digests:
        return True
    part = part_path(shard, token)
    # it may have the shard's name already
    with open(part if part.exists() else shard, "rb") as file:
        for sample in samples:
            offset, nbytes = sample.json
            file.seek(offset)
            digest = json.loads(file.read(nbytes))["digest"]
            if digests.get(sample.key, digest) != digest:
                return False
    return True


def journal_lines(shard: Path, token: str = "") -> list[Json]:
    """Return the lines of a journal up to the first damaged or cut-off one: a head, then entries."""
    lines: list[Json] = []
    for line in journal_path(shard, token).read_bytes().splitlines(keepends=True):
        body, _, check = line.rpartition(b" ")
        # A checksum per line: after a power loss the last one may be cut off, or have any bytes in it.
        if not line.endswith(b"\n") or f"{google_crc32c.value(body):08x}\n".encode() != check:
            break
        lines.append(json.loads(body))
    return lines


def checked_line(body: bytes) -> bytes:
    return body + f" {google_crc32c.value(body):08x}\n".encode()


def _head(unit: int, fingerprint: str) -> Json:
    return {"unit": unit, "fingerprint": fingerprint}
