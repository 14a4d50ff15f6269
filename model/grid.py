"""Patch grids cut into cells: pooling, cell spans and centres, maps between grids.

A grid is the tower's patches (rows, columns) cut with a stride; a cell is `stride` patches on a
side, the last one smaller where the stride does not divide the grid. Grids need not be square.
The `average` and `bilinear` rules make ceil(n / stride) cells, `average_floor` and `max`
floor(n / stride), dropping trailing patches (LLaVA-NeXT, `llava_arch.py` get_2dPool).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from shards.errors import UserError


@dataclass(frozen=True)
class Grid:
    """One stride's cells over a patch grid. Spans are in [0, 1], fractions of the patch grid."""

    patch_rows: int
    patch_cols: int
    stride: int
    mode: str = "average"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise UserError(
                f"stride {self.stride} with pool {self.mode} leaves no cell of a "
                f"{self.patch_rows}x{self.patch_cols} patch grid; use a smaller stride or `average`"
            )

    @property
    def rows(self) -> int:
        """Number of cells along the height."""
        return num_cells(self.patch_rows, self.stride, self.mode)

    @property
    def cols(self) -> int:
        """Number of cells along the width."""
        return num_cells(self.patch_cols, self.stride, self.mode)

    @property
    def cells(self) -> int:
        """Number of cells of a frame, so of its tokens."""
        return self.rows * self.cols

    @property
    def row_spans(self) -> Tensor:
        """`cell_spans` along the height."""
        return cell_spans(self.patch_rows, self.stride, self.mode)

    @property
    def col_spans(self) -> Tensor:
        """`cell_spans` along the width."""
        return cell_spans(self.patch_cols, self.stride, self.mode)

    def order(self, *, by_columns: bool) -> Tensor:
        """Return the place of each cell among those of its frame: int64 `(cells,)`, cells row by row."""
        places = torch.arange(self.cells)
        return places.view(self.cols, self.rows).T.flatten() if by_columns else places


def num_cells(patches: int, stride: int, mode: str) -> int:
    """Return the number of cells along an axis of so many patches; 0 if the stride leaves none."""
    return -(-patches // stride) if mode in ("average", "bilinear") else patches // stride


# a run has a handful of frame sizes and two strides, but asks for their spans at every step
@lru_cache(maxsize=256)
def cell_spans(patches: int, stride: int, mode: str) -> Tensor:
    """Return each cell's (start, end) along one axis: float64 `(cells, 2)`, fractions of the axis.

    `bilinear` samples the grid evenly, so its cells have even spans.
    """
    count = num_cells(patches, stride, mode)
    if mode == "bilinear":
        # `F.interpolate` scales by size: its samples are even, whatever the stride leaves over
        edges = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    else:
        edges = torch.arange(count + 1, dtype=torch.float64) * stride
        # a last window over the border has the patches that are there: 3 of 4 for 27 patches at stride 4
        edges = edges.clamp(max=patches) / patches
    return torch.stack([edges[:-1], edges[1:]], dim=1)


def cell_shares(patches: int, stride: int, mode: str) -> Tensor:
    """Return each patch's share in each cell of an axis: float64 `(cells, patches)`, rows sum to 1.

    What `pool` does along one axis, of `max` what it does on average: so pooled are also patches' places.
    """
    if mode == "bilinear":
        # of a cell's patches it reads the two around the centre, for an even span may end inside a patch
        taps = F.interpolate(
            torch.eye(patches, dtype=torch.float64)[None],
            size=num_cells(patches, stride, mode),
            mode="linear",
        )
        return taps[0].T
    centres = (torch.arange(patches, dtype=torch.float64) + 0.5) / patches
    start, end = cell_spans(patches, stride, mode).unbind(1)
    inside = ((centres >= start[:, None]) & (centres < end[:, None])).double()
    return inside / inside.sum(dim=1, keepdim=True)


def pool(features: Tensor, stride: int, mode: str = "average") -> Tensor:
    """Pool patches into cells in fp32.

    features: `(frames, patch_rows, patch_cols, dim)` -> fp32 `(frames, cell_rows, cell_cols, dim)`.
    `average` is the mean of the patches that a cell really has, edge cells included.
    """
    # `average` is the default because the others drop patches of a 27x27 grid (SigLIP at 384 pixels):
    # at stride 4 `average_floor` and `max` lose 21 % of them, `bilinear` reads 23 % of them.
    grid = Grid(features.shape[1], features.shape[2], stride, mode)
    planes = features.float().permute(0, 3, 1, 2)  # frames, dim, rows, cols
    if mode == "average":
        # without padding, a window cut by the border divides by its true number of patches
        pooled = F.avg_pool2d(planes, stride, stride, ceil_mode=True)
    elif mode == "average_floor":
        pooled = F.avg_pool2d(planes, stride, stride)
    elif mode == "max":
        pooled = F.max_pool2d(planes, stride, stride)
    else:
        assert mode == "bilinear", mode
        pooled = F.interpolate(planes, size=(grid.rows, grid.cols), mode="bilinear")
    return pooled.permute(0, 2, 3, 1).contiguous()


@lru_cache(maxsize=256)
def resample_map(source: Grid, target: Grid) -> Tensor:
    """Return the fixed map from one grid's cells to another's: fp32 `(target.cells, source.cells)`.

    Rows sum to 1. Towards a coarser or equal axis: the share of each source cell in the target
    cell. Towards a finer axis: linear interpolation between source centres, clamped at the borders.
    With `average` the first is exact: where the coarser stride is a multiple of the finer one, the map
    takes features pooled at the finer stride to those pooled at the coarser one.
    """
    # both axes are independent, so the map over cells in row-major order is a Kronecker product
    rows = _resample_axis(source.row_spans, target.row_spans)
    cols = _resample_axis(source.col_spans, target.col_spans)
    return torch.kron(rows, cols).float()


def _resample_axis(source: Tensor, target: Tensor) -> Tensor:
    if len(target) <= len(source):
        # coarser: shares of overlap, so that no source cell is lost and a constant stays what it is
        start = torch.maximum(target[:, None, 0], source[None, :, 0])
        end = torch.minimum(target[:, None, 1], source[None, :, 1])
        overlap = (end - start).clamp(min=0)
        # by what is covered, not by the target's length: modes that drop patches end before the border
        return overlap / overlap.sum(dim=1, keepdim=True)
    # finer: overlap would repeat each source cell in blocks; between centres a gradient stays smooth
    source_centres, target_centres = source.mean(dim=1), target.mean(dim=1)
    # no second centre to interpolate towards
    if len(source) == 1:
        return torch.ones(len(target), 1, dtype=torch.float64)
    # the border pair serves targets outside of all centres too; their weight is clamped to 0 or 1
    right = torch.searchsorted(source_centres, target_centres).clamp(1, len(source) - 1)
    left = right - 1
    gap = source_centres[right] - source_centres[left]
    weight = ((target_centres - source_centres[left]) / gap).clamp(0, 1)
    out = torch.zeros(len(target), len(source), dtype=torch.float64)
    out.scatter_(1, left[:, None], (1 - weight)[:, None])
    out.scatter_add_(1, right[:, None], weight[:, None])
    return out
