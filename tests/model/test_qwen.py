"""Qwen's vision towers: taken out of whole models, in units of two frames, patches row by row."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model.llm import own_tower_digest
from model.tower.forward.qwen import patch_order, patchify
from model.tower.tower import Tower
from shards.errors import UserError

PATCH, WIDTH, LLM_WIDTH = 4, 24, 16
TEXT = {
    "hidden_size": LLM_WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
}
VISION = {"depth": 3, "num_heads": 2, "patch_size": PATCH}


def qwen2() -> Any:
    vision = VISION | {"embed_dim": WIDTH, "hidden_size": LLM_WIDTH, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=TEXT, vision_config=vision))


def qwen2_5() -> Any:
    """Windows of 2x2 blocks in all layers but the second."""
    vision = VISION | {
        "hidden_size": WIDTH,
        "out_hidden_size": LLM_WIDTH,
        "intermediate_size": 20,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3() -> Any:
    """Two of its three layers have mergers of their own; positions are those of a 4x4 grid."""
    text = {k: v for k, v in TEXT.items() if k not in ("bos_token_id", "eos_token_id")}
    vision = VISION | {
        "hidden_size": WIDTH,
        "out_hidden_size": LLM_WIDTH,
        "intermediate_size": 20,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision)
    return Qwen3VLForConditionalGeneration(config)


MAKE: dict[str, Callable[[], Any]] = {"qwen2_vl": qwen2, "qwen2_5_vl": qwen2_5, "qwen3_vl": qwen3}


def qwen_processor(**values: Any) -> Any:
    limits = {"min_pixels": 16 * 16, "max_pixels": 48 * 48}
    return Qwen2VLImageProcessorPil(**(limits | {"patch_size": PATCH} | values))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Random whole models, whose weights are large enough for every patch to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {kind: make().eval() for kind, make in MAKE.items()}
        for model in made.values():
            for weight in model.model.visual.parameters():
                weight.data.normal_(std=0.3)
    return made


@pytest.fixture(scope="module")
def folders(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The whole models on disk, as they are published."""
    root = tmp_path_factory.mktemp("qwen")
    for kind, model in models.items():
        model.save_pretrained(root / kind)
        qwen_processor().save_pretrained(root / kind)
    return {kind: root / kind for kind in models}


def frames_of(seed: int, height: int, width: int, count: int) -> np.ndarray:
    shape = (count, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24), (8, 56), (32, 32)])
def test_merged_patches_are_those_that_the_whole_model_gives_its_llm(
    folders: dict[str, Path], models: dict[str, Any], kind: str, height: int, width: int
) -> None:
    """The merger, given our last patches in blocks of 2x2, must find what it finds by itself."""
    tower = Tower.load(str(folders[kind]), layer=-1)
    assert (tower.frames_per_unit, tower.width) == (2, WIDTH)
    frames = frames_of(1, height, width, 6)
    rows, cols = height // PATCH, width // PATCH
    patches = tower.encode(frames)
    assert patches.shape == (3, rows, cols, WIDTH)
    visual = models[kind].model.visual
    given = patchify(tower.normalise(frames), 2, PATCH, 2)
    with torch.no_grad():
        expected = visual(given, grid_thw=torch.tensor([[3, rows, cols]])).pooler_output
        blocks = patches.reshape(3, rows // 2, 2, cols // 2, 2, WIDTH).transpose(2, 3)
        merged = visual.merger(blocks.reshape(-1, WIDTH))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MAKE)
def test_every_layer_can_be_taken(
    folders: dict[str, Path], models: dict[str, Any], kind: str
) -> None:
    """Layer k is what comes out last of a tower of k blocks."""
    frames = frames_of(2, 24, 40, 2)
    tower = Tower.load(str(folders[kind]), layer=-2)

    def at(layer: int) -> torch.Tensor:
        tower.layer = layer
        return tower.encode(frames)

    assert torch.equal(tower.encode(frames), at(2))
    found = [at(layer) for layer in range(4)]
    for layer in range(-4, 0):
        assert torch.equal(at(layer), found[layer])
    for blocks in (2, 1):
        tower.model.blocks = tower.model.blocks[:blocks]
        tower.model.config.depth = blocks
        assert torch.equal(at(-1), found[blocks])
    visual, place = models[kind].model.visual, torch.from_numpy(patch_order(6, 10, 2, 0))
    with torch.no_grad():
        embedded = visual.patch_embed(patchify(tower.normalise(frames), 2, PATCH, 2))
    if kind != "qwen3_vl":  # which adds positions to them
        torch.testing.assert_close(found[0].reshape(-1, WIDTH)[place], embedded)
    for before, after in pairwise(found):
        assert not torch.allclose(before, after)
    with pytest.raises(UserError, match="layer 4 of 3 layers; use -1 to -4"):
        Tower.load(str(folders[kind]), layer=4)


