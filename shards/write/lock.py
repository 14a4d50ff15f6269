"""One writer per folder (of a bank or a training run): `<folder>/.lock`, which a killed writer frees.

with folder_lock(bank, "preprocess encode"):
    ...  # write

Readers never take it. The file names the writer; it is removed at the end, and after a `kill -9` it
remains without meaning. The lock itself is the kernel's flock. Some network file systems have no flock,
or one that other hosts do not see, so a holder also touches its file, and a process that finds another's
file watches it for a touch.
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

from shards.errors import UserError, naming
from shards.format.fields import parse
from shards.storage import Files, open_files

ORPHANS_SECONDS = 5.0
"""Wait this long for a lock without a live holder: a child that a killed writer had just forked keeps the
inherited lock until it executes its own program."""
BEAT_SECONDS = 5.0
"""Seconds between two touches of the file by its holder."""
WATCHED_SECONDS = 45.0
"""A holder on another machine has ended if it did not touch its file for this long: nine touches."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of flock on a file system without locks."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Writer:
    """A process that writes into a folder."""

    pid: int
    host: str
    command: str
    started: str
    """UTC, `2025-01-31T12:00:00Z`, by the clock that gives files their times: clocks of hosts differ."""
    boot: str | None = None
    """`kernel()` of the process. A pid alone is ambiguous: after a restart, and in another container, the
    same number is another process, and containers may share a host name."""

    @classmethod
    def here(cls, command: str, touched: int) -> "Writer":
        """Return this process. touched: a file or folder on the bank's disk, by its descriptor."""
        os.utime(touched)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(os.fstat(touched).st_mtime))
        return cls(os.getpid(), socket.gethostname(), command, started, kernel())

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host})"

    @property
    def is_here(self) -> bool:
        """Return whether its pid can be looked up here: same boot of the kernel, same pid namespace."""
        return self.boot == kernel() if self.boot else self.host == socket.gethostname()

    @property
    def is_over(self) -> bool:
        """Return whether it is known to have ended; False for a process on another machine."""
        if not self.is_here:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it exists, and is another user's
            return False
        return False


@cache
def kernel() -> str:
    """Return the boot id and the pid namespace: pids can be compared only where both are equal."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def writer_of(place: str | Path | Files) -> Writer | None:
    """Return the process that writes into a folder or at a URL; None if there is none."""
    files = open_files(place) if isinstance(place, str | Path) else place
    writer = _written(files)
    return None if writer is None or writer.is_over else writer


def _written(files: Files) -> Writer | None:
    try:
        return parse(Writer, json.loads(files.read(".lock")), ".lock")
    except (OSError, ValueError, UserError):  # no file, or locked and not written yet
        return None


# -- taking the lock


@contextmanager
def folder_lock(
    folder: Path, command: str, fix: str = "wait for its end, or end it"
) -> Iterator[None]:
    """Hold the exclusive right to write into a folder, which is created if missing.

    Raises UserError naming the process that holds it. fix: what to do about that, for the message.
    """
    over = threading.Event()
    with _acquired(folder, fix) as file:
        try:
            with naming(lock_path(folder)):
                # emptied only now that it is ours: before it named its holder
                file.truncate(0)
                here = Writer.here(command, file.fileno())
                line = json.dumps(asdict(here), sort_keys=True) + "\n"
                # past the buffer, which `close` would try to write once more on a full disk
                os.write(file.fileno(), line.encode())
            threading.Thread(target=_beat, args=(lock_path(folder), over), daemon=True).start()
            yield
        finally:
            over.set()
            # while it is still locked: whoever has opened it meanwhile sees that the name leads
            # elsewhere, and tries again
            lock_path(folder).unlink(missing_ok=True)


def lock_path(folder: Path) -> Path:
    return folder / ".lock"


def _acquired(folder: Path, fix: str) -> TextIO:
    """Return the lock file, open and locked: closing it frees the folder."""
    path = lock_path(folder)
    deadline = time.monotonic() + ORPHANS_SECONDS
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # append, not write: opening must not empty the file that names its holder
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held until the folder is free
        except FileNotFoundError:  # the last holder has just removed or renamed the folder
            if time.monotonic() < deadline:
                continue
            raise
        try:
            by_kernel = _flock(file)
        except BlockingIOError:
            file.close()
            # locked, and nobody named or alive: the lock of a child that is about to let go of it
            if writer_of(folder) is None and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            raise _taken(folder, fix) from None
        before = _written(open_files(folder))
        # The previous holder did not clean up. On one machine the free flock proves that it has ended.
        if before and not before.is_over and not (by_kernel and before.is_here):
            log.warning(f"{folder}: watching whether {before} still writes here")
            if _is_touched(path):
                file.close()
                raise _taken(folder, fix)
        # the lock must be that of the file under this name, which another process may have replaced
        if _is_at(file, path):
            return file
        file.close()  # the last holder removed the file between open and flock


def _flock(file: TextIO) -> bool:
    """Lock a file; False if its file system has no locks. Raises BlockingIOError if it is locked."""
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


# -- signs of life


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_SECONDS):
        try:
            os.utime(path)
        except OSError:  # the file server may be unavailable for a while
            continue


def _is_touched(path: Path) -> bool:
    """Return whether a lock file's holder touches it, within `WATCHED_SECONDS`."""
    seen = touched(path)
    deadline = time.monotonic() + WATCHED_SECONDS
    # the monotonic clock here, the server's there: only a change of the file's time is looked for
    while seen is not None and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
        now = touched(path)
        if now is not None and now != seen:
            return True
        seen = now
    return False


def touched(path: Path) -> int | None:
    """Return a file's modification time, in ns by its server's clock; None if it does not exist."""
    try:
        with open(path, "rb") as file:  # NFS asks the server on open; stat alone may be cached
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:  # its holder has finished
        return None


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
