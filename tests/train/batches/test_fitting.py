"""Frames that token limits leave out: counted, said, and the same for held-out records as in training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.batches.chat import Chat
from train.batches.loader import Loader
from train.batches.plan import plan_run
from train.data.dataset import Dataset, open_dataset
from train.estimate import table
from train.run import main
from train.settings.config import TrainConfig
from train.start.stage import build


@pytest.fixture(scope="module")
def config(run_settings: dict[str, Any]) -> Callable[..., TrainConfig]:
    def make(**settings: Any) -> TrainConfig:
        own = {name: run_settings[name] for name in ("num_temporal_tokens", "num_spatial_tokens")}
        paths = {name: [str(run_settings[name])] for name in ("bank", "data_path")}
        stage = str(run_settings["stage_path"])
        return TrainConfig(stage_path=stage, **paths, **(own | settings))

    return make


@pytest.fixture(scope="module")
def dataset(config: Callable[..., TrainConfig]) -> Dataset:
    return open_dataset(config())


LIMITS: list[dict[str, Any]] = [
    {},
    {"max_tokens": 155},
    {"max_tokens": 150, "slow_frame_ratio": "0.25"},
    {"pack_tokens": 142},
    {"max_tokens": 170, "frame_time": "text"},
    {"max_tokens": 130, "pack_tokens": 400, "max_frames_num": 5},
]
"""Records here have 133 to 166 tokens with all 8 frames, 110 to 143 with one; times take 32 more."""


@pytest.mark.parametrize("settings", LIMITS, ids=str)
def test_a_loader_leaves_out_the_frames_that_the_plan_leaves_out_and_the_plan_counts_them(
    config: Callable[..., TrainConfig], dataset: Dataset, settings: dict[str, Any]
) -> None:
    asked = config(**settings)
    model = build(asked, dataset, lambda text: None)
    limit = min(filter(None, (asked.max_tokens, asked.pack_tokens)), default=0)
    loader = Loader(dataset, Chat.of(model), model.config, limit=limit)
    plan = plan_run(asked, dataset, 2)
    wanted = used = shortened = 0
    kept = np.setdiff1d(np.arange(len(dataset.records)), [*plan.left_out.values()] or [[]])
    for number in kept:
        record = dataset.records[number]
        batch = loader.batch([record])
        assert batch.lengths.item() == plan.tokens[number]
        assert not limit or batch.lengths.item() <= limit
        whole = sum(min(8, asked.max_frames_num) for _ in record.clips)
        taken = sum(len(group.end_index) for group in batch.groups)
        wanted, used, shortened = wanted + whole, used + taken, shortened + (taken < whole)
    if wanted == used:
        assert plan.frames_line == ""
    else:
        name = "max_tokens" if asked.max_tokens == limit else "pack_tokens"
        assert plan.frames_line.startswith(
            f"{name} {limit} leaves out {wanted - used:,} of {wanted:,} frames, in {shortened} of "
            f"{len(kept)} records"
        )
        assert f"frames    {plan.frames_line}\n" in table(asked, dataset, plan, 1)
    assert (wanted > used) == bool(limit), "each limit here leaves something out"
    for number in np.setdiff1d(np.arange(len(dataset.records)), kept):
        assert loader.fitting(dataset.records[number]) == 0


def test_frames_that_only_written_times_leave_no_room_for_are_told_apart(
    config: Callable[..., TrainConfig], dataset: Dataset
) -> None:
    limits = {"max_tokens": 160}
    lines = [
        plan_run(config(**limits, frame_time=time), dataset, 2).frames_line
        for time in ("none", "text")
    ]
    left = [int(re.findall(r"leaves out (\d+) of", line)[0]) for line in lines]
    assert left[1] > left[0] > 0
    assert lines[1].endswith(f"; {left[1] - left[0]} of them for the times written before frames")
    assert "times" not in lines[0]


def test_the_banner_and_the_plan_say_it(
    train_here: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run_settings: dict[str, Any],
    as_flags: Callable[..., list[str]],
) -> None:
    limit = {"max_tokens": 150, "max_steps": 1}
    out = train_here(tmp_path / "out", **limit)
    said = re.search(
        r"max_tokens 150 leaves out \d+ of \d+ frames.*", (out / "train.log").read_text()
    )
    assert said
    capsys.readouterr()
    main(as_flags(run_settings | limit | {"output_dir": tmp_path / "other", "plan": True}))
    assert said[0] in capsys.readouterr().out
