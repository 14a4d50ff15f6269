"""One writer per bank: `<bank>/.lock`, held by the kernel, so that nothing is left of a killed one.

with BankLock(bank, "preprocess encode"):
    ...  # write

Readers never take it. The file says who writes; it is gone when nobody does, or lies there without
a meaning after a `kill -9`.
"""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from shards.errors import UserError
from shards.signed import Json

ORPHANS_SECONDS = 5.0
"""A child that a killed writer was just starting holds its lock until it is a program of its own."""


class BankLock:
    """Held from `with` to its end, by one process at a time."""

    def __init__(self, bank: Path, command: str) -> None:
        self.bank, self.command = bank, command
        self._file: TextIO | None = None

    def __enter__(self) -> "BankLock":
        """Make the bank's folder if need be; raise UserError naming the process that writes."""
        self.bank.mkdir(parents=True, exist_ok=True)
        path = lock_path(self.bank)
        deadline = time.monotonic() + ORPHANS_SECONDS
        while self._file is None:
            file = open(path, "a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = _described(file.read())
                file.close()
                if writer_of(self.bank) is None and time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                raise UserError(
                    f"{self.bank}: {who} writes here; wait for its end, or end it"
                ) from None
            if _is_at(file, path):
                self._file = file
            else:  # its last holder removed it between our two calls
                file.close()
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": self.command,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._file.truncate(0)
        self._file.write(json.dumps(record, sort_keys=True) + "\n")
        self._file.flush()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._file
        lock_path(self.bank).unlink(missing_ok=True)
        self._file.close()
        self._file = None


def lock_path(bank: Path) -> Path:
    return bank / ".lock"


def writer_of(bank: Path) -> Json | None:
    """Return `pid host command started` of the process that writes a bank, None where there is none.

    Of a process on another machine it cannot be known whether it lives still.
    """
    try:
        record: Json = json.loads(lock_path(bank).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if record["host"] == socket.gethostname() and not Path(f"/proc/{record['pid']}").exists():
        return None
    return record


def _described(text: str) -> str:
    try:
        record = json.loads(text)
        return f"`{record['command']}` (process {record['pid']} on {record['host']})"
    except (ValueError, KeyError, TypeError):  # between its lock and its first line
        return "another process"


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
