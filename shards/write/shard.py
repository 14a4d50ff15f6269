"""Write a shard: a deterministic tar under a temporary name, then its index, then its commit record.

    with ShardWriter(path, unit=0, fingerprint=config.fingerprint) as writer:
        for key in wanted - writer.keys:
            writer.write(key, meta, arrays)
        writer.commit()

While it is written, `<name>.part` holds the samples and `<name>.journal` a line for each that is on
the disk; both are synced, so that a writer that was killed is followed by one that goes on after
the last whole sample. A shard is committed when `<name>.done` exists: the tar is synced and renamed
first, `.idx` next, `.done` last. The same samples in the same order give the same bytes on every
machine, however often the writer was killed.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import google_crc32c
import numpy as np

from shards.format.codec import Codec, Stored
from shards.format.commits import (
    ArrayRecord,
    CommitRecord,
    SampleRecord,
    StreamRecord,
    done_path,
    end_of,
    index_path,
    journal_path,
    part_path,
    write_commit,
)
from shards.format.samples import KEY_PATTERN, SampleMeta, member_name, scale_name
from shards.signed import Json, canonical_json, file_facts, write_atomic, write_synced

BLOCK = tarfile.BLOCKSIZE
PLAIN = Codec()


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


class ShardWriter:
    """Appends samples to `<path>.part`; `commit` turns it into the shard at `path`."""

    def __init__(self, path: Path, unit: int, fingerprint: str, codec: Codec = PLAIN) -> None:
        """Go on after the samples of an earlier writer of the same unit and fingerprint."""
        self.path, self.codec = path, codec
        self.unit, self.fingerprint = unit, fingerprint
        self.part, self._journal_path = part_path(path), journal_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lost = not self.part.exists() and not done_path(path).exists()
        if lost and self._journal_path.exists() and path.exists():
            os.replace(path, self.part)  # a commit was cut off after its first rename
        self.entries = read_journal(path, unit, fingerprint)
        """Of each sample written."""
        self.keys = {entry.sample.key for entry in self.entries}
        whole = len(self.entries)
        # Unbuffered: after a full disk nothing may be left to write.
        self._file = io.FileIO(self.part, "r+" if whole else "w")  # closed by close
        self.nbytes = self._file.truncate(self._good_end())
        self._file.seek(self.nbytes)
        head = canonical_json({"unit": unit, "fingerprint": fingerprint})
        lines = [head, *(canonical_json(entry.to_json()) for entry in self.entries)]
        write_atomic(self._journal_path, b"".join(map(_checked_line, lines)))
        self._journal = io.FileIO(self._journal_path, "a")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(
        self, key: str, meta: SampleMeta, arrays: Mapping[int, np.ndarray], underflowed: int = 0
    ) -> None:
        """Append one clip: its json, then the arrays of each stride, finest first; sync them.

        arrays: stride -> float16 or uint16 `(frames, cell_rows, cell_cols, dim)`. underflowed: how
        many of their values were rounded to zero.
        """
        assert KEY_PATTERN.fullmatch(key), key
        assert key not in self.keys, key
        assert all(array.ndim == 4 for array in arrays.values()), key
        stored = {stride: self.codec.encode(stride, arrays[stride]) for stride in sorted(arrays)}
        frames = {str(s): one.frame_nbytes for s, one in stored.items() if one.frame_nbytes}
        sample = _Sample(self.nbytes)
        place = sample.add(
            f"{key}.json", canonical_json(replace(meta, frame_nbytes=frames).to_json())
        )
        streams = {
            stride: _add_stream(sample, key, stride, arrays[stride].shape, one)
            for stride, one in stored.items()
        }
        blob = sample.blob()
        crc32c = google_crc32c.value(blob)
        record = SampleRecord(key, self.nbytes, len(blob), crc32c, place, streams)
        self._append(blob, record, underflowed)

    def copy(self, blob: bytes, record: SampleRecord) -> None:
        """Append a sample's bytes as they are in another shard, of which `record` tells."""
        assert google_crc32c.value(blob) == record.crc32c, record.key
        self._append(blob, record.moved(self.nbytes - record.offset), 0)

    def _append(self, blob: bytes, sample: SampleRecord, underflowed: int) -> None:
        write_synced(self._file, blob)
        entry = JournalEntry(sample, underflowed)
        write_synced(self._journal, _checked_line(canonical_json(entry.to_json())))
        self.nbytes += len(blob)
        self.entries.append(entry)
        self.keys.add(sample.key)

    def commit(self, provenance: Json | None = None) -> CommitRecord:
        """Sync, rename, write `.idx` and `.done`; return the commit record. No sample makes no tar.

        provenance: what, beside the fingerprint, the last bits may depend on.
        """
        write_synced(self._file, end_of_archive(self.nbytes))
        self.close()
        samples = [entry.sample for entry in self.entries]
        record = CommitRecord(
            shard=self.path.name,
            unit=self.unit,
            fingerprint=self.fingerprint,
            **file_facts(self.part),
            samples=samples,
            underflowed=sum(entry.underflowed for entry in self.entries),
            provenance=provenance or {},
        )
        if not samples:
            self.abandon()
            return commit_nothing(self.path, record)
        os.replace(self.part, self.path)
        write_atomic(index_path(self.path), index_bytes(samples))
        write_commit(self.path, record)
        self._journal_path.unlink(missing_ok=True)  # another writer of the bank may tidy up
        return record

    def close(self) -> None:
        """Leave what is written to the next writer."""
        self._file.close()
        self._journal.close()

    def abandon(self) -> None:
        """Leave nothing."""
        self.close()
        self._journal_path.unlink(missing_ok=True)  # first: without it the rest counts for nothing
        self.part.unlink(missing_ok=True)

    def _good_end(self) -> int:
        return end_of([entry.sample for entry in self.entries])


