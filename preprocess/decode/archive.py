"""Videos inside tar archives: what is there, and one at a time to read, never unpacked to a name.

    for member in archive_members(Path("0_30_s_academic_v0_1_videos_1.tar.gz")): ...
    with Unpacker(folder) as unpacker, unpacker.unpacked(path, offset, nbytes) as video: ...

The plan keeps where each member's bytes lie in the (uncompressed) tar. A .tar is read there. A
.tar.gz can only be read from its start, so units of archived clips are cut in the archive's order
(see `plan.cut_units`): asked in that order, one pass over the archive serves all of a run.
"""

import errno
import gzip
import os
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from preprocess.decode.scan import VideoError
from shards.errors import UserError
from shards.format.quarantine import Reason

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of the disk that is written to, which are no archive's and no clip's fault."""


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    name: str
    offset: int
    """Of its bytes in the uncompressed tar."""
    nbytes: int


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def archive_members(path: Path, suffixes: frozenset[str]) -> list[Member]:
    """Return the files of these suffixes in the archive's order.

    Raises UserError, a line for each problem: an archive that is cut off or damaged, and members
    that cannot be clips of their own: names that lead outside, links, two of one name.
    """
    members: list[Member] = []
    problems: list[str] = []
    try:
        with open_tar(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                name = PurePosixPath(info.name)
                if name.suffix.lower() not in suffixes or info.isdir():
                    continue
                if name.is_absolute() or ".." in name.parts:
                    problems.append(f"{path}: member {info.name!r} leads outside the archive")
                elif not info.isreg() or info.issparse():
                    problems.append(f"{path}: member {info.name!r} is a link or no plain file")
                else:
                    members.append(Member(name.as_posix(), info.offset_data, info.size))
            # tarfile takes a damaged header for the end of the archive
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
            while file.read(1 << 20):  # to the checksum of a .gz
                pass
    except BROKEN as error:
        raise UserError(
            f"cut off or damaged after {len(members)} videos ({error})",
            where=path,
            fix="fetch it again",
        ) from None
    twice = [name for name, count in Counter(m.name for m in members).items() if count > 1]
    problems += [f"{path}: holds {name!r} more than once" for name in twice]
    if problems:
        raise UserError.of(f"{line}; make the archive again" for line in problems)
    return members


class Unpacker(AbstractContextManager["Unpacker"]):
    """Gives one member at a time a path, without writing its name anywhere."""

    def __init__(self, folder: Path) -> None:
        """folder: on whose disk the member lies while it is read."""
        self.folder = folder
        self._archive: Path | None = None
        self._file: IO[bytes] | None = None

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextmanager
    def unpacked(self, archive: Path, offset: int, nbytes: int) -> Iterator[Path]:
        """Copy a member into a file without a name, gone when the process is, and give its path."""
        with tempfile.TemporaryFile(dir=self.folder) as copy:
            try:
                self._copy(archive, offset, nbytes, copy)
            except BROKEN as error:
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                self._close()
                raise VideoError(
                    Reason.CANNOT_UNPACK, str(error), where=archive, fix="fetch the archive again"
                ) from None
            yield Path(f"/proc/{os.getpid()}/fd/{copy.fileno()}")

    def _copy(self, archive: Path, offset: int, nbytes: int, copy: IO[bytes]) -> None:
        if archive != self._archive or self._file is None:
            self._close()
            self._archive, self._file = archive, open_tar(archive)
        # A .gz goes on from where it is, or for an earlier member again from the start.
        self._file.seek(offset - tarfile.BLOCKSIZE)
        header = tarfile.TarInfo.frombuf(
            self._file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape"
        )
        if header.size != nbytes:
            raise tarfile.ReadError("another archive than when its clips were planned")
        left = nbytes
        while left:
            data = self._file.read(min(left, 1 << 20))
            if not data:
                raise EOFError("the archive is cut off")
            copy.write(data)
            left -= len(data)
        copy.flush()

    def _close(self) -> None:
        if self._file:
            self._file.close()
        self._archive = self._file = None


def open_tar(path: Path) -> IO[bytes]:
    """Open the uncompressed tar."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if zipped else open(path, "rb")
