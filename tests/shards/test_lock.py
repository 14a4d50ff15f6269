"""One writer per bank, told by name to the second, and nothing left of a killed one.

pytest tests/shards/test_lock.py
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.write.lock import bank_lock, lock_path, writer_of

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from shards.write.lock import bank_lock
with bank_lock(Path(sys.argv[1]), "preprocess encode"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(bank: Path) -> "subprocess.Popen[str]":
    """Return another process, which holds the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(bank)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_by_name_until_the_first_is_done(tmp_path: Path) -> None:
    process = holder(tmp_path)
    with pytest.raises(UserError, match=r".") as caught, bank_lock(tmp_path, "preprocess retry"):
        pass
    line = str(caught.value)
    assert "\n" not in line
    for said in (str(tmp_path), "preprocess encode", str(process.pid), socket.gethostname()):
        assert said in line
    writer = writer_of(tmp_path)
    assert writer
    assert (writer.pid, writer.command) == (process.pid, "preprocess encode")
    process.communicate("")
    assert list(tmp_path.iterdir()) == []
    with bank_lock(tmp_path, "preprocess retry"):
        assert writer_of(tmp_path) is not None
    assert writer_of(tmp_path) is None


def test_a_killed_writer_leaves_the_bank_free(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lock_path(tmp_path).exists()
    assert writer_of(tmp_path) is None
    with bank_lock(tmp_path, "preprocess encode"):
        writer = writer_of(tmp_path)
        assert writer
        assert writer.pid == os.getpid()


def test_an_error_inside_frees_the_bank(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), bank_lock(tmp_path, "preprocess encode"):
        1 / 0  # noqa: B018
    with bank_lock(tmp_path, "preprocess encode"):
        pass


def test_many_at_once_are_never_two(tmp_path: Path) -> None:
    inside, most, refused = 0, 0, 0
    guard = threading.Lock()

    def write() -> None:
        nonlocal inside, most, refused
        for _ in range(300):
            try:
                with bank_lock(tmp_path, "preprocess encode"):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1
            except UserError:
                refused += 1

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused > 0, "they never met"
