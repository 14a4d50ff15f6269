"""One writer per folder, told by name to the second, and nothing left of a killed one.

pytest tests/shards/test_lock.py
"""

import calendar
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.write import lock
from shards.write.lock import folder_lock, lock_path, writer_of

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from shards.write.lock import folder_lock
with folder_lock(Path(sys.argv[1]), "preprocess encode"):
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
    with pytest.raises(UserError, match=r".") as caught, folder_lock(tmp_path, "preprocess retry"):
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
    with folder_lock(tmp_path, "preprocess retry"):
        assert writer_of(tmp_path) is not None
    assert writer_of(tmp_path) is None


def test_a_killed_writer_leaves_the_bank_free(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lock_path(tmp_path).exists()
    assert writer_of(tmp_path) is None
    with folder_lock(tmp_path, "preprocess encode"):
        writer = writer_of(tmp_path)
        assert writer
        assert writer.pid == os.getpid()


def test_an_error_inside_frees_the_bank(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path, "preprocess encode"):
        1 / 0  # noqa: B018
    with folder_lock(tmp_path, "preprocess encode"):
        pass


def test_many_at_once_are_never_two(tmp_path: Path) -> None:
    inside, most, refused = 0, 0, 0
    guard = threading.Lock()

    def write() -> None:
        nonlocal inside, most, refused
        for _ in range(300):
            try:
                with folder_lock(tmp_path, "preprocess encode"):
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


def test_who_is_refused_hears_since_when_and_what_to_do(tmp_path: Path) -> None:
    fix = "name another output_dir"
    with (
        folder_lock(tmp_path, "train/run.py --config a.yaml"),
        pytest.raises(UserError, match=r".") as caught,
        folder_lock(tmp_path, "train/run.py", fix),
    ):
        pass
    writer = str(caught.value).removeprefix(f"{tmp_path}: `train/run.py --config a.yaml` ")
    found = re.fullmatch(
        rf"\(process {os.getpid()} on {re.escape(socket.gethostname())}\) writes here since "
        rf"(\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ); {fix}",
        writer,
    )
    assert found, writer
    assert abs(calendar.timegm(time.strptime(found[1], "%Y-%m-%dT%H:%M:%SZ")) - time.time()) < 60


OTHER_HOST = "node7.elsewhere"


def left_by(folder: Path, host: str, pid: int) -> None:
    fields = {
        "pid": pid,
        "host": host,
        "command": "train/run.py",
        "started": "2026-01-01T00:00:00Z",
    }
    lock_path(folder).write_text(json.dumps(fields) + "\n")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "WATCHED_SECONDS", 1.5)


@pytest.mark.usefixtures("quick")
def test_a_holder_on_another_host_is_watched_and_counts_while_it_touches_its_file(
    tmp_path: Path,
) -> None:
    left_by(tmp_path, OTHER_HOST, 1)
    over = threading.Event()
    elsewhere = threading.Thread(target=lock._beat, args=(lock_path(tmp_path), over))
    elsewhere.start()
    try:
        with (
            pytest.raises(UserError, match=f"process 1 on {OTHER_HOST}"),
            folder_lock(tmp_path, ""),
        ):
            pass
    finally:
        over.set()
        elsewhere.join()
    with folder_lock(tmp_path, "train/run.py"):  # killed: nobody cleans up after it
        writer = writer_of(tmp_path)
        assert writer
        assert writer.pid == os.getpid()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_as_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with folder_lock(tmp_path, "preprocess encode"):  # this process holds, and touches
        with pytest.raises(UserError, match=f"process {os.getpid()}"), folder_lock(tmp_path, ""):
            pass
        assert writer_of(tmp_path) is not None
    assert not lock_path(tmp_path).exists()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left_by(tmp_path, socket.gethostname(), process.pid)
    began = time.monotonic()
    with folder_lock(tmp_path, "train/run.py"):
        assert time.monotonic() - began < 0.5, "a dead process of this host is not waited for"
    left_by(tmp_path, socket.gethostname(), os.getppid())  # a number that is another process' now
    with folder_lock(tmp_path, "train/run.py"):
        pass
