"""Who attends to whom, as intervals: query q sees the keys in [start(q), end(q)).

Text is causal; with `block` attention the tokens of one frame also see each other; nothing sees a
later frame and nothing crosses samples. Two int32 vectors hold all of it, 8 bytes a token where a dense
mask has a byte a pair (1 GiB at 32,768 tokens), and every attention back-end's mask is derived from
them. Where turns of a sample do not see each other, two more vectors say which keys of a query's
interval belong to other turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import FRAME_ATTENTION

BLOCK = 128
"""Queries, and keys, in a block of flex_attention's mask: its default, which its kernels expect."""


def intervals(
    sample: np.ndarray, block: np.ndarray, frame_attention: str = "block"
) -> tuple[np.ndarray, np.ndarray]:
    """Return (start, end), int32 `(length,)`, of one row.

    sample: int `(length,)`, the sample of each token, consecutive, -1 for padding.
    block: int `(length,)`, the frame of each token, unique across the row, -1 for text.
    Padding sees itself alone: a row of the mask without any key can make NaN (pytorch#103749).
    """
    assert frame_attention in FRAME_ATTENTION, frame_attention
    position = np.arange(len(sample), dtype=np.int32)
    # a sample's tokens are consecutive, so its first token bounds what any of them sees
    start = _run_starts(sample)[position]
    end = position + 1
    if frame_attention == "block":
        # a run's end is its start in the reversed row
        run_end = len(block) - _run_starts(block[::-1])[::-1]
        end = np.where(block >= 0, run_end, end)
    padding = sample < 0
    start = np.where(padding, position, start)
    end = np.where(padding, position + 1, end)
    return start.astype(np.int32), end.astype(np.int32)


