"""Ctrl-C and SIGTERM end `encode` within seconds, with 130 and 143, leave nobody, and lose nothing.

pytest tests/preprocess/test_stopped.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from shards.format.commits import shard_path
from shards.format.features import Sampling
from shards.read.bank import Bank
from shards.write.lease import holders
from shards.write.lock import lock_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips, of which the first is soon done."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (16, 72, 96, 3), np.uint8)
    for number in range(4):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height = 96, 72
            for k in range(8 if number < 1 else 150):
                frame = av.VideoFrame.from_ndarray(pictures[k % 16], format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return folder


@pytest.mark.parametrize(
    ("how", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_a_run_that_is_stopped_ends_at_once_and_goes_on_later(
    toy: Path, videos: Path, tmp_path: Path, how: signal.Signals, code: int
) -> None:
    bank = tmp_path / "bank"
    words = ["encode", videos, "--out", bank, "--tower", toy / "tower", "--frames", "150"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "preprocess",
            *map(str, words),
            "--decoders",
            "2",
            "--tower-threads",
            "1",
        ],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not [p for p in (bank / "shards").glob("*.part") if p.stat().st_size]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        began = time.monotonic()
        process.send_signal(how)
        said = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == code, said
    assert time.monotonic() - began < 30  # 0.5 s on an idle machine
    assert "Traceback" not in said
    assert "stopped; committed work is kept" in said
    assert not lock_path(bank).exists()
    assert not holders(bank)
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_of(path, process.pid)]
    assert not left
    assert not (bank / "bank.json").exists()
    sampling = Sampling(num_frames=150)
    options = EncodeOptions(str(toy / "tower"), (4, 8), sampling, tower_threads=1)
    summary = encode([str(videos)], bank, options)
    assert summary.clips < 4, "what was written is not done again"
    whole = tmp_path / "whole"
    encode([str(videos)], whole, options)
    assert len(Bank.open(bank)) == 4
    assert shard_path(bank, 0).read_bytes() == shard_path(whole, 0).read_bytes()


def is_of(cmdline: Path, group: int) -> bool:
    """Whether a process is of the session that was stopped, or decodes for it."""
    try:
        fields = cmdline.with_name("stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return False
    return fields[0] != "Z" and group in (int(fields[1]), int(fields[2]))
