"""LAPE, Language-Aligned Positional Embedding (LLaVA-ST, CVPR 2025, arXiv 2501.08282).

Three axes (time, height, width) each have N anchors with an input row and an output row. A
coordinate u in [0, 1] is a blend of its two nearest anchors: as an input embedding in text, as a
soft target at the head, and - by the mean of both tables - as the position of visual features.
That sharing aligns language and vision. The six tables are their own module, never rows of the
LLM's matrices, so tied heads, padded vocabularies and frozen rows are no concern, and every use of them
places a coordinate by one rule, `kappa`.

Preset `st` follows LLaVA-ST (two-hot targets, gradient spread to neighbours, gamma fixed at 1);
`plus` trains Gaussian targets of `sigma` bins and learns gamma. Both decode by the median.

LLaVA-ST places frames' cells by another rule than coordinates in text (half-pixel centres over N bins
against anchors over N - 1 intervals), up to half a bin apart at the borders; here all are by `kappa`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.grid import Grid, cell_shares
from model.lape.tokens import HEIGHT, LAPE_AXES, PRESETS, TIME, WIDTH, LapeTokens

NUM_FREQUENCIES = 16
TIED = 1e-9
"""Cumulative shares of a prediction that differ by less count as equal."""


def kappa(u: Tensor, bins: int) -> Tensor:
    """Return coordinates' places on an axis of anchors: clip(u, 0, 1) (bins - 1), fp32."""
    return u.float().clamp(0, 1) * (bins - 1)


def hat_weights(u: Tensor, bins: int) -> Tensor:
    """Return max(0, 1 - |kappa(u) - i|) over anchors i: fp32 `(..., bins)`, at most two non-zero.

    Linear interpolation between the two nearest anchors, as in Momentor and LLaVA-ST.
    """
    anchors = torch.arange(bins, device=u.device, dtype=torch.float32)
    return (1 - (kappa(u, bins)[..., None] - anchors).abs()).clamp(min=0)


def gaussian_weights(k: Tensor, bins: int, sigma: float) -> Tensor:
    """Return the mass of N(k, sigma) in each bin [i - 1/2, i + 1/2], renormalised: `(..., bins)`.

    The histogram of a Gaussian, as in Farebrother et al. 2024 ("Stop Regressing"). k: in anchors.
    """
    edges = torch.arange(bins + 1, device=k.device, dtype=k.dtype) - 0.5
    cdf = torch.special.ndtr((edges - k[..., None]) / sigma)
    mass = cdf[..., 1:] - cdf[..., :-1]
    # what falls beyond the axis goes to the bins that are there: a border target sums to 1 too
    return mass / mass.sum(dim=-1, keepdim=True)


def quantile(shares: Tensor, level: float) -> Tensor:
    """Return where cumulative shares reach a level in (0, 1): `(n, bins)` -> `(n,)`, in anchors.

    Anchor i's share is spread evenly over [i - 1, i + 1], what is beyond the axis put on its end. The
    median of two equal neighbours is then their mean, and every quantile is in [0, bins - 1].
    """
    # half of an anchor's share is on either side of it: cumsum(i) - share(i) / 2 up to anchor i
    reached = shares.cumsum(dim=-1) - shares / 2
    low = ((reached <= level).sum(dim=-1, keepdim=True) - 1).clamp(0, shares.shape[-1] - 2)
    start, end = reached.gather(-1, low), reached.gather(-1, low + 1)
    return (low + ((level - start) / (end - start)).clamp(0, 1)).squeeze(-1)


def centre_of(median: Tensor, bins: int, sigma: float) -> Tensor:
    """Return the kappa whose `gaussian_weights` have the given median: fp64 of any shape, in anchors.

    Where the median is lower or higher than any target's, 0 or bins - 1. The median rises with kappa, so
    kappa is found by bisection: with F the normal distribution around kappa, j the anchor before the
    median and r the rest to it, (1 - r) F(j - 1/2) + F(j + 1/2) + r F(j + 3/2) = F(-1/2) + F(bins - 1/2).
    That is `quantile` at level 1/2, with the shares written as differences of F.
    """
    before = median.floor()
    rest = median - before
    first, last = torch.full_like(median, -0.5), torch.full_like(median, bins - 0.5)
    edges = torch.stack([before - 0.5, before + 0.5, before + 1.5, first, last])
    one = torch.ones_like(rest)
    weights = torch.stack([1 - rest, one, rest, -one, -one])
    low, high = torch.zeros_like(median), torch.full_like(median, bins - 1.0)
    for _ in range(40):  # 1000 bins / 2^40 is 1e-9 of a bin
        middle = (low + high) / 2
        beyond = (weights * torch.special.ndtr((edges - middle) / sigma)).sum(dim=0) > 0
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    return (low + high) / 2