class _Sample:
    """The members of one sample, as they will be in a tar from `offset` on."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.pieces: list[bytes] = []

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Append a member; return where in the tar its data begins, and its length."""
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, mode 0644
        info.size = len(data)
        header = info.tobuf(tarfile.USTAR_FORMAT)
        begin = self.offset + len(header)
        self.pieces += [header, data, bytes(-len(data) % BLOCK)]
        self.offset = begin + len(data) + len(self.pieces[-1])
        return begin, len(data)

    def blob(self) -> bytes:
        return b"".join(self.pieces)


def _add_stream(
    sample: _Sample, key: str, stride: int, shape: tuple[int, ...], stored: Stored
) -> StreamRecord:
    place = _add_array(sample, member_name(key, stride), stored.data)
    scale = None
    if stored.scale is not None:
        scale = _add_array(sample, scale_name(key, stride), stored.scale)
    frames, rows, cols, dim = shape
    return StreamRecord(
        place.offset,
        place.nbytes,
        place.crc32c,
        (frames, rows, cols, dim),
        stored.frame_nbytes,
        scale,
    )


def _add_array(sample: _Sample, name: str, array: np.ndarray) -> ArrayRecord:
    """Append an array as npy; return where its values are, without the header of the npy."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    values = array.tobytes()
    begin, _ = sample.add(name, head.getvalue() + values)
    return ArrayRecord(begin + head.tell(), len(values), google_crc32c.value(values))


def read_journal(path: Path, unit: int, fingerprint: str) -> list[JournalEntry]:
    """Return the entries of the samples of an unfinished shard that are whole in its `.part`.

    Samples after one whose checksum is wrong do not count: a machine that lost its power may have
    kept the later bytes and not the earlier.
    """
    if not journal_path(path).exists() or not part_path(path).exists():
        return []
    lines = journal_lines(path)
    if not lines or lines[0] != {"unit": unit, "fingerprint": fingerprint}:
        return []
    whole, end = [], 0
    with open(part_path(path), "rb") as file:
        for entry in map(JournalEntry.from_json, lines[1:]):
            blob = file.read(entry.sample.nbytes)
            if entry.sample.offset != end or google_crc32c.value(blob) != entry.sample.crc32c:
                break
            whole.append(entry)
            end += len(blob)
    return whole


def journal_lines(path: Path) -> list[Json]:
    """Return the lines of a shard's journal up to one that was cut off: a head, then the entries."""
    lines: list[Json] = []
    for line in journal_path(path).read_bytes().splitlines(keepends=True):
        body, _, check = line.rpartition(b" ")
        if not line.endswith(b"\n") or f"{google_crc32c.value(body):08x}\n".encode() != check:
            break
        lines.append(json.loads(body))
    return lines


def _checked_line(body: bytes) -> bytes:
    return body + f" {google_crc32c.value(body):08x}\n".encode()


def commit_nothing(shard: Path, record: CommitRecord) -> CommitRecord:
    """Write the record of a unit without samples: no tar is left, at which stock readers would break."""
    for path in (shard, index_path(shard)):
        path.unlink(missing_ok=True)
    record = replace(record, nbytes=0, sha256=hashlib.sha256().hexdigest(), crc32c=0)
    write_commit(shard, record)
    return record


def end_of_archive(nbytes: int) -> bytes:
    """Return the zeros that end a tar whose members take `nbytes`: two blocks, whole records."""
    return bytes(2 * BLOCK + -(nbytes + 2 * BLOCK) % tarfile.RECORDSIZE)


def index_bytes(samples: Sequence[SampleRecord]) -> bytes:
    """Return the content of `.idx`, which Megatron-Energon and Lhotse read."""
    return np.asarray([*(one.offset for one in samples), end_of(samples)], "<u8").tobytes()