@pytest.mark.parametrize("kind", MAKE)
def test_half_precision_is_that_of_transformers(folders: dict[str, Path], kind: str) -> None:
    """Weights are cast, the frequencies of the rotary positions are not."""
    tower = Tower.load(str(folders[kind]), layer=-1, dtype="bfloat16")
    theirs = type(tower.model).from_pretrained(
        folders[kind],
        config=AutoConfig.from_pretrained(folders[kind]).vision_config,
        key_mapping={r"^(model\.)?visual\.": ""},
        dtype=torch.bfloat16,
    )
    frames = frames_of(7, 32, 48, 2)
    patches = patchify(tower.normalise(frames), 2, PATCH, 2)
    assert patches.dtype == torch.bfloat16
    sizes = torch.tensor([[1, 8, 12]])
    with torch.no_grad():
        ours, expected = (
            m(patches, grid_thw=sizes).last_hidden_state for m in (tower.model, theirs)
        )
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", MAKE)
def test_patches_lie_in_the_order_of_the_picture(folders: dict[str, Path], kind: str) -> None:
    tower = Tower.load(str(folders[kind]), layer=0)
    frames = frames_of(3, 24, 40, 2)
    before = tower.encode(frames)
    for row, col, frame in ((0, 1, 0), (3, 7, 1), (5, 9, 0)):
        changed = frames.copy()
        changed[frame, PATCH * row : PATCH * (row + 1), PATCH * col : PATCH * (col + 1)] ^= 255
        differs = (tower.encode(changed) != before).any(dim=-1)
        assert torch.nonzero(differs).tolist() == [[0, row, col]]


@pytest.mark.parametrize("kind", MAKE)
def test_a_frame_changes_only_its_own_unit(folders: dict[str, Path], kind: str) -> None:
    tower = Tower.load(str(folders[kind]))
    frames = frames_of(4, 24, 40, 8)
    before = tower.encode(frames)
    changed = frames.copy()
    changed[5] = 255 - changed[5]
    after = tower.encode(changed)
    differs = (after != before).flatten(1).any(dim=1)
    assert differs.tolist() == [False, False, True, False]
    # and within it every patch sees it: nothing was lost on the way
    assert (after[2] != before[2]).any(dim=-1).all()


@pytest.mark.parametrize("kind", MAKE)
def test_an_odd_last_frame_is_a_unit_with_itself(folders: dict[str, Path], kind: str) -> None:
    tower = Tower.load(str(folders[kind]))
    frames = frames_of(5, 16, 24, 5)
    odd = tower.encode(frames, batch_frames=4)
    even = tower.encode(np.concatenate([frames, frames[-1:]]), batch_frames=4)
    assert odd.shape == (3, 4, 6, WIDTH)
    assert torch.equal(odd, even)
    assert tower.encode(frames[:1]).shape == (1, 4, 6, WIDTH)
    # how many frames pass together changes nothing but the last bits
    for batch_frames in (1, 3, 16):
        torch.testing.assert_close(
            tower.encode(frames, batch_frames=batch_frames), odd, rtol=1e-5, atol=1e-5
        )


def test_the_order_is_that_of_transformers(window_index: Callable[..., torch.Tensor]) -> None:
    for rows, cols, window in ((6, 10, 2), (12, 8, 2), (2, 14, 3), (8, 8, 4), (10, 10, 1)):
        merge = 2
        sizes = torch.tensor([[1, rows, cols]])
        blocks = window_index(sizes, merge, window * merge * PATCH, PATCH)
        by_block = patch_order(rows, cols, merge, 0).reshape(-1, merge**2)
        expected = by_block[blocks.numpy()].ravel()
        assert patch_order(rows, cols, merge, window).tolist() == expected.tolist()


