"""P6: random access is worth 80 % of `preadv`'s bytes a second, and 4 times webdataset's per CPU second.

`make bench` (tests/bench/reading.py) measures both, on 2 GB and beside other readers. What makes it so
is tested here: no byte is read twice, and none that was not asked for.
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.read.bank import Bank

CLIPS, FRAMES = 12, 16


def bytes_read() -> int:
    """Return how many bytes this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.fixture(scope="module")
def path(make_bank: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {4: (FRAMES, 8, 8, 64), 8: (FRAMES, 4, 4, 64)}
    arrays = {stride: np.zeros(shape[stride], np.float16) for stride in (4, 8)}
    clips = {f"{k}.mp4": arrays for k in range(CLIPS)}
    return make_bank(tmp_path_factory.mktemp("read") / "bank", clips)


def test_a_pass_in_random_order_reads_each_byte_once(path: Path) -> None:
    bank = Bank.open(path)
    places = [(row, stride) for row in range(CLIPS) for stride in (4, 8)]
    before = bytes_read()
    nbytes = sum(bank.read(*place).nbytes for place in random.Random(0).sample(places, len(places)))
    assert nbytes == CLIPS * FRAMES * (64 + 16) * 64 * 2
    assert nbytes <= bytes_read() - before < 1.01 * nbytes


@pytest.mark.parametrize("frames", [[3], [0, 7], [15, 2, 9, 3]])
def test_some_frames_of_a_known_clip_are_read_alone(path: Path, frames: list[int]) -> None:
    bank = Bank.open(path)
    for row in range(CLIPS):
        bank.read(row, 4)  # checksums are compared at the first touch
    before = bytes_read()
    nbytes = sum(bank.read(row, 4, frames).nbytes for row in range(CLIPS))
    assert nbytes == CLIPS * len(frames) * 64 * 64 * 2
    assert nbytes <= bytes_read() - before < 1.01 * nbytes
