"""The vision tower of SigLIP 2 NaFlex, which takes pictures of any shape: patches and their grid's sides.

All frames of a clip have one shape, so no patch is padding and none is masked.
"""

from typing import Any

import torch
from torch import Tensor

from model.tower.forward.hidden import hidden_state
from model.tower_kinds import Layer


def encode(model: Any, pixels: Tensor, layer: Layer) -> Tensor:
    """Return the hidden states of each frame: `(frames, patch_rows, patch_cols, width)`.

    pixels: `(frames, 3, height, width)`, sides multiples of the patch.
    """
    side = model.config.patch_size
    grid = [length // side for length in pixels.shape[2:]]
    patches = lay_out(model.config, pixels)
    shapes = torch.tensor([grid] * len(pixels), device=pixels.device)
    # the model asks for a mask; in a clip, whose frames have one shape, no patch is padding
    every = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
    assert isinstance(layer, int), "it has no merger"
    known = {"pixel_attention_mask": every, "spatial_shapes": shapes}
    return hidden_state(model, layer, pixel_values=patches, **known).unflatten(1, grid)


def lay_out(config: Any, pixels: Tensor) -> Tensor:
    """Return patches, row-major, each flat as (y, x, channel): `(frames, patches, side * side * 3)`."""
    side = config.patch_size
    blocks = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # f, c, rows, y, cols, x
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
