"""LAPE, Language-Aligned Positional Embedding (LLaVA-ST, CVPR 2025, arXiv 2501.08282).

Three axes (time, height, width) each have N anchors with an input row and an output row. A
coordinate u in [0, 1] is a blend of its two nearest anchors: as an input embedding in text, as a
soft target at the head, and - by the mean of both tables - as the position of visual features.
That sharing aligns language and vision. The six tables are their own module, never rows of the
LLM's matrices, and every read of them goes through one rule for where a coordinate lies: `kappa`.

Preset `st` follows LLaVA-ST (two-hot targets, gradient spread to neighbours, gamma fixed at 1);
`plus` trains Gaussian targets of `sigma` bins and learns gamma, and decodes between bins.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.grid import Grid, cell_patches
from model.lape.tokens import HEIGHT, LAPE_AXES, PRESETS, TIME, WIDTH, LapeTokens

NUM_FREQUENCIES = 16
"""RMS of the injected positions over RMS of the projected features, at the start of `plus`."""


def kappa(u: Tensor, bins: int) -> Tensor:
    """Return where coordinates lie on an axis of anchors: clip(u, 0, 1) (bins - 1), fp32."""
    return u.float().clamp(0, 1) * (bins - 1)


def hat_weights(u: Tensor, bins: int) -> Tensor:
    """Return max(0, 1 - |kappa(u) - i|) over anchors i: fp32 `(..., bins)`, at most two non-zero."""
    anchors = torch.arange(bins, device=u.device, dtype=torch.float32)
    return (1 - (kappa(u, bins)[..., None] - anchors).abs()).clamp(min=0)


def gaussian_weights(k: Tensor, bins: int, sigma: float) -> Tensor:
    """Return the mass of N(k, sigma) in each bin [i - 1/2, i + 1/2], renormalised: `(..., bins)`."""
    edges = torch.arange(bins + 1, device=k.device, dtype=k.dtype) - 0.5
    cdf = torch.special.ndtr((edges - k[..., None]) / sigma)
    mass = cdf[..., 1:] - cdf[..., :-1]
    return mass / mass.sum(dim=-1, keepdim=True)


def cell_hat_weights(
    patches: int, grid: Grid, axis: int, covered: tuple[float, ...], bins: int
) -> Tensor:
    """Return, per cell along an axis, the mean hat weights of its patch centres: `(cells, bins)`.

    Averaging is linear: positions laid on the full grid and then pooled are these.
    """
    low, high = (covered[0], covered[2]) if axis == HEIGHT else (covered[1], covered[3])
    centres = low + (high - low) * (torch.arange(patches, dtype=torch.float64) + 0.5) / patches
    weights = hat_weights(centres, bins)
    return torch.stack(
        [weights[cell].mean(dim=0) for cell in cell_patches(patches, grid.stride, grid.mode)]
    )


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
            self.register_buffer(f"spread_{axis}", spread, persistent=False)

    def initialise(self, embeddings: Tensor, head: Tensor) -> None:
        """Set the tables to smooth codes of position at the scale of the LLM's own rows.

        Anchors close in position are close in code: sin and cos at 16 geometric frequencies from
        0.5 to 12 cycles, through a random semi-orthonormal basis that input and output share.

        embeddings, head: the LLM's input and output matrices `(rows, width)`.
        """
        generator = torch.Generator().manual_seed(0)
        width = embeddings.shape[1]
        frequency = torch.logspace(math.log10(0.5), math.log10(12), NUM_FREQUENCIES)
        with torch.no_grad():
            for axis, bins in enumerate(self.tokens.counts):
                phase = 2 * math.pi * torch.linspace(0, 1, bins)[:, None] * frequency
                code = torch.cat([phase.sin(), phase.cos()], dim=1)  # bins, 32
                code = code[:, : min(code.shape[1], width)]
                basis, _ = torch.linalg.qr(torch.randn(width, code.shape[1], generator=generator))
                direction = code @ basis.T
                direction = direction / direction.square().mean().sqrt()
                for tables, rows, scale in (
                    (self.input_tables, embeddings, 1.0),
                    (self.output_tables, head, 0.5),
                ):
                    rows = rows.detach().float().cpu()
                    mean = rows.mean(dim=0)
                    spread = (rows - mean).square().mean().sqrt()
                    tables[axis].copy_(mean + scale * spread * direction)

    def table(self, role: str, axis: int) -> Tensor:
        """Return a table as training sees it; `st` sends each row's gradient to its neighbours too."""
        rows = (self.input_tables if role == "input" else self.output_tables)[axis]
        if self.preset == "plus":
            return rows
        spread = self.get_buffer(f"spread_{axis}") @ rows
        return rows + (spread - spread.detach())

    def embed(self, axis: int, coord: Tensor) -> Tensor:
        """Return the input vectors of coordinates on an axis: `(n,)` -> fp32 `(n, width)`."""
        with _in_fp32(coord.device):
            return hat_weights(coord, self.tokens.counts[axis]) @ self.table("input", axis)

    def positions(
        self, grid: Grid, covered: tuple[float, ...], time: Tensor, timed: Tensor
    ) -> Tensor:
        """Return what is added to projected cells: fp32 `(frames, cell_rows, cell_cols, width)`.

        time: fp32 `(frames,)` in [0, 1]; timed: fp32 `(frames,)`, 0 where a clip has no duration.
        """
        with _in_fp32(time.device):
            mean = [(self.table("input", a) + self.table("output", a)) / 2 for a in range(3)]
            at_time = hat_weights(time, self.tokens.counts[TIME]) @ mean[TIME] * timed[:, None]
            at_row = self._span(grid.patch_rows, grid, HEIGHT, covered, time.device) @ mean[HEIGHT]
            at_col = self._span(grid.patch_cols, grid, WIDTH, covered, time.device) @ mean[WIDTH]
            parts = (at_time[:, None, None], at_row[None, :, None], at_col[None, None, :])
            first, *others = (self.gamma[axis] * parts[axis] for axis in self.tokens.axes)
            # an axis that is not used leaves its size of 1, which is spread out here
            return sum(others, first).expand(len(time), grid.rows, grid.cols, -1)

    def _span(
        self, patches: int, grid: Grid, axis: int, covered: tuple[float, ...], device: torch.device
    ) -> Tensor:
        place = (grid, axis, covered, device)
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
        unused = [torch.full((n,), a not in self.tokens.axes) for a, n in enumerate(counts)]
        return logits.masked_fill(torch.cat(unused).to(logits.device), -1e9)

    def target(self, axis: int, coord: Tensor) -> Tensor:
        """Return the soft target over an axis's anchors: fp32 `(n, bins)`, rows sum to 1."""
        bins = self.tokens.counts[axis]
        if self.preset == "st":
            return hat_weights(coord, bins)
        return gaussian_weights(kappa(coord, bins), bins, self.sigma)

    def decode(self, axis: int, logits: Tensor) -> Tensor:
        """Return the coordinate that an axis's logits mean: `(n, bins)` -> fp32 `(n,)` in [0, 1].

        The mean over a window around the best anchor; in `plus` it is then inverted through the
        target's own window mean, so that a perfect prediction decodes exactly at the borders too.
        """
        bins = self.tokens.counts[axis]
        radius = 1 if self.preset == "st" else 3
        probability = logits.float().softmax(dim=-1)
        best = probability.argmax(dim=-1)
        anchors = torch.arange(bins, device=logits.device, dtype=torch.float32)
        window = ((anchors - best[:, None]).abs() <= radius).float()
        mean = _window_mean(probability, window, anchors)
        if self.preset == "plus":
            mean = self._invert(mean, best, window, anchors)
        return mean.clamp(0, bins - 1) / (bins - 1)

    def _invert(self, mean: Tensor, best: Tensor, window: Tensor, anchors: Tensor) -> Tensor:
        """Bisect for the kappa whose target has this mean in this window (monotone in kappa)."""
        bins = len(anchors)
        low = (best - 2.0).clamp(min=0)
        high = (best + 2.0).clamp(max=bins - 1)
        for _ in range(30):
            middle = (low + high) / 2
            reached = _window_mean(gaussian_weights(middle, bins, self.sigma), window, anchors)
            low, high = (
                torch.where(reached < mean, middle, low),
                torch.where(reached < mean, high, middle),
            )
        return (low + high) / 2


def _window_mean(probability: Tensor, window: Tensor, anchors: Tensor) -> Tensor:
    weight = probability * window
    return (weight * anchors).sum(dim=-1) / weight.sum(dim=-1)


def _empty(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, width))


def _in_fp32(device: torch.device) -> torch.autocast:
    """Return a context in which autocast rounds no coordinate: bfloat16 keeps 8 bits of a weight."""
    return torch.autocast(device.type, enabled=False)
