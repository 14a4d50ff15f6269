"""LLaVA checkpoints from a bank: tokens pooled as they pool them give the logits that they give.

Random tiny checkpoints of transformers' own classes; the reference is their forward on the same
features, rounded as the bank rounds them.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    SiglipImageProcessorPil,
)

from model.grid import pool
from model.tower.tower import Tower
from model.vlm import VLM
from shards.errors import UserError
from shards.format.features import FeatureConfig
from shards.read.timeline import Medium
from tests.train.start.checkpoints import World, as_theirs, batch_of, close, laid_out, our_logits
from tests.train.start.tiny import (
    LLAVA_VIDEO,
    PATCH,
    SIDE,
    WIDTH,
    next_video,
    onevision,
    save_llava,
)
from train.batches.collate import Row, collate
from train.batches.measure import measure
from train.data.dataset import open_dataset
from train.export import export
from train.start.stage import bank_problem

FRAMES = {"a": 4, "b": 1, "c": 7}


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(
    toy: Path,
    tmp_path: Path,
    make_bank: Callable[..., Path],
    features: FeatureConfig,
) -> MakeWorld:
    """A function that saves a checkpoint and banks features: floats that float16 holds, and so do
    their means over 2x2 cells."""

    def make(theirs: Any, **values: Any) -> World:
        tower = theirs.config.vision_config.model_type
        processor = {"height": SIDE * PATCH, "width": SIDE * PATCH, "crop": None}
        config = replace(features, tower_type=tower, processor=processor, **values)
        save_llava(tmp_path / "stage", theirs, toy)
        clips = {}
        for number, (name, frames) in enumerate(FRAMES.items()):
            steps = np.random.default_rng(number).integers(-64, 65, (frames, SIDE, SIDE, WIDTH))
            patches = torch.from_numpy(steps / 16)
            clips[name] = {s: pool(patches, s, config.pool).half().numpy() for s in config.strides}
        whole = {"patch_grid": (SIDE, SIDE), "covered": (0.0, 0.0, 1.0, 1.0)}
        bank = make_bank(tmp_path / "bank", clips, config=config, meta=whole, width=WIDTH)
        talk = [{"from": "human", "value": "<video>\nWhen?"}, {"from": "gpt", "value": "from 1.5"}]
        lines = [json.dumps({"id": k, "video": k, "conversations": talk}) for k in clips]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        return World(tmp_path / "stage", theirs, bank, tmp_path / "data.jsonl")

    return make


@contextmanager
def banked_patches(world: World, patches: Tensor, cls: bool) -> Iterator[None]:
    """Let every layer of their tower give the patches of the bank, behind a CLS token if it has one."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = patches.flatten(1, 2)
        if cls:
            hidden = torch.cat([torch.full_like(hidden[:, :1], 99.0), hidden], dim=1)
        output.hidden_states = (hidden,) * 4
        return output

    handle = world.theirs.model.vision_tower.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def moved_to(theirs: Any, model: VLM) -> Any:
    """Return a copy of transformers' model with the weights that ours was trained to."""
    moved = copy.deepcopy(theirs)
    weights = model.llm.state_dict()
    own = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    moved.model.language_model.load_state_dict(own)
    moved.lm_head.load_state_dict({"weight": weights["lm_head.weight"]})
    names = {"0.": "linear_1.", "2.": "linear_2."}
    layers = {names[k[:2]] + k[2:]: v for k, v in model.projector.state_dict().items()}
    moved.model.multi_modal_projector.load_state_dict(layers)
    if model.config.frame_marks == "media":
        moved.model.image_newline.data.copy_(model.visual.frame_end)
    return moved


def their_logits(world: World, row: Row, patches: Tensor, cls: bool) -> Tensor:
    ids = torch.from_numpy(row.ids).clone()
    ids[torch.from_numpy(row.block) >= 0] = LLAVA_VIDEO
    ids[list(row.newlines)] = LLAVA_VIDEO
    side = SIDE * PATCH
    with torch.no_grad(), banked_patches(world, patches, cls):
        given = {"pixel_values_videos": torch.zeros(1, len(patches), 3, side, side)}
        return world.theirs(input_ids=ids[None], **given).logits[0]


