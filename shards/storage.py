"""Read the files of a bank from a folder, or from a URL through fsspec, by ranges of bytes.

files = open_files("s3://lab/banks/toy")
header = files.read("shards/bank-000000.tar", 0, 512)

Both kinds may be forked, pickled and used by many threads: they read at explicit offsets and share no
file position.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np

from shards.errors import UserError, first_line

MOST_OPEN = 128
LOOK_AGAIN = 300.0
"""Seconds after which a file at a URL is asked whether it is still the same: a round trip each time."""
SUMMED = 256 << 10
"""Bytes that are read and then summed, while they are in the core's own cache: a clip of 5 MB took 1.4
times as long read whole and then summed."""


class Files(Protocol):
    """The files under one folder, by their paths relative to it."""

    where: str
    """The folder, for messages."""
    replaced: int
    """How often a file was found to be another one than when it was last opened."""

    def read(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """Return a part of a file, by default all of it; fewer bytes where the file ends early.

        Raises FileNotFoundError, and other OSErrors for failures of the disk or the network.
        """

    def read_into(self, name: str, offset: int, target: np.ndarray) -> int:
        """Fill uint8 `target` from `offset` on; return the bytes read: fewer if the file ends early."""

    def read_summed(self, name: str, offset: int, target: np.ndarray) -> tuple[int, int]:
        """Do what `read_into` does; return the crc32c of the filled target, too."""

    def size(self, name: str) -> int:
        """Return a file's size in bytes, -1 if there is no such file."""


def open_files(place: str | Path) -> Files:
    """Return the files at a local path or at a URL such as `s3://bucket/bank`."""
    return RemoteFiles(place) if isinstance(place, str) and "://" in place else LocalFiles(place)


URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
"""A URL, also after `pathlib` has merged its two slashes into one."""
DOWNLOADS = {
    "s3": "aws s3 cp --recursive",
    "gs": "gcloud storage cp --recursive",
    "gcs": "gcloud storage cp --recursive",
    "hf": "hf download",
    "http": "curl -LO",
    "https": "curl -LO",
}


def refuse_url(path: object, what: str) -> None:
    """Raise UserError for a URL where a local path is needed."""
    match = URL.match(str(path))
    if match is None:
        return
    tool = DOWNLOADS.get(match[1].lower())
    how = f"copy it with `{tool}`, and name the copy" if tool else "name a path"
    raise UserError(f"{what} must be a local path, got a URL", where=path, fix=how)


