"""P1: kill -9 anywhere during encode redoes at most one clip, and ends with the same bytes.

pytest tests/promises/test_p01_kill.py
pytest tests/promises/test_p01_kill.py -m slow    a hundred kills

So does a disk that fails at any moment. The real command runs in a process of its own, and dies of
SIGKILL. It is forked from one that has imported torch, which takes seconds, and has done nothing
else: this file, run as a script.
"""

import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shards.errors import UserError
from shards.read.bank import Bank
from shards.signed import read_signed_json

FRAMES = 40
SHAPE = ["--stride", "1,2", "--frames", str(FRAMES), "--shard-size", "1", "--device", "cpu"]
"""Some 400 kB a clip: two clips a shard, so four or five shards of the nine clips."""
CLIPS = 9


def nursery() -> None:
    """For each request, a line on stdin, run `preprocess encode` in a fork; answer with a line."""
    import preprocess.encode.run
    import preprocess.toyworld  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            _run(request)
        timer = threading.Timer(request.get("seconds", 120), os.kill, (child, signal.SIGKILL))
        timer.start()
        _, status = os.waitpid(child, 0)
        timer.cancel()
        took = time.monotonic() - began
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "took": took}), flush=True)


def _run(request: dict[str, Any]) -> None:
    """Become `preprocess encode`, and do not return."""
    from preprocess.cli.main import main

    code = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _count(request)
        if "limit" in request:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        main(request["arguments"])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count(request: dict[str, Any]) -> None:
    """Note each clip that is encoded to its end, and each sync, rename and removal.

    clip, call: die at the n-th of these. full: the disk is, from the n-th call on. vanish: a folder,
    and where it is moved at the second clip.
    """
    from model.tower.pooling import Pooling

    notes = os.open(request["counts"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    clips, calls, unlink = 0, 0, os.unlink

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            os.write(notes, b"s")
            if calls == request.get("call"):
                os.kill(os.getpid(), signal.SIGKILL)
            if calls >= request.get("full", calls + 1) and real is not unlink:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return call

    def pooling(*args: Any, real: Any = Pooling.__init__, **options: Any) -> None:
        nonlocal clips
        clips += 1
        if clips == request.get("clip"):
            os.kill(os.getpid(), signal.SIGKILL)
        if clips == 2 and "vanish" in request:
            os.rename(*request["vanish"])
        real(*args, **options)

    def end(self: Pooling, real: Callable[[Pooling], None] = Pooling.end) -> None:
        real(self)
        os.write(notes, b"c")

    os.fsync, os.replace, os.unlink = noted(os.fsync), noted(os.replace), noted(unlink)
    Pooling.__init__ = pooling  # type: ignore[method-assign]
    Pooling.end = end  # type: ignore[method-assign]


class Runs:
    """Runs of `preprocess encode` over the toy world."""

    def __init__(self, toy: Path, folder: Path) -> None:
        self.toy, self.folder = toy, folder
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(20)

    def run(self, bank: Path, videos: Path | None = None, **request: Any) -> tuple[int, float]:
        """Return the exit code, and the seconds."""
        assert self._process.stdin
        assert self._process.stdout
        arguments = ["encode", str(videos or self.toy / "videos"), "--out", str(bank), *SHAPE]
        arguments += ["--tower", str(self.toy / "tower")]
        request |= {"log": str(self.folder / "log"), "counts": str(self.counts(bank))}
        self._process.stdin.write(json.dumps(request | {"arguments": arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["took"]

    def counts(self, bank: Path) -> Path:
        return bank.with_suffix(".counts")

    def counted(self, bank: Path, what: str) -> int:
        """Of all runs: `c`, clips that went to the tower; `s`, syncs, renames and removals."""
        return self.counts(bank).read_text().count(what)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def said(self) -> list[str]:
        """The lines of the last run's log, without progress bars and notes."""
        lines = self.log.replace("\r", "\n").splitlines()
        return [
            line for line in lines if line.strip() and not re.match(r"(probe|encode|note): ", line)
        ]


class Whole(NamedTuple):
    """A bank that nothing interrupted."""

    bank: Path
    seconds: float
    calls: int
    """Syncs, renames and removals."""
    shard_calls: int
    """Those until the last shard was committed."""


@pytest.fixture(scope="module")
def runs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(toy, tmp_path_factory.mktemp("runs"))
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    bank = tmp_path_factory.mktemp("whole") / "whole"
    code, took = runs.run(bank)
    assert code == 0, runs.log
    assert len(list((bank / "shards").glob("*.tar"))) >= 4
    noted = runs.counts(bank).read_text()
    assert noted.count("c") == CLIPS
    until_commit = noted[: noted.rindex("c")].count("s") + 12
    return Whole(bank, took, noted.count("s"), until_commit)


def outcome(bank: Path) -> dict[str, Any]:
    """Return all that two runs must agree in: digests of files, and the manifest."""
    found = {
        path.relative_to(bank).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("shards", "index.zarr")
        for path in (bank / folder).rglob("*")
        if path.is_file()
    }
    assert not [name for name in found if name.endswith((".part", ".journal", ".tmp"))], sorted(
        found
    )
    manifest = read_signed_json(bank / "bank.json")
    del manifest["provenance"]
    return found | {"manifest": manifest}


def samples_on_disk(bank: Path) -> int:
    """Return how many samples the next run need not encode."""
    shards, found = bank / "shards", 0
    for done in shards.glob("*.done"):
        found += len(read_signed_json(done)["samples"])
    for journal in shards.glob("*.journal"):
        if not journal.with_name(journal.name.replace(".tar.journal", ".done")).exists():
            found += max(0, journal.read_bytes().count(b"\n") - 1)
    return found


def kill_until_done(runs: Runs, whole: Whole, bank: Path, rng: random.Random, most: int) -> int:
    """Encode, killed up to `most` times; return how often, when the bank is like the whole one.

    A third of the kills come at any time. The others come at a sync, rename or removal, for commits
    take next to no time.
    """
    kills, before = 0, 0
    while True:
        ways: list[dict[str, Any]] = [
            {"seconds": rng.uniform(0.0, whole.seconds)},
            {"call": rng.randint(1, whole.shard_calls)},
            {"call": rng.randint(1, whole.calls)},
        ]
        how = rng.choice(ways) if kills < most else {}
        code, _ = runs.run(bank, **how)
        if code == 0:
            break
        assert code == -signal.SIGKILL, runs.log
        kills += 1
        now = samples_on_disk(bank)
        assert now >= before, "a restart lost samples"
        before = now
        if not (bank / "bank.json").exists():
            with pytest.raises(UserError, match="bank"):
                Bank.open(bank)
    assert runs.counted(bank, "c") <= CLIPS + kills, "more than one clip a kill was encoded again"
    assert outcome(bank) == outcome(whole.bank)
    return kills


def test_killed_runs_end_with_the_same_bytes(runs: Runs, whole: Whole, tmp_path: Path) -> None:
    rng, kills = random.Random(4), 0
    while kills < 6:
        kills += kill_until_done(runs, whole, tmp_path / f"bank{kills}", rng, most=6 - kills)


@pytest.mark.slow
def test_a_hundred_kills_end_with_the_same_bytes(runs: Runs, whole: Whole, tmp_path: Path) -> None:
    rng, kills, rounds = random.Random(2026), 0, 0
    while kills < 100:
        bank = tmp_path / f"bank{rounds}"
        kills += kill_until_done(runs, whole, bank, rng, most=100)
        shutil.rmtree(bank)
        rounds += 1


@pytest.mark.slow
def test_a_kill_at_each_fourth_step_ends_with_the_same_bytes(
    runs: Runs, whole: Whole, tmp_path: Path
) -> None:
    for call in range(1, whole.calls + 1, 4):
        bank = tmp_path / f"bank{call}"
        code, _ = runs.run(bank, call=call)
        assert code in (0, -signal.SIGKILL), runs.log
        assert runs.run(bank)[0] == 0, runs.log
        assert runs.counted(bank, "c") <= CLIPS + 1
        assert outcome(bank) == outcome(whole.bank), f"killed at call {call}"
        shutil.rmtree(bank)


@pytest.fixture
def begun(runs: Runs, whole: Whole, tmp_path: Path) -> Path:
    """A bank whose run was killed at its sixth clip, some shards being committed."""
    bank = tmp_path / "begun"
    assert runs.run(bank, clip=6)[0] == -signal.SIGKILL
    assert list((bank / "shards").glob("*.done"))
    assert not (bank / "bank.json").exists()
    return bank


def committed(bank: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for done in (bank / "shards").glob("*.done")
        for path in (done, done.with_suffix(".tar"), done.with_suffix(".tar.idx"))
    }


def test_a_full_disk_ends_in_one_line_and_the_next_run_in_the_same_bytes(
    runs: Runs, whole: Whole, begun: Path
) -> None:
    before = committed(begun)
    code, _ = runs.run(begun, limit=600_000)  # enough for one clip of a shard, not for two
    assert code == 2, runs.log
    (line,) = runs.said
    assert "too large" in line
    assert "run the same command again" in line
    assert line.startswith(f"error: {begun}")
    after = committed(begun)
    assert {name: after[name] for name in before} == before
    assert not (begun / "quarantine.jsonl").exists(), "no clip is to blame"
    assert runs.run(begun)[0] == 0, runs.log
    assert outcome(begun) == outcome(whole.bank)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["plan", "shard", "catalogue", "manifest"])
def test_a_disk_that_is_full_from_any_moment_on_ends_in_one_line(
    runs: Runs, whole: Whole, tmp_path: Path, moment: str
) -> None:
    calls = {
        "plan": 1,
        "shard": whole.shard_calls // 2,
        "catalogue": (whole.shard_calls + whole.calls) // 2,
        "manifest": whole.calls - 1,
    }
    bank = tmp_path / "bank"
    code, _ = runs.run(bank, full=calls[moment])
    assert code == 2, runs.log
    (line,) = runs.said
    assert os.strerror(errno.ENOSPC) in line
    assert "run the same command again" in line
    assert str(bank) in line
    assert runs.run(bank)[0] == 0, runs.log
    assert runs.counted(bank, "c") <= CLIPS + 1
    assert outcome(bank) == outcome(whole.bank)


def test_a_folder_that_cannot_be_written_ends_in_one_line_and_the_next_run_in_the_same_bytes(
    runs: Runs, whole: Whole, begun: Path
) -> None:
    before = committed(begun)
    (begun / "shards").rename(begun / "aside")
    (begun / "shards").write_text("")  # permissions do not stop root
    code, _ = runs.run(begun)
    assert code == 2, runs.log
    (line,) = runs.said
    assert str(begun / "shards") in line
    (begun / "shards").unlink()
    (begun / "aside").rename(begun / "shards")
    assert committed(begun) == before
    assert runs.run(begun)[0] == 0, runs.log
    assert outcome(begun) == outcome(whole.bank)


def test_videos_that_vanish_stop_the_run_and_none_is_blamed(
    runs: Runs, whole: Whole, toy: Path, tmp_path: Path
) -> None:
    bank, videos, away = tmp_path / "bank", tmp_path / "videos", tmp_path / "away"
    shutil.copytree(toy / "videos", videos)
    code, _ = runs.run(bank, videos, vanish=[str(videos), str(away)])
    assert code == 2, runs.log
    (line,) = runs.said
    assert str(videos) in line
    assert "vanished" in line
    assert not (bank / "quarantine.jsonl").exists()
    away.rename(videos)
    assert runs.run(bank, videos)[0] == 0, runs.log
    shards = [{n: v for n, v in outcome(b).items() if "shards/" in n} for b in (bank, whole.bank)]
    assert shards[0] == shards[1]


if __name__ == "__main__":
    nursery()