def check(world: World, model: VLM, patches: Callable[[Medium], Tensor], cls: bool) -> None:
    """Every clip's logits, alone, padded and packed, are theirs."""
    rows, theirs = [], []
    for name in FRAMES:
        clips = world.clips(name)
        rows.append((laid_out(model, clips, "<video>\nWhen is it?", "from 1.5 to 2.25"), clips))
        theirs.append(their_logits(world, rows[-1][0], patches(clips[0]), cls))
    as_theirs(model, rows, theirs)


def patches_of(clip: Medium) -> Tensor:
    """Return the bank's patches, of stride 1."""
    return torch.from_numpy(clip.read(1, range(len(clip.info.timestamps)))).float()


AFTER = {"pool_after_projector": True, "frame_marks": "media"}


def test_onevision_pools_behind_its_projector(make_world: MakeWorld) -> None:
    world = make_world(onevision(), layer=-1, strides=(1,))
    model, said = world.start(**AFTER)
    assert "features are pooled as there" in said
    assert "visual: media are closed by the stage's image_newline" in said
    assert "ignored: image_newline" not in said
    assert "has other weights than that in the checkpoint" in said
    check(world, model, patches_of, cls=False)
    row = laid_out(model, world.clips("c"), "<video>", "red")
    assert [frame.grid.rows for frame in row.frames] == [3] * 7
    assert row.newlines == (row.frames[0].first + 7 * 9,)
    # a copy of it on disk is the same
    model.save(world.folder.parent / "run")
    again = VLM.load(world.folder.parent / "run").eval()
    clips = world.clips("c")
    batches = [batch_of(own, (row, clips)) for own in (model, again)]
    assert torch.equal(our_logits(model, batches[0]), our_logits(again, batches[1]))


def test_the_tower_in_a_checkpoint_is_known_again(make_world: MakeWorld, tmp_path: Path) -> None:
    theirs = onevision()
    theirs.model.vision_tower.save_pretrained(tmp_path / "tower")
    side = {"height": SIDE * PATCH, "width": SIDE * PATCH}
    SiglipImageProcessorPil(size=side).save_pretrained(tmp_path / "tower")
    tower = Tower.load(str(tmp_path / "tower"), layer=-1)
    world = make_world(theirs, layer=-1, strides=(1,), tower_digest=tower.digest)
    _, said = world.start(**AFTER)
    assert "features are pooled as there\n" in said
    # as it was published: another level around the tower
    file = world.folder / "model.safetensors"
    own = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in load_file(file).items()
    }
    assert own.keys() != load_file(file).keys()
    save_file(own, file, {"format": "pt"})
    _, said = world.start(**AFTER)
    assert "features are pooled as there\n" in said
    changed = next(name for name in own if "vision_model.encoder" in name)
    save_file(own | {changed: own[changed] + 1}, file, {"format": "pt"})
    _, said = world.start(**AFTER)
    assert "has other weights than that in the checkpoint" in said


@pytest.mark.parametrize("mode", ["average", "max"])
def test_next_video_pools_before_its_projector_as_a_bank_does(
    make_world: MakeWorld, mode: str
) -> None:
    pool_mode = {"average": "average_floor", "max": "max"}[mode]
    world = make_world(next_video(spatial_pool_mode=mode), layer=-2, strides=(1, 2), pool=pool_mode)
    settings = {"frame_marks": "none", "mm_spatial_pool_stride": 2}
    model, said = world.start(**settings)
    assert "features are pooled as there" in said
    check(world, model, patches_of, cls=True)
    _, said = world.start(frame_marks="none", mm_spatial_pool_stride=1, fast_stride=1)
    assert "pooled before it here, so it has to be tuned again" in said


TRAINED: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any], bool]] = [
    (onevision, {"layer": -1, "strides": (1,)}, AFTER, False),
    (
        next_video,
        {"layer": -2, "strides": (1, 2), "pool": "average_floor"},
        {"frame_marks": "none", "mm_spatial_pool_stride": 2},
        True,
    ),
]


