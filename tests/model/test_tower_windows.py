"""Towers whose frames are of any shape (SigLIP 2 NaFlex), and whose frames see each other (V-JEPA 2)."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2VisionModel,
    VJEPA2Config,
    VJEPA2Model,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    get_image_size_for_max_num_patches,
)

from model.config import VLMConfig
from model.tower.forward.naflex import lay_out
from model.tower.pixels import MostPatches, Pixels
from model.tower.tower import Tower
from model.tower_kinds import frame_flops, mixes_frames
from shards.errors import UserError
from train.start.pooled import tokens_problem

PATCH, MOST, WIDTH = 4, 40, 16
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
FRAME_SIZES = [(56, 56), (64, 65), (101, 57), (37, 203), (240, 426), (13, 333), (5, 7)]


def frames_of(seed: int, height: int, width: int, count: int) -> np.ndarray:
    shape = (count, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole SigLIP 2 NaFlex on disk; its positions are those of a 4x4 grid."""
    folder = tmp_path_factory.mktemp("naflex")
    vision = SMALL | {"intermediate_size": 24, "patch_size": PATCH, "num_patches": 16}
    text = SMALL | {"intermediate_size": 24, "vocab_size": 20, "max_position_embeddings": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
        for weight in model.parameters():
            weight.data.normal_(std=0.3)
    model.save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=MOST).save_pretrained(folder)
    return folder


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 32), st.integers(1, 1024))
def test_sizes_are_those_of_naflex(height: int, width: int, patch: int, most: int) -> None:
    expected = get_image_size_for_max_num_patches(height, width, patch, most)
    assert MostPatches(patch, most).of(height, width) == expected


@pytest.mark.parametrize(("height", "width"), FRAME_SIZES)
def test_pixels_and_features_of_any_shape_are_those_of_transformers(
    naflex: Path, height: int, width: int
) -> None:
    processor = Siglip2ImageProcessorPil.from_pretrained(naflex)
    theirs: Any = Siglip2VisionModel.from_pretrained(naflex).eval()
    frames = frames_of(1, height, width, 3)
    inputs = processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
    tower = Tower.load(str(naflex), layer=-1)
    grid = tower.grid_of(height, width)
    assert inputs["spatial_shapes"].tolist() == [list(grid)] * 3
    assert tower.covered(height, width) == (0, 0, 1, 1)
    seen, cells = tower.pixels.resize(frames), math.prod(grid)
    ours = lay_out(tower.model.config, tower.normalise(seen))
    assert torch.equal(ours, inputs["pixel_values"][:, :cells].float())
    assert not inputs["pixel_values"][:, cells:].any()
    with torch.no_grad():
        states = theirs(**inputs, output_hidden_states=True).hidden_states
    for layer in (-1, -2, 1):
        tower.layer = layer
        found = tower.encode(seen, batch_frames=2)
        assert found.shape == (3, *grid, WIDTH)
        torch.testing.assert_close(found.flatten(1, 2), states[layer][:, :cells], atol=1e-4, rtol=0)


def test_naflex_is_one_tower_alone_and_in_a_pair(naflex: Path, tmp_path: Path) -> None:
    pair = Tower.load(str(naflex))
    Siglip2VisionModel.from_pretrained(naflex).save_pretrained(tmp_path)
    Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=MOST).save_pretrained(tmp_path)
    alone = Tower.load(str(tmp_path))
    assert (pair.digest, pair.model_type) == (alone.digest, "siglip2_vision_model")
    assert Pixels.from_json(json.loads(json.dumps(pair.pixels.to_json()))) == pair.pixels
    assert frame_flops(pair.model.config.to_dict(), 40)
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=MOST).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="multiples of 8, expected 4"):
        Tower.load(str(tmp_path))


WINDOW = 6
"""Frames that see each other."""


@pytest.fixture(scope="module")
def vjepa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V-JEPA 2 on disk with the file of its own processor, which needs torchvision."""
    folder = tmp_path_factory.mktemp("vjepa")
    predictor = {"pred_hidden_size": 6, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1}
    shape = {"patch_size": 8, "crop_size": 32, "frames_per_clip": WINDOW, "mlp_ratio": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VJEPA2Model(VJEPA2Config(**SMALL, **predictor, **shape))
        for weight in model.parameters():
            weight.data.normal_(std=0.3)
    model.save_pretrained(folder)
    written = {"video_processor_type": "VJEPA2VideoProcessor", "crop_size": {"height": 32}}
    written["crop_size"] |= {"width": 32}  # type: ignore[operator]
    (folder / "video_preprocessor_config.json").write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 15])
def test_frames_pass_in_windows_each_alone(vjepa: Path, count: int, layer: int) -> None:
    """The reference: transformers' model on six frames at a time, the last one twice where one lacks."""
    tower = Tower.load(str(vjepa), layer=layer)
    assert (tower.frames_per_unit, tower.window, tower.grid_of(90, 160)) == (2, WINDOW, (4, 4))
    assert (tower.pixels.height, tower.pixels.crop) == (int(32 * 256 / 224), (32, 32))
    theirs: Any = VJEPA2Model.from_pretrained(vjepa).eval()
    frames = tower.pixels.resize(frames_of(2, 40, 60, count))
    whole = np.concatenate([frames, frames[-1:]]) if count % 2 else frames
    expected = []
    for first in range(0, len(whole), WINDOW):
        pixels = tower.normalise(whole[first : first + WINDOW])[None]
        with torch.no_grad():
            states = theirs(
                pixel_values_videos=pixels, skip_predictor=True, output_hidden_states=True
            ).hidden_states
        expected.append(states[layer][0].unflatten(0, (-1, 4, 4)))
    for batch_frames in (1, 16):  # which changes nothing here
        found = tower.encode(frames, batch_frames=batch_frames)
        torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-4)
    stored, _ = tower.features(frames, (1, 2), batch_frames=4, threads=1)
    np.testing.assert_array_equal(stored[1], tower.encode(frames).half().numpy())


def test_a_frame_changes_earlier_ones_of_its_window(vjepa: Path) -> None:
    """Which is why the frame-causal loss is refused over them."""
    tower = Tower.load(str(vjepa))
    frames = tower.pixels.resize(frames_of(3, 32, 32, 2 * WINDOW))
    changed = frames.copy()
    changed[WINDOW - 1] = 255 - changed[WINDOW - 1]
    differs = (tower.encode(changed) != tower.encode(frames)).flatten(1).any(dim=1)
    assert differs.tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("tower", ["vjepa2", "siglip_vision_model"])
@pytest.mark.parametrize("weight", [0.0, 0.15])
def test_the_frame_causal_loss_is_refused_over_towers_that_mix_frames(
    tower: str, weight: float
) -> None:
    problem = tokens_problem(VLMConfig(loss_weight=weight), {"tower_type": tower, "layer": -2}, {4})
    assert mixes_frames(tower) == (tower == "vjepa2")
    if weight and tower == "vjepa2":
        assert problem is not None
        assert "see later ones" in problem
        assert "set loss_weight: 0" in problem
        assert len(problem.splitlines()) == 1
    else:
        assert problem is None
