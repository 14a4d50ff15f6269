"""`frame_time: text`, the axes of LAPE, and the baselines B0 to B5 that are made of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.generate import choose
from model.vlm import VLM
from train.ask import ask
from train.batches.chat import Chat
from train.batches.fitting import fit_frames
from train.batches.lengths import Lengths
from train.batches.loader import Loader
from train.batches.measure import measure
from train.batches.plan import plan_run
from train.data.dataset import open_dataset
from train.data.records import Turn
from train.settings.config import TrainConfig
from train.start.stage import build

PRESETS = Path(__file__).parents[3] / "train" / "presets"
TALK = ("<video>\nWhen is it?", "from <t:1.0> to <t:3.5>")


@pytest.fixture
def config(run_settings: dict[str, Any]) -> Callable[..., TrainConfig]:
    def make(**settings: Any) -> TrainConfig:
        own = {name: run_settings[name] for name in ("num_temporal_tokens", "num_spatial_tokens")}
        paths = {name: [str(run_settings[name])] for name in ("bank", "data_path")}
        stage = str(run_settings["stage_path"])
        return TrainConfig(stage_path=stage, **paths, **(own | settings))

    return make


def test_a_time_is_written_before_each_frame_and_nothing_else_changes(
    make_model: Callable[..., VLM], make_clip: Any, make_batch: Any
) -> None:
    clip = make_clip(frames=5)
    model, plain = make_model(frame_time="text"), make_model()
    with_times, without = (make_batch(m, ([clip], *TALK)) for m in (model, plain))
    (row,), (bare,) = with_times.input_ids.tolist(), without.input_ids.tolist()
    frames, written = [], []
    taken: set[int] = set()
    for group in with_times.groups:
        for first, end in zip(group.token_index[:, 0], group.end_index, strict=True):
            frames.append((int(first), int(end)))
            taken |= set(range(int(first), int(end) + 1))
    frames.sort()
    chat = Chat.of(model)
    for second, (first, _) in enumerate(frames):
        stamp, behind = chat.stamp(second)
        assert behind == []
        place = slice(first - len(stamp), first)
        assert row[place] == stamp
        written.append(model.tokenizer.decode(row[place]))
        assert with_times.axis[0, place].eq(-1).all()
        # causal text: each of its tokens sees up to itself, from the conversation's first on
        ends = torch.arange(place.start, place.stop) + 1
        assert torch.equal(with_times.mask_end[0, place].long(), ends)
        assert with_times.mask_start[0, place].eq(0).all()
        taken |= set(range(*place.indices(len(row))))
    assert written == ["0.0s", "1.0s", "2.0s", "3.0s", "4.0s"]
    # beside them the row is the same, and the same is learned
    visual = {
        k
        for g in without.groups
        for f, e in zip(g.token_index[:, 0], g.end_index, strict=True)
        for k in range(int(f), int(e) + 1)
    }
    assert [t for k, t in enumerate(with_times.input_ids[0].tolist()) if k not in taken] == [
        t for k, t in enumerate(bare) if k not in visual
    ]
    assert torch.equal(with_times.labels, without.labels)
    assert torch.equal(with_times.label_coord, without.label_coord)
    assert with_times.num_transitions == without.num_transitions == 4
    for ours, theirs in zip(with_times.groups, without.groups, strict=True):
        assert torch.equal(ours.features, theirs.features)
        assert torch.equal(ours.time, theirs.time)
        whole = with_times.mask_end[0][ours.token_index].long()
        assert torch.equal(whole, (ours.end_index[:, None] + 1).expand_as(whole))


def test_a_time_counts_from_the_clips_start(
    make_model: Any, make_clip: Any, make_batch: Any
) -> None:
    from dataclasses import replace

    clip = make_clip(frames=2)
    late = replace(
        clip, info=replace(clip.info, start=40.0, end=42.0, timestamps=np.array([40.0, 41.04]))
    )
    model = make_model(frame_time="text")
    batch = make_batch(model, ([late], *TALK))
    text = model.tokenizer.decode([t for t in batch.input_ids[0].tolist() if t])
    assert "0.0s" in text
    assert "1.0s" in text
    assert "40" not in text


@pytest.mark.parametrize("settings", [{"enable_lape": False}, {"lape_axes": "space"}, {}])
def test_lengths_count_what_rows_hold(
    config: Callable[..., TrainConfig], settings: dict[str, Any]
) -> None:
    asked = config(frame_time="text", max_frames_num=7, **settings)
    dataset = open_dataset(asked)
    model = build(asked, dataset, lambda text: None)
    loader = Loader(dataset, Chat.of(model), model.config)
    plan = plan_run(asked, dataset, 2)
    assert (
        plan.tokens.sum() > plan_run(config(max_frames_num=7, **settings), dataset, 2).tokens.sum()
    )
    for number, record in enumerate(dataset.records):
        batch = loader.batch([record])
        assert plan.tokens[number] == batch.lengths.item()
        assert plan.supervised[number] == len(batch.labels)
        assert plan.visual[number] == sum(
            len(g.end_index) * (g.grid.cells + 1) for g in batch.groups
        )


def test_frames_are_left_out_until_times_fit_too(config: Callable[..., TrainConfig]) -> None:
    asked = config(frame_time="text")
    dataset = open_dataset(asked)
    lengths: Lengths = measure(asked, dataset, asked.stage_path, "x")
    most = np.full(len(lengths.text), 8)
    limit = int(lengths.total(np.full_like(most, 5)).max())
    frames = fit_frames(lengths, most, limit)
    assert (lengths.total(frames) <= limit).all()
    assert (lengths.total(frames + 1)[frames < 8] > limit).all()
    assert frames.min() == 5


def test_packed_rows_and_answers_agree_with_the_plan(
    train_here: Callable[..., Path], toy: Path, tmp_path: Path
) -> None:
    out = train_here(
        tmp_path / "out", frame_time="text", pack_tokens=512, max_tokens=400, max_steps=2
    )
    # every batch is compared with the plan as it is made, and each step's counts after it
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    video = next((toy / "videos" / "test").glob("*.mp4"))
    assert isinstance(ask(video, "When is the red circle visible?", out, None, 4), str)


def test_an_axis_without_tokens_is_text_and_never_answered(
    make_model: Any, make_clip: Any, make_batch: Any
) -> None:
    talk = ("<video>\nWhere?", "at <t:2.0>, <x:0.25><y:0.5>")
    for axes, kept in (("time", {0}), ("space", {1, 2}), ("all", {0, 1, 2})):
        model = make_model(lape_axes=axes)
        batch = make_batch(model, ([make_clip()], *talk))
        assert set(batch.axis.unique().tolist()) == {-1, *kept}
        text = model.tokenizer.decode(batch.labels[batch.label_axis < 0].tolist())
        assert ("2.0" in text) == (0 not in kept)
        assert ("0.250" in text) == (2 not in kept)
        hidden = torch.randn(64, 32) * 30
        assert {piece.axis for piece in choose(model, hidden)} <= {-1, *kept}
        (group, *_) = batch.groups
        with torch.no_grad():
            placed = model.lape.positions(group.grid, group.covered, group.time, group.timed)
        varies = {0: placed.diff(dim=0), 1: placed.diff(dim=1), 2: placed.diff(dim=2)}
        assert {axis for axis, change in varies.items() if change.abs().max() > 1e-6} == kept


def test_positions_can_be_left_off_frames(make_model: Any, make_clip: Any, make_batch: Any) -> None:
    model, plain = make_model(lape_positions=False), make_model(enable_lape=False)
    batch = make_batch(model, ([make_clip()], *TALK))
    for group in batch.groups:
        assert torch.equal(model.frame_tokens(group), plain.frame_tokens(group))
    assert math.isnan(model.calibrate(batch))
    out = model(batch)
    (out["ce"] + out["ar"].sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("number", range(6))
def test_each_baseline_takes_a_step_and_is_what_it_says(
    train_here: Callable[..., Path], tmp_path: Path, number: int
) -> None:
    out = train_here(tmp_path / "out", config=PRESETS / f"b{number}.yaml", max_steps=1)
    (line,) = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(line["loss"])
    assert ("coordinate_ce" in line) == (number not in (0, 2))
    model = VLM.load(out)
    facts = model.config
    assert facts.frame_time == ("text" if number in (2, 5) else "none")
    assert facts.enable_lape == (number not in (0, 2))
    assert facts.lape_preset == ("st" if number == 3 else "plus")
    assert facts.lape_axes == {1: "time", 5: "space"}.get(number, "all")
    assert facts.lape_positions == (number != 1)


def test_a_prompt_is_laid_out_like_a_training_row(
    make_model: Any, make_clip: Any, make_batch: Any
) -> None:
    model = make_model(frame_time="text")
    clip = make_clip()
    row = make_batch(model, ([clip], *TALK)).input_ids[0]
    prompt = make_batch(model, ([clip], TALK[0]), prompt=True).input_ids[0]
    assert torch.equal(row[: len(prompt)], prompt)


def test_a_stamp_is_plain_text(make_model: Any) -> None:
    model = make_model(frame_time="text")
    chat = Chat.of(model)
    assert model.tokenizer.decode(chat.stamp(12.46)[0]) == "12.5s"
    own = chat.encode([Turn("user", "12.5s"), Turn("assistant", "x")], []).ids
    stamp = chat.stamp(12.5)[0]
    assert any(own[k : k + len(stamp)] == stamp for k in range(len(own)))
