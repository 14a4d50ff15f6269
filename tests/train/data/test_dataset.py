"""Banks and records: what is drawn at each step, what is dropped, and what is refused before torch."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import UserError
from shards.format.features import FeatureConfig
from train.data.dataset import open_dataset
from train.settings.config import TrainConfig


@dataclass
class World:
    folder: Path
    bank: Path
    """Clips a.mp4 and b.mp4; bad.mp4 is in quarantine."""
    other: Path
    """Clip c.mp4."""

    def records(self, name: str, *videos: str, text: str = "x") -> str:
        path = self.folder / name
        lines = [
            json.dumps(
                {
                    "id": f"{name}-{k}",
                    "video": video,
                    "conversations": [
                        {"from": "human", "value": "<video>?"},
                        {"from": "gpt", "value": text},
                    ],
                }
            )
            for k, video in enumerate(videos)
        ]
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    def config(self, **changes: Any) -> TrainConfig:
        return TrainConfig(**({"bank": [str(self.bank)]} | changes))


@pytest.fixture
def world(make_bank: Callable[..., Path], tmp_path: Path) -> World:
    def clip() -> dict[int, np.ndarray]:
        return {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}

    bank = make_bank(
        tmp_path / "bank", {"a.mp4": clip(), "b.mp4": clip()}, quarantined=("bad.mp4",)
    )
    return World(tmp_path, bank, make_bank(tmp_path / "other", {"c.mp4": clip()}))


def refused(config: TrainConfig) -> list[str]:
    with pytest.raises(UserError) as stop:
        open_dataset(config)
    return stop.value.problems


def test_records_draw_on_several_banks(world: World) -> None:
    path = world.records("r.jsonl", "a.mp4", "c.mp4", "b.mp4")
    dataset = open_dataset(world.config(bank=[str(world.bank), str(world.other)], data_path=[path]))
    assert [dataset.clips(record)[0].bank.path for record in dataset.records] == [
        world.bank,
        world.other,
        world.bank,
    ]
    assert (dataset.slow_stride, dataset.fast_stride) == (4, 8)


def test_a_mixture_repeats_its_parts_and_brings_their_banks(world: World) -> None:
    world.records("first.jsonl", "a.mp4", "b.mp4")
    world.records("second.jsonl", "c.mp4")
    mixtures = world.folder / "mixtures.yaml"
    mixtures.write_text(
        "one: {records: first.jsonl}\ntwo: {records: [second.jsonl], banks: other}\n"
        "unused: {records: nowhere.jsonl}\n"
    )
    config = world.config(data_config=str(mixtures), data_mixture="one+two*3")
    counts = Counter(record.id for record in open_dataset(config).records)
    assert counts == {"first.jsonl-0": 1, "first.jsonl-1": 1, "second.jsonl-0": 3}


def test_records_of_quarantined_clips_are_dropped_and_counted(world: World) -> None:
    path = world.records("r.jsonl", "a.mp4", "bad.mp4", "bad.mp4")
    dataset = open_dataset(world.config(data_path=[path], eval_path=[path]))
    assert [record.id for record in dataset.records] == ["r.jsonl-0"]
    assert dataset.dropped == {"clip in quarantine": 2}
    assert [record.id for record in dataset.held_out] == ["r.jsonl-0"]


def test_an_unknown_clip_is_refused_unless_it_may_be_missing(world: World) -> None:
    path = world.records("r.jsonl", "a.mp4", "z.mp4")
    (line,) = refused(world.config(data_path=[path]))
    assert line == (
        f"{path}:2 (id r.jsonl-1): no bank knows the clip 'z.mp4'; encode it, name its bank, "
        "or set missing: drop"
    )
    dataset = open_dataset(world.config(data_path=[path], missing="drop"))
    assert [r.id for r in dataset.records] == ["r.jsonl-0"]
    assert dataset.dropped == {"clip in no bank": 1}


def test_a_record_without_an_answer_is_refused_unless_it_may_be_dropped(world: World) -> None:
    path = world.records("r.jsonl", "a.mp4")
    mute = world.records("mute.jsonl", "a.mp4", "b.mp4", text=" ")
    mixtures = world.folder / "mixtures.yaml"
    mixtures.write_text(f"one: {{records: {path}}}\ntwo: {{records: {mute}}}\n")
    mixed = {"data_config": str(mixtures), "data_mixture": "one+two*3"}
    lines = refused(world.config(**mixed))
    assert lines[0] == (
        f"{mute}:1 (id mute.jsonl-0): no supervised text: no gpt turn with an answer"
    )
    assert lines[-1] == (
        "2 bad records are refused: correct them, or set on_bad_record: drop, which leaves such records "
        "out, counts them and lists them in dropped.jsonl, or unsupervised: drop for those without an "
        "answer"
    )
    dataset = open_dataset(world.config(**mixed, unsupervised="drop"))
    assert [r.id for r in dataset.records] == ["r.jsonl-0"]
    assert dataset.dropped == {"no supervised text": 6}


def test_nothing_left_to_train_on_is_refused(world: World) -> None:
    path = world.records("r.jsonl", "bad.mp4")
    (line,) = refused(world.config(data_path=[path]))
    assert line.startswith("no records are left to train on (1 clip in quarantine); see `missing`")


STRIDES = [
    ({"mm_spatial_pool_stride": 2}, "mm_spatial_pool_stride 2: BANK holds the strides 4, 8; ask"),
    ({"fast_stride": 16}, "fast_stride 16: BANK holds the strides 4, 8; ask for one of them, or "),
    ({"mm_spatial_pool_stride": 8, "fast_stride": 4}, "the slow stride 8 must be finer than the"),
    ({"fast_stride": 4}, "slow_frame_ratio 0.5: slow and fast are both stride 4, so it can only"),
]


@pytest.mark.parametrize(("changes", "expected"), STRIDES)
def test_strides_that_do_not_fit_are_refused_by_name(
    world: World, changes: dict[str, int], expected: str
) -> None:
    path = world.records("r.jsonl", "a.mp4")
    (line,) = refused(world.config(data_path=[path], **changes))
    assert line.startswith(expected.replace("BANK", str(world.bank)))


@pytest.mark.parametrize("ratio", ["0", "1", "1.0"])
def test_one_stride_serves_where_all_frames_are_alike(world: World, ratio: str) -> None:
    path = world.records("r.jsonl", "a.mp4")
    config = world.config(data_path=[path], fast_stride=4, slow_frame_ratio=ratio)
    dataset = open_dataset(config)
    assert (dataset.slow_stride, dataset.fast_stride) == (4, 4)


def test_banks_of_different_towers_are_refused_by_field(
    world: World,
    make_bank: Callable[..., Path],
    features: FeatureConfig,
) -> None:
    arrays = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    strange = make_bank(
        world.folder / "strange", {"d.mp4": arrays}, config=replace(features, layer=-1)
    )
    path = world.records("r.jsonl", "a.mp4")
    banks = [str(world.bank), str(strange)]
    (line,) = refused(world.config(bank=banks, data_path=[path]))
    assert "cannot be joined: layer: -2 here, -1 there" in line


def test_all_problems_are_listed_together(world: World) -> None:
    path = world.records("r.jsonl", "z.mp4", "a.mp4", text="at <t:7.5>")
    lines = refused(world.config(data_path=[path], fast_stride=3))
    # the stride, an unfit order of strides, the clip, the time; what can be done about bad records
    assert len(lines) == 3 + 1 + 1
    assert lines[-1].startswith("1 bad record is refused: correct it, or set on_bad_record: drop")
    text = "\n".join(lines)
    for part in (
        "fast_stride 3",
        "'z.mp4'",
        "r.jsonl:2 (id r.jsonl-1): time 7.5 is outside [0, 1]",
    ):
        assert part in text


def test_many_problems_are_counted_not_all_printed(world: World) -> None:
    path = world.records("r.jsonl", *["z.mp4"] * 50)
    lines = refused(world.config(data_path=[path]))
    assert len(lines) == 31
    assert lines[-1] == "... and 20 more like these"


def test_a_missing_bank_is_refused_with_what_makes_one(world: World) -> None:
    path = world.records("r.jsonl", "a.mp4")
    (line,) = refused(world.config(bank=[str(world.folder / "none")], data_path=[path]))
    assert line.startswith(f"{world.folder / 'none'}: no bank here (bank.json is missing)")
    (line,) = refused(world.config(bank=[], data_path=[path]))
    assert line.startswith("bank: missing; give --bank BANK")


def test_lape_without_a_coordinate_to_learn_from_is_said(world: World) -> None:
    words = world.records("words.jsonl", "a.mp4", text="from 0.1 to 0.5 seconds")
    times = world.records("times.jsonl", "a.mp4", text="from <t:0.1> to <t:0.5>")
    (line,) = open_dataset(world.config(data_path=[words])).notes
    assert line.startswith(
        "LAPE: no answer of 1 record looked at has a coordinate such as <t:12.5>"
    )
    assert not open_dataset(world.config(data_path=[words, times])).notes
    assert not open_dataset(world.config(data_path=[words], enable_lape=False)).notes
