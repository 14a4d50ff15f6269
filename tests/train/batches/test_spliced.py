"""Spliced media against the same frames written into a bank by hand; lengths and steps as planned."""

import cProfile
import json
import pstats
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from model.batch import Batch
from model.lape.tokens import LAPE_AXES, LapeTokens
from model.vlm import VLM, VLMConfig
from shards.errors import UserError
from shards.read.timeline import Stretch, splice
from train.batches.chat import Chat
from train.batches.collate import choose_frames, collate, lay_out
from train.batches.loader import Loader, Share
from train.batches.plan import plan_run
from train.batches.turns import as_turns, count_rounds
from train.data.dataset import Dataset, open_dataset, open_records
from train.data.records import Turn
from train.data.swapped import SwappedDataset
from train.settings.config import TrainConfig
from train.start.templates import load_with_template

WIDTH = 12
CELLS = {2: (4, 3), 4: (2, 2)}
CLIPS = {"a.mp4": 7, "b.mp4": 4, "c.mp4": 5}
"""Frames of each; one every eighth of a second."""
TIMELINES = [
    [("a.mp4", 0.25, 0.75), ("b.mp4", None, None)],
    [("b.mp4", 0.125, None), ("a.mp4", None, 0.5), ("c.mp4", 0.375, 0.5)],
    [("a.mp4", None, 0.375), ("a.mp4", 0.375, 0.75), ("a.mp4", None, 0.375)],
]
ASKED = ["When?", "from <t:0.250> to <t:0.625>", "And <t:0.5>?", "no"]


class World(NamedTuple):
    spliced: Dataset
    """Records with a timeline each."""
    whole: Dataset
    """The same records about clips that were laid together by hand."""
    kept: list[list[tuple[str, int]]]
    """The (clip, frame) of each frame of each medium."""


def kept_frames(parts: list[tuple[str, float | None, float | None]]) -> list[tuple[str, int]]:
    return [
        (id_, k)
        for id_, start, end in parts
        for k in range(CLIPS[id_])
        if (start or 0) <= k / 8 and (end is None or k / 8 < end)
    ]


def rows(media: list[dict[str, Any]]) -> str:
    talk = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(ASKED)]
    return "".join(
        json.dumps({"id": str(k), "conversations": talk} | medium) + "\n"
        for k, medium in enumerate(media)
    )


@pytest.fixture(scope="module")
def world(make_bank: Callable[..., Path], features: Any, tmp_path_factory: Any) -> World:
    folder = tmp_path_factory.mktemp("spliced")
    rng = np.random.default_rng(0)
    arrays = {
        id_: {s: rng.normal(size=(n, *CELLS[s], WIDTH)).astype(np.float16) for s in CELLS}
        for id_, n in CLIPS.items()
    }
    kept = [kept_frames(parts) for parts in TIMELINES]
    whole = {
        f"{k}.mp4": {s: np.stack([arrays[id_][s][f] for id_, f in frames]) for s in CELLS}
        for k, frames in enumerate(kept)
    }
    config = replace(features, strides=(2, 4))
    banks = (
        make_bank(folder / "a", arrays, config=config),
        make_bank(folder / "b", whole, config=config),
    )
    parts = [
        [
            {"video": v} | {n: t for n, t in (("start", s), ("end", e)) if t is not None}
            for v, s, e in own
        ]
        for own in TIMELINES
    ]
    (folder / "spliced.jsonl").write_text(rows([{"timeline": own} for own in parts]))
    (folder / "whole.jsonl").write_text(rows([{"video": f"{k}.mp4"} for k in range(len(kept))]))
    spliced = open_records([str(banks[0])], [str(folder / "spliced.jsonl")], 2, 4)
    by_hand = open_records([str(banks[1])], [str(folder / "whole.jsonl")], 2, 4)
    return World(spliced, by_hand, kept)


def cut_places(frames: list[tuple[str, int]], parts: list[Any]) -> list[int]:
    """Return the frame that each part but the first begins with."""
    return np.cumsum([len(kept_frames([part])) for part in parts])[:-1].tolist()