def renamed(folder: Path, to: Path, change: Callable[[str], str | None]) -> Path:
    """Copy a model's folder, its weights under other names; those of no name are left out."""
    to.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    weights = {change(name): w for name, w in load_file(folder / "model.safetensors").items()}
    kept = {name: weight for name, weight in weights.items() if name is not None}
    save_file(kept, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("kind", MAKE)
def test_the_vision_part_is_the_same_tower_wherever_it_lies(
    folders: dict[str, Path], models: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    whole = Tower.load(str(folders[kind]))
    assert whole.model_type == f"{kind}_vision"
    older = renamed(folders[kind], tmp_path / "older", lambda name: name.removeprefix("model."))
    assert any(n.startswith("visual.") for n in load_file(older / "model.safetensors"))
    newer = renamed(older, tmp_path / "newer", lambda name: f"model.{name}")
    half = tmp_path / "half"
    models[kind].model.visual.save_pretrained(half)
    qwen_processor().save_pretrained(half)
    frames = frames_of(6, 16, 24, 2)
    for folder in (older, newer, half):
        tower = Tower.load(str(folder))
        assert (tower.digest, tower.model_type) == (whole.digest, whole.model_type)
        assert torch.equal(tower.encode(frames), whole.encode(frames))


def test_a_published_config_is_understood(folders: dict[str, Path], tmp_path: Path) -> None:
    """As the hub has it: text settings at the top, more words and no type in `vision_config`."""
    folder = renamed(folders["qwen2_vl"], tmp_path / "published", lambda name: name)
    vision = VISION | {"embed_dim": WIDTH, "hidden_size": LLM_WIDTH, "mlp_ratio": 2}
    vision |= {"in_chans": 3, "spatial_merge_size": 2, "spatial_patch_size": PATCH}
    text = {name: value for name, value in TEXT.items() if name != "rope_parameters"}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = {"model_type": "qwen2_vl", "vision_config": vision, **text, **rope}
    (folder / "config.json").write_text(json.dumps(config))
    frames = frames_of(6, 16, 24, 2)
    tower = Tower.load(str(folder))
    assert torch.equal(tower.encode(frames), Tower.load(str(folders["qwen2_vl"])).encode(frames))


def test_weights_that_are_not_there_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    lost = "visual.blocks.1.mlp.fc1.bias"
    folder = renamed(folders["qwen2_vl"], tmp_path / "a", lambda n: None if n == lost else n)
    with pytest.raises(UserError, match=r"1 of its weights are missing, such as blocks\.1\.mlp"):
        Tower.load(str(folder))


def test_a_processor_of_another_tower_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = renamed(folders["qwen2_vl"], tmp_path / "a", lambda name: name)
    for processor, complaint in (
        (qwen_processor(patch_size=14), "multiples of 28, expected 8"),
        (SiglipImageProcessorPil(size={"height": 24, "width": 24}), "of None, expected 8"),
    ):
        processor.save_pretrained(folder)
        with pytest.raises(UserError, match=complaint):
            Tower.load(str(folder))
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = SiglipVisionConfig(**small, num_attention_heads=2, image_size=24, patch_size=4)
    SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    qwen_processor().save_pretrained(tmp_path / "siglip")
    with pytest.raises(UserError, match="multiples of 8, expected None"):
        Tower.load(str(tmp_path / "siglip"))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(("height", "width"), [(24, 40), (8, 56), (32, 32)])
def test_the_layer_merged_is_what_the_whole_model_gives_its_llm(
    folders: dict[str, Path], models: dict[str, Any], kind: str, height: int, width: int
) -> None:
    tower = Tower.load(str(folders[kind]), layer="merged")
    assert (tower.width, tower.patch) == (LLM_WIDTH, 2 * PATCH)
    assert tower.grid_of(height, width) == (height // 8, width // 8)
    frames = frames_of(3, height, width, 6)
    tokens = tower.encode(frames)
    assert tokens.shape == (3, height // 8, width // 8, LLM_WIDTH)
    sizes = torch.tensor([[3, height // PATCH, width // PATCH]])
    with torch.no_grad():
        given = patchify(tower.normalise(frames), 2, PATCH, 2)
        expected = models[kind].model.visual(given, grid_thw=sizes).pooler_output
    torch.testing.assert_close(tokens.reshape(-1, LLM_WIDTH), expected, rtol=1e-4, atol=1e-5)


def test_merged_tokens_of_several_layers_are_those_that_are_added_to_the_llms_first_layers(
    folders: dict[str, Path], models: dict[str, Any]
) -> None:
    tower = Tower.load(str(folders["qwen3_vl"]), layer="0,1,merged")
    assert (tower.width, tower.patch) == (3 * LLM_WIDTH, 2 * PATCH)
    frames = frames_of(3, 24, 40, 6)
    given = patchify(tower.normalise(frames), 2, PATCH, 2)
    with torch.no_grad():
        theirs = models["qwen3_vl"].model.visual(given, grid_thw=torch.tensor([[3, 6, 10]]))
    expected = torch.cat([*theirs.deepstack_features, theirs.pooler_output], dim=1)
    found = tower.encode(frames).reshape(-1, 3 * LLM_WIDTH)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"no layer 0,merged; use .* -1 to -4, or merged, or 0,1,m"):
        Tower.load(str(folders["qwen3_vl"]), layer="0,merged")
    with pytest.raises(UserError, match=r"no layer 0,1,merged; use a number, -1 to -4, or merged$"):
        Tower.load(str(folders["qwen2_vl"]), layer="0,1,merged")


def test_other_towers_have_no_merged_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = SiglipVisionConfig(**small, num_attention_heads=2, image_size=24, patch_size=4)
    SiglipVisionModel(config).save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no layer merged: merged tokens are those of Qwen"):
        Tower.load(str(tmp_path), layer="merged")
    with pytest.raises(UserError, match="has no layer pooled; use a number, -1 to -4, or merged"):
        Tower.load(str(folders["qwen2_vl"]), layer="pooled")


@pytest.mark.parametrize("kind", MAKE)
def test_a_checkpoint_names_its_tower_as_a_bank_does(folders: dict[str, Path], kind: str) -> None:
    digest = Tower.load(str(folders[kind]), layer="merged").digest
    assert own_tower_digest(folders[kind], ("model.visual.", "visual.")) == digest
