"""The frame-causal loss: from the hidden states of frame i, predict the features of frame i + 1.

The target is the frozen tower's banked feature, layer-normalised per token (V-JEPA 2-AC and
JARVIS use the same kind of target). Its variance is 1, so the loss starts near 1 over any tower. Nothing
trainable enters it, so it cannot collapse: with the projector's output as the target a toy's loss fell
to 0.0001 while that output's deviation fell from 0.15 to 0.01, and layer-normalising it did not help.

A low loss means nothing by itself, since neighbouring frames are alike; `skill` compares it with the
strongest of some cheap predictions (`train/loop/floor.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.batch import STREAMS, Batch, FrameGroup, Transitions
from model.config import PREDICTORS
from model.grid import resample_map

# periods from 2 down to 1/64 of an axis: the finest is shorter than a patch of a 27x27 grid
NUM_FREQUENCIES = 8
NUM_CODES = 3 * 2 * NUM_FREQUENCIES + 1
"""Width of a cell's query: sines and cosines of y, x and time, and the gap's code."""
SHORTEST_GAP, LONGEST_GAP = 2.0**-10, 2.0**14
"""Range of `gap_code`, in seconds between frames: a millisecond to four and a half hours."""
# over a 7B LLM (width 3584) and SigLIP (1152) 9.7 M weights: 0.14 % of the LLM's work for a token
PREDICTOR_WIDTH = 2048
PAIRS = ("SS", "SF", "FS", "FF")
"""Streams of source and target: slow to slow, slow to fast, ..."""


@dataclass(frozen=True)
class FrameLoss:
    """Sums over transitions, split by the streams of source and target in the order of `PAIRS`."""

    loss: Tensor
    """fp32 `(4,)`, mean square errors per frame, summed."""
    copy: Tensor
    """fp32 `(4,)`, the errors of predicting no change; zero where it was not computed."""
    count: Tensor
    """fp32 `(4,)`, transitions."""
    copy_count: Tensor
    """fp32 `(4,)`, transitions whose copy baseline was computed."""


class FrameCausal(nn.Module):
    """Predicts the next frame's features on that frame's grid, from the current frame's hidden states.

    `resample` moves the hidden states to the target's grid by a fixed map; `xattn` adds attention over
    all cells of the source frame.
    """

    # Held-out losses in a toy of translating fields, where copying the last frame has 0.716: resample
    # 0.571, with xattn 0.566; the mean of the frame's hidden states 0.900, its last token 0.908.

    def __init__(self, llm_width: int, tower_width: int, predictor: str = "resample") -> None:
        super().__init__()
        assert predictor in PREDICTORS, predictor
        self.norm = nn.LayerNorm(llm_width)
        self.query = nn.Linear(NUM_CODES, llm_width)
        self.stream = nn.Embedding(2, llm_width)
        self.attention = None
        if predictor == "xattn":
            # MultiheadAttention needs a width that its heads divide; toy LLMs have any
            heads = 8 if llm_width % 8 == 0 else 1
            self.attention = nn.MultiheadAttention(llm_width, heads, batch_first=True)
        self.up = nn.Linear(llm_width, PREDICTOR_WIDTH)
        self.down = nn.Linear(PREDICTOR_WIDTH, tower_width)
        # so small that the first guesses are near 0: the loss then starts near 1, the target's variance
        for layer in (self.query, self.up, self.down):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.stream.weight, std=0.02)

    def predict(
        self,
        hidden: Tensor,
        source: FrameGroup,
        target: FrameGroup,
        time: Tensor,
        gap: Tensor,
    ) -> Tensor:
        """Return predicted features: `(pairs, target cells, dim)`.

        hidden: `(pairs, source cells, llm_width)`. time: fp32 `(pairs,)`, the target frames' time as a
        share of the clip. gap: fp32 `(pairs,)`, seconds from source to target frame.
        """
        states = self.norm(hidden)
        moved = resample_map(source.grid, target.grid).to(hidden.device, hidden.dtype) @ hidden
        # the guess knows where and when it is to predict, and nothing else of the target
        guess = self.norm(moved) + self.query(_query_codes(target, time, gap)).to(moved.dtype)
        guess = guess + self.stream.weight[target.stream]
        if self.attention is not None:
            guess = guess + self.attention(guess, states, states, need_weights=False)[0]
        return self.down(F.gelu(self.up(guess)))

    def forward(self, hidden: Tensor, batch: Batch) -> FrameLoss:
        """Return the loss sums of a batch.

        hidden: the LLM's last hidden states after its final norm, `(rows * length, llm_width)`.
        Each transition counts the same: a slow frame of 49 cells does not outweigh a fast one of 16.
        """
        loss, copy, count, copied = (hidden.new_zeros(4, dtype=torch.float32) for _ in range(4))
        for pairs in batch.transitions:
            source, target = batch.groups[pairs.source], batch.groups[pairs.target]
            slot = PAIRS.index(pair_of(batch, pairs))
            states = hidden[source.token_index[pairs.source_frame]]
            time = target.time[pairs.target_frame]
            guess = self.predict(states, source, target, time, pairs.gap)
            truth = frame_target(target.features[pairs.target_frame])
            # out of place, unlike the counts: autograd keeps what `loss` was before
            loss = loss.index_add(0, _slot(slot, hidden), frame_mse(guess, truth)[None])
            count[slot] += len(pairs.source_frame)
            if pairs.copy is not None:
                copy[slot] += frame_mse(frame_target(pairs.copy), truth)
                copied[slot] += len(pairs.source_frame)
        return FrameLoss(loss, copy, count, copied)


def frame_target(features: Tensor) -> Tensor:
    """Return banked features layer-normalised per cell, without gradient: fp32 `(n, cells, dim)`."""
    flat = features.detach().float().flatten(1, 2)  # pairs, cells, dim
    # no weight and no bias: a target that learns could make itself easy
    return F.layer_norm(flat, flat.shape[-1:], eps=1e-6)


def pair_of(batch: Batch, pairs: Transitions) -> str:
    """Return the streams of transitions, source then target: one of `PAIRS`."""
    source, target = batch.groups[pairs.source], batch.groups[pairs.target]
    return STREAMS[source.stream] + STREAMS[target.stream]


def skill(loss: float, floor: float) -> float:
    """Return 1 - loss / floor, where floor is a baseline's loss: above 0 the model beats it."""
    # the skill score of weather forecasts (Murphy 1988): 1 - MSE / MSE of a reference
    return 1.0 - loss / floor if floor > 0 else float("nan")


