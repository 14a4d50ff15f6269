"""P19: any number of equal workers, killed or paused at any moment, make the bytes of one process.

pytest tests/promises/test_p19_machines.py
pytest tests/promises/test_p19_machines.py -m slow     many more kills and pauses

Four real `preprocess work` processes over one plan die of SIGKILL or are stopped with SIGSTOP at
random moments; one that was stopped goes on after another has taken its unit. No clip is lost, and at
most one for each kill or pause is encoded twice. They are forked from a process that has imported
torch, which takes seconds, and has done nothing else: this file, run as a script.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards.care.verify import verify
from shards.format.commits import CommitRecord, attempt_files, read_commits
from shards.format.plan import read_plan
from shards.format.quarantine import read_entries
from shards.signed import read_signed_json

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 4
BEAT, WATCHED = 0.2, 5.0
"""Seconds, instead of 5 and 45. A busy machine must not take a live worker for a dead one."""
FRAMES = 40


def nursery() -> None:
    """For each line on stdin, words and a file, fork a `preprocess` of these words; answer its pid."""
    import preprocess.encode.run  # noqa: F401
    from shards.write import lock

    lock.BEAT_SECONDS, lock.WATCHED_SECONDS = BEAT, WATCHED
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: they leave at once
    for line in sys.stdin:
        words, log = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _run(words, log)
        print(child, flush=True)


def _run(words: list[str], log: str) -> None:
    """Become `preprocess`, note each clip that is encoded to its end, and how it ends itself."""
    from model.tower.pooling import Pooling
    from preprocess.cli.main import main

    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(notes, 1)
    os.dup2(notes, 2)

    def end(self: Pooling, real: Any = Pooling.end) -> None:
        real(self)
        os.write(notes, b"\nCLIP\n")

    Pooling.end = end  # type: ignore[method-assign]
    code = 70
    try:
        main(words)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(notes, f"\nEXIT {code}\n".encode())
    os._exit(code)


class Process:
    """A `preprocess` that was started by the nursery."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    @property
    def lives(self) -> bool:
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        return state not in "ZX"

    @property
    def code(self) -> int | None:
        """How it ended; None where it was killed."""
        last = self.log.read_text().rstrip().rsplit("\n", 1)[-1]
        return int(last.removeprefix("EXIT ")) if last.startswith("EXIT ") else None

    def wait(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while self.lives:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> bool:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


class Machines:
    """Starts processes over the videos, and counts what they did."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[Process]()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        )

    def start(self, *words: object) -> Process:
        assert self._process.stdin
        assert self._process.stdout
        log = self.folder / f"log{len(self.started)}"
        log.touch()  # it may be killed before it has said anything
        self._process.stdin.write(json.dumps([list(map(str, words)), str(log)]) + "\n")
        self._process.stdin.flush()
        process = Process(int(self._process.stdout.readline()), log)
        self.started.append(process)
        return process

    def run(self, *words: object) -> int | None:
        process = self.start(*words)
        process.wait()
        return process.code

    def clips(self, since: int) -> int:
        """How many came to a tower, in processes from the n-th on."""
        return sum(one.log.read_text().count("\nCLIP\n") for one in self.started[since:])

    def close(self) -> None:
        for process in self.started:
            process.send(signal.SIGKILL)
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(20)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    machines = Machines(tmp_path_factory.mktemp("machines"))
    yield machines
    machines.close()


@pytest.fixture(scope="module")
def flags(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Inputs and flags: nine clips and two that cannot be read, in some five shards."""
    videos = tmp_path_factory.mktemp("videos") / "videos"
    shutil.copytree(toy / "videos", videos)
    (videos / "bad.mp4").write_text("no video")
    (videos / "test" / "empty.mp4").write_bytes(b"")
    shape = ["--stride", "1,2", "--frames", FRAMES, "--shard-size", 1, "--device", "cpu"]
    shape += ["--tower-threads", 1]  # of many processes on few cores
    return [videos, *shape, "--tower", toy / "tower"]


@pytest.fixture(scope="module")
def alone(
    machines: Machines, flags: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bank as one process makes it. Read it only."""
    bank = tmp_path_factory.mktemp("alone") / "bank"
    assert machines.run("encode", *flags, "--out", bank) == 1, "two clips fail"
    plan = read_plan(bank)
    assert plan
    assert len(plan.units) >= 4
    return bank


def promised(bank: Path) -> dict[str, object]:
    """Return what no number of workers may change: shards, records, catalogue, manifest, failures."""
    found: dict[str, object] = {
        path.relative_to(bank).as_posix(): path.read_bytes()
        for folder in ("shards", "index.zarr")
        for path in (bank / folder).rglob("*")
        if path.is_file() and path.suffix != ".done"
    }
    plan = read_plan(bank)
    assert plan
    found |= {one.shard: timeless(one) for one in read_commits(bank, plan)}
    found["quarantine"] = {replace(one, seconds=0) for one in read_entries(bank).values()}
    manifest = read_signed_json(bank / "bank.json")
    del manifest["provenance"]
    return found | {"bank.json": manifest, "plan": plan}


def timeless(record: CommitRecord) -> CommitRecord:
    """Return a commit record without how long it took to find that a clip cannot be read."""
    return replace(record, failures=[replace(one, seconds=0) for one in record.failures or ()])


def made_by_many(
    machines: Machines, flags: list[object], bank: Path, rng: random.Random, events: int
) -> tuple[int, int]:
    """Plan, work with four processes through so many kills and pauses, and finish.

    Returns how many events there were, and how many clips came to a tower.
    """
    assert machines.run("plan", *flags, "--out", bank, "--no-estimate") == 0
    since, happened = len(machines.started), 0
    work = ["work", bank, "--device", "cpu"]
    running = [machines.start(*work, "--share", f"{rank}/{WORKERS}") for rank in range(WORKERS)]
    asleep: list[tuple[float, Process]] = []
    while running or asleep:
        time.sleep(rng.uniform(0.05, 0.6))
        running = [one for one in running if one.lives]
        if running and happened < events:
            victim = running.pop(rng.randrange(len(running)))
            how = rng.choice([signal.SIGKILL, signal.SIGSTOP])
            if victim.send(how):
                happened += 1
                if how is signal.SIGSTOP:
                    asleep.append((time.monotonic() + rng.uniform(0.0, 2 * WATCHED), victim))
                running.append(machines.start(*work))
        for until, one in list(asleep):
            if time.monotonic() > until or not running:
                one.send(signal.SIGCONT)
                asleep.remove((until, one))
                running.append(one)
    for process in machines.started[since:]:
        assert process.code in (0, None), process.log.read_text()
    assert machines.run(*work) == 0  # what those have left who were killed last
    assert machines.run("finish", bank) == 1, "two clips fail"
    return happened, machines.clips(since)


def check(machines: Machines, flags: list[object], alone: Path, bank: Path, seed: int) -> int:
    rng = random.Random(seed)
    happened, clips = made_by_many(machines, flags, bank, rng, events=5)
    assert promised(bank) == promised(alone)
    assert not list(attempt_files(bank / "shards"))
    assert verify(bank, deep=True) == []
    assert clips <= 9 + happened, "more than one clip a kill or pause was encoded again"
    return happened


def test_four_workers_killed_and_paused_make_the_bytes_of_one(
    machines: Machines, flags: list[object], alone: Path, tmp_path: Path
) -> None:
    assert check(machines, flags, alone, tmp_path / "bank", seed=1) > 0


@pytest.mark.slow
def test_many_more_kills_and_pauses_make_the_bytes_of_one(
    machines: Machines, flags: list[object], alone: Path, tmp_path: Path
) -> None:
    happened, seed = 0, 2
    while happened < 60:
        happened += check(machines, flags, alone, tmp_path / f"bank{seed}", seed)
        shutil.rmtree(tmp_path / f"bank{seed}")
        seed += 1


@pytest.mark.slow
def test_a_worker_that_is_asleep_is_named_to_who_wants_to_finish(
    machines: Machines, flags: list[object], alone: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    assert machines.run("plan", *flags, "--out", bank, "--no-estimate") == 0
    worker = machines.start("work", bank, "--device", "cpu")
    while not list(bank.glob("shards/*.part")):
        time.sleep(0.01)
    worker.send(signal.SIGSTOP)
    early = machines.start("finish", bank)
    early.wait()
    assert early.code == 2
    assert f"by `preprocess work` (process {worker.pid} on " in early.log.read_text()
    assert not (bank / "bank.json").exists()
    worker.send(signal.SIGCONT)
    worker.wait()
    assert worker.code == 0
    assert "units are made; `preprocess finish" in worker.log.read_text()
    assert machines.run("finish", bank) == 1
    assert promised(bank) == promised(alone)


if __name__ == "__main__":
    nursery()
