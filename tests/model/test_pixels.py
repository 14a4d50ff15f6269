"""Frames of any size to the tower's pixels: Qwen's sizes, what is refused, values on disk.

Processors of one fixed size are compared with transformers in tests/model/test_tower.py.
"""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil, SiglipImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from model.tower.forward.qwen import patchify
from model.tower.pixels import OwnSize, Pixels
from model.tower.tower import Tower
from model.tower_kinds import find_kind
from shards.errors import UserError

FRAME_SIZES = [(56, 56), (64, 65), (101, 57), (37, 203), (240, 426), (426, 240), (13, 333)]
LIMITS = [
    {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 40},
    {"patch_size": 8, "merge_size": 4, "min_pixels": 32 * 32, "max_pixels": 128 * 128},
    {"patch_size": 14},
]


def tower_of(processor: Any) -> Tower:
    """A tower that has no model: enough to normalise."""
    return Tower(
        name="none",
        model_type="none",
        digest="",
        layer=-1,
        dtype="float32",
        attention="sdpa",
        pixels=Pixels.from_processor(processor),
        patch=processor.patch_size,
        width=0,
        model=torch.nn.Identity(),
        device=torch.device("cpu"),
        kind=find_kind("qwen2_vl"),
        frames_per_unit=2,
    )


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(("height", "width"), FRAME_SIZES)
def test_pixels_of_own_size_are_those_of_transformers(
    limits: dict[str, int], height: int, width: int
) -> None:
    processor = Qwen2VLImageProcessorPil(**limits)
    tower = tower_of(processor)
    side, merge = processor.patch_size, processor.merge_size
    pair = np.random.default_rng(1).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    theirs = processor(images=[Image.fromarray(frame) for frame in pair], return_tensors="pt")
    rows, cols = tower.grid_of(height, width)
    assert theirs["image_grid_thw"].tolist() == [[1, rows, cols]] * 2
    resized = tower.pixels.resize(pair)
    assert resized.shape == (2, rows * side, cols * side, 3)
    ours = patchify(tower.normalise(resized), 2, side, merge)
    # a picture is there twice, once for each frame of a unit: ours has the first, then the second
    first, second = theirs["pixel_values"].view(2, rows * cols, 3, 2, side * side).unbind(0)
    expected = torch.stack([first[:, :, 0], second[:, :, 1]], dim=2).flatten(1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([8, 28, 56]),
    st.integers(1, 200), st.integers(1, 200),
)  # fmt: skip
def test_sizes_are_those_of_transformers(
    height: int, width: int, multiple: int, least: int, more: int
) -> None:
    most = multiple**2 * (least + more)
    pixels = Pixels.from_processor(
        Qwen2VLImageProcessorPil(
            patch_size=multiple // 2, min_pixels=multiple**2 * least, max_pixels=most
        )
    )
    assert pixels.own_size == OwnSize(multiple, multiple**2 * least, most)
    try:
        expected = smart_resize(height, width, multiple, multiple**2 * least, most)
    except ValueError:
        with pytest.raises(UserError, match="200 times as long as wide"):
            pixels.check(height, width)
        return
    pixels.check(height, width)
    assert pixels.output_size(height, width) == expected
    assert pixels.covered(height, width, multiple // 2) == (0.0, 0.0, 1.0, 1.0)


def test_pixels_survive_their_json() -> None:
    clip = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    for processor in (Qwen2VLImageProcessorPil(), clip, SiglipImageProcessorPil()):
        pixels = Pixels.from_processor(processor)
        assert Pixels.from_json(pixels.to_json()) == pixels
    # what is in the fingerprint of every bank of a tower of one size: a new key would change it
    assert set(pixels.to_json()) == {
        "height", "width", "shortest_edge", "resample", "crop", "scale", "mean", "std",
    }  # fmt: skip


def test_sizes_by_an_unknown_rule_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = SiglipImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    with pytest.raises(UserError, match="a rule that is not supported"):
        Pixels.from_processor(processor)
    with pytest.raises(UserError, match="resizes to"):
        Pixels.from_processor(Qwen2VLImageProcessorPil(do_resize=False))
