"""Pooling, spans and maps between grids, against NumPy loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model.grid import Grid, cell_shares, pool, resample_map
from shards.errors import UserError

MODES = ("average", "average_floor", "max", "bilinear")
TABLE = {  # side of the patch grid -> side of the cell grid at strides 2, 4, 8: floor, then ceil
    27: ((13, 6, 3), (14, 7, 4)),
    32: ((16, 8, 4), (16, 8, 4)),
    24: ((12, 6, 3), (12, 6, 3)),
    16: ((8, 4, 2), (8, 4, 2)),
    36: ((18, 9, 4), (18, 9, 5)),
}


def random_patches(seed: int, rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, rows, cols, 3)).astype(np.float32)


@pytest.mark.parametrize("side", TABLE)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_the_tabled_grid(side: int, mode: str) -> None:
    floor, ceil = TABLE[side]
    expected = floor if mode in ("average_floor", "max") else ceil
    for stride, cells in zip((2, 4, 8), expected, strict=True):
        assert pool(torch.zeros(1, side, side, 2), stride, mode).shape == (1, cells, cells, 2)
        assert Grid(side, side, stride, mode).cells == cells**2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 19), st.integers(1, 19), st.integers(1, 9), st.sampled_from(MODES[:3]))
def test_a_cell_is_the_mean_or_maximum_of_its_patches(
    rows: int, cols: int, stride: int, mode: str
) -> None:
    if mode != "average" and stride > min(rows, cols):
        return
    patches = random_patches(rows * 100 + cols, rows, cols)
    got = pool(torch.from_numpy(patches), stride, mode).numpy()
    for a in range(got.shape[1]):
        for b in range(got.shape[2]):
            window = patches[:, a * stride : (a + 1) * stride, b * stride : (b + 1) * stride]
            window = window.astype(np.float64)
            expected = window.max((1, 2)) if mode == "max" else window.mean((1, 2))
            np.testing.assert_allclose(got[:, a, b], expected, atol=1e-6)
    whole = math.ceil if mode == "average" else math.floor
    assert got.shape[1:3] == (whole(rows / stride), whole(cols / stride))


def llava_next(frames: torch.Tensor, stride: int, rule: str) -> torch.Tensor:
    """What LLaVA-NeXT makes of `(frames, rows, cols, dim)`, from the description of its pooling.

    `average` and `max` are avg_pool2d and max_pool2d of that stride (floor); `bilinear` interpolates
    to ceil(side / stride), align_corners unset, no antialiasing.
    """
    planes = frames.permute(0, 3, 1, 2)
    if rule == "bilinear":
        size = [math.ceil(side / stride) for side in planes.shape[2:]]
        small = F.interpolate(planes, size=size, mode="bilinear")
    else:
        small = {"average": F.avg_pool2d, "max": F.max_pool2d}[rule](planes, stride)
    return small.permute(0, 2, 3, 1)


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "cols"), [(24, 24), (27, 27), (32, 32), (26, 46), (46, 26), (9, 31)]
)
def test_pooling_is_that_of_llava_next(rows: int, cols: int, stride: int) -> None:
    patches = torch.from_numpy(random_patches(rows * cols, rows, cols))
    for ours, theirs in (("average_floor", "average"), ("max", "max"), ("bilinear", "bilinear")):
        expected = llava_next(patches, stride, theirs)
        torch.testing.assert_close(pool(patches, stride, ours), expected, rtol=0, atol=1e-6)
        assert Grid(rows, cols, stride, ours).cells == expected.shape[1] * expected.shape[2]


def bilinear_axis(values: np.ndarray, count: int) -> np.ndarray:
    """Sample axis 0 at the centres of `count` even cells, half-pixel centres, clamped borders."""
    length = len(values)
    out = []
    for k in range(count):
        place = max((k + 0.5) * length / count - 0.5, 0.0)
        low = min(int(place), length - 1)
        high = min(low + 1, length - 1)
        out.append(values[low] + (place - low) * (values[high] - values[low]))
    return np.stack(out)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 19), st.integers(1, 19), st.integers(1, 9))
def test_bilinear_samples_at_the_centres_of_even_cells(rows: int, cols: int, stride: int) -> None:
    patches = random_patches(7, rows, cols)
    by_row = bilinear_axis(np.moveaxis(patches, 1, 0), math.ceil(rows / stride))
    expected = np.moveaxis(bilinear_axis(np.moveaxis(by_row, 2, 0), math.ceil(cols / stride)), 0, 2)
    got = pool(torch.from_numpy(patches), stride, "bilinear")
    np.testing.assert_allclose(got.numpy(), np.moveaxis(expected, 1, 0), atol=1e-5)


def test_half_precision_features_are_pooled_in_full_precision() -> None:
    patches = torch.full((1, 64, 64, 1), 40000.0, dtype=torch.float16)
    pooled = pool(patches, 64)
    assert pooled.dtype == torch.float32
    assert pooled.item() == 40000.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(MODES))
def test_a_cell_has_the_shares_that_pooling_gives_its_patches(
    patches: int, stride: int, mode: str
) -> None:
    if mode in ("average_floor", "max") and stride > patches:
        return
    grid = Grid(patches, patches, stride, mode)
    spans, shares = grid.row_spans.numpy(), cell_shares(patches, stride, mode).numpy()
    assert spans[0, 0] == 0
    assert (spans[1:, 0] == spans[:-1, 1]).all()
    # each patch alone along the rows, equal along the columns
    alone = torch.eye(patches)[:, :, None, None].expand(-1, -1, patches, -1)
    pooled = pool(alone, stride, "average_floor" if mode == "max" else mode)
    np.testing.assert_allclose(shares.T, pooled[:, :, 0, 0], atol=1e-5)
    np.testing.assert_allclose(shares.sum(1), 1)
    # its patches' places are, pooled, where the cell is
    centres = shares @ ((np.arange(patches) + 0.5) / patches)
    inner = slice(1, -1) if mode == "bilinear" else slice(None)  # clamped at the border
    np.testing.assert_allclose(centres[inner], spans.mean(1)[inner], atol=1e-6)


def test_a_grid_without_cells_is_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"stride 8 with pool max .* 5x27 .* smaller stride"):
        Grid(5, 27, 8, "max")


def grids(mode: str, rows: int, cols: int, slow: int, fast: int) -> tuple[Grid, Grid]:
    return Grid(rows, cols, slow, mode), Grid(rows, cols, fast, mode)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(9, 32), st.integers(9, 32), st.integers(1, 4), st.integers(1, 5),
    st.sampled_from(MODES),
)  # fmt: skip
def test_maps_keep_constant_fields_and_their_rows_sum_to_one(
    rows: int, cols: int, slow: int, more: int, mode: str
) -> None:
    slow_grid, fast_grid = grids(mode, rows, cols, slow, slow + more)
    for source in (slow_grid, fast_grid):
        for target in (slow_grid, fast_grid):
            rows_of_map = resample_map(source, target)
            assert rows_of_map.shape == (target.cells, source.cells)
            assert (rows_of_map >= 0).all()
            np.testing.assert_allclose(rows_of_map.sum(dim=1), 1, atol=1e-6)
            np.testing.assert_allclose(
                rows_of_map @ torch.full((source.cells,), 3.7), 3.7, atol=1e-5
            )
        torch.testing.assert_close(resample_map(source, source), torch.eye(source.cells))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(8, 32), st.integers(8, 32), st.integers(1, 4), st.integers(2, 3),
    st.sampled_from(["average", "average_floor"]),
)  # fmt: skip
def test_resampling_slow_cells_gives_the_fast_cells_where_strides_divide(
    rows: int, cols: int, slow: int, factor: int, mode: str
) -> None:
    if mode == "average_floor" and slow * factor > min(rows, cols):
        return
    slow_grid, fast_grid = grids(mode, rows, cols, slow, slow * factor)
    patches = torch.from_numpy(random_patches(3, rows, cols))
    slow_cells = pool(patches, slow, mode).flatten(1, 2)
    fast_cells = pool(patches, slow * factor, mode).flatten(1, 2)
    moved = resample_map(slow_grid, fast_grid) @ slow_cells
    torch.testing.assert_close(moved, fast_cells, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("rows", "cols"), [(27, 27), (5, 9), (16, 3)])
def test_towards_a_finer_grid_values_are_interpolated_between_centres(rows: int, cols: int) -> None:
    slow, fast = grids("average", rows, cols, 2, 5)
    field = np.random.default_rng(0).normal(size=(fast.rows, fast.cols))
    coarse, fine = [
        [spans.mean(dim=1).numpy() for spans in (g.row_spans, g.col_spans)] for g in (fast, slow)
    ]
    by_row = np.stack([np.interp(fine[0], coarse[0], column) for column in field.T], axis=1)
    expected = np.stack([np.interp(fine[1], coarse[1], row) for row in by_row])
    got = resample_map(fast, slow) @ torch.from_numpy(field.flatten()).float()
    np.testing.assert_allclose(got.view(slow.rows, slow.cols), expected, atol=1e-5)


def test_towards_a_coarser_grid_values_are_shared_by_overlap() -> None:
    source, target = grids("average", 11, 7, 3, 5)  # strides that do not divide each other
    expected = np.zeros((target.cells, source.cells))
    for row in range(11):
        for col in range(7):
            patch_target = row // 5 * target.cols + col // 5
            expected[patch_target, row // 3 * source.cols + col // 3] += 1
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(resample_map(source, target), expected, atol=1e-6)
