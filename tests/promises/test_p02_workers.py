"""P2: shard bytes are equal for 1, 2 and 7 workers, and for any order of work.

pytest tests/promises/test_p02_workers.py
pytest tests/promises/test_p02_workers.py -m slow    also seven workers

A worker that dies takes nothing with it, and none outlives the command.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from preprocess.sources.find import FindOptions
from shards.errors import UserError
from shards.read.bank import Bank
from shards.write.lock import writer_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def options(toy_options: EncodeOptions) -> EncodeOptions:
    """One clip a shard: nine units."""
    return replace(toy_options, shard_bytes=1, tower_threads=1)


@pytest.fixture(scope="module")
def alone(toy: Path, options: EncodeOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bank as one process makes it. Read it only."""
    out = tmp_path_factory.mktemp("alone") / "bank"
    assert encode([str(toy / "videos")], out, options).clips == 9
    return out


def promised(bank: Path) -> dict[str, object]:
    """Return what no number of workers may change: shards, indices, catalogue, manifest."""
    files: dict[str, object] = {
        path.relative_to(bank).as_posix(): path.read_bytes()
        for folder in ("shards", "index.zarr")
        for path in sorted((bank / folder).rglob("*"))
        if path.is_file()
    }
    manifest = json.loads((bank / "bank.json").read_bytes())
    del manifest["provenance"], manifest["self_hash"]
    return files | {"bank.json": manifest}


@pytest.mark.parametrize(
    "procs", [2, pytest.param(7, marks=pytest.mark.slow)], ids=lambda n: f"{n} workers"
)
def test_the_bank_is_the_same_for_any_number_of_workers(
    toy: Path, options: EncodeOptions, alone: Path, tmp_path: Path, procs: int
) -> None:
    inputs = [str(toy / "videos" / "train" / ".."), str(toy / "videos")]
    summary = encode(inputs, tmp_path / "bank", options, procs=procs)
    assert (summary.clips, summary.frames, summary.failures) == (9, 72, [])
    assert promised(tmp_path / "bank") == promised(alone)
    assert encode(inputs, tmp_path / "bank", options, procs=procs).skipped == 9
    assert promised(tmp_path / "bank") == promised(alone)


def test_the_bank_is_the_same_for_any_order_of_work(
    toy: Path, options: EncodeOptions, alone: Path, tmp_path: Path
) -> None:
    """Units of a run that was cut off are made later than those after them."""
    bank = tmp_path / "bank"
    encode([str(toy / "videos")], bank, options)
    for unit in (0, 3, 4):
        for path in (bank / "shards").glob(f"bank-{unit:06d}.*"):
            path.unlink()
    assert encode([str(toy / "videos")], bank, options).clips == 3
    assert promised(bank) == promised(alone)


@pytest.mark.slow
def test_bad_videos_are_told_once_by_several_workers(
    toy: Path, options: EncodeOptions, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for k in range(8):
        (videos / f"bad{k}.mp4").write_text("no video")
    (videos / "good.mp4").write_bytes((toy / "videos/test/clip-00000.mp4").read_bytes())
    # A bad file is predicted to take no room: parts of the good one make units of their own.
    records = tmp_path / "records.json"
    names = sorted(path.name for path in videos.iterdir())
    parts = [{"video": n, "start": s, "end": s + 1} for n in names for s in (0, 1)]
    records.write_text(json.dumps(parts))
    options = replace(options, find=FindOptions(video_roots=(str(videos),)))
    summary = encode([str(records)], tmp_path / "bank", options, procs=2)
    assert (summary.clips, len(summary.failures)) == (2, 16)
    lines = (tmp_path / "bank" / "quarantine.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 16


@pytest.mark.parametrize("procs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_fails_is_one_line_whatever_the_number_of_workers(
    toy: Path, options: EncodeOptions, alone: Path, tmp_path: Path, procs: int
) -> None:
    bank = tmp_path / "bank"
    bank.mkdir()
    (bank / "shards").write_text("in the way")
    with pytest.raises((UserError, OSError), match="run the same command again") as caught:
        encode([str(toy / "videos")], bank, options, procs=procs)
    (line,) = str(caught.value).splitlines()
    assert str(bank / "shards") in line
    (bank / "shards").unlink()
    encode([str(toy / "videos")], bank, options)
    assert promised(bank) == promised(alone)


ENCODE = """
import sys
from pathlib import Path

if __name__ == "__main__":  # not in the workers
    from preprocess.cli.main import one_line_errors
    from preprocess.encode.run import EncodeOptions, encode
    from shards.format.features import Sampling

    videos, bank, tower = sys.argv[1:]
    options = EncodeOptions(tower, (4, 8), Sampling(num_frames=8), shard_bytes=1, tower_threads=1)
    with one_line_errors():
        encode([videos], Path(bank), options, procs=2)
"""


@pytest.fixture
def run(toy: Path, tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """A function that starts encoding with two workers, in a session of its own."""
    script = tmp_path / "script.py"
    script.write_text(ENCODE)
    started = []

    def start(bank: Path, videos: Path = toy / "videos") -> "subprocess.Popen[bytes]":
        words = [sys.executable, str(script), videos, bank, toy / "tower"]
        process = subprocess.Popen(
            [str(word) for word in words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def below(pid: int) -> dict[int, str]:
    """Return the command lines of all processes that descend from one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = {}, [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            try:
                found[child] = (Path("/proc") / str(child) / "cmdline").read_text()
            except OSError:
                continue
            waiting.append(child)
    return found


def workers(pid: int) -> list[int]:
    return sorted(p for p, command in below(pid).items() if "spawn_main" in command)


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_worker_that_dies_is_told_in_a_line_and_the_rest_goes_on(
    toy: Path, options: EncodeOptions, alone: Path, tmp_path: Path, run: Callable[[Path], object]
) -> None:
    bank = tmp_path / "bank"
    process = run(bank)
    assert isinstance(process, subprocess.Popen)
    until(lambda: len(workers(process.pid)) == 2)
    first = workers(process.pid)[0]
    os.kill(first, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said.decode()
    (line,) = [line for line in said.decode().splitlines() if line.startswith("error: ")]
    assert "worker 1 of 2 died (SIGKILL)" in line
    assert "same command again" in line
    assert "Traceback" not in said.decode()
    done = {path.name for path in (bank / "shards").glob("*.done")}
    assert {f"bank-{unit:06d}.done" for unit in range(1, 9, 2)} <= done
    assert not (bank / "bank.json").exists()
    assert encode([str(toy / "videos")], bank, options).skipped == len(done)
    assert promised(bank) == promised(alone)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_parent(
    toy: Path, tmp_path: Path, run: Callable[..., object], how: signal.Signals
) -> None:
    bank, videos = tmp_path / "bank", tmp_path / "videos"
    for copy in range(20):  # with nine clips it might be over before it is stopped
        shutil.copytree(toy / "videos", videos / str(copy))
    process = run(bank, videos)
    assert isinstance(process, subprocess.Popen)
    until(lambda: list((bank / "shards").glob("*.done")))
    family = below(process.pid)
    assert len(family) >= 2
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as Ctrl-C does
    else:
        os.kill(process.pid, how)
    process.wait(30)
    assert process.returncode != 0
    until(lambda: not [pid for pid in family if alive(pid)], 10)
    assert writer_of(bank) is None
    with pytest.raises(UserError, match="its run is not finished"):
        Bank.open(bank)
