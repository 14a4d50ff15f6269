"""Work in several processes: the results of one, its errors, and what a process leaves that is killed.

pytest tests/shards/test_forked.py
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.annotations.fault import RowError
from shards.errors import UserError
from shards.forked import cores, in_processes

ROOT = Path(__file__).resolve().parents[2]


@given(parts=st.lists(st.integers(), max_size=9), processes=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_results_are_those_of_one_process_in_its_order(parts: list[int], processes: int) -> None:
    # large results too: more than a pipe holds
    def work(part: int) -> tuple[int, bytes]:
        return part * part, bytes(part % 3 * 100_000)

    assert list(in_processes(work, parts, processes)) == list(map(work, parts))


def test_parts_are_done_by_as_many_processes_and_each_keeps_what_it_found() -> None:
    seen: list[int] = []

    def work(part: int) -> tuple[int, list[int]]:
        seen.append(part)
        return os.getpid(), [*seen]

    done = list(in_processes(work, range(7), 3))
    assert [own for _, own in done] == [[0], [1], [2], [0, 3], [1, 4], [2, 5], [0, 3, 6]]
    assert len({pid for pid, _ in done} | {os.getpid()}) == 4
    assert seen == []  # not this process's own


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(
    "error",
    [
        UserError("no such place", "c", "a or b", "here", "look elsewhere"),
        RowError("empty answer", "turn 2", got="''").at("r.jsonl:3", "x"),
        ZeroDivisionError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_as_it_was_raised(error: Exception, processes: int) -> None:
    def work(part: int) -> int:
        if part == 4:
            raise error
        return part

    found = []
    with pytest.raises(type(error)) as raised:
        found += [*in_processes(work, range(9), processes)]
    assert (str(raised.value), vars(raised.value) | {"__notes__": 0}) == (
        str(error),
        vars(error) | {"__notes__": 0},
    )
    if processes > 1:
        assert "in work" in raised.value.__notes__[0]


class OfTwo(Exception):
    """As some libraries' errors: it can be pickled, and not be unpickled."""

    def __init__(self, what: str, where: int) -> None:
        super().__init__(f"{what}: {where}")


def test_what_cannot_be_sent_is_met_here(capfd: pytest.CaptureFixture[str]) -> None:
    class Local(Exception):
        pass

    def work(part: int) -> Callable[[], int]:
        if part < 2:
            return lambda: part
        raise OfTwo("bad", part) if part < 4 else Local(part)

    results = in_processes(work, range(4), 2)
    assert [next(results)(), next(results)()] == [0, 1]
    with pytest.raises(OfTwo, match="bad: 2"):
        next(results)
    for first, error in ((2, OfTwo), (4, Local)):
        with pytest.raises(error):
            list(in_processes(work, range(first, first + 2), 2))
    assert capfd.readouterr().err == ""  # what goes on between the two is nothing to a user


def test_what_a_killed_process_leaves_is_done_here() -> None:
    here = os.getpid()

    def work(part: int) -> int:
        if part == 3 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return part

    assert list(in_processes(work, range(12), 2)) == [*range(12)]


def test_without_room_for_a_process_all_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    assert list(in_processes(lambda part: (part, os.getpid()), range(5), 2)) == [
        (part, os.getpid()) for part in range(5)
    ]


def test_a_process_that_may_start_none_does_all_itself() -> None:
    def work(part: int) -> list[int]:
        return [*in_processes(lambda own: own + part, [1, 2], 2)]

    assert list(in_processes(work, [10, 20], 2)) == [[11, 12], [21, 22]]


def test_who_stops_early_leaves_no_process() -> None:
    results = in_processes(lambda part: (os.getpid(), time.sleep(part)), [0, 60, 60], 3)
    pid, _ = next(results)
    began = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


WAITS = """
import os, time
from signal import SIGINT, SIGTERM
from shards.forked import in_processes
from shards.stopping import Stopped, end_by, stopped_by
def work(part):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece
    time.sleep(part)
    return part
try:
    with stopped_by(SIGINT, SIGTERM):
        list(in_processes(work, [0.5] * 400, 2))
except Stopped as stopped:
    end_by(stopped.number)
"""


@pytest.mark.parametrize(
    ("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_they_end_with_the_process_that_started_them(stop: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout
        pids = {int(process.stdout.readline()) for _ in range(2)}
        # as a terminal does: Ctrl-C to all, another signal to the one
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)
        else:
            process.send_signal(stop)
        said = process.communicate(timeout=30)[1]
    assert (process.returncode, said) == (code, "")
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"left behind: {pids}")


def test_cores_are_shared_among_the_processes_of_a_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (cores(), cores(sharers=1)) == (2, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert cores() == 1