def frame_mse(guess: Tensor, truth: Tensor) -> Tensor:
    """Return the mean square error of each frame, summed: `(n, cells, dim)` -> fp32 scalar."""
    return (guess.float() - truth).square().mean(dim=(1, 2)).sum()


def _slot(slot: int, like: Tensor) -> Tensor:
    return torch.tensor([slot], device=like.device)


def gap_code(gap: Tensor) -> Tensor:
    """Return log2(seconds) / 4, from -1 to 1 for gaps of 1/16 s to 16 s: fp32 `(pairs,)`.

    The query's time is a share of the clip, which says nothing of how far things move until the next
    frame; seconds do.
    """
    return gap.float().clamp(SHORTEST_GAP, LONGEST_GAP).log2() / 4


def _query_codes(target: FrameGroup, time: Tensor, gap: Tensor) -> Tensor:
    """Return the codes of the target's cells: fp32 `(pairs, cells, NUM_CODES)`.

    Fixed sinusoids of (y, x, time), as in NeRF's positional encoding, and the gap's code. Never LAPE's
    tables, so that the predictor is the same with LAPE off.
    """
    grid, (y0, x0, y1, x1) = target.grid, target.covered
    # fractions of the frame, not of the grid: slow and fast cells, and crops, share one scale
    rows = y0 + (y1 - y0) * grid.row_spans.mean(dim=1).to(time)
    cols = x0 + (x1 - x0) * grid.col_spans.mean(dim=1).to(time)
    place = torch.cartesian_prod(rows, cols) if grid.cells > 1 else torch.stack([rows, cols], 1)
    pairs, cells = len(time), grid.cells
    coords = torch.cat(
        [place.expand(pairs, cells, 2), time[:, None, None].expand(pairs, cells, 1)], dim=2
    )
    # sin and cos of 2^k pi u: NeRF, arXiv 2003.08934, equation 4
    frequency = torch.pi * 2.0 ** torch.arange(NUM_FREQUENCIES, device=time.device)
    phase = (coords[..., None] * frequency).flatten(2)  # pairs, cells, 3 * frequencies
    gaps = gap_code(gap)[:, None, None].expand(pairs, cells, 1)
    return torch.cat([phase.sin(), phase.cos(), gaps], dim=2)


__all__ = [
    "PAIRS",
    "PREDICTORS",
    "FrameCausal",
    "FrameLoss",
    "Transitions",
    "frame_mse",
    "frame_target",
    "gap_code",
    "pair_of",
    "skill",
]
