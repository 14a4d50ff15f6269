"""LLaVA checkpoints from a bank: tokens pooled as they pool them give the logits that they give.

Random tiny checkpoints of transformers' own classes; the reference is their forward on the same
features, rounded as the bank rounds them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from model.batch import Batch
from model.grid import pool
from model.tower.tower import Tower
from model.vlm import VLM
from shards.errors import UserError
from shards.format.features import FeatureConfig
from shards.read.banks import Banks
from shards.read.timeline import Medium
from train.batches.chat import Chat
from train.batches.collate import Row, collate, lay_out, pack
from train.batches.measure import measure
from train.data.dataset import open_dataset
from train.data.records import Turn
from train.settings.config import TrainConfig
from train.start.stage import bank_problem, build

PATCH, WIDTH, ROWS = 4, 16, 512
SIDE = 5
"""Patches on a side: of an odd number, pooling by two leaves half a cell, or a row."""
VIDEO = 511
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
}
TEXT = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
EXACT: Mapping[str, Any] = {
    "frame_attention": "token",
    "enable_lape": False,
    "loss_weight": 0.0,
    "slow_frame_ratio": "1",
    "max_frames_num": 64,
}
FRAMES = {"a": 4, "b": 1, "c": 7}


def onevision(**values: Any) -> Any:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION), text_config=Qwen2Config(**TEXT), **values
    )
    return LlavaOnevisionForConditionalGeneration(config)


def next_video(**values: Any) -> Any:
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=Qwen2Config(**TEXT), **values
    )
    return LlavaNextVideoForConditionalGeneration(config)


@dataclass(frozen=True)
class World:
    """A checkpoint on disk, transformers' model of it, and a bank of features of its tower's kind."""

    folder: Path
    theirs: Any
    bank: Path
    data: Path

    def start(self, **settings: Any) -> tuple[VLM, str]:
        config = self.config(**settings)
        lines: list[str] = []
        return build(config, open_dataset(config), lines.append).eval(), "\n".join(lines)

    def config(self, **settings: Any) -> TrainConfig:
        values = dict(EXACT) | {"stage_path": str(self.folder)} | settings
        return TrainConfig(bank=[str(self.bank)], data_path=[str(self.data)], **values)

    def clips(self, names: str) -> list[Medium]:
        banks = Banks.open([str(self.bank)])
        return [place.clip() for name in names if (place := banks.find(name))]


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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, weight in theirs.named_parameters():
                if "multi_modal_projector" in name or "newline" in name:
                    weight.data.normal_(std=0.3)
        theirs.config.video_token_id = VIDEO
        theirs.eval().save_pretrained(tmp_path / "stage")
        AutoTokenizer.from_pretrained(toy / "llm").save_pretrained(tmp_path / "stage")
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


def laid_out(model: VLM, clips: Sequence[Medium], *texts: str) -> Row:
    turns = [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)]
    infos, chat = [clip.info for clip in clips], Chat.of(model)
    encoded = chat.encode(turns, [info.duration for info in infos])
    return lay_out(encoded, infos, model.config, model.features["pool"], stamp=chat.stamp)


def batch_of(model: VLM, *rows: tuple[Row, Sequence[Medium]], packed: bool = False) -> Batch:
    if packed:
        media = [clip for _, clips in rows for clip in clips]
        return collate([pack([row for row, _ in rows])], [media], model.config, ["packed"])
    names = [f"record-{k}" for k in range(len(rows))]
    return collate([row for row, _ in rows], [clips for _, clips in rows], model.config, names)


def our_logits(model: VLM, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.logits(model.hidden_states(batch)).view(*batch.input_ids.shape, -1)


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


def their_logits(world: World, row: Row, patches: Tensor, cls: bool) -> Tensor:
    ids = torch.from_numpy(row.ids).clone()
    ids[torch.from_numpy(row.block) >= 0] = VIDEO
    ids[list(row.newlines)] = VIDEO
    side = SIDE * PATCH
    with torch.no_grad(), banked_patches(world, patches, cls):
        given = {"pixel_values_videos": torch.zeros(1, len(patches), 3, side, side)}
        return world.theirs(input_ids=ids[None], **given).logits[0]


def close(ours: Tensor, theirs: Tensor) -> None:
    """Assert that logits are equal to 1e-4 of their RMS."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * theirs.square().mean().sqrt()


def check(world: World, model: VLM, patches: Callable[[Medium], Tensor], cls: bool) -> None:
    """Every clip's logits, alone, padded and packed, are theirs."""
    rows, theirs = [], []
    for name in FRAMES:
        clips = world.clips(name)
        rows.append((laid_out(model, clips, "<video>\nWhen is it?", "from 1.5 to 2.25"), clips))
        theirs.append(their_logits(world, rows[-1][0], patches(clips[0]), cls))
        close(our_logits(model, batch_of(model, rows[-1]))[0], theirs[-1])
    for own, (row, _), expected in zip(
        our_logits(model, batch_of(model, *rows)), rows, theirs, strict=True
    ):
        close(own[: len(row)], expected)
    close(our_logits(model, batch_of(model, *rows, packed=True))[0], torch.cat(theirs))


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
