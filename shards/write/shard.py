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

import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import google_crc32c
import numpy as np

from shards.format.codec import Codec, Stored
from shards.format.commits import done_path, index_path, journal_path, part_path
from shards.format.samples import KEY_PATTERN, SampleMeta, member_name, scale_name
from shards.signed import Json, _write_synced, canonical_json, file_facts, signed_json, write_atomic

BLOCK = tarfile.BLOCKSIZE
PLAIN = Codec()


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
        """Of each sample written: its record, and the note of the caller."""
        self.keys = {entry["sample"]["key"] for entry in self.entries}
        whole = len(self.entries)
        # Unbuffered: after a full disk nothing may be left to write.
        self._file = io.FileIO(self.part, "r+" if whole else "w")  # closed by close
        self.nbytes = self._file.truncate(self._good_end())
        self._file.seek(self.nbytes)
        head = canonical_json({"unit": unit, "fingerprint": fingerprint})
        lines = [head, *map(canonical_json, self.entries)]
        write_atomic(self._journal_path, b"".join(map(_checked_line, lines)))
        self._journal = io.FileIO(self._journal_path, "a")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def write(
        self, key: str, meta: SampleMeta, arrays: Mapping[int, np.ndarray], note: Json | None = None
    ) -> None:
        """Append one clip: its json, then the arrays of each stride, finest first; sync them.

        arrays: stride -> float16 or uint16 `(frames, cell_rows, cell_cols, dim)`. note: kept in the
        journal until the commit, for the caller.
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
            str(stride): _add_stream(sample, key, stride, arrays[stride].shape, one)
            for stride, one in stored.items()
        }
        blob = sample.blob()
        self._append(blob, {"key": key, "json": place, "streams": streams}, note)

    def copy(self, blob: bytes, record: Json, note: Json | None = None) -> None:
        """Append a sample's bytes as they lie in another shard, of which `record` tells."""
        assert google_crc32c.value(blob) == record["crc32c"], record["key"]
        self._append(blob, moved(record, self.nbytes - record["offset"]), note)

    def _append(self, blob: bytes, record: Json, note: Json | None) -> None:
        sample = record | {
            "offset": self.nbytes,
            "nbytes": len(blob),
            "crc32c": google_crc32c.value(blob),
        }
        _write_synced(self._file, blob)
        entry = {"sample": sample, "note": note or {}}
        _write_synced(self._journal, _checked_line(canonical_json(entry)))
        self.nbytes += len(blob)
        self.entries.append(entry)
        self.keys.add(sample["key"])

    def commit(self, **facts: object) -> Json:
        """Sync, rename, write `.idx` and `.done`; return the commit record, with `facts` in it."""
        _write_synced(self._file, end_of_archive(self.nbytes))
        self.close()
        samples = [entry["sample"] for entry in self.entries]
        record = facts | {
            "shard": self.path.name,
            "unit": self.unit,
            "fingerprint": self.fingerprint,
            **file_facts(self.part),
            "samples": samples,
        }
        os.replace(self.part, self.path)
        write_atomic(index_path(self.path), index_bytes(samples, self.nbytes))
        write_atomic(done_path(self.path), signed_json(record))
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
        if not self.entries:
            return 0
        last = self.entries[-1]["sample"]
        return int(last["offset"] + last["nbytes"])


class _Sample:
    """The members of one sample, as they will lie in a tar from `offset` on."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.pieces: list[bytes] = []

    def add(self, name: str, data: bytes) -> list[int]:
        """Append a member; return where in the tar its data begins, and its length."""
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, mode 0644
        info.size = len(data)
        header = info.tobuf(tarfile.USTAR_FORMAT)
        begin = self.offset + len(header)
        self.pieces += [header, data, bytes(-len(data) % BLOCK)]
        self.offset = begin + len(data) + len(self.pieces[-1])
        return [begin, len(data)]

    def blob(self) -> bytes:
        return b"".join(self.pieces)


def _add_stream(
    sample: _Sample, key: str, stride: int, shape: tuple[int, ...], stored: Stored
) -> Json:
    entry = _add_array(sample, member_name(key, stride), stored.data) | {"shape": list(shape)}
    if stored.frame_nbytes is not None:
        entry["frame_nbytes"] = stored.frame_nbytes
    if stored.scale is not None:
        entry["scale"] = _add_array(sample, scale_name(key, stride), stored.scale)
    return entry


def _add_array(sample: _Sample, name: str, array: np.ndarray) -> Json:
    """Append an array as npy; return where its values lie, without the header of the npy."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    values = array.tobytes()
    begin, _ = sample.add(name, head.getvalue() + values)
    return {
        "offset": begin + head.tell(),
        "nbytes": len(values),
        "crc32c": google_crc32c.value(values),
    }


def moved(record: Json, by: int) -> Json:
    """Return a sample's record as it is `by` bytes further on."""
    offset, nbytes = record["json"]
    streams = {}
    for stride, entry in record["streams"].items():
        streams[stride] = entry | {"offset": entry["offset"] + by}
        if "scale" in entry:
            scale = entry["scale"]
            streams[stride]["scale"] = scale | {"offset": scale["offset"] + by}
    return record | {
        "offset": record["offset"] + by,
        "json": [offset + by, nbytes],
        "streams": streams,
    }


def read_journal(path: Path, unit: int, fingerprint: str) -> list[Json]:
    """Return the entries of the samples of an unfinished shard that are whole in its `.part`.

    Lines after one that was cut off, and samples after one whose checksum is wrong, do not count:
    a machine that lost its power may have kept the later bytes and not the earlier.
    """
    if not journal_path(path).exists() or not part_path(path).exists():
        return []
    lines = []
    for line in journal_path(path).read_bytes().splitlines(keepends=True):
        body, _, check = line.rpartition(b" ")
        if not line.endswith(b"\n") or f"{google_crc32c.value(body):08x}\n".encode() != check:
            break
        lines.append(json.loads(body))
    if not lines or lines[0] != {"unit": unit, "fingerprint": fingerprint}:
        return []
    whole, end = [], 0
    with open(part_path(path), "rb") as file:
        for entry in lines[1:]:
            sample = entry["sample"]
            blob = file.read(sample["nbytes"])
            if sample["offset"] != end or google_crc32c.value(blob) != sample["crc32c"]:
                break
            whole.append(entry)
            end += len(blob)
    return whole


def _checked_line(body: bytes) -> bytes:
    return body + f" {google_crc32c.value(body):08x}\n".encode()


def end_of_archive(nbytes: int) -> bytes:
    """Return the zeros that end a tar whose members take `nbytes`: two blocks, whole records."""
    return bytes(2 * BLOCK + -(nbytes + 2 * BLOCK) % tarfile.RECORDSIZE)


def index_bytes(samples: list[Json], end: int) -> bytes:
    """Return the content of `.idx`, which Megatron-Energon and Lhotse read."""
    return np.asarray([sample["offset"] for sample in samples] + [end], "<u8").tobytes()
