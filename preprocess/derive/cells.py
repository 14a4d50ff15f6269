"""Cells of a bank -> coarser cells, as if the tower's patches had been pooled at once.

coarse = pool_again(features, patch_grid=(27, 27), banked=4, stride=8, mode="average")

What is lost is the rounding of the banked cells: `max` loses nothing, since rounding keeps order. A
cell at the border, of fewer patches, counts for as many as it has.
"""

import numpy as np

from shards.format.codec import as_float32

NESTING = ("average", "average_floor", "max")
"""Pool modes of which coarse cells are made of whole fine ones. `bilinear` reads patches between."""


def pool_again(
    features: np.ndarray, patch_grid: tuple[int, int], banked: int, stride: int, mode: str
) -> np.ndarray:
    """Return cells of `stride` patches on a side, of those of `banked`, which divides it.

    features: float16, or uint16 that holds bfloat16, `(frames, rows, cols, dim)`; patch_grid: (rows,
    columns) of the tower's output, of which both strides leave cells. Returns float32.
    """
    assert mode in NESTING, mode
    assert stride % banked == 0, (banked, stride)
    values = as_float32(features)
    for axis, patches in ((1, patch_grid[0]), (2, patch_grid[1])):
        values = _pool_axis(values, axis, patches, banked, stride, mode)
    return values


def _pool_axis(
    values: np.ndarray, axis: int, patches: int, banked: int, stride: int, mode: str
) -> np.ndarray:
    together = stride // banked
    if mode != "average":  # trailing patches are dropped, and the cells that hold them
        values = values.take(range(patches // stride * together), axis)
    firsts = np.arange(0, values.shape[axis], together)
    if mode == "max":
        return np.maximum.reduceat(values, firsts, axis)
    begins = banked * np.arange(values.shape[axis])
    held = np.minimum(patches - begins, banked).astype(np.float32)  # patches of each cell
    shares = held / np.repeat(np.add.reduceat(held, firsts), together)[: len(held)]
    shape = [1] * values.ndim
    shape[axis] = len(held)
    return np.add.reduceat(values * shares.reshape(shape), firsts, axis)
