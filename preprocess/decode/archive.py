"""Videos inside archives: unpacked one at a time, into a file without a name.

    with Unpacker(folder) as unpacker, unpacker.unpacked(path, offset, nbytes) as video: ...

The plan records where each member starts: its bytes in the (uncompressed) tar, or its header in the
zip. A .tar or .zip is read from there. A compressed tar can only be read from its start, so units of
archived clips are cut in the archive's order (see `plan.cut_units`): in that order one pass over the
archive is enough for a whole run.
"""

import bz2
import gzip
import lzma
import os
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, cast

from preprocess.decode.scan import VideoError
from shards.errors import DISK_FULL
from shards.format.quarantine import Reason

ARCHIVE_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tbz"),
    ".zip",
)
UNREADABLE = (
    *(tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError),
    *(NotImplementedError, RuntimeError),  # zipfile: unknown compression; a password is needed
)
"""What the libraries raise for a damaged or unsupported archive."""
LARGEST = 8**11 - 1
"""Bytes of a member whose size a tar's header holds in octal digits."""
CHANGED = "the archive is not the one that was planned: its members are elsewhere"


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def open_tar(path: Path) -> IO[bytes]:
    """Return an open file that reads as an uncompressed tar; the compression is found by content."""
    with open(path, "rb") as file:
        head = file.read(6)
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(path))
    if head.startswith(b"BZh"):
        return cast(IO[bytes], bz2.open(path))
    return cast(IO[bytes], lzma.open(path)) if head == b"\xfd7zXZ\0" else open(path, "rb")


class Archive(AbstractContextManager["Archive"]):
    """An open tar or zip whose members are read by their offsets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = zipfile.ZipFile(path) if is_zip(path) else None
        self._file = None if self._zip else open_tar(path)
        infos = self._zip.infolist() if self._zip else ()
        self._infos = {info.header_offset: info for info in infos}

    def __exit__(self, *_: object) -> None:
        for opened in (self._zip, self._file):
            if opened:
                opened.close()

    @contextmanager
    def member(self, offset: int, nbytes: int) -> Iterator[tuple[IO[bytes], int]]:
        """Yield a file that contains the member's bytes, and the offset at which they begin.

        offset: of the member's data in the tar, or of its header in the zip. A compressed tar is read
        on from the last member; an earlier member makes it start over.
        """
        if self._zip:
            info = self._infos.get(offset)
            # the archive may have been replaced since it was planned: its offsets are then others'
            if info is None or info.file_size != nbytes:
                raise zipfile.BadZipFile(CHANGED)
            with self._zip.open(info) as file:
                yield file, 0
            return
        assert self._file
        self._file.seek(offset - tarfile.BLOCKSIZE)
        block = self._file.read(tarfile.BLOCKSIZE)
        # The plan's offsets are only valid for the archive that was planned: a header of another size
        # there means that the archive was replaced.
        size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
        # a size that a header cannot hold is in the extended one before it (POSIX.1-2017, pax)
        if size != nbytes and not (nbytes > LARGEST and size == 0):
            raise tarfile.ReadError(CHANGED)
        yield self._file, offset


class Unpacker(AbstractContextManager["Unpacker"]):
    """Gives archive members a path for as long as they are read; unpacks one at a time."""

    def __init__(self, folder: Path) -> None:
        """folder: on the disk that holds a member while it is read."""
        self.folder = folder
        self._archive: Archive | None = None
        self._one = threading.Lock()

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextmanager
    def unpacked(self, archive: Path, offset: int, nbytes: int) -> Iterator[Path]:
        """Copy a member into an anonymous file and yield a path to it."""
        # A file without a name cannot be left behind by `kill -9`, and FFmpeg can still open it by
        # its /proc path, which a pipe would not allow: readers seek.
        with tempfile.TemporaryFile(dir=self.folder) as copy:
            with self._one:
                self._unpack(archive, offset, nbytes, copy)
            yield Path(f"/proc/{os.getpid()}/fd/{copy.fileno()}")

    def _unpack(self, archive: Path, offset: int, nbytes: int, copy: IO[bytes]) -> None:
        try:
            self._copy(archive, offset, nbytes, copy)
        except UNREADABLE as error:
            # the disk that is written to: it stops the run, since no archive or clip is at fault
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            self._close()
            raise VideoError(
                Reason.CANNOT_UNPACK, str(error), where=archive, fix="fetch the archive again"
            ) from None

    def _copy(self, path: Path, offset: int, nbytes: int, copy: IO[bytes]) -> None:
        # kept open between members: a compressed tar is unpacked once, not from its start for each clip
        if self._archive is None or path != self._archive.path:
            self._close()
            self._archive = Archive(path)
        with self._archive.member(offset, nbytes) as (file, begin):
            file.seek(begin)
            left = nbytes
            while left:
                data = file.read(min(left, 1 << 20))
                if not data:
                    raise EOFError("the archive is cut off")
                copy.write(data)
                left -= len(data)
        copy.flush()

    def _close(self) -> None:
        if self._archive:
            self._archive.__exit__()
        self._archive = None
