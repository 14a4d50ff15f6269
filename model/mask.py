"""Who attends to whom, as intervals: query q sees the keys in [start(q), end(q)).

Text is causal; with `block` attention the tokens of one frame also see each other; nothing sees a
later frame and nothing crosses samples. Two int32 vectors hold all of it, and every attention
back-end's mask is derived from them.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

FRAME_ATTENTION = ("block", "token")


def intervals(
    sample: np.ndarray, block: np.ndarray, frame_attention: str = "block"
) -> tuple[np.ndarray, np.ndarray]:
    """Return (start, end), int32 `(length,)`, of one row.

    sample: int `(length,)`, the sample of each token, consecutive, -1 for padding.
    block: int `(length,)`, the frame of each token, unique across the row, -1 for text.
    Padding sees itself alone, so that no row of the mask is empty.
    """
    assert frame_attention in FRAME_ATTENTION, frame_attention
    position = np.arange(len(sample), dtype=np.int32)
    start = _run_starts(sample)[position]
    end = position + 1
    if frame_attention == "block":
        run_end = len(block) - _run_starts(block[::-1])[::-1]
        end = np.where(block >= 0, run_end, end)
    padding = sample < 0
    start = np.where(padding, position, start)
    end = np.where(padding, position + 1, end)
    return start.astype(np.int32), end.astype(np.int32)


def _run_starts(values: np.ndarray) -> np.ndarray:
    """Return, for each entry, where its run of equal values begins."""
    position = np.arange(len(values))
    begins = np.concatenate([[True], values[1:] != values[:-1]])
    return np.maximum.accumulate(np.where(begins, position, 0))


def dense_mask(start: Tensor, end: Tensor, num_keys: int | None = None) -> Tensor:
    """Return the boolean mask that SDPA wants: `(rows, 1, queries, keys)`, True where q sees k."""
    keys = torch.arange(num_keys or start.shape[1], device=start.device)
    return ((keys >= start[..., None]) & (keys < end[..., None]))[:, None]


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where True and the dtype's minimum elsewhere: the eager back-end adds its mask."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def block_mask(start: Tensor, end: Tensor) -> Any:
    """Return the same mask as flex_attention's BlockMask, which never holds the dense one.

    start, end: int32 `(rows, length)` on a CUDA device.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= start[row, query]) & (key < end[row, query])

    rows, length = start.shape
    return create_block_mask(sees, rows, None, length, length, device=start.device)
