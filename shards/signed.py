"""Files that contain their own hash: canonical json, hashes, and atomic writes."""

import errno
import hashlib
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c

from shards.errors import UserError, naming

Json = dict[str, Any]


def canonical_json(data: Json) -> bytes:
    """Return `data` in the one serialisation that hashes and shard members use."""
    # sorted, without blanks, ASCII: equal content gives equal bytes, whoever wrote it
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(data: bytes, size: int = 16) -> str:
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def write_synced(file: io.FileIO, data: bytes) -> None:
    """Write all of the data and wait until it is on the disk."""
    left = memoryview(data)
    with naming(file.name):
        while left:
            # an unbuffered write may take a part: on a nearly full disk it does
            left = left[file.write(left) :]
        os.fsync(file.fileno())


def signed_json(record: Json) -> bytes:
    """Return `record` as json with a `self_hash` over all other fields."""
    return canonical_json(record | {"self_hash": digest(canonical_json(record))}) + b"\n"


def read_signed_json(path: Path) -> Json:
    """Read a file written by `signed_json`; a damaged or edited one is refused."""
    return parse_signed_json(path.read_bytes(), str(path))


def parse_signed_json(data: bytes, where: str) -> Json:
    """Return the record that `signed_json` was given; where: of the bytes, for the message."""
    try:
        record = json.loads(data)
        claimed = record.pop("self_hash")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: not a framebank record; restore it or encode again") from None
    # over the parsed content, not the bytes: blanks that an editor adds do not count, values do
    if digest(canonical_json(record)) != claimed:
        raise UserError(f"{where}: its content does not match its own hash; restore it from a copy")
    return dict(record)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a temporary file, sync, rename, sync the folder: readers see the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            # Before the rename: a file system may store the new name before the data, and a power loss
            # in between would leave an empty file under the final name.
            write_synced(file, data)
        os.replace(temporary, path)
    except BaseException:
        # of no use to anybody, and on a full disk it takes the last of the room
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk: fsync of a file does not store its name."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of file systems without hard links."""


def give_name(source: Path, name: Path, *, never_empty: bool = False) -> bool:
    """Give a file a name exclusively: of several processes that try at once one succeeds; else False.

    By a hard link, which a file system makes exactly once, on NFS too; a rename would replace the
    winner's file. If the server's first answer was lost and the request repeated, the link is found to be
    the file itself: success. Without hard links the name is reserved by an empty file, which the file
    then replaces; or with `never_empty` the file is moved at once, and of two processes in the same
    moment the last one has the name.
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
        # one pass for both hashes: a shard may be a gigabyte, and reading it twice
        # takes longer than hashing
        while piece := file.read(1 << 22):
            sha256.update(piece)
            crc.update(piece)
        return {
            "nbytes": file.tell(),
            "sha256": sha256.hexdigest(),
            "crc32c": int.from_bytes(crc.digest(), "big"),
        }
