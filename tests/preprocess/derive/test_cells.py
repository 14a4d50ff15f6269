"""Cells pooled of banked cells are those of the patches, within the rounding of what was banked.

pytest tests/preprocess/derive/test_cells.py
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.grid import pool
from preprocess.derive.cells import NESTING, pool_cells
from shards.format.codec import as_float32, from_float32

HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Of a value's size, at most, is what rounding it changes."""
SMALLEST = {"float16": 2.0**-25, "bfloat16": 0.0}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", NESTING)
@settings(max_examples=40)
@given(
    rows=st.integers(1, 29),
    cols=st.integers(1, 29),
    banked=st.integers(1, 5),
    together=st.integers(2, 4),
    scale=st.sampled_from([1e-6, 1.0, 900.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_cells_of_cells_are_cells_of_patches(
    mode: str, dtype: str, rows: int, cols: int, banked: int, together: int, scale: float, seed: int
) -> None:
    stride = banked * together
    if mode != "average" and min(rows, cols) < stride:
        return  # leaves no cell
    patches = np.random.default_rng(seed).normal(scale=scale, size=(2, rows, cols, 3))
    patches = patches.astype(np.float32)
    fine, coarse = (pool(torch.from_numpy(patches), s, mode).numpy() for s in (banked, stride))
    stored = from_float32(fine, dtype)
    got = pool_cells(stored, (rows, cols), banked, stride, mode)
    assert got.shape == coarse.shape
    if mode == "max":
        np.testing.assert_array_equal(from_float32(got, dtype), from_float32(coarse, dtype))
        return
    # each banked cell is off by half a step of its own size at most, and so is their mean
    largest = pool_cells(
        from_float32(np.abs(as_float32(stored)), dtype), (rows, cols), banked, stride, mode
    )
    bound = largest * HALF_ULP[dtype] * 1.01 + SMALLEST[dtype] + np.abs(patches).max() * 1e-6
    assert (np.abs(got - coarse) <= bound).all()


def test_a_ragged_border_counts_for_the_patches_that_it_has() -> None:
    """Seven patches in fours: a cell of four and one of three; a plain mean of the two is wrong."""
    patches = torch.arange(7.0).reshape(1, 1, 7, 1)
    fine = pool(patches, 4).half().numpy()
    assert fine.ravel().tolist() == [1.5, 5.0]
    assert pool_cells(fine, (1, 7), 4, 8, "average").item() == pytest.approx(3.0)


def test_the_largest_values_stay_finite() -> None:
    most = np.full((1, 7, 7, 1), 65504, np.float16)
    assert (from_float32(pool_cells(most, (27, 27), 4, 8, "average"), "float16") == 65504).all()
    huge = np.full((1, 7, 7, 1), 0x7F7F, np.uint16)
    assert (from_float32(pool_cells(huge, (27, 27), 4, 8, "average"), "bfloat16") == 0x7F7F).all()
