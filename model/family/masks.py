"""The masks of an LLM's layers: one for each kind of layer, in the form that each back-end reads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.batch import Batch
from model.cpu.by_sample import by_sample
from model.mask import Reach, additive_mask, block_mask, dense_mask
from shards.errors import UserError

MASK_FREE = ("sdpa", "flash_attention_2")
"""Back-ends that have faster kernels for causal rows without a mask."""


def batch_masks(
    reaches: Mapping[str, Reach], batch: Batch, implementation: str, dtype: torch.dtype
) -> Any:
    """Return the masks of a batch's rows; None where they equal the LLM's own causal masks.

    reaches: kind of layer -> its `Reach`. Raises UserError where flash_attention_2 would need a mask.
    """
    if batch.causal and implementation in MASK_FREE and not _frames_beyond(reaches, batch):
        # Padding is on the right, where nothing sees it. Without a mask SDPA has faster kernels: forward
        # and backward of 4,096 tokens in bucketed rows took 3.8 s, of one packed row with a mask 10.0 s.
        return None
    if implementation == "flash_attention_2":
        raise UserError(
            "attn flash_attention_2: takes no mask, and rows here need one: turns that do not see each "
            "other, or a frame of more tokens than the LLM's layers see back",
            fix="use attn: auto",
        )
    masks = {}
    for kind, reach in reaches.items():
        start = batch.mask_start
        if reach.limited:
            places = batch.position_ids, frame_starts(batch)
            start = reach.narrowed(start, *places, batch.others)
        if implementation == "flex_attention":
            masks[kind] = block_mask(start, batch.mask_end, batch.others)
        else:
            seen = dense_mask(start, batch.mask_end, batch.others)
            masks[kind] = in_form(seen, implementation, dtype)
            if implementation == "sdpa":
                plain = batch.others is None and not reach.limited
                bounds = batch.mask_start, batch.mask_end, batch.lengths
                masks[kind] = by_sample(masks[kind], *bounds, plain=plain)
    return by_kind(masks)


def step_masks(
    reaches: Mapping[str, Reach],
    seen: Tensor,
    keys: Tensor,
    query: Tensor,
    implementation: str,
    dtype: torch.dtype,
) -> Any:
    """Return the masks of one new token of each row over all cached keys, its own the last.

    seen: bool `(rows, keys)`, False for padding. keys: int64 `(rows, keys)`, positions in the record,
    wherever their tokens are in the cache. query: int64 `(rows,)`, the new token's position.
    """
    masks = {
        kind: in_form(
            (seen & reach.sees(query[:, None], keys))[:, None, None], implementation, dtype
        )
        for kind, reach in reaches.items()
    }
    return by_kind(masks)


def in_form(mask: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask as a back-end reads it; eager and flex_attention add a tensor to scores."""
    return mask if implementation == "sdpa" else additive_mask(mask, dtype)


def by_kind(masks: Mapping[str, Any]) -> Any:
    """Return masks as a decoder takes them: a single one alone, several as a dict by kind of layer."""
    return next(iter(masks.values())) if len(masks) == 1 else dict(masks)


def frame_starts(batch: Batch) -> Tensor:
    """Return the place in its row where each token's frame starts, of text its own: `(rows, length)`."""
    rows, length = batch.input_ids.shape
    flat = torch.arange(rows * length, device=batch.input_ids.device)
    for group in batch.groups:
        # a closing token belongs to its frame: whatever sees a part of the frame sees it too
        first = group.token_index[:, :1]
        flat.index_copy_(
            0, group.token_index.flatten(), first.expand_as(group.token_index).flatten()
        )
        if len(group.end_index):
            flat.index_copy_(0, group.end_index, first[:, 0])
    return flat.view(rows, length) % length


def _frames_beyond(reaches: Mapping[str, Reach], batch: Batch) -> bool:
    """Return whether a frame is longer than some layer's reach: its tokens see all of it nevertheless."""
    longest = max(
        (group.grid.cells + bool(len(group.end_index)) for group in batch.groups), default=0
    )
    return any(
        (reach.window is not None and longest > reach.window)
        or (reach.chunk is not None and longest > 1)  # a frame may span two chunks
        for reach in reaches.values()
    )