def other_turns(sample: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (start, end), int32 `(length,)`, of one row: query q does not see the keys [start, end).

    sample: as in `intervals`. turn: int `(length,)`, 0 for what all turns of a sample see, which comes
    before them; 1, 2, ... for the tokens of turns that do not see each other.
    """
    begin = _run_starts(sample)
    # one number for (sample, turn): a turn also ends where the next sample has the same turn number
    own = _run_starts(sample * (turn.max(initial=0) + 1) + turn)
    # what turns share comes first in a sample, so its last place is the first one plus their count
    shared = np.cumsum(turn == 0)
    behind_shared = begin + shared - shared[begin] + (turn[begin] == 0)
    start, end = (np.where(turn > 0, bound, 0) for bound in (behind_shared, own))
    return start.astype(np.int32), end.astype(np.int32)


def places_before(
    places: np.ndarray, others: Sequence[np.ndarray] | None, length: int
) -> np.ndarray:
    """Return the flat place of the token that precedes each token for its turn: int `(n,)`.

    places: int `(n,)`, row * length + position. others: from `other_turns`, `(rows, length)` each.
    The first token of a turn follows the last one that all turns share, not the turn before it.
    """
    if others is None:
        return places - 1
    behind_shared, own = (bound.reshape(-1)[places] for bound in others)
    return np.where(own == places % length, places - own + behind_shared, places) - 1


def _run_starts(values: np.ndarray) -> np.ndarray:
    """Return, for each entry, where its run of equal values begins."""
    position = np.arange(len(values))
    begins = np.concatenate([[True], values[1:] != values[:-1]])
    return np.maximum.accumulate(np.where(begins, position, 0))


@dataclass(frozen=True)
class Reach:
    """How far back layers of one kind see: a limit on top of the intervals."""

    window: int | None = None
    """A query sees the keys less than this many positions before it, and all of its own frame."""
    chunk: int | None = None
    """A query sees the keys of its own chunk of this many positions, and all of its own frame."""

    @property
    def limited(self) -> bool:
        """Whether these layers see less than an interval holds."""
        return self.window is not None or self.chunk is not None

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether each key is near enough to its query: bool, shapes broadcast.

        query, key: int, positions in their record.
        """
        if self.window is not None:
            return query - key < self.window
        if self.chunk is not None:
            return key // self.chunk == query // self.chunk
        return torch.ones_like(query - key, dtype=torch.bool)

    def narrowed(
        self,
        start: Tensor,
        position: Tensor,
        frame_start: Tensor,
        others: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the starts of the intervals for these layers: int32 `(rows, length)`.

        start: from `intervals`. position: of each token in its record, rising by 1 with its place in
        the row. frame_start: the place of the first token of its frame; for text its own place.
        others: from `other_turns`; a window does not count their keys.
        The near keys and those of the query's own frame are neighbours, so the result is an interval.
        """
        place = torch.arange(start.shape[1], device=start.device)
        if self.window is not None:
            # a window counts the query itself, as transformers' sliding window does
            near = place - self.window + 1
        elif self.chunk is not None:
            near = place - position % self.chunk
        else:
            return start
        if others is not None:
            # keys of other turns are between: a window that reaches over them goes on as far before them
            first, behind = others
            near = torch.where(near < behind, near - (behind - first), near)
        return torch.maximum(start, torch.minimum(near, frame_start)).to(start.dtype)


def dense_mask(start: Tensor, end: Tensor, others: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return the boolean mask that SDPA reads: `(rows, 1, queries, keys)`, True where q sees k."""
    keys = torch.arange(start.shape[1], device=start.device)
    seen = (keys >= start[..., None]) & (keys < end[..., None])
    if others is not None:
        seen &= (keys < others[0][..., None]) | (keys >= others[1][..., None])
    return seen[:, None]


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where the mask is True and the dtype's minimum elsewhere, of the mask's shape.

    Eager attention adds its mask to the scores: a boolean one would silently add 1 where q sees k.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def block_mask(start: Tensor, end: Tensor, others: tuple[Tensor, Tensor] | None = None) -> Any:
    """Return the same mask as flex_attention's BlockMask, built from the intervals themselves.

    start, end: int32 `(rows, length)`, from `intervals`; others: from `other_turns`. The length is best
    a multiple of `BLOCK` and the same for all batches: the kernel is recompiled for another one.

    Without others, starts and ends never fall along a row and each query sees itself, so that the keys
    of consecutive queries are one interval too: a block of keys is touched iff it meets the interval
    from the least start to the greatest end, and full (needs no `mask_mod`) iff it is inside that from
    the greatest start to the least end. With others, blocks that every query of a block skips are left
    out, and those of which any query skips a part are not full.
    """
    # `create_block_mask` evaluates every pair of tokens: 5.4 s at 8,192 tokens on a CPU, this 18 ms
    from torch.nn.attention.flex_attention import BlockMask

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key >= start[row, query]) & (key < end[row, query])
        if others is None:
            return seen
        return seen & ((key < others[0][row, query]) | (key >= others[1][row, query]))

    rows, length = start.shape
    blocks = -(-length // BLOCK)
    # queries that pad the last block touch nothing, and make no block full
    missing = (0, blocks * BLOCK - length)
    starts = F.pad(start, missing, value=length).view(rows, 1, blocks, BLOCK)
    ends = F.pad(end, missing, value=0).view(rows, 1, blocks, BLOCK)
    first = torch.arange(blocks, device=start.device, dtype=start.dtype) * BLOCK
    touched = (first + BLOCK > starts.amin(-1, keepdim=True)) & (
        first < ends.amax(-1, keepdim=True)
    )
    whole = (first >= starts.amax(-1, keepdim=True)) & (
        first + BLOCK <= ends.amin(-1, keepdim=True)
    )
    if others is not None:
        passed = others[1] > others[0]
        low, high = (
            F.pad(bound, missing, value=value).view(rows, 1, blocks, BLOCK)
            for bound, value in zip(others, (0, blocks * BLOCK), strict=True)
        )
        touched &= (first < low.amax(-1, keepdim=True)) | (
            first + BLOCK > high.amin(-1, keepdim=True)
        )
        some = F.pad(passed, missing).view(rows, 1, blocks, BLOCK)
        low, high = low.where(some, blocks * BLOCK), high.where(some, 0)
        whole &= (first + BLOCK <= low.amin(-1, keepdim=True)) | (
            first >= high.amax(-1, keepdim=True)
        )
    return BlockMask.from_kv_blocks(
        *_ordered(touched & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return, per block of queries, the number of chosen blocks of keys, and all blocks, these first."""
    chosen = blocks.int()
    order = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), order.int()
