"""What part of a frame the patches cover: held against which pixels change any feature at all.

pytest tests/model/test_covered.py
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    Qwen2VLImageProcessorPil,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    VJEPA2Config,
    VJEPA2Model,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from model.tower.pixels import FITS, MostPatches, Pixels
from model.tower.tower import Tower
from model.tower_kinds import KINDS, find_kind, patch_of
from shards.errors import UserError

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
QWEN = {"depth": 1, "num_heads": 1}


@dataclass(frozen=True)
class Shape:
    """Numbers of a tower and its processor."""

    patch: int
    side: int
    """Of the square that the tower is given, where all frames are given one size."""
    edge: int
    """That the shorter side is resized to, where a square is cut out."""


def squeezed(shape: Shape) -> Any:
    return SiglipImageProcessorPil(size={"height": shape.side, "width": shape.side})


def cropped(kind: Any) -> Callable[[Shape], Any]:
    def processor(shape: Shape) -> Any:
        square = {"height": shape.side, "width": shape.side}
        return kind(size={"shortest_edge": shape.edge}, crop_size=square)

    return processor


def of_own_size(shape: Shape) -> Any:
    blocks = 4 * shape.patch**2
    return Qwen2VLImageProcessorPil(
        patch_size=shape.patch, min_pixels=blocks, max_pixels=9 * blocks
    )


def of_own_shape(shape: Shape) -> Any:
    return Siglip2ImageProcessorPil(patch_size=shape.patch, max_num_patches=4)


def naflex(shape: Shape) -> Any:
    return Siglip2VisionModel(Siglip2VisionConfig(**SMALL, patch_size=shape.patch, num_patches=4))


def vjepa2(shape: Shape) -> Any:
    predictor = {"pred_hidden_size": 6, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1}
    sizes = {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"hidden_size": 12}
    shapes = {"patch_size": shape.patch, "crop_size": shape.side, "frames_per_clip": 2}
    return VJEPA2Model(VJEPA2Config(**sizes, **predictor, **shapes, mlp_ratio=1))


def plain(config: Any, model: Any, **more: Any) -> Callable[[Shape], Any]:
    return lambda shape: model(
        config(**SMALL, image_size=shape.side, patch_size=shape.patch, **more)
    )


def qwen2(shape: Shape) -> Any:
    sizes = QWEN | {"embed_dim": 8, "hidden_size": 8, "mlp_ratio": 1}
    return Qwen2VisionTransformerPretrainedModel(
        Qwen2VLVisionConfig(**sizes, patch_size=shape.patch)
    )


def qwen2_5(shape: Shape) -> Any:
    sizes = QWEN | {"hidden_size": 8, "out_hidden_size": 8, "intermediate_size": 8}
    sizes |= {"window_size": 4 * shape.patch, "fullatt_block_indexes": [0]}
    return Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(**sizes, patch_size=shape.patch)
    )


def qwen3(shape: Shape) -> Any:
    sizes = QWEN | {"hidden_size": 8, "out_hidden_size": 8, "intermediate_size": 8}
    sizes |= {"num_position_embeddings": 16, "deepstack_visual_indexes": []}
    return Qwen3VLVisionModel(Qwen3VLVisionConfig(**sizes, patch_size=shape.patch))


MADE: dict[str, list[tuple[Callable[[Shape], Any], Callable[[Shape], Any]]]] = {
    "siglip": [
        (plain(SiglipVisionConfig, SiglipVisionModel), squeezed),
        (plain(SiglipVisionConfig, SiglipVisionModel), cropped(CLIPImageProcessorPil)),
    ],
    "clip": [(plain(CLIPVisionConfig, CLIPVisionModel), cropped(CLIPImageProcessorPil))],
    "dinov2": [
        (plain(Dinov2Config, Dinov2Model), cropped(BitImageProcessorPil)),
        (plain(Dinov2Config, Dinov2Model), squeezed),
    ],
    "dinov2_with_registers": [
        (
            plain(Dinov2WithRegistersConfig, Dinov2WithRegistersModel, num_register_tokens=2),
            cropped(BitImageProcessorPil),
        )
    ],
    "dinov3_vit": [
        (
            plain(DINOv3ViTConfig, DINOv3ViTModel, num_register_tokens=1),
            cropped(BitImageProcessorPil),
        )
    ],
    "internvl": [(plain(InternVLVisionConfig, InternVLVisionModel), squeezed)],
    "siglip2": [(naflex, of_own_shape)],
    "vjepa2": [(vjepa2, cropped(BitImageProcessorPil))],
    "qwen2_vl": [(qwen2, of_own_size)],
    "qwen2_5_vl": [(qwen2_5, of_own_size)],
    "qwen3_vl": [(qwen3, of_own_size)],
}
"""By model type, towers of it and what makes their pixels."""
ROWS = [(name, *pair) for name, pairs in MADE.items() for pair in pairs]
BY_LINE = [
    pytest.param(*row, marks=pytest.mark.slow) if row[0] == "vjepa2" else row for row in ROWS
]
"""Frames that attend to each other are tried one by one, which takes ten times as long."""


def tower_of(kind: str, model: Any, processor: Any) -> Tower:
    row, config = find_kind(kind), model.config
    model = model.requires_grad_(False).eval()
    for weight in model.parameters():
        weight.data.normal_(std=0.3)
    return Tower(
        name="made here",
        model_type=kind,
        digest="",
        layer=-1,
        dtype="float32",
        attention="sdpa",
        pixels=Pixels.from_processor(processor),
        patch=patch_of(config.to_dict()),
        width=getattr(config, row.width),
        model=model,
        device=torch.device("cpu"),
        kind=row,
        frames_per_unit=row.frames_of(config),
        window=row.window_of(config),
    )


def seen_by_trying(tower: Tower, height: int, width: int, seed: int) -> list[tuple[int, int]]:
    """Return (first, last + 1) of the rows, and of the columns, of which any changes any feature."""
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    spans = []
    for axis, length in enumerate((height, width)):
        tried = np.stack([frame] * (length + 1))
        for place in range(length):
            line = tried[place].swapaxes(0, axis)[place]
            line[:] = np.where(line < 128, 255, 0)  # far from what it was
        frames = tower.pixels.resize(tried).repeat(tower.frames_per_unit, axis=0)
        # frames that see each other are tried alone
        each = tower.frames_per_unit if tower.window else len(frames)
        parts = [frames[k : k + each] for k in range(0, len(frames), each)]
        found = torch.cat([tower.encode(part, batch_frames=len(part)) for part in parts])
        change = (found - found[-1]).abs().amax(dim=(1, 2, 3))[:-1]
        places = torch.nonzero(change > 1e-4).flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1))
        spans.append((places[0], places[-1] + 1))
    return spans


def test_every_kind_of_tower_is_tried() -> None:
    assert set(MADE) == {kind.model_types[0] for kind in KINDS}


@pytest.mark.parametrize(("kind", "make", "processor"), BY_LINE)
@given(
    shape=st.builds(
        Shape, patch=st.integers(2, 9), side=st.integers(9, 24), edge=st.integers(9, 30)
    ),
    longer=st.integers(0, 15),
    tall=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=12, deadline=None)
def test_the_covered_part_is_that_of_the_pixels_that_change_a_feature(
    kind: str, make: Any, processor: Any, shape: Shape, longer: int, tall: bool, seed: int
) -> None:
    assume(shape.edge >= shape.side >= shape.patch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = tower_of(kind, make(shape), processor(shape))
    # frames that resizing leaves as they are, so that every pixel is one of the tower's
    short = shape.edge if tower.pixels.shortest_edge else shape.side
    size = (short, short + longer) if tower.pixels.shortest_edge else (short, short)
    if tower.pixels.own_size:
        multiple = tower.pixels.own_size.multiple
        size = multiple, multiple * (1 + longer % 4)
        if isinstance(tower.pixels.own_size, MostPatches):
            size = multiple, multiple * tower.pixels.own_size.patches
    height, width = size[::-1] if tall else size
    assert tower.pixels.resized(height, width) == (height, width)
    y0, x0, y1, x1 = tower.covered(height, width)
    rows, cols = seen_by_trying(tower, height, width, seed)
    assert (y0 * height, y1 * height) == pytest.approx(rows, abs=1e-9)
    assert (x0 * width, x1 * width) == pytest.approx(cols, abs=1e-9)
    if shape.side % shape.patch == 0 and not tower.pixels.shortest_edge:
        assert (y0, x0, y1, x1) == (0, 0, 1, 1)


SIZES = [(31, 57), (57, 31), (90, 45), (21, 21)]
FITTED = [(*row, None) for row in ROWS] + [
    (*row, fit) for row in ROWS if row[2] not in (of_own_size, of_own_shape) for fit in FITS
]
FITTED_BY_LINE = [
    pytest.param(*row, marks=pytest.mark.slow) if row[0] == "vjepa2" else row for row in FITTED
]


@pytest.mark.parametrize(("kind", "make", "processor", "fit"), FITTED_BY_LINE)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_so_of_frames_of_any_size(
    kind: str, make: Any, processor: Any, fit: str | None, height: int, width: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = tower_of(kind, make(Shape(7, 20, 23)), processor(Shape(7, 20, 23)))
    if fit:
        own = tower.grid_of(height, width)
        tower.fit(fit)
        assert tower.grid_of(height, width) == own
    y0, x0, y1, x1 = tower.covered(height, width)
    resized = tower.pixels.resized(height, width)
    spans = zip(
        seen_by_trying(tower, height, width, 0),
        ((y0 * height, y1 * height), (x0 * width, x1 * width)),
        (height, width),
        resized,
        strict=True,
    )
    for (first, last), (begin, end), length, pixels in spans:
        reach = 2 * max(1.0, length / pixels) + 1  # of a bicubic filter, in pixels of the frame
        begin, end = max(begin, 0), min(end, length)  # of a frame that is padded
        assert begin - reach <= first <= begin + 1
        assert end - 1 <= last <= end + reach


@pytest.mark.parametrize(("kind", "make", "processor", "fit"), FITTED)
@pytest.mark.parametrize(("height", "width"), [(68, 160), (160, 68), (90, 120)])
def test_a_mark_is_seen_where_the_covered_part_says(
    kind: str, make: Any, processor: Any, fit: str | None, height: int, width: int
) -> None:
    """A small mark changes the patches over it alone, so that cells and answers mean one place."""
    shape = Shape(4, 40, 44)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = tower_of(kind, make(shape), processor(shape))
    if fit:
        tower.fit(fit)
    tower.layer = 0  # before patches see each other
    y0, x0, y1, x1 = tower.covered(height, width)
    rows, cols = tower.grid_of(height, width)
    frames = np.full((17, height, width, 3), 128, np.uint8)
    side, seen = 6, 0
    corners = [((height - side) * y // 3, (width - side) * x // 3) for y, x in np.ndindex(4, 4)]
    for frame, (top, left) in zip(frames[1:], corners, strict=True):
        frame[top : top + side, left : left + side] = 255
    each = tower.frames_per_unit
    pixels = tower.pixels.resize(frames).repeat(each, axis=0)
    before, *after = tower.encode(pixels, batch_frames=len(pixels))
    for (top, left), found in zip(corners, after, strict=True):
        change = (found - before).abs().sum(dim=-1).double()
        centre = (top + side / 2) / height, (left + side / 2) / width
        inside = y0 <= centre[0] <= y1 and x0 <= centre[1] <= x1
        if change.max() < 1e-3:
            assert not inside
            continue
        seen += 1
        places = [
            (torch.arange(count, dtype=torch.float64) + 0.5) / count for count in (rows, cols)
        ]
        row = y0 + (y1 - y0) * float(change.sum(dim=1) @ places[0] / change.sum())
        col = x0 + (x1 - x0) * float(change.sum(dim=0) @ places[1] / change.sum())
        # to a patch, and what of the mark is cut off
        assert abs(row - centre[0]) < (y1 - y0) / rows + side / 2 / height
        assert abs(col - centre[1]) < (x1 - x0) / cols + side / 2 / width
    assert seen >= 4
    share = tower.pixels.cut_away(height, width, tower.patch)
    kept = (min(y1, 1) - max(y0, 0)) * (min(x1, 1) - max(x0, 0))
    assert share == pytest.approx(1 - kept)
    assert fit in (None, "crop") or share < 1e-9


@pytest.mark.parametrize(("kind", "make", "processor"), ROWS)
@pytest.mark.parametrize("fit", FITS)
def test_what_keeps_its_own_shape_is_not_fitted_and_a_bank_knows_how_others_were(
    kind: str, make: Any, processor: Any, fit: str
) -> None:
    def made() -> Tower:
        return tower_of(kind, make(Shape(7, 20, 23)), processor(Shape(7, 20, 23)))

    tower, again = made(), made()
    if tower.pixels.own_size:
        with pytest.raises(
            UserError, match=r"keep a shape of their own, and nothing is cut; leave"
        ):
            tower.fit(fit)
        return
    tower.fit(fit)
    processor_of_bank = json.loads(json.dumps(tower.pixels.to_json()))
    assert Pixels.from_json(processor_of_bank) == tower.pixels
    again.fit_like(processor_of_bank)
    assert again.pixels == tower.pixels
    again.fit_like({"mean": "of another processor"})
    assert again.pixels == tower.pixels


def test_padding_has_the_mean_colour_and_the_frame_in_its_middle() -> None:
    pixels = Pixels.from_processor(squeezed(Shape(4, 20, 20))).fitted("pad")
    frame = np.random.default_rng(0).integers(0, 256, (2, 50, 100, 3), dtype=np.uint8)
    seen = pixels.resize(frame)
    assert seen.shape == (2, 20, 20, 3)
    assert (seen[:, :5] == 128).all()
    assert (seen[:, 15:] == 128).all()
    for k in range(2):
        resized = Image.fromarray(frame[k]).resize((20, 10), Image.Resampling(pixels.resample))
        assert np.array_equal(seen[k, 5:15], np.asarray(resized))
    assert pixels.covered(50, 100, 4) == (-0.5, 0.0, 1.5, 1.0)


def test_so400m_leaves_six_of_384_pixels() -> None:
    tower = tower_of(
        "siglip", plain(SiglipVisionConfig, SiglipVisionModel)(Shape(14, 384, 384)),
        squeezed(Shape(14, 384, 384)),
    )  # fmt: skip
    assert tower.grid_of(720, 1280) == (27, 27)
    assert tower.covered(720, 1280) == (0.0, 0.0, 378 / 384, 378 / 384)
