"""Checks of a tower before it is used: our pixels against its own image processor's, and one forward.

A processor may do more than its values say: swap channels, shift levels, crop in its own way. So a test
picture of each shape passes through transformers' processor and through ours.
"""

from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.tower.pixels import Pixels
from model.tower_kinds import TowerKind, named
from shards.errors import UserError, first_line

SHAPES = ((90, 150), (211, 120))
"""(height, width) of the test pictures: landscape and portrait."""
ROUNDING = 1e-4
"""Largest difference of normalised values: float32 is exact to about 1e-6 of them, and one level of 255
is 4e-3 before normalising."""


class Tried(Protocol):
    """The part of `Tower` that the checks use."""

    name: str
    pixels: Pixels
    patch: int
    frames_per_unit: int
    dtype: str
    model: Any
    kind: TowerKind

    def normalise(self, frames: np.ndarray) -> Tensor: ...

    def patches(self, pixels: Tensor) -> Tensor: ...


def check_processor(tower: Tried, processor: Any) -> None:
    """Raise UserError for an image processor whose pixels differ from ours on a test picture.

    processor: of transformers, with its Pillow backend.
    """
    kind = type(processor).__name__
    for shape in SHAPES:
        try:
            tower.pixels.check(*shape)
        except UserError:  # a crop larger than the frame: each such clip is refused by name
            continue
        picture = test_picture(*shape)
        try:
            theirs = processor(images=[Image.fromarray(picture)], return_tensors="np")
        except Exception as error:  # a processor's own code may raise anything
            raise UserError(
                f"tower {tower.name}: its image processor {kind} cannot read a picture of "
                f"{shape[0]}x{shape[1]}: {first_line(error)}"
            ) from None
        values = np.asarray(theirs["pixel_values"], np.float32)
        ours = _ours(tower, picture)
        if "pixel_attention_mask" in theirs:  # NaFlex pads its row of patches
            values = values[:, np.asarray(theirs["pixel_attention_mask"])[0] > 0]
        if values.shape != ours.shape or np.abs(values - ours).max() > ROUNDING:
            far = (
                f"by up to {np.abs(values - ours).max():.3g}"
                if values.shape == ours.shape
                else (f"in shape: {values.shape}, ours {ours.shape}")
            )
            raise UserError(
                f"tower {tower.name}: its image processor {kind} does more to a picture than is known "
                f"here: on a test picture its pixels differ from ours {far}; take another tower, or "
                "one of its processors that only resizes, crops, rescales and normalises"
            )


def check_size(tower: Tried) -> None:
    """Raise UserError where the tower's forward fails on pixels of its image processor's size."""
    rows, cols = tower.pixels.output_size(*SHAPES[0])
    pixels = tower.normalise(np.zeros((tower.frames_per_unit, rows, cols, 3), np.uint8))
    try:
        tower.patches(pixels)
    except torch.OutOfMemoryError:
        raise UserError(
            f"tower {tower.name}: the device has no memory for one frame; try --device cpu"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"tower {tower.name}: it cannot take the {rows}x{cols} pixels that its image processor "
            f"makes: {first_line(error)}; correct the sizes in "
            "preprocessor_config.json"
        ) from None


def test_picture(height: int, width: int) -> np.ndarray:
    """Return uint8 `(height, width, 3)`: edges, gradients and noise, different in each channel."""
    # each channel has its own content, so that swapped channels are seen, and edges show another filter
    row, col = np.mgrid[:height, :width]
    picture = np.stack(
        [row * 255 // height, col * 255 // width, (row // 7 + col // 5) % 2 * 255], 2
    )
    picture[height // 4 : height // 2, width // 3 : width // 2] = (250, 20, 120)
    noise = np.random.default_rng(0).integers(-20, 21, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def _ours(tower: Tried, picture: np.ndarray) -> np.ndarray:
    """Return our pixels of a picture, fp32, in the layout of the tower's image processor."""
    own = tower.dtype
    try:
        tower.dtype = "float32"  # that of the processor's pixels
        values = tower.normalise(tower.pixels.resize(picture[None]))
    finally:
        tower.dtype = own
    if tower.kind.lay_out:
        values = named(tower.kind.lay_out)(tower.model.config, values)
    return values.cpu().numpy()
