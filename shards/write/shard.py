"""Write a shard: a deterministic tar under a temporary name, then its index, then its commit record.

    with ShardWriter(path, unit=0, fingerprint=config.fingerprint) as writer:
        for key in wanted - writer.keys:
            writer.write(key, meta, arrays)
        writer.commit()

While it is written, `<name>.part` holds the samples and `<name>.journal` a line for each sample on the
disk and for each clip that failed; after a kill the next writer continues after the last complete sample.
Several processes may write the same shard, each under a lease with its token in the names of its files:
the first that links its part to the shard's name has made it, and the others drop theirs. A shard is
committed when `<name>.done` exists: the tar gets its name first, then `.idx`, and `.done` last. The same
samples in the same order give the same bytes on every machine, however often the writer was killed.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import google_crc32c
import numpy as np

from shards.errors import UserError
from shards.format.codec import Codec, Stored
from shards.format.commits import (
    ArrayRecord,
    CommitRecord,
    SampleRecord,
    StreamRecord,
    attempt_path,
    done_path,
    end_of,
    index_path,
    journal_path,
    part_path,
    read_commit,
    record_path,
    write_commit,
)
from shards.format.manifest import refuse_listed
from shards.format.quarantine import QuarantineEntry
from shards.format.samples import KEY_PATTERN, SampleMeta, member_name, scale_name
from shards.signed import (
    Json,
    canonical_json,
    file_facts,
    file_sha256,
    give_name,
    read_signed_json,
    signed_json,
    sync_folder,
    write_synced,
)
from shards.write.journal import (
    JournalEntry,
    Written,
    are_of,
    line_of,
    read_journal,
    take_part,
    write_journal,
)

BLOCK = tarfile.BLOCKSIZE
PLAIN = Codec()
NO_TAR: Json = {"nbytes": 0, "sha256": hashlib.sha256().hexdigest(), "crc32c": 0}
"""The tar's fields in the commit record of a unit without samples."""
DROPPED = ("journal", "part", "record", "index", "holder", "journal.tmp")


class OvertakenError(Exception):
    """Another process has made this shard, or holds its lease now: drop what was written here."""


@dataclass(frozen=True)
class Attempt:
    """The files that an earlier holder of a unit has left."""

    token: str
    """Part of the names of its files."""
    over: bool
    """Whether the holder is known to have ended. Otherwise it may resume writing to its files."""