def cell_hat_weights(
    patches: int, grid: Grid, axis: int, covered: tuple[float, ...], bins: int
) -> Tensor:
    """Return, per cell along an axis, the hat weights of its patches' centres, pooled: `(cells, bins)`.

    Pooling is linear, so these give the positions of the full patch grid, pooled as its features are.
    """
    low, high = (covered[0], covered[2]) if axis == HEIGHT else (covered[1], covered[3])
    centres = low + (high - low) * (torch.arange(patches, dtype=torch.float64) + 0.5) / patches
    return cell_shares(patches, grid.stride, grid.mode).float() @ hat_weights(centres, bins)


class Lape(nn.Module):
    """Six fp32 tables `(anchors, width)` and one gamma per axis."""

    def __init__(
        self, width: int, tokens: LapeTokens, preset: str = "plus", sigma: float = 1.0
    ) -> None:
        super().__init__()
        assert preset in PRESETS, preset
        assert min(tokens.counts) >= 2, tokens.counts
        self.tokens = tokens
        self.preset = preset
        self.sigma = sigma
        self.input_tables = nn.ParameterList(_empty(n, width) for n in tokens.counts)
        self.output_tables = nn.ParameterList(_empty(n, width) for n in tokens.counts)
        self.gamma = nn.Parameter(torch.ones(3), requires_grad=preset == "plus")
        self._spans: dict[tuple[Any, ...], Tensor] = {}
        for axis, bins in enumerate(tokens.counts):
            distance = torch.arange(bins).float()
            spread = 0.5 ** (distance[:, None] - distance[None, :]).abs()
            # follows from the number of anchors, so no file holds it
            self.register_buffer(f"spread_{axis}", spread, persistent=False)

    def initialise(self, embeddings: Tensor, head: Tensor) -> None:
        """Set the tables to smooth codes of position at the scale of the LLM's own rows.

        Anchors close in position are close in code: sin and cos at 16 geometric frequencies from
        0.5 to 12 cycles, through a random semi-orthonormal basis that input and output share. Of 100
        anchors, neighbours have a cosine of 0.95, those 5 apart 0.35, those 20 apart about 0.

        embeddings, head: the LLM's input and output matrices `(rows, width)`.
        """
        # transformers' own new rows (mean + covariance x 1e-9) would make all anchors start equal, and
        # LLaVA-ST's N(0, 1) ignores the LLM's scale and which anchors are neighbours
        # a generator of its own: the run's random numbers are the same with LAPE on and off
        generator = torch.Generator().manual_seed(0)
        width = embeddings.shape[1]
        frequency = torch.logspace(math.log10(0.5), math.log10(12), NUM_FREQUENCIES)
        with torch.no_grad():
            for axis, bins in enumerate(self.tokens.counts):
                phase = 2 * math.pi * torch.linspace(0, 1, bins)[:, None] * frequency
                code = torch.cat([phase.sin(), phase.cos()], dim=1)  # bins, 32
                # an LLM narrower than the code's 32 numbers (toys) takes the first ones
                code = code[:, : min(code.shape[1], width)]
                # orthonormal columns keep the cosines between codes, whatever the width
                basis, _ = torch.linalg.qr(torch.randn(width, code.shape[1], generator=generator))
                direction = code @ basis.T
                # to an RMS of 1, so that `scale` is in deviations of the LLM's own rows
                direction = direction / direction.square().mean().sqrt()
                for tables, rows, scale in (
                    (self.input_tables, embeddings, 1.0),
                    (
                        self.output_tables,
                        head,
                        0.5,
                    ),  # else new anchors would be likelier than words at once
                ):
                    rows = rows.detach().float().cpu()
                    mean = rows.mean(dim=0)
                    spread = (rows - mean).square().mean().sqrt()
                    tables[axis].copy_(mean + scale * spread * direction)

    def table(self, role: str, axis: int) -> Tensor:
        """Return a table for use in a forward pass: `(anchors, width)`, role `input` or `output`.

        `st` also sends 2^-|i-j| of each row's gradient to row j, values unchanged: LLaVA-ST's
        neighbouring-token propagation (`llava_arch.py`), E + M E - stopgrad(M E).
        """
        rows = (self.input_tables if role == "input" else self.output_tables)[axis]
        if self.preset == "plus":
            return rows
        spread = self.get_buffer(f"spread_{axis}") @ rows
        # forward: rows, exactly; backward: (I + M) times the gradient
        return rows + (spread - spread.detach())

    def embed(self, axis: int, coord: Tensor) -> Tensor:
        """Return the input vectors of coordinates on an axis: `(n,)` -> fp32 `(n, width)`."""
        with _in_fp32(coord.device):
            return hat_weights(coord, self.tokens.counts[axis]) @ self.table("input", axis)

    def positions(
        self, grid: Grid, covered: tuple[float, ...], time: Tensor, timed: Tensor
    ) -> Tensor:
        """Return the positions that are added to projected cells: fp32 `(frames, rows, cols, width)`.

        Per axis gamma x hat weights x mean of input and output table, summed: the mean of both tables is
        what aligns features with words (LLaVA-ST). gamma starts where `VLM.calibrate` puts it and is
        learned: in toy runs that did not learn places it fell to 0.10 and 0.03 for height and width.
        time: fp32 `(frames,)` in [0, 1]; timed: fp32 `(frames,)`, 0 where a clip has no duration.
        """
        with _in_fp32(time.device):
            mean = [(self.table("input", a) + self.table("output", a)) / 2 for a in range(3)]
            at_time = hat_weights(time, self.tokens.counts[TIME]) @ mean[TIME] * timed[:, None]
            at_row = self._span(grid.patch_rows, grid, HEIGHT, covered, time.device) @ mean[HEIGHT]
            at_col = self._span(grid.patch_cols, grid, WIDTH, covered, time.device) @ mean[WIDTH]
            parts = (at_time[:, None, None], at_row[None, :, None], at_col[None, None, :])
            first, *others = (self.gamma[axis] * parts[axis] for axis in self.tokens.axes)
            # an axis that is not used leaves a dimension of size 1, expanded here
            return sum(others, first).expand(len(time), grid.rows, grid.cols, -1)

    def _span(
        self, patches: int, grid: Grid, axis: int, covered: tuple[float, ...], device: torch.device
    ) -> Tensor:
        place = (grid, axis, covered, device)
        # frames of a run have few shapes; made once, the weights also stay on the device
        if place not in self._spans:
            weights = cell_hat_weights(patches, grid, axis, covered, self.tokens.counts[axis])
            self._spans[place] = weights.to(device)
        return self._spans[place]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits over all anchors, axis after axis: fp32 `(n, sum of counts)`."""
        with _in_fp32(hidden.device):
            tables = torch.cat([self.table("output", axis) for axis in range(3)])
            logits = hidden.float() @ tables.T
        if self.tokens.axes == LAPE_AXES["all"]:
            return logits
        counts = self.tokens.counts
        # not minus infinity: zero gradients of infinite logits would be NaN
        unused = [torch.full((n,), a not in self.tokens.axes) for a, n in enumerate(counts)]
        return logits.masked_fill(torch.cat(unused).to(logits.device), -1e9)

    def target(self, axis: int, coord: Tensor) -> Tensor:
        """Return the soft target over an axis's anchors: fp32 `(n, bins)`, rows sum to 1."""
        bins = self.tokens.counts[axis]
        if self.preset == "st":
            return hat_weights(coord, bins)
        return gaussian_weights(kappa(coord, bins), bins, self.sigma)

    def decode(self, axis: int, logits: Tensor) -> Tensor:
        """Return the coordinate that an axis's logits stand for: `(n, bins)` -> fp32 `(n,)` in [0, 1].

        It is the one whose own target has the prediction's median (`quantile`), so that a perfect
        prediction decodes exactly, at the borders too. Where a range of coordinates fits, as between two
        equal peaks, it is the middle. In fp64, on the CPU.
        """
        # The median of the whole axis, not the mean around the likeliest anchor, which loses where the
        # model is unsure: on one toy run box IoU rose from 0.208 to 0.286, R@0.7 of spans from 0.530
        # to 0.616.
        bins = self.tokens.counts[axis]
        # fp64: differences of `TIED` (1e-9) are below fp32's 6e-8
        shares = logits.cpu().double().softmax(dim=-1)
        # just below and just above a half: equal where the median is one point, the ends of a flat
        # stretch otherwise
        ends = torch.stack([quantile(shares, 0.5 - TIED), quantile(shares, 0.5 + TIED)])
        if self.preset == "plus":  # the median of a two-hot target is its coordinate already
            ends = centre_of(ends, bins, self.sigma)
        return (ends.mean(dim=0) / (bins - 1)).float().to(logits.device)


def _empty(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, width))


def _in_fp32(device: torch.device) -> torch.autocast:
    """Return a context without autocast: between 64 and 128 bfloat16 numbers are half a bin apart."""
    return torch.autocast(device.type, enabled=False)