class _Opened:
    """A file descriptor that is closed when its last user drops it."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        stat = os.fstat(self.number)
        # without the inode: some file systems give a file another one each time it is opened
        self.stamp = stat.st_size, stat.st_mtime_ns

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class LocalFiles:
    """The files of a local folder. Those read in parts stay open, up to `MOST_OPEN` of them."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.where = str(folder)
        self.replaced = 0
        self._opened: dict[str, _Opened] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        self._process = os.getpid()

    def read(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        if nbytes is None:
            with open(self.folder / name, "rb") as file:
                file.seek(offset)
                return file.read()
        # pread, not seek and read: threads and forked processes share a descriptor's position
        return os.pread(self._file(name).number, nbytes, offset)

    def read_into(self, name: str, offset: int, target: np.ndarray) -> int:
        opened, view, done = self._file(name), target.data, 0
        while done < len(view):  # Linux reads at most 2 GiB per call
            got = _read_into(opened.number, view[done:], offset + done)
            if not got:
                break
            done += got
        return done

    def read_summed(self, name: str, offset: int, target: np.ndarray) -> tuple[int, int]:
        done = crc = 0
        while done < len(target):
            piece = target[done : done + SUMMED]
            got = self.read_into(name, offset + done, piece)
            crc, done = google_crc32c.extend(crc, piece), done + got
            if got < len(piece):
                break
        return done, crc

    def size(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return -1

    def _file(self, name: str) -> _Opened:
        if self._process != os.getpid():
            self._opened, self._process = {}, os.getpid()
        opened = self._opened.get(name)
        if opened is None:
            # No lock, because a fork may copy it locked. If two threads open at once, one file is closed.
            opened = self._opened.setdefault(name, _Opened(self.folder / name))
            # before the first read from it: whoever reads it sees the count
            if self._stamps.setdefault(name, opened.stamp) != opened.stamp:
                self._stamps[name] = opened.stamp
                self.replaced += 1
            if len(self._opened) > MOST_OPEN:
                self._opened.pop(list(self._opened)[0], None)  # noqa: RUF015 - list() is atomic
        return opened

    def __getstate__(self) -> dict[str, object]:
        # descriptors mean nothing in another process
        return self.__dict__ | {"_opened": {}, "_stamps": {}}


def _read_into(file: int, view: memoryview, offset: int) -> int:
    """Read into `view`, without a copy where `preadv` exists; the GIL is released meanwhile."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [view], offset)
    data = os.pread(file, len(view), offset)
    view[: len(data)] = data
    return len(data)


class RemoteFiles:
    """The files under a URL, read through fsspec: one ranged request per read."""

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        self.replaced = 0
        self._opened: tuple[int, Any, str] | None = None
        self._seen: dict[str, tuple[float, str]] = {}
        """When a file was last asked for what it is, and the answer."""

    def read(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        if nbytes is None:
            # no range at all: a server may answer `bytes=0-` with a part
            return self._range(name, None, None)[offset:]
        self._look(name)
        data = b""
        # servers may answer with a part of what was asked for (RFC 9110, 15.3.7); an empty range cannot
        # be asked for: HTTP's `bytes=a-b` has at least one byte
        while len(data) < nbytes:
            more = self._range(name, offset + len(data), offset + nbytes)
            if not more:
                break
            data = data + more if data else more
        return data

    def read_into(self, name: str, offset: int, target: np.ndarray) -> int:
        # fsspec gives bytes of its own: one copy more than `preadv` into the target
        data = self.read(name, offset, len(target))
        target[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)

    def read_summed(self, name: str, offset: int, target: np.ndarray) -> tuple[int, int]:
        return self.read_into(name, offset, target), google_crc32c.value(target)

    def size(self, name: str) -> int:
        try:
            size = self._info(name)["size"]
        except FileNotFoundError:
            return -1
        if size is None:
            raise UserError(
                "its server does not say how long it is", where=f"{self.where}/{name}", fix=COPY
            )
        return int(size)

    def _look(self, name: str) -> None:
        """Count a file that is another one than when it was last asked for, see `LOOK_AGAIN`."""
        asked, before = self._seen.get(name, (0.0, ""))
        if before and time.monotonic() - asked < LOOK_AGAIN:
            return
        # all that the server says: ETag, time of change, generation, whichever it has
        now = repr(sorted(self._info(name).items(), key=str))
        self._seen[name] = time.monotonic(), now
        if before and now != before:
            self.replaced += 1

    def _info(self, name: str) -> dict[str, Any]:
        system, root = self._system()
        with _network(f"{self.where}/{name}"):
            system.invalidate_cache(f"{root}/{name}")  # a listing that another user of it made
            return dict(system.info(f"{root}/{name}"))

    def _range(self, name: str, begin: int | None, end: int | None) -> bytes:
        """Return one answer: the bytes from `begin` to `end`, or fewer; none beyond the file's end.

        Both None: the whole file.
        """
        system, root = self._system()
        try:
            with _network(f"{self.where}/{name}"):
                data = bytes(system.cat_file(f"{root}/{name}", start=begin, end=end))
        except _BeyondEnd:
            return b""
        if begin is not None and end is not None and len(data) > end - begin:
            raise UserError(
                "its server ignores ranges of bytes and sends the whole file, as `python -m http.server` "
                "does",
                where=f"{self.where}/{name}",
                fix=COPY,
            )
        return data

    def _system(self) -> tuple[Any, str]:
        """Return the file system, created once per process, and the bank's path in it."""
        # fsspec's event loop runs in a thread, which does not survive a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                from fsspec.core import url_to_fs

                system, root = url_to_fs(self.where)
            except (ImportError, ValueError) as error:
                raise UserError(f"{self.where}: cannot be opened: {error}") from None
            self._opened = (os.getpid(), system, root)
        return self._opened[1:]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": None, "_seen": {}}


COPY = "use another server, or copy the bank and open the copy"
OUT_OF_RANGE = 416  # HTTP's status


class _BeyondEnd(Exception):
    """A range begins at or after a file's end."""


@contextmanager
def _network(where: str) -> Iterator[None]:
    """Raise OSError for whatever an fsspec file system raises of its own."""
    try:
        yield
    # bad values are left to the caller: fsspec's `filecache` gives some to threads, and good ones after
    except (FileNotFoundError, UserError, MemoryError, ValueError, KeyError, TypeError):
        raise
    # any type: aiohttp's errors of a refused request or a body cut short are no OSErrors
    except Exception as error:
        if (getattr(error, "status", None) or getattr(error, "code", None)) == OUT_OF_RANGE:
            raise _BeyondEnd from None
        raise OSError(f"{where}: {first_line(error)}") from error
