"""Files that prove themselves: canonical json, its hash, and writes that are whole or not there."""

import errno
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import google_crc32c

from shards.errors import UserError

Json = dict[str, Any]


def canonical_json(data: Json) -> bytes:
    """Return the one spelling of `data` that hashes and shard members use."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(data: bytes, size: int = 16) -> str:
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def write_synced(file: io.FileIO, data: bytes) -> None:
    """Write all of the data, and see it on the disk."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


def signed_json(record: Json) -> bytes:
    """Return `record` as json with a `self_hash` of everything else in it."""
    return canonical_json(record | {"self_hash": digest(canonical_json(record))}) + b"\n"


def read_signed_json(path: Path) -> Json:
    """Read a file written by `signed_json`; a damaged or edited one is refused."""
    return parse_signed_json(path.read_bytes(), str(path))


def parse_signed_json(data: bytes, where: str) -> Json:
    """Return what `signed_json` was given; `where` the bytes came from is for the message."""
    try:
        record = json.loads(data)
        claimed = record.pop("self_hash")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: not a framebank record; restore it or encode again") from None
    if digest(canonical_json(record)) != claimed:
        raise UserError(f"{where}: its content does not match its own hash; restore it from a copy")
    return dict(record)


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, sync, rename, sync the folder: readers see the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", buffering=0) as file:
        write_synced(file, data)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """See the names in a folder on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What a file system without hard links says."""


def give_name(source: Path, name: Path, *, never_empty: bool = False) -> bool:
    """Give a file a name that no other file has, for all who try at once; False where one has it.

    A server that was asked twice, its first answer being lost, finds the file itself there. Where there
    are no hard links the name is taken by an empty file, in whose place the file is moved; or with
    `never_empty` moved at once, so that only the last of two who try in the same moment has it.
    """
    try:
        os.link(source, name)
    except FileExistsError:
        return source.samefile(name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            if never_empty and name.exists():
                return False
            if not never_empty:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.replace(source, name)
    sync_folder(name.parent)
    return True


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_facts(path: Path) -> Json:
    """Return a file's size, sha256 and crc32c."""
    sha256, crc = hashlib.sha256(), google_crc32c.Checksum()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            sha256.update(piece)
            crc.update(piece)
        return {
            "nbytes": file.tell(),
            "sha256": sha256.hexdigest(),
            "crc32c": int.from_bytes(crc.digest(), "big"),
        }