class ShardWriter:
    """Appends samples to a part; `commit` turns it into the shard at `path`."""

    def __init__(
        self,
        path: Path,
        unit: int,
        fingerprint: str,
        codec: Codec = PLAIN,
        token: str = "",
        earlier: Sequence[Attempt] = (),
        wanted: Collection[str] | None = None,
        digests: Mapping[str, str] | None = None,
        *,
        keep_failures: bool = True,
    ) -> None:
        """Continue after the finished clips of an earlier writer of the same unit and fingerprint.

        token: part of the names of this writer's files; empty if there can be no other writer. earlier:
        attempts of earlier holders, of which the one with most clips is continued. wanted: keys of the
        unit's clips; an attempt with other clips is of another unit and ignored. digests: by key, of the
        planned videos; an attempt that read another one is ignored, too. keep_failures: do not try clips
        again that failed before.
        """
        self.path, self.codec, self.token = path, codec, token
        self.unit, self.fingerprint = unit, fingerprint
        self.part = part_path(path, token)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_uncommitted()
        attempts = [Attempt(token, True), *earlier]
        done = {one: self._left_by(one.token, wanted, digests) for one in attempts}
        best = max(done, key=lambda one: len(done[one].keys))
        self.entries = done[best].samples
        """One entry per sample written."""
        self.failures = done[best].failures if keep_failures else []
        """One entry per clip that could not be encoded."""
        self.keys = Written(self.entries, self.failures).keys
        """Keys of the finished clips."""
        # the journal before the part: after a kill in between its lines are ignored; a part without
        # lines would be lost
        write_journal(path, unit, fingerprint, token, [*self.entries, *self.failures])
        if best.token != token and self.entries:
            take_part(path, best.token, token, done[best].end, best.over)
        # Unbuffered: when the disk is full, close must not try to write once more.
        self._file = io.FileIO(self.part, "r+" if self.entries else "w")  # closed by close
        self.nbytes = self._file.truncate(done[best].end)
        self._file.seek(self.nbytes)
        self._journal = io.FileIO(journal_path(path, token), "a")

    def _drop_uncommitted(self) -> None:
        """Remove a tar without a commit record from the shard's name, or make it the part once more."""
        if done_path(self.path).exists() or not self.path.exists():
            return
        if self.part.exists() or not journal_path(self.path, self.token).exists():
            refuse_listed(self.path)
            self.path.unlink()
        else:  # a commit was interrupted, and this is the part
            os.replace(self.path, self.part)

    def _left_by(
        self, token: str, wanted: Collection[str] | None, digests: Mapping[str, str] | None
    ) -> Written:
        written = read_journal(self.path, self.unit, self.fingerprint, token)
        samples = [entry.sample for entry in written.samples]
        ours = wanted is None or written.keys <= set(wanted)
        # a retry that was killed may have read a file that was replaced since
        return written if ours and are_of(self.path, token, samples, digests) else Written()

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
        assert all(array.ndim == 4 for array in arrays.values()), key
        stored = {stride: self.codec.encode(stride, array) for stride, array in arrays.items()}
        shapes = {stride: array.shape for stride, array in arrays.items()}
        self.write_stored(key, meta, stored, shapes, underflowed)

    def write_stored(
        self,
        key: str,
        meta: SampleMeta,
        stored: Mapping[int, Stored],
        shapes: Mapping[int, tuple[int, ...]],
        underflowed: int = 0,
    ) -> None:
        """Append one clip as the codec stores it; shapes: of the features that were stored."""
        assert KEY_PATTERN.fullmatch(key), key
        assert key not in self.keys, key
        # the order of members is part of the bytes, and must not follow the order of a dict
        stored = {stride: stored[stride] for stride in sorted(stored)}
        # in the json too: without the catalogue a compressed member could not be cut into frames
        frames = {str(s): one.frame_nbytes for s, one in stored.items() if one.frame_nbytes}
        sample = _Sample(self.nbytes)
        place = sample.add(
            f"{key}.json", canonical_json(replace(meta, frame_nbytes=frames).to_json())
        )
        streams = {
            stride: _add_stream(sample, key, stride, shapes[stride], one)
            for stride, one in stored.items()
        }
        blob = sample.blob()
        # headers and padding included: `verify` then proves a whole sample by one number
        crc32c = google_crc32c.value(blob)
        record = SampleRecord(key, self.nbytes, len(blob), crc32c, place, streams)
        self._append(blob, record, underflowed)

    def copy(self, blob: bytes, record: SampleRecord) -> None:
        """Append a sample's bytes from another shard. record: of the sample there."""
        assert google_crc32c.value(blob) == record.crc32c, record.key
        self._append(blob, record.moved(self.nbytes - record.offset), 0)

    def fail(self, entry: QuarantineEntry) -> None:
        """Record in the journal that a clip cannot be encoded."""
        assert entry.key not in self.keys, entry.key
        write_synced(self._journal, line_of(entry))
        self.failures.append(entry)
        self.keys.add(entry.key)

    def _append(self, blob: bytes, sample: SampleRecord, underflowed: int) -> None:
        # The sample is synced before its journal line, so that a line proves that the bytes are there.
        write_synced(self._file, blob)
        entry = JournalEntry(sample, underflowed)
        write_synced(self._journal, line_of(entry))
        self.nbytes += len(blob)
        self.entries.append(entry)
        self.keys.add(sample.key)

    def commit(self, provenance: Json | None = None) -> CommitRecord:
        """Publish tar, `.idx` and `.done`; return the commit record. Without samples there is no tar.

        provenance: libraries and hardware. Raises OvertakenError if another process has made the shard.
        """
        write_synced(self._file, end_of_archive(self.nbytes))
        self.close()
        samples = [entry.sample for entry in self.entries]
        try:
            record = CommitRecord(
                shard=self.path.name,
                unit=self.unit,
                fingerprint=self.fingerprint,
                **(file_facts(self.part) if samples else NO_TAR),
                samples=samples,
                underflowed=sum(entry.underflowed for entry in self.entries),
                provenance=provenance or {},
                failures=self.failures or None,
            )
            with open(record_path(self.path, self.token), "wb", buffering=0) as file:
                write_synced(file, signed_json(record.to_json()))
            put_in_place(self.path, self.token, record, self.token)
        except FileNotFoundError:
            if done_path(self.path).exists():  # another process made it and removed our files
                raise OvertakenError from None
            raise
        drop_attempt(self.path, self.token)
        return record

    def close(self) -> None:
        """Close the files and keep them for the next writer."""
        self._file.close()
        self._journal.close()

    def abandon(self) -> None:
        """Close the files and remove them."""
        self.close()
        drop_attempt(self.path, self.token)