def without_cuts(batch: Batch, world: World, config: VLMConfig, loader: Loader) -> Batch:
    """Return the batch of whole clips without the steps that lead from one part to another."""
    crossing = set()
    length = batch.input_ids.shape[1]
    ends = sorted(int(end) for group in batch.groups for end in group.end_index)
    by_row = [[e for e in ends if e // length == row] for row in range(len(batch.lengths))]
    for row, (frames, parts) in enumerate(zip(world.kept, TIMELINES, strict=True)):
        info = world.whole.clips(world.whole.held_out[row])[0].info
        chosen = [k for k, _, _ in choose_frames(info, config, loader.pool)]
        begins = cut_places(frames, parts)
        for (a, one), (b, two) in pairwise(zip(by_row[row], chosen, strict=True)):
            if any(one < begin <= two for begin in begins):
                crossing.add((a, b))
    kept = []
    for pairs in batch.transitions:
        starts = batch.groups[pairs.source].end_index[pairs.source_frame].tolist()
        targets = batch.groups[pairs.target].end_index[pairs.target_frame].tolist()
        on = [k for k, pair in enumerate(zip(starts, targets, strict=True)) if pair not in crossing]
        if on:
            own = {"source_frame": pairs.source_frame[on], "target_frame": pairs.target_frame[on]}
            copy = None if pairs.copy is None else pairs.copy[on]
            more = {"gap": pairs.gap[on]} if hasattr(pairs, "gap") else {}
            kept.append(replace(pairs, **own, copy=copy, **more))
    assert crossing
    return replace(batch, transitions=tuple(kept))


def losses_of(model: VLM, batch: Batch) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return the model's sums of a batch, and the gradients of all its losses together."""
    model.zero_grad(set_to_none=True)
    out = model(batch)
    (out["ce"] + out["ar"].sum()).backward()
    return out, [p.grad for p in model.parameters() if p.grad is not None]


MROPE = {
    "frame_positions": "mrope",
    "mrope_sections": "2,1,1",
    "mrope_tokens_per_second": 16.0,
    "media_tags": "none",
}


def assert_equal_batches(one: Batch, other: Batch) -> None:
    assert (one.rope is None) == (other.rope is None)
    assert one.rope is None or torch.equal(one.rope, other.rope)
    for name in ("input_ids", "axis", "coord", "labels", "label_coord", "mask_start", "mask_end"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert len(one.groups) == len(other.groups)
    for a, b in zip(one.groups, other.groups, strict=True):
        assert (a.stream, a.grid, a.covered) == (b.stream, b.grid, b.covered)
        for name in ("features", "time", "timed", "token_index", "end_index"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert len(one.transitions) == len(other.transitions)
    for c, d in zip(one.transitions, other.transitions, strict=True):
        assert (c.source, c.target) == (d.source, d.target)
        for name in ("source_frame", "target_frame", "copy"):
            assert torch.equal(getattr(c, name), getattr(d, name)), name


@pytest.mark.parametrize("pattern", [("interleave", "0.5", 16), ("uniform", "0.3", 5)])
@pytest.mark.parametrize("settings", [{}, {"frame_time": "text"}, {"enable_lape": False}, MROPE])
def test_a_spliced_medium_is_the_clip_that_is_laid_together_by_hand(
    world: World, make_model: Callable[..., VLM], pattern: tuple[str, str, int], settings: Any
) -> None:
    strategy, ratio, most = pattern
    model = make_model(
        frame_sampling_strategy=strategy, slow_frame_ratio=ratio, max_frames_num=most, **settings
    )
    spliced = Loader(world.spliced, Chat.of(model), model.config)
    whole = Loader(world.whole, Chat.of(model), model.config)
    ours = spliced.batch(world.spliced.held_out, with_copy=True)
    theirs = whole.batch(world.whole.held_out, with_copy=True)
    theirs = without_cuts(theirs, world, model.config, whole)
    assert_equal_batches(ours, theirs)
    losses, gradients = losses_of(model, ours)
    expected, expected_gradients = losses_of(model, theirs)
    assert losses["ce"] > 0 < losses["ar"].sum()
    assert len(gradients) == len(expected_gradients) > 10
    for name in expected:
        assert torch.equal(losses[name], expected[name]), name
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(a, b)
    prompts = [
        loader.prompts([(record, 1) for record in loader.dataset.held_out]).input_ids
        for loader in (spliced, whole)
    ]
    assert torch.equal(*prompts)


def test_steps_between_frames_are_those_within_a_part(
    world: World, make_model: Callable[..., VLM]
) -> None:
    """Every pair of neighbours in a medium, by brute force over its frames."""
    model = make_model(max_frames_num=9)
    loader = Loader(world.spliced, Chat.of(model), model.config)
    batch = loader.batch(world.spliced.held_out)
    length = batch.input_ids.shape[1]
    found = set()
    for pairs in batch.transitions:
        ends = [
            batch.groups[group].end_index[frames].tolist()
            for group, frames in (
                (pairs.source, pairs.source_frame),
                (pairs.target, pairs.target_frame),
            )
        ]
        found |= set(zip(*ends, strict=True))
    every = sorted(int(end) for group in batch.groups for end in group.end_index)
    expected = set()
    for row, (frames, parts) in enumerate(zip(world.kept, TIMELINES, strict=True)):
        own = [end for end in every if end // length == row]
        chosen = [k * (len(frames) - 1) // 8 for k in range(9)] if len(frames) > 9 else None
        places = chosen or list(range(len(frames)))
        part_of = [k for k, part in enumerate(parts) for _ in kept_frames([part])]
        for (a, one), (b, two) in pairwise(zip(own, places, strict=True)):
            if part_of[one] == part_of[two]:
                expected.add((a, b))
    assert found == expected
    assert len(expected) < len(every) - len(world.kept), "some neighbours are kept apart"


def test_shuffled_features_stand_on_the_clock_of_the_medium(
    world: World, make_model: Callable[..., VLM]
) -> None:
    model = make_model()
    loaders = [
        Loader(dataset, Chat.of(model), model.config)
        for dataset in (world.spliced, SwappedDataset.of(world.spliced))
    ]
    true, shuffled = [loader.batch(loader.dataset.held_out) for loader in loaders]
    assert torch.equal(true.input_ids, shuffled.input_ids)
    assert true.num_transitions == shuffled.num_transitions
    for a, b in zip(true.groups, shuffled.groups, strict=True):
        assert torch.equal(a.time, b.time)
        assert not (a.features == b.features).flatten(1).all(dim=1).any()


# -- plans


@pytest.fixture(scope="module")
def sources(toy: Path, tmp_path_factory: Any) -> Path:
    """A phrase for each toy clip, of some for a part alone."""
    videos = sorted(
        {json.loads(x)["video"] for x in (toy / "train.jsonl").read_text().splitlines()}
    )
    rows = [{"video": v, "phrase": [f"scene {k} of many", f"the {k}th"]}
            for k, v in enumerate(videos)]  # fmt: skip
    rows += [{"video": videos[0], "caption": "A part.", "start": 1.0, "end": 3.5}]
    rows += [{"video": videos[1], "phrase": ["scene 0 of many", "the 0th"]}]
    path = tmp_path_factory.mktemp("sources") / "phrases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(toy: Path, toy_bank: Path, sources: Path) -> TrainConfig:
    return TrainConfig(
        stage_path=str(toy / "llm"),
        bank=[str(toy_bank)],
        data_path=[str(toy / "train.jsonl")],
        splice_path=[str(sources)],
        splice=["records=40", "parts=2-4", "seconds=0.5-3"],
        augment=["jitter", "pattern", "ratio=0.25+0.5+1", "drop=0.4"],
        num_temporal_tokens=20,
        num_spatial_tokens=20,
        max_frames_num=6,
        num_train_epochs=3.0,
        seed=3,
    )


def loader_of(config: TrainConfig, dataset: Dataset) -> Loader:
    anchors = LapeTokens((20, 20, 20), LAPE_AXES[config.lape_axes]) if config.enable_lape else None
    vlm = VLMConfig(
        slow_stride=4,
        fast_stride=8,
        max_frames_num=config.max_frames_num,
        frame_sampling_strategy=config.frame_sampling_strategy,
        slow_frame_ratio=config.slow_frame_ratio,
        frame_time=config.frame_time.replace("auto", "none"),
    )
    frames = vlm.time_form, vlm.around_frames
    chat = Chat(load_with_template(config.stage_path, ""), anchors, frames=frames)
    return Loader(dataset, chat, vlm)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"augment": []},
        {"augment": ["drop=0.9"], "frame_time": "text", "pack_tokens": 700},
        {"frame_time": "text", "max_tokens": 260},
        {"enable_lape": False, "augment": ["jitter"], "pack_tokens": 900},
        {"splice": ["records=30", "span=When?? {}|{}", "seen={}, in words of one's own, is what?"]},
        {"splice_path": [], "splice": [], "augment": ["ratio=0+1", "drop=0.5"]},
    ],
    ids=str,
)
def test_what_is_planned_is_what_is_collated(config: TrainConfig, settings: Any) -> None:
    config = replace(config, **settings)
    dataset = open_dataset(config)
    plan = plan_run(config, dataset, 8)
    loader = loader_of(config, dataset)
    used = 0
    for step in range(plan.num_steps):
        batches = loader.packs(plan, Share(0, 1), step)  # asserts the tokens of each row
        used += len(plan.records(step))
        assert sum(len(b.labels) for b in batches) == plan.num_labels[step]
        assert sum(b.num_transitions for b in batches) == plan.num_transitions[step]
        assert sum(int(b.lengths.sum()) for b in batches) == plan.per_step(plan.tokens)[step]
        frames = sum(len(group.time) for b in batches for group in b.groups)
        assert frames == plan.per_step(plan.transitions + plan.clips)[step]
        places = sum(
            int((b.mask_end - b.mask_start)[row, : b.lengths[row]].sum())
            for b in batches
            for row in range(len(b.lengths))
        )
        causal = plan.tokens * (plan.tokens + 1) // 2
        assert places == plan.per_step(causal + plan.frame_pairs)[step]
    assert used == plan.uses.size
    assert len(plan.frames) == 3 * dataset.count
    if not config.max_tokens:
        assert sorted(plan.uses.tolist()) == list(range(3 * dataset.count))


def test_no_epoch_is_like_another_and_ranks_and_later_starts_draw_the_same(
    config: TrainConfig,
) -> None:
    dataset, again = open_dataset(config), open_dataset(config)
    plan = plan_run(config, dataset, 8)
    longer = plan_run(replace(config, num_train_epochs=5.0), again, 8)
    assert longer.fingerprint == plan.fingerprint
    assert [longer.records(k) for k in range(plan.num_steps)] == [
        plan.records(k) for k in range(plan.num_steps)
    ]
    loaders = [loader_of(config, each) for each in (dataset, again)]
    epoch = plan.num_steps // 3
    for step in (0, epoch, 2 * epoch + 1):
        (whole,) = [loaders[0].packs(plan, Share(0, 1), step)]
        for world in (2, 3):  # each with a loader that made nothing before
            shares = [loaders[1].packs(longer, Share(r, world), step) for r in range(world)]
            dealt = [shares[k % world][k // world] for k in range(len(whole))]
            for ours, theirs in zip(dealt, whole, strict=True):
                assert ours.record_ids == theirs.record_ids
                assert torch.equal(ours.input_ids, theirs.input_ids)
                for a, b in zip(ours.groups, theirs.groups, strict=True):
                    assert torch.equal(a.features, b.features)
    texts = [{(r.cuts, r.turns) for r in dataset.epoch(k) if r.cuts} for k in range(3)]
    assert all(len(own) == 40 for own in texts)
    assert not texts[0] & texts[1] | texts[1] & texts[2]
    # a record of the file is seen otherwise in each epoch
    file = [k for k in range(dataset.count) if not dataset.records[k].cuts]
    seen = [plan.tokens[np.asarray(file) + k * dataset.count].tolist() for k in range(3)]
    assert seen[0] != seen[1] != seen[2]


def test_another_seed_draws_others_and_is_another_plan(config: TrainConfig) -> None:
    one, other = open_dataset(config), open_dataset(replace(config, seed=4))
    assert {r.turns for r in one.records if r.cuts} != {r.turns for r in other.records if r.cuts}
    plan = plan_run(config, one, 8)
    for changed in ({"augment": ["jitter"]}, {"splice": ["records=40"]}):
        changes = replace(config, **changed)  # type: ignore[arg-type]
        assert plan_run(changes, open_dataset(changes), 8).fingerprint != plan.fingerprint


def test_a_record_that_no_longer_fits_is_left_out_by_its_number(config: TrainConfig) -> None:
    config = replace(config, max_tokens=150, augment=[], frame_time="text")
    dataset = open_dataset(config)
    plan = plan_run(config, dataset, 8)
    (out,) = plan.left_out.values()
    assert len(out)
    assert not set(out.tolist()) & set(plan.uses.tolist())
    assert (plan.tokens[plan.uses] <= 150).all()
    assert plan.dropped == {next(iter(plan.left_out)): len(out)}


@pytest.mark.parametrize("template", ["chatml", "plain", "vicuna", "llama2", ""])
@pytest.mark.parametrize("lape", [True, False])
def test_turns_counted_apart_are_those_counted_whole(
    toy: Path, template: str, lape: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where control tokens stand between turns; elsewhere nothing is said."""
    monkeypatch.setattr("train.batches.turns.CHECKED", 1)
    anchors = LapeTokens((20, 20, 20), LAPE_AXES["all"]) if lape else None
    chat = Chat(load_with_template(str(toy / "llm"), template), anchors)
    rng = np.random.default_rng(0)
    texts = [
        "When?",
        "a red <|im_end|> dog",
        "from <t:1.25> to <t:2.05>",
        " 7",
        "é\nA. x\n",
        "</s>",
    ]
    talks, durations = [], []
    for _ in range(60):
        pairs = [tuple(rng.choice(texts, 2).tolist()) for _ in range(rng.integers(1, 5))]
        pairs[0] = "<video>\n" + pairs[0][0], pairs[0][1]
        talks.append(pairs)
        durations.append(float(rng.uniform(2.1, 9)))
    found = count_rounds(chat, talks, durations)
    kept_apart = template in ("", "chatml")
    if found is None:
        assert not kept_apart
        return
    whole = chat.count(
        [chat.pieces(as_turns(talk), [d]) for talk, d in zip(talks, durations, strict=True)]
    )
    assert found.tolist() == [list(pair) for pair in whole]


def test_a_resumed_run_of_spliced_records_ends_with_the_same_bits(
    train_here: Callable[..., Path], sources: Path, tmp_path: Path
) -> None:
    """Resumed in the second epoch, and begun again with another number of epochs asked for."""
    settings = {
        "splice_path": sources,
        "splice": ["records=6", "parts=2-3", "seconds=0.5-3"],
        "augment": ["jitter", "pattern", "drop=0.4"],
        "per_device_train_batch_size": 4,
        "reduce": "exact",
    }
    whole = train_here(tmp_path / "whole", max_steps=8, save_steps=5, **settings)
    shutil.copytree(whole / "checkpoint-5", tmp_path / "again" / "checkpoint-5")
    again = train_here(tmp_path / "again", max_steps=8, **settings)
    lines = [
        [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()][-3:]
        for out in (whole, again)
    ]
    assert [line["ce_loss"] for line in lines[0]] == [line["ce_loss"] for line in lines[1]]
    for name in ("projector.safetensors", "visual.safetensors"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()


def test_another_splice_is_another_run(
    train_here: Callable[..., Path], refused: Callable[..., str], sources: Path, tmp_path: Path
) -> None:
    settings = {"splice_path": sources, "max_steps": 1}
    out = train_here(tmp_path / "out", splice="records=6", **settings)
    line = refused(train_here, out, splice="records=7", **settings)
    assert 'records was "6", is now "7"' in line
    assert "augment" in refused(train_here, out, splice="records=6", augment="jitter", **settings)


@pytest.mark.slow
def test_a_hundred_thousand_spliced_records_are_planned_in_few_calls(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By calls of functions, which no neighbour on the machine makes more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    records = 100_000
    config = replace(config, splice=[f"records={records}"], num_train_epochs=1.0, pack_tokens=4096)
    load_with_template(config.stage_path, "")  # importing transformers is not of the plan
    calls = cProfile.Profile()
    plan = calls.runcall(lambda: plan_run(config, open_dataset(config), 64))
    assert len(plan.frames) > records
    found = pstats.Stats(calls).total_calls / records
    assert found < 120, found


def test_banks_of_two_types_are_read_as_what_they_hold(
    make_bank: Callable[..., Path], features: Any, tmp_path: Path, make_tokenizer: Any
) -> None:
    """float16 and bfloat16 (which is stored as uint16) in one batch, and on one timeline."""
    values = np.linspace(-2, 2, 3 * 12 * WIDTH).reshape(3, 4, 3, WIDTH)
    half = {s: values[:, : CELLS[s][0], : CELLS[s][1]].astype(np.float16) for s in CELLS}
    brain = {
        s: torch.from_numpy(a.astype(np.float32)).bfloat16().view(torch.uint16).numpy()
        for s, a in half.items()
    }
    banks = [
        make_bank(
            tmp_path / name,
            {f"{name}.mp4": arrays},
            config=replace(features, strides=(2, 4), dtype=name),
        )
        for name, arrays in (("float16", half), ("bfloat16", brain))
    ]
    (tmp_path / "r.jsonl").write_text(
        rows([{"timeline": [{"video": "float16.mp4"}, {"video": "bfloat16.mp4"}]}])
    )
    dataset = open_records([str(b) for b in banks], [str(tmp_path / "r.jsonl")], 2, 4)
    loader = Loader(dataset, Chat(make_tokenizer(), None), VLMConfig(slow_stride=2, fast_stride=4))
    batch = loader.batch(dataset.held_out, with_copy=True)
    for group in batch.groups:
        assert group.features.float().abs().max() <= 2
    assert batch.num_transitions == 4


def test_parts_of_other_grids_and_crops_keep_their_own(
    make_clip: Callable[..., Any], make_model: Callable[..., VLM]
) -> None:
    wide = make_clip(1, 4, patch_grid=(3, 8), covered=(0.2, 0.0, 0.8, 1.0))
    tall = make_clip(2, 3, patch_grid=(8, 4))
    places = [Stretch(None, 1, 4, 1.0, 4.0), Stretch(None, 0, 3, 0.0, 3.0)]  # type: ignore[arg-type]
    medium = splice([wide, tall], places)
    model = make_model()
    chat = Chat.of(model)
    turns = [Turn("user", "<video>?"), Turn("assistant", "at <t:3>")]
    encoded = chat.encode(turns, [medium.info.duration])
    row = lay_out(encoded, [medium.info], model.config, "average", stamp=chat.stamp)
    batch = collate([row], [[medium]], model.config, ["r"], with_copy=True)
    assert medium.info.duration == 6
    seen = []
    for group in batch.groups:
        clip = wide if group.covered == wide.info.covered else tall
        assert group.covered == clip.info.covered
        assert (group.grid.patch_rows, group.grid.patch_cols) == clip.info.patch_grid
        for share, features in zip(group.time.tolist(), group.features, strict=True):
            second = round(6 * share)
            frame = second + 1 if clip is wide else second - 3
            own = clip.read(group.grid.stride, [frame])[0]
            assert torch.equal(features, torch.from_numpy(own))
            seen.append(second)
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    assert batch.num_transitions == 4
    assert torch.isfinite(model(batch)["ar"]).all()


def test_pictures_are_shown_for_as_long_as_a_record_says(
    make_bank: Callable[..., Path], features: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        id_: {s: rng.normal(size=(n, *CELLS[s], WIDTH)).astype(np.float16) for s in CELLS}
        for id_, n in {"a.jpg": 1, "b.jpg": 1, "c.mp4": 3}.items()
    }
    config = replace(features, strides=(2, 4))
    stills = {id_: arrays[id_] for id_ in ("a.jpg", "b.jpg")}
    banks = [
        str(make_bank(tmp_path / "a", stills, config=config, meta={"end": 0.0})),
        str(make_bank(tmp_path / "b", {"c.mp4": arrays["c.mp4"]}, config=config)),
    ]
    parts = [{"video": "a.jpg", "end": 2}, {"video": "c.mp4"}, {"video": "b.jpg", "end": 0.5}]
    path = tmp_path / "r.jsonl"
    path.write_text(rows([{"timeline": parts}]))
    dataset = open_records(banks, [str(path)], 2, 4)
    (medium,) = dataset.clips(dataset.held_out[0])
    assert medium.info.duration == 2 + 3 / 8 + 0.5
    assert medium.info.timestamps.tolist() == [0, 2, 2.125, 2.25, 2.375]
    shown = [arrays[id_][2][k] for id_, k in (("a.jpg", 0), ("c.mp4", 1), ("b.jpg", 0))]
    read = [part.read(2, [k])[0] for part, k in zip(medium.parts, (0, 1, 0), strict=True)]
    assert np.array_equal(read, shown)
    for wrong in ({"video": "b.jpg"}, {"video": "b.jpg", "start": 0.1, "end": 1}):
        path.write_text(rows([{"timeline": [{"video": "c.mp4"}, wrong]}]))
        with pytest.raises(UserError) as error:
            open_records(banks, [str(path)], 2, 4)
        (problem,) = error.value.problems
        assert "part 2 of `timeline`, b.jpg: a picture, which has no length" in problem


def test_a_cut_without_a_frame_or_behind_its_clip_is_named(world: World, tmp_path: Path) -> None:
    bank = world.spliced.banks.banks[0].where
    near = "no banked frame from 0.13 to 0.2 s, expected frames, of which the nearest are at 0.125"
    wrong = {
        near: {"video": "a.mp4", "start": 0.13, "end": 0.2},
        "ends at 3 s, after its clip, expected at most 0.875": {"video": "a.mp4", "end": 3},
    }
    for message, part in wrong.items():
        path = tmp_path / "r.jsonl"
        path.write_text(rows([{"timeline": [{"video": "b.mp4"}, part]}]))
        with pytest.raises(UserError) as error:
            open_records([bank], [str(path)], 2, 4)
        (problem,) = error.value.problems
        assert f"{path}:1 (id 0)" in problem
        assert "part 2 of `timeline`, a.mp4" in problem
        assert message in problem
