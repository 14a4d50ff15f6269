"""Pool banked cells into coarser cells, equal to pooling the tower's patches directly.

coarse = pool_cells(features, patch_grid=(27, 27), banked=4, stride=8, mode="average")

The only difference is the rounding of the banked cells; with `max` there is none, because rounding is
monotonic. A cell at the border, of fewer patches, is weighted by its number of patches.
"""

import numpy as np

from shards.format.codec import as_float32

NESTING = ("average", "average_floor", "max")
"""Pool modes whose coarse cells consist of whole fine cells. `bilinear` interpolates between patches."""


def pool_cells(
    features: np.ndarray, patch_grid: tuple[int, int], banked: int, stride: int, mode: str
) -> np.ndarray:
    """Return cells of `stride` patches per side, pooled from cells of `banked`, which divides it.

    features: float16, or bfloat16 as uint16, `(frames, rows, cols, dim)`; patch_grid: (rows, columns) of
    the tower's output, at least `stride` each. Returns float32.
    """
    assert mode in NESTING, mode
    assert stride % banked == 0, (banked, stride)
    # Pooled in float32 and rounded once at the end, as patches are in `encode`.
    values = as_float32(features)
    for axis, patches in ((1, patch_grid[0]), (2, patch_grid[1])):
        values = _pool_axis(values, axis, patches, banked, stride, mode)
    return values


def _pool_axis(
    values: np.ndarray, axis: int, patches: int, banked: int, stride: int, mode: str
) -> np.ndarray:
    together = stride // banked
    if mode != "average":  # these modes drop incomplete cells at the border
        values = values.take(range(patches // stride * together), axis)
    firsts = np.arange(0, values.shape[axis], together)
    if mode == "max":
        return np.maximum.reduceat(values, firsts, axis)
    # A mean of means must be weighted by the patches behind each: cells at the border have fewer.
    begins = banked * np.arange(values.shape[axis])
    held = np.minimum(patches - begins, banked).astype(np.float32)  # patches of each cell
    shares = held / np.repeat(np.add.reduceat(held, firsts), together)[: len(held)]
    shape = [1] * values.ndim
    shape[axis] = len(held)
    return np.add.reduceat(values * shares.reshape(shape), firsts, axis)