# -- publishing: from a part file to a committed shard


def resume_commit(
    path: Path,
    fingerprint: str,
    wanted: Collection[str],
    attempts: Sequence[str],
    token: str,
    digests: Mapping[str, str] | None = None,
) -> CommitRecord | None:
    """Complete the commit that an earlier holder of the unit had begun; None if there is none.

    wanted: keys of the unit's clips; a record of others belongs to another plan's unit. attempts: tokens
    of the earlier holders. token: of this holder. digests: as of `ShardWriter`.
    """
    for attempt in attempts:
        try:
            record = CommitRecord.from_json(read_signed_json(record_path(path, attempt)), str(path))
            done = record.keys | {entry.key for entry in record.failures or ()}
            ours = (record.fingerprint, done) == (fingerprint, set(wanted))
            if not ours or not are_of(path, attempt, record.samples, digests):
                continue
            put_in_place(path, attempt, record, token)
        except (FileNotFoundError, UserError, OvertakenError):
            continue
        return record
    return None


def put_in_place(path: Path, attempt: str, record: CommitRecord, token: str) -> None:
    """Publish a complete part and its record as the shard at `path`. Raises OvertakenError.

    attempt: the token of the files. token: of this process; several may publish the same files.
    """
    # Two exclusive links decide a race between holders: that of the tar's name, and that of `.done`,
    # which commits. Every step can be repeated, so after a kill in between the next holder completes it.
    if done_path(path).exists():
        raise OvertakenError
    if record.samples:
        part = part_path(path, attempt)
        named = give_name(part, path) if part.exists() else path.exists()
        if not named or (not part.exists() and file_sha256(path) != record.sha256):
            raise OvertakenError
        index = attempt_path(path, token, "index")
        with open(index, "wb", buffering=0) as file:
            write_synced(file, index_bytes(record.samples))
        os.replace(index, index_path(path))
        sync_folder(path.parent)
    if not give_name(record_path(path, attempt), done_path(path), never_empty=True):
        if record.samples and not read_commit(path).samples:
            path.unlink()  # another process has just committed that there are no samples
        raise OvertakenError
    # a new writer took the name from a tar without a record
    if record.samples and not path.exists():
        give_name(part_path(path, attempt), path)


def drop_attempt(path: Path, token: str) -> None:
    """Remove the files of a holder."""
    for kind in DROPPED:  # the journal first: without it the other files are ignored
        attempt_path(path, token, kind).unlink(missing_ok=True)


# -- the bytes of a tar


class _Sample:
    """The tar members of one sample; offset: at which it begins in the tar."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.pieces: list[bytes] = []

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Append a member; return the offset of its data in the tar, and its length."""
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, mode 0644
        info.size = len(data)
        # ustar: exactly one header block per member, which `care.tar_scan.layout` relies on; pax and GNU
        # formats may add more.
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
    """Append an array as npy; return where its values are, without the npy header."""
    # Version 1.0 explicitly: `np.save` chooses it by the header, and the bytes must not depend on NumPy.
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    values = array.tobytes()
    begin, _ = sample.add(name, head.getvalue() + values)
    return ArrayRecord(begin + head.tell(), len(values), google_crc32c.value(values))


def commit_nothing(shard: Path, record: CommitRecord) -> CommitRecord:
    """Write the record of a unit without samples, and no tar: stock readers fail on an empty one."""
    for path in (shard, index_path(shard)):
        path.unlink(missing_ok=True)
    record = replace(record, **NO_TAR)
    write_commit(shard, record)
    return record


def end_of_archive(nbytes: int) -> bytes:
    """Return the zeros that end a tar of `nbytes` bytes: two blocks, padded to a whole record (POSIX)."""
    return bytes(2 * BLOCK + -(nbytes + 2 * BLOCK) % tarfile.RECORDSIZE)


def index_bytes(samples: Sequence[SampleRecord]) -> bytes:
    """Return the content of `.idx`, in the layout that Megatron-Energon and Lhotse read."""
    return np.asarray([*(one.offset for one in samples), end_of(samples)], "<u8").tobytes()
