"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, before and after their merger.

A patch is `temporal_patch_size` (2) frames deep: frames go in by such units, and no attention passes
from one unit to another, so features stay causal by unit. The merger after the tower joins blocks of
`spatial_merge_size` x `spatial_merge_size` patches, so the tower has its patches in order of these
blocks, and Qwen2.5-VL's inside in order of the windows of its attention. The output here is row-major.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.tower.forward.hidden import hidden_state
from model.tower_kinds import Layer, named_layers


def encode(model: Any, pixels: Tensor, layer: Layer) -> Tensor:
    """Return the hidden states of each unit: `(units, patch_rows, patch_cols, width)`.

    For the layer `merged`: the merger's tokens, which go to the LLM, a cell for each block. For
    `5,11,17,merged`: those of all of Qwen3-VL's mergers, the last one's in the last channels.

    pixels: `(frames, 3, height, width)`, whole units of whole blocks.
    """
    config = model.config
    deep, side, merge = config.temporal_patch_size, config.patch_size, config.spatial_merge_size
    patches = patchify(pixels, deep, side, merge)
    units, rows, cols = len(pixels) // deep, pixels.shape[2] // side, pixels.shape[3] // side
    sizes = torch.tensor([[units, rows, cols]], device=pixels.device)
    if isinstance(layer, str):
        output = model(patches, grid_thw=sizes)
        earlier = output.deepstack_features if named_layers(layer) else []
        tokens = torch.cat([*earlier, output.pooler_output], dim=-1)
        return tokens.reshape(units, rows // merge, cols // merge, -1)
    hidden = hidden_state(model, layer, patches, grid_thw=sizes)
    hidden = hidden.unflatten(0, (units, rows * cols))
    window = getattr(config, "window_size", 0) // side // merge  # in blocks
    places = torch.from_numpy(patch_order(rows, cols, merge, window)).to(pixels.device)
    # scattered back: hidden states come in the order of blocks and windows, cells are row-major
    in_rows = torch.empty_like(hidden)
    in_rows[:, places] = hidden
    return in_rows.unflatten(1, (rows, cols))


def lay_out(config: Any, pixels: Tensor) -> Tensor:
    """Return the patches of one frame as its processor lays out a picture, repeated to fill a unit."""
    deep = config.temporal_patch_size
    frames = pixels.expand(deep, -1, -1, -1)
    return patchify(frames, deep, config.patch_size, config.spatial_merge_size)


def patchify(pixels: Tensor, deep: int, side: int, merge: int) -> Tensor:
    """Return patches in order of units and blocks: `(patches, 3 * deep * side * side)`.

    deep: frames of a unit; side: pixels of a patch; merge: patches on a side of a block. The layout is
    that of transformers' Qwen2VLImageProcessor.
    """
    frames, channels, height, width_ = pixels.shape
    blocks = pixels.reshape(
        frames // deep, deep, channels,
        height // side // merge, merge, side,
        width_ // side // merge, merge, side,
    )  # fmt: skip
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * deep * side * side)


def patch_order(rows: int, cols: int, merge: int, window: int) -> np.ndarray:
    """Return the row-major index of each patch, in the tower's order: int64 `(patches,)`.

    By windows of `window` x `window` blocks where it is not 0, then by blocks, then by rows.
    """
    row, col = np.indices((rows, cols)).reshape(2, -1)
    block_row, block_col = row // merge, col // merge
    keys = [block_row, block_col, row, col]
    if window:
        keys = [block_row // window, block_col // window, *keys]
    # lexsort takes the most significant key last
    return np.lexsort(keys[::-1])