@pytest.mark.parametrize(("make", "bank", "settings", "cls"), TRAINED)
def test_trained_saved_loaded_and_exported_it_is_theirs_still(
    make_world: MakeWorld,
    train_here: Callable[..., Path],
    tmp_path: Path,
    make: Callable[..., Any],
    bank: dict[str, Any],
    settings: dict[str, Any],
    cls: bool,
) -> None:
    world = make_world(make(), **bank)
    packed = {"pack_tokens": 300, "max_steps": 2, "num_train_epochs": 4, "learning_rate": 1e-2}
    given = {"stage_path": world.folder, "bank": world.bank, "data_path": world.data}
    out = train_here(tmp_path / "run", **(dict(world.exact) | given | packed | settings))
    model = VLM.load(out).eval()
    moved = replace(world, theirs=moved_to(world.theirs, model))
    clips = world.clips("c")
    row = laid_out(model, clips, "<video>\nWhen is it?", "from 1.5 to 2.25")
    before, after = (their_logits(w, row, patches_of(clips[0]), cls) for w in (world, moved))
    assert (after - before).abs().max() > 0.1 * before.square().mean().sqrt()
    export(out, tmp_path / "exported")
    for trained in (model, VLM.load(tmp_path / "exported").eval()):
        close(our_logits(trained, batch_of(trained, (row, clips)))[0], after)


def test_lengths_count_pooled_cells_and_what_closes_media(make_world: MakeWorld, toy: Path) -> None:
    world = make_world(onevision(), layer=-1, strides=(1,))
    model, _ = world.start(**AFTER)
    config = world.config(**AFTER)
    dataset = open_dataset(config)
    lengths = measure(config, dataset, config.stage_path, "tokenizer")
    talk = "<video>\nWhen?", "from 1.5"
    laid = [len(laid_out(model, world.clips(name), *talk)) for name in FRAMES]
    assert lengths.total(np.full(3, 64)).tolist() == laid


def test_a_coarser_bank_is_pooled_on_and_its_frames_are_predicted(make_world: MakeWorld) -> None:
    """Tokens of stride 2 and 4 of a bank of 1 and 2, with the frame-causal loss over the same cells."""
    world = make_world(onevision(), layer=-1, strides=(1, 2))
    model, said = world.start(
        **AFTER, slow_frame_ratio="0.5", loss_weight=0.15, frame_attention="block", enable_lape=True
    )
    assert "so it has to be tuned again" in said
    clips = world.clips("c")
    row = laid_out(model, clips, "<video>", "red <t:0.5>")
    assert {(frame.grid.stride, frame.grid.cells) for frame in row.frames} == {(2, 9), (4, 4)}
    batch = collate([row], [clips], model.config, ["record"], with_copy=True)
    for group in batch.groups:
        assert group.finer is not None
        assert torch.equal(group.features, pool(group.finer, 2, "bilinear").half())
    losses = model(batch)
    assert losses["ar_count"].sum() == losses["ar_copy_count"].sum() == 6
    (losses["ce"] + losses["ar"].sum()).backward()
    assert all(p.grad is not None for p in model.projector.parameters())


REFUSED: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]] = [
    (onevision, {}, {"layer": -2}, "reads layer -1 of its tower, and the bank holds layer -2"),
    (onevision, {"vision_feature_layer": [-1, -2]}, {}, "joins the layers -1, -2 of its tower"),
    (
        onevision,
        {"vision_feature_select_strategy": "default"},
        {},
        "does not take just the patches",
    ),
    (onevision, {"projector_hidden_act": "relu"}, {}, "have relu between them"),
    (onevision, {}, {"strides": (2,), "pool": "max"}, "the bank's pool mode is max"),
    (next_video, {}, {"layer": -2}, "pools before its projector; leave it out, and set bank to"),
]


@pytest.mark.parametrize(("make", "values", "bank", "why"), REFUSED)
def test_what_is_not_its_own_pooling_is_refused_by_name(
    make_world: MakeWorld,
    make: Callable[..., Any],
    values: dict[str, Any],
    bank: dict[str, Any],
    why: str,
) -> None:
    world = make_world(make(**values), **({"layer": -1, "strides": (1,)} | bank))
    with pytest.raises(UserError, match=why) as caught:
        world.start(**AFTER)
    assert len(str(caught.value).splitlines()) == 1


def test_a_projector_that_joins_cells_is_not_pooled_behind(make_world: MakeWorld) -> None:
    world = make_world(onevision(), layer=-1, strides=(1, 2))
    config = world.config(**AFTER, mm_projector_type="mlp_downsample")
    problem = bank_problem(config, open_dataset(config))
    assert problem is not None
    assert "mlp_downsample joins cells itself" in problem
