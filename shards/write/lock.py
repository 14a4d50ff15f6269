"""One writer per bank: `<bank>/.lock`, held by the kernel, so that nothing is left of a killed one.

with bank_lock(bank, "preprocess encode"):
    ...  # write

Readers never take it. The file says who writes; it is removed when nobody does, or is there without
a meaning after a `kill -9`.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from shards.errors import UserError
from shards.format.fields import parse
from shards.storage import Files, open_files

ORPHANS_SECONDS = 5.0
"""A child that a killed writer was just starting holds its lock until it is a program of its own."""


@dataclass(frozen=True)
class Writer:
    """A process that writes a bank."""

    pid: int
    host: str
    command: str
    started: str
    """UTC, `2025-01-31T12:00:00Z`."""

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host})"

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

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


def writer_of(place: str | Path | Files) -> Writer | None:
    """Return who writes the bank in a folder or at a URL, None where nobody does."""
    files = open_files(place) if isinstance(place, str | Path) else place
    try:
        writer = parse(Writer, json.loads(files.read(".lock")), ".lock")
    except (OSError, ValueError, UserError):  # not there, or between its lock and its first line
        return None
    return None if writer.is_over else writer


@contextmanager
def bank_lock(bank: Path, command: str) -> Iterator[None]:
    """Be the only process that writes a bank; its folder is made if need be.

    Raises UserError naming the process that writes.
    """
    bank.mkdir(parents=True, exist_ok=True)
    with _acquired(bank) as file:
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        writer = Writer(os.getpid(), socket.gethostname(), command, started)
        file.truncate(0)
        file.write(json.dumps(asdict(writer), sort_keys=True) + "\n")
        file.flush()
        try:
            yield
        finally:
            lock_path(bank).unlink(missing_ok=True)


def lock_path(bank: Path) -> Path:
    return bank / ".lock"


def _acquired(bank: Path) -> TextIO:
    """Return the lock file, open and locked: closing it frees the bank."""
    path = lock_path(bank)
    deadline = time.monotonic() + ORPHANS_SECONDS
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held until the bank is free
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            writer = writer_of(bank)
            if writer is None and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            who = writer or "another process"
            raise UserError(f"{bank}: {who} writes here; wait for its end, or end it") from None
        if _is_at(file, path):
            return file
        file.close()  # its last holder removed it between our two calls


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
