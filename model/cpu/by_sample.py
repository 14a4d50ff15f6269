"""SDPA a sample at a time: on a CPU a packed row costs what its samples do, not the square of its length.

    mask = by_sample(dense_mask(start, end), start, end, lengths, plain=True)

The mask stays whole and right for whoever reads it; `attend`, which transformers calls for `sdpa` once
this module is imported, reads the squares of the samples alone. Without a mask of this kind it is
transformers' own function.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass(frozen=True)
class Samples:
    """The samples of packed rows."""

    sizes: list[list[int]]
    """Of each row, the tokens of each sample; its padding is the last one."""
    causal: bool
    """Whether each token sees its sample up to itself, so that no mask is needed in it."""


def by_sample(mask: Tensor, start: Tensor, end: Tensor, lengths: Tensor, *, plain: bool) -> Tensor:
    """Return the mask, to be read sample by sample where rows on a CPU hold several.

    mask: bool `(rows, 1, length, length)`. start, end: int32 `(rows, length)`, from `mask.intervals`.
    lengths: int64 `(rows,)`, without padding. plain: whether the mask says no more than the intervals.
    """
    if mask.device.type != "cpu":  # many small kernels in place of one: not measured
        return mask
    real = torch.arange(start.shape[1]) < lengths[:, None]
    begins = [row[own].unique_consecutive().tolist() for row, own in zip(start, real, strict=True)]
    # a family's verdict looks at two samples in a row, so whatever is read this way was checked
    if max(map(len, begins)) > 1:
        causal = plain and bool((end == torch.arange(1, start.shape[1] + 1))[real].all())
        sizes = [
            _sizes(row, int(length), start.shape[1])
            for row, length in zip(begins, lengths, strict=True)
        ]
        # on the tensor, which transformers hands on as it is, to recomputed layers, too
        mask.samples = Samples(sizes, causal)  # type: ignore[attr-defined]
    return mask


def _sizes(begins: list[int], length: int, width: int) -> list[int]:
    """Return the tokens between places in a row, and of its padding."""
    sizes = [after - begin for begin, after in pairwise([*begins, length])]
    return [*sizes, width - length] if length < width else sizes


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **how: Any
) -> tuple[Tensor, None]:
    """Do what transformers' `sdpa` does, sample by sample where the mask names samples.

    query, key, value: `(rows, heads, length, dim)`; returns `(rows, length, heads, dim)`.
    """
    samples = None
    if not torch.compiler.is_compiling():
        samples = getattr(attention_mask, "samples", None)
    # a bias is of the whole row
    if samples is None or how.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    how = how | {"is_causal": samples.causal}
    rows = []
    # split, not slices: the gradient of each slice would be as large as all of it
    apart = (part.split(1) for part in (query, key, value, attention_mask))
    for sizes, q, k, v, mask in zip(samples.sizes, *apart, strict=True):
        done, begin = list[Tensor](), 0
        for own in zip(*(part.split(sizes, 2) for part in (q, k, v)), strict=True):
            end = begin + own[0].shape[2]
            square = None if samples.causal else mask[..., begin:end, begin:end]
            done.append(sdpa_attention_forward(module, *own, square, **how)[0])
            begin = end
        rows.append(torch.cat(done, 1))
    return torch.cat(rows), None


AttentionInterface.register("sdpa", attend)
