"""Write a shard: a deterministic tar under a temporary name, then its index, then its commit record.

A shard is committed when `<name>.done` exists: the tar is synced and renamed first, `.idx` next,
`.done` last. The same samples in the same order give the same bytes on every machine.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import numpy as np

from shards.schema import KEY_PATTERN, Json, SampleMeta, canonical_json, digest, member_name

BLOCK = tarfile.BLOCKSIZE


class ShardWriter:
    """Appends samples to `<path>.part`; `commit` turns it into the shard at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.part, "wb")  # noqa: SIM115 - closed by commit or abandon
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._samples: list[Json] = []

    def write(self, key: str, meta: SampleMeta, arrays: Mapping[int, np.ndarray]) -> None:
        """Append one clip: its json, then one npy per stride, finest first.

        arrays: stride -> float16 or uint16 `(frames, cell_rows, cell_cols, dim)`.
        """
        assert KEY_PATTERN.fullmatch(key), key
        offset = self._tar.offset
        start, nbytes = self._add(f"{key}.json", canonical_json(meta.to_json()))
        streams = {}
        for stride in sorted(arrays):
            array = arrays[stride]
            assert array.ndim == 4, array.shape
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0))
            data = buffer.getvalue()
            begin, length = self._add(member_name(key, stride), data)
            header = length - array.nbytes
            streams[str(stride)] = {
                "offset": begin + header,
                "nbytes": array.nbytes,
                "shape": list(array.shape),
                "crc32c": google_crc32c.value(data[header:]),
            }
        self._samples.append(
            {"key": key, "offset": offset, "json": [start, nbytes], "streams": streams}
        )

    @property
    def nbytes(self) -> int:
        return self._tar.offset

    def commit(self, unit: int, fingerprint: str, underflowed: int = 0) -> Json:
        """Sync, rename, write `.idx` and `.done`; return the commit record.

        underflowed: values of the shard that became zero in its type, for the manifest.
        """
        end = self._tar.offset
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        offsets = [sample["offset"] for sample in self._samples] + [end]
        record: Json = {
            "shard": self.path.name,
            "unit": unit,
            "fingerprint": fingerprint,
            "underflowed": underflowed,
            "nbytes": self.part.stat().st_size,
            "sha256": file_sha256(self.part),
            "samples": self._samples,
        }
        os.replace(self.part, self.path)
        write_atomic(index_path(self.path), np.asarray(offsets, dtype="<u8").tobytes())
        write_atomic(done_path(self.path), signed_json(record))
        return record

    def abandon(self) -> None:
        self._file.close()
        self.part.unlink(missing_ok=True)

    def _add(self, name: str, data: bytes) -> tuple[int, int]:
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, mode 0644
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // BLOCK) * BLOCK
        return self._tar.offset - padded, len(data)


def index_path(shard: Path) -> Path:
    """uint64 little-endian: each sample's first header, then the end of the members."""
    return shard.with_name(shard.name + ".idx")


def done_path(shard: Path) -> Path:
    return shard.with_suffix(".done")


def signed_json(record: Json) -> bytes:
    """Return `record` as json with a `self_hash` of everything else in it."""
    return canonical_json(record | {"self_hash": digest(canonical_json(record))}) + b"\n"


def read_signed_json(path: Path) -> Json:
    """Read a file written by `signed_json`; a damaged or edited one is refused."""
    try:
        record = json.loads(path.read_bytes())
        claimed = record.pop("self_hash")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a framebank record; restore it or encode again") from None
    if digest(canonical_json(record)) != claimed:
        raise ValueError(f"{path}: its content does not match its own hash; restore it from a copy")
    return dict(record)


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, sync, rename, sync the folder: readers see the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
