"""One writer per folder, a bank or a run's: `<folder>/.lock`, of which nothing is left of a killed one.

with folder_lock(bank, "preprocess encode"):
    ...  # write

Readers never take it. The file says who writes; it is removed when nobody does, or is there without
a meaning after a `kill -9`. The kernel holds the lock. Some network file systems have none, or none
that other hosts see; so a holder also touches its file, and who finds one that may live watches it.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TextIO

from shards.errors import UserError
from shards.format.fields import parse
from shards.storage import Files, open_files

ORPHANS_SECONDS = 5.0
"""A child that a killed writer was just starting holds its lock until it is a program of its own."""
BEAT_SECONDS = 5.0
"""Between two touches of the file by its holder."""
WATCHED_SECONDS = 45.0
"""Without a touch for so long, a holder that the kernel does not know of is over."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What flock says on a file system without locks."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Writer:
    """A process that writes a folder."""

    pid: int
    host: str
    command: str
    started: str
    """UTC, `2025-01-31T12:00:00Z`."""
    boot: str | None = None
    """Of the kernel that knows its number, as `kernel` gives it."""

    @classmethod
    def here(cls, command: str) -> "Writer":
        """Return this process."""
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(os.getpid(), socket.gethostname(), command, started, kernel())

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host})"

    @property
    def is_here(self) -> bool:
        """Whether this kernel knows of it; hosts may share a name, and containers a kernel."""
        return self.boot == kernel() if self.boot else self.host == socket.gethostname()

    @property
    def is_over(self) -> bool:
        """Whether it has ended; of a process on another machine this cannot be known."""
        if not self.is_here:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # of another user
            return False
        return False


@cache
def kernel() -> str:
    """Return what tells this start of this machine from others, and the numbers of its processes from
    those of other containers on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def writer_of(place: str | Path | Files) -> Writer | None:
    """Return who writes in a folder or at a URL, None where nobody does."""
    files = open_files(place) if isinstance(place, str | Path) else place
    writer = _written(files)
    return None if writer is None or writer.is_over else writer


def _written(files: Files) -> Writer | None:
    try:
        return parse(Writer, json.loads(files.read(".lock")), ".lock")
    except (OSError, ValueError, UserError):  # not there, or between its lock and its first line
        return None


@contextmanager
def folder_lock(
    folder: Path, command: str, fix: str = "wait for its end, or end it"
) -> Iterator[None]:
    """Be the only process that writes a folder; it is made if need be.

    Raises UserError naming the process that writes, with what to do about it (`fix`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    over = threading.Event()
    with _acquired(folder, fix) as file:
        file.truncate(0)
        file.write(json.dumps(asdict(Writer.here(command)), sort_keys=True) + "\n")
        file.flush()
        threading.Thread(target=_beat, args=(lock_path(folder), over), daemon=True).start()
        try:
            yield
        finally:
            over.set()
            lock_path(folder).unlink(missing_ok=True)


def lock_path(folder: Path) -> Path:
    return folder / ".lock"


def _acquired(folder: Path, fix: str) -> TextIO:
    """Return the lock file, open and locked: closing it frees the folder."""
    path = lock_path(folder)
    deadline = time.monotonic() + ORPHANS_SECONDS
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held until the folder is free
        try:
            by_kernel = _flock(file)
        except BlockingIOError:
            file.close()
            if writer_of(folder) is None and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            raise _taken(folder, fix) from None
        before = _written(open_files(folder))
        # on one machine the kernel's word is enough
        if before and not before.is_over and not (by_kernel and before.is_here):
            log.warning(f"{folder}: watching whether {before} still writes here")
            if _is_touched(path):
                file.close()
                raise _taken(folder, fix)
        if _is_at(file, path):
            return file
        file.close()  # its last holder removed it between our two calls


def _flock(file: TextIO) -> bool:
    """Lock a file; False where its file system has no locks. BlockingIOError if another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _taken(folder: Path, fix: str) -> UserError:
    writer = writer_of(folder)
    since = f" since {writer.started}" if writer else ""
    return UserError(f"{writer or 'another process'} writes here{since}", where=folder, fix=fix)


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_SECONDS):
        try:
            os.utime(path)
        except OSError:  # a server that is away for a while
            continue


def _is_touched(path: Path) -> bool:
    """Watch a lock file; tell whether its holder touches it, at the latest when it must have."""
    seen = touched(path)
    deadline = time.monotonic() + WATCHED_SECONDS
    while seen is not None and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
        now = touched(path)
        if now is not None and now != seen:
            return True
        seen = now
    return False


def touched(path: Path) -> int | None:
    """Return when a file was last touched, in ns by its server's clock; None where it is gone."""
    try:
        with open(path, "rb") as file:  # opening asks the server: a stat alone may be of a cache
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:  # its holder is done
        return None


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
