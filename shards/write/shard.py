"""Write a shard: a deterministic tar under a temporary name, then its index, then its commit record.

    with ShardWriter(path, unit=0, fingerprint=config.fingerprint) as writer:
        for key in wanted - writer.keys:
            writer.write(key, meta, arrays)
        writer.commit()

While it is written, `<name>.part` holds the samples and `<name>.journal` a line for each that is on
the disk, and for each clip that failed; a writer that was killed is followed by one that goes on after
the last whole sample. Of several that write the same shard, each under a lease with a token in the
names of its files, the first to give its part the name of the shard has made it; the others drop
theirs. A shard is committed when `<name>.done` exists: the tar gets its name first, `.idx` next,
`.done` last. The same samples in the same order give the same bytes on every machine, however often
the writer was killed.
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
    line_of,
    read_journal,
    take_part,
    write_journal,
)

BLOCK = tarfile.BLOCKSIZE
PLAIN = Codec()
NO_TAR: Json = {"nbytes": 0, "sha256": hashlib.sha256().hexdigest(), "crc32c": 0}
"""What the commit record of a unit without samples says of its tar."""
DROPPED = ("journal", "part", "record", "index", "holder", "journal.tmp")


class OvertakenError(Exception):
    """Another has made this shard, or is to: what was written here counts for nothing."""


@dataclass(frozen=True)
class Attempt:
    """What an earlier holder of a unit has left."""

    token: str
    """In the names of its files."""
    over: bool
    """Whether the holder is known to be at its end. Else it may wake, and go on writing to its files."""


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
        *,
        keep_failures: bool = True,
    ) -> None:
        """Go on after what an earlier writer of the same unit and fingerprint has done.

        token: in the names of this writer's files, empty where there can be no other. earlier: those
        before it. wanted: keys of the unit's clips; who wrote another clip made another unit.
        keep_failures: of clips that failed before; else they are to be tried again.
        """
        self.path, self.codec, self.token = path, codec, token
        self.unit, self.fingerprint = unit, fingerprint
        self.part = part_path(path, token)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_uncommitted()
        done = {one: self._left_by(one.token, wanted) for one in [Attempt(token, True), *earlier]}
        best = max(done, key=lambda one: len(done[one].keys))
        self.entries = done[best].samples
        """Of each sample written."""
        self.failures = done[best].failures if keep_failures else []
        """Of each clip that could not be encoded."""
        self.keys = Written(self.entries, self.failures).keys
        """Of the clips that are done with."""
        write_journal(path, unit, fingerprint, token, [*self.entries, *self.failures])
        if best.token != token and self.entries:
            take_part(path, best.token, token, done[best].end, best.over)
        # Unbuffered: after a full disk nothing may be left to write.
        self._file = io.FileIO(self.part, "r+" if self.entries else "w")  # closed by close
        self.nbytes = self._file.truncate(done[best].end)
        self._file.seek(self.nbytes)
        self._journal = io.FileIO(journal_path(path, token), "a")

    def _drop_uncommitted(self) -> None:
        """Take the shard's name from a tar without a commit record, which does not exist."""
        if done_path(self.path).exists() or not self.path.exists():
            return
        if self.part.exists() or not journal_path(self.path, self.token).exists():
            self.path.unlink()
        else:  # a commit was cut off, and this is the part
            os.replace(self.path, self.part)

    def _left_by(self, token: str, wanted: Collection[str] | None) -> Written:
        written = read_journal(self.path, self.unit, self.fingerprint, token)
        ours = wanted is None or written.keys <= set(wanted)
        return written if ours else Written()

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
        stored = {stride: stored[stride] for stride in sorted(stored)}
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
        crc32c = google_crc32c.value(blob)
        record = SampleRecord(key, self.nbytes, len(blob), crc32c, place, streams)
        self._append(blob, record, underflowed)

    def copy(self, blob: bytes, record: SampleRecord) -> None:
        """Append a sample's bytes as they are in another shard, of which `record` tells."""
        assert google_crc32c.value(blob) == record.crc32c, record.key
        self._append(blob, record.moved(self.nbytes - record.offset), 0)

    def fail(self, entry: QuarantineEntry) -> None:
        """Note a clip that cannot be encoded; the next writer knows of it."""
        assert entry.key not in self.keys, entry.key
        write_synced(self._journal, line_of(entry))
        self.failures.append(entry)
        self.keys.add(entry.key)

    def _append(self, blob: bytes, sample: SampleRecord, underflowed: int) -> None:
        write_synced(self._file, blob)
        entry = JournalEntry(sample, underflowed)
        write_synced(self._journal, line_of(entry))
        self.nbytes += len(blob)
        self.entries.append(entry)
        self.keys.add(sample.key)

    def commit(self, provenance: Json | None = None) -> CommitRecord:
        """Give tar, `.idx` and `.done` their names; return the commit record. No sample makes no tar.

        provenance: what, beside the fingerprint, the last bits may depend on. Raises OvertakenError
        where another has made the shard.
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
            if done_path(self.path).exists():  # and who made it has tidied up
                raise OvertakenError from None
            raise
        drop_attempt(self.path, self.token)
        return record

    def close(self) -> None:
        """Leave what is written to the next writer."""
        self._file.close()
        self._journal.close()

    def abandon(self) -> None:
        """Leave nothing."""
        self.close()
        drop_attempt(self.path, self.token)


def resume_commit(
    path: Path, fingerprint: str, wanted: Collection[str], attempts: Sequence[str], token: str
) -> CommitRecord | None:
    """Bring to its end the commit that an earlier holder of the unit had begun; None of no such.

    wanted: keys of the unit's clips; a record of others is of another plan's unit. attempts: tokens of
    the earlier holders. token: one's own.
    """
    for attempt in attempts:
        try:
            record = CommitRecord.from_json(read_signed_json(record_path(path, attempt)), str(path))
            done = record.keys | {entry.key for entry in record.failures or ()}
            if (record.fingerprint, done) != (fingerprint, set(wanted)):
                continue
            put_in_place(path, attempt, record, token)
        except (FileNotFoundError, UserError, OvertakenError):
            continue
        return record
    return None


def put_in_place(path: Path, attempt: str, record: CommitRecord, token: str) -> None:
    """Make a part that is whole, and the record of it, the shard at `path`. Raises OvertakenError.

    attempt: the token of the files. token: of who does this; several may, of the same files.
    """
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
            path.unlink()  # another has found just now that there are none
        raise OvertakenError
    if record.samples and not path.exists():  # who began meanwhile took it for one without a record
        give_name(part_path(path, attempt), path)


def drop_attempt(path: Path, token: str) -> None:
    """Remove the files of a holder."""
    for kind in DROPPED:  # without its journal the rest counts for nothing
        attempt_path(path, token, kind).unlink(missing_ok=True)


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


def commit_nothing(shard: Path, record: CommitRecord) -> CommitRecord:
    """Write the record of a unit without samples: no tar is left, at which stock readers would break."""
    for path in (shard, index_path(shard)):
        path.unlink(missing_ok=True)
    record = replace(record, **NO_TAR)
    write_commit(shard, record)
    return record


def end_of_archive(nbytes: int) -> bytes:
    """Return the zeros that end a tar whose members take `nbytes`: two blocks, whole records."""
    return bytes(2 * BLOCK + -(nbytes + 2 * BLOCK) % tarfile.RECORDSIZE)


def index_bytes(samples: Sequence[SampleRecord]) -> bytes:
    """Return the content of `.idx`, which Megatron-Energon and Lhotse read."""
    return np.asarray([*(one.offset for one in samples), end_of(samples)], "<u8").tobytes()
