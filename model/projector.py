"""Banked features -> LLM width. The names, and those of the weights, are those of LLaVA and VILA.

`linear`; `mlpNx_gelu`, N linear layers; `identity`, for features of the LLM's own width; and VILA's
`mlp_downsample` families, which join a block of 2x2 or 3x3 neighbouring cells before the first layer
(`base_projector.py`, `DownSampleBlock`). The cells that they join must be banked at a stride that is
finer by that factor.

`norm_mlpNx_gelu` is ours: the MLP on standardised channels. A tower's channels differ in scale and are
far from 0 (the mean of a DINOv2 channel is up to four times its standard deviation), so that all frames
look nearly the same to a fresh projector, which then takes long to learn their differences.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import MLP, joined_cells
from shards.errors import UserError


def build_projector(kind: str, tower_width: int, llm_width: int) -> nn.Module:
    """Return a module that maps `(frames, rows, cols, tower_width)` to the LLM's width.

    One that joins n x n cells returns `(frames, ceil(rows / n), ceil(cols / n), llm_width)`. Raises
    UserError for `identity` where the widths differ, and for an unknown kind.
    """
    if kind == "identity":
        if tower_width != llm_width:
            raise UserError(
                "mm_projector_type identity: the features go to the LLM as they are",
                got=f"features of width {tower_width}",
                expected=f"the LLM's width {llm_width}",
                fix="take a bank of the checkpoint's own merged tokens (preprocess encode --layer "
                "merged), or another mm_projector_type",
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(tower_width, llm_width)
    side = joined_cells(kind)
    joined = side * side * tower_width
    if side == 1:
        found = MLP.fullmatch(kind)
        assert found
        widths = [tower_width] + [llm_width] * int(found.group(2))
    elif side == 2:
        widths = [joined, llm_width, llm_width]
    else:
        widths = [joined, side * tower_width, llm_width, llm_width]
    # in a Sequential, in this order, a layer's number is its name in VILA's files
    layers: list[nn.Module] = [JoinCells(side), nn.LayerNorm(joined)] if side > 1 else []
    layers += [ChannelNorm(tower_width)] if kind.startswith("norm_") else []
    for place, (before, after) in enumerate(pairwise(widths)):
        if place:
            layers.append(nn.GELU())
        if side == 3 and place == 1:  # VILA's 3x3 projector normalises its hidden layer too
            layers.append(nn.LayerNorm(before))
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


LEAST_STD = 0.1
"""Lower bound of a channel's standard deviation, as a share of the channels' median one."""


class ChannelNorm(nn.Module):
    """Standardises each channel by a mean and a standard deviation, measured once and then fixed.

    Buffers, not running statistics: a batch norm would make a record's loss depend on its batch.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.mean: Tensor
        self.std: Tensor

    @property
    def measured(self) -> bool:
        """Whether `measure` has set the buffers, in this run or in the one that saved them."""
        return bool((self.std != 1).any())

    def measure(self, features: Sequence[Tensor]) -> None:
        """Set mean and standard deviation from features `(..., width)`.

        The deviation has a lower bound (`LEAST_STD`): a channel that hardly varies in these few clips
        may vary more in others, where it would be scaled up without limit.
        """
        # in double: a mean far from 0 leaves few digits to the deviation
        cells = torch.cat([part.flatten(0, -2).double() for part in features])
        std = cells.std(dim=0, unbiased=False)
        least = LEAST_STD * std.median()
        self.mean.copy_(cells.mean(dim=0))
        # all channels constant, as over one blank clip: leave them as they are rather than divide by 0
        self.std.copy_(std.clamp(min=least) if least > 0 else torch.ones_like(std))

    def forward(self, cells: Tensor) -> Tensor:
        """Return the cells standardised, in their own dtype: `(..., width)`."""
        standard: Tensor = (cells - self.mean) / self.std
        return standard.to(cells.dtype)


class JoinCells(nn.Module):
    """Joins each block of `side` x `side` cells, row by row; blocks across the border are zero-padded."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, cells: Tensor) -> Tensor:
        """`(frames, rows, cols, width)` -> `(frames, ceil(rows/n), ceil(cols/n), n n width)`."""
        side = self.side
        rows, cols = cells.shape[1:3]
        # VILA pads below and to the right, by zeros: elsewhere its weights would see another block
        cells = F.pad(cells, (0, 0, 0, -cols % side, 0, -rows % side))
        blocks = cells.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # f, R, n, C, n, width
        return torch.flatten(blocks.permute(0, 1, 3, 2, 4, 5), 3)
