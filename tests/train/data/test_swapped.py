"""The control of other clips' features: every clip has another one's, and what is known stays its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.errors import UserError
from shards.read.banks import BankedClip
from train.data.dataset import Dataset, open_records
from train.data.swapped import SwappedDataset


def values(clip: int, frames: int, side: int = 2) -> dict[int, np.ndarray]:
    """Return features that say which clip and which frame they are of."""
    number = 100 * clip + np.arange(frames, dtype=np.float16)
    return {
        4: np.broadcast_to(number[:, None, None, None], (frames, side, side, 3)).copy(),
        8: np.broadcast_to(number[:, None, None, None], (frames, 1, 1, 3)).copy(),
    }


@pytest.fixture
def dataset(tmp_path: Path, make_bank: Callable[..., Path]) -> Callable[..., Dataset]:
    """A function that returns the dataset of some records, each of these clips."""
    lengths = {"a.mp4": 4, "b.mp4": 4, "c.mp4": 8, "d.mp4": 2}
    clips = {name: values(k, length) for k, (name, length) in enumerate(lengths.items())}
    bank = make_bank(tmp_path / "bank", clips)

    def open_(*media: tuple[str, ...]) -> Dataset:
        turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": "yes"}]
        rows = []
        for number, names in enumerate(media):
            turns[0] = {"from": "human", "value": "<video>" * len(names) + " Is it?"}
            rows.append({"id": f"r{number}", "video": list(names), "conversations": list(turns)})
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_records([str(bank)], [str(path)], 4, 8)

    return open_


def which(clip: BankedClip) -> int:
    return int(clip.read(8, [0]).flat[0]) // 100


@pytest.mark.parametrize("seed", range(5))
def test_every_clip_has_the_features_of_another_one(
    dataset: Callable[..., Dataset], seed: int
) -> None:
    names = ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    plain = dataset(("a.mp4", "b.mp4"), ("c.mp4",), ("d.mp4",), ("a.mp4",))
    shuffled = SwappedDataset.of(plain, seed)
    taken = {}
    for record in plain.held_out:
        for own, other in zip(plain.clips(record), shuffled.clips(record), strict=True):
            assert names[which(own)] == own.info.id
            assert other.info.id == own.info.id
            assert other.info.timestamps.tolist() == own.info.timestamps.tolist()
            assert other.info.duration == own.info.duration
            assert which(other) != which(own)
            assert taken.setdefault(which(own), which(other)) == which(other)  # wherever it is
    assert sorted(taken.values()) == [0, 1, 2, 3]


def test_frames_are_as_early_in_the_other_clip(dataset: Callable[..., Dataset]) -> None:
    plain = dataset(("c.mp4",), ("d.mp4",))
    shuffled = SwappedDataset.of(plain)
    long, short = (shuffled.clips(record)[0] for record in plain.held_out)
    frames = [int(value) % 100 for value in long.read(4, range(8))[:, 0, 0, 0]]
    assert frames == [0, 0, 0, 0, 1, 1, 1, 1]
    frames = [int(value) % 100 for value in short.read(4, [1, 0])[:, 0, 0, 0]]
    assert frames == [4, 0]


def test_a_clip_alone_is_refused(dataset: Callable[..., Dataset]) -> None:
    with pytest.raises(UserError, match=r"no other clip has the grid of a\.mp4, got 8x6"):
        SwappedDataset.of(dataset(("a.mp4",), ("a.mp4",)))
