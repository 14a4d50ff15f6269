"""Where a clip's tokens come from: which frames are fine, which coarse, and what each costs."""

from dataclasses import dataclass, fields
from html import escape
from math import prod

from model.slow_fast import slow_frames, uniform_indices
from shards.read.bank import Bank
from train.pages.answers import sized
from train.pages.read.footage import Footage, Look
from train.pages.read.runs import Run
from train.settings.config import TrainConfig

MOST = 16
"""Frames that are drawn of a clip."""


@dataclass(frozen=True)
class Layout:
    """The tokens of one clip in a run."""

    chosen: tuple[int, ...]
    """Which of the banked frames are used."""
    slow: tuple[bool, ...]
    cells: dict[bool, tuple[int, int]]
    """(rows, columns) of tokens of a frame, by whether it is slow."""
    closing: int
    """Tokens that close a frame."""
    newline: int
    """Tokens that close the clip."""

    @property
    def by_kind(self) -> dict[str, int]:
        """Tokens of slow frames, of fast frames, and those between."""
        fine = sum(self.slow) * prod(self.cells[True])
        coarse = (len(self.slow) - sum(self.slow)) * prod(self.cells[False])
        return {
            "fine frames": fine,
            "coarse frames": coarse,
            "marks between": len(self.slow) * self.closing + self.newline,
        }


def layout_of(config: TrainConfig, bank: Bank, row: int) -> Layout:
    """Return where the tokens of a banked clip come from; without drawn frames or written times."""
    # as the run chooses them where its settings name none: the finest is slow, the coarsest fast
    strides = bank.config.strides
    slow = config.mm_spatial_pool_stride or min(strides)
    fast = config.fast_stride or max(strides)
    units = bank.shape(row, slow)[0]
    chosen = uniform_indices(units, config.max_frames_num)
    return Layout(
        tuple(chosen),
        tuple(slow_frames(config.frame_sampling_strategy, config.slow_frame_ratio, len(chosen))),
        {
            is_slow: grid(config, bank, row, stride)
            for is_slow, stride in ((True, slow), (False, fast))
        },
        config.closing_tokens,
        config.newline_tokens,
    )


def grid(config: TrainConfig, bank: Bank, row: int, stride: int) -> tuple[int, int]:
    # rounded up, as LLaVA-OneVision pools (bilinear, to half the rows and columns)
    rows, cols = (-(-side // config.pooled) for side in bank.shape(row, stride)[1:3])
    return rows, cols


def settings_of(run: Run) -> TrainConfig:
    """Return a run's settings, those of its version that today's do not know left out."""
    # a report is of runs of any age: settings that were since removed are no reason to draw nothing
    known = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in run.config.items() if name in known})


def section(run: Run, footage: Footage, clip: str) -> str:
    """Return the frames of a clip with the grid of tokens over each, and the sum."""
    found = footage.place(clip)
    look = footage.look(clip)
    if found is None or look is None:
        return ""
    layout = layout_of(settings_of(run), *found)
    tokens = layout.by_kind
    total = sum(tokens.values())
    # as frames themselves are chosen: first and last are among them
    shown = uniform_indices(len(layout.chosen), MOST)
    tiles = "".join(tile(layout, look, k) for k in shown)
    parts = "".join(
        f'<i style="flex:{count} 1 0;--colour:var(--run-{k})" title="{name}: {count}">'
        f"<span>{count}</span></i>"
        for k, (name, count) in enumerate(tokens.items())
        if count
    )
    key = "".join(
        f'<li><i class="swatch" style="--colour:var(--run-{k})"></i>{count} {name}</li>'
        for k, (name, count) in enumerate(tokens.items())
        if count
    )
    fine, coarse = layout.cells[True], layout.cells[False]
    return (
        f"<p>Each frame becomes a few tokens, one for each square of the grid over it. Of the "
        f"{len(layout.chosen)} frames that {escape(run.name)} takes of the clip "
        f"<code>{escape(clip)}</code>, {sum(layout.slow)} are fine ({fine[0]} by {fine[1]} tokens) and "
        f"{len(layout.slow) - sum(layout.slow)} coarse ({coarse[0]} by {coarse[1]}): "
        f"<b>{total} tokens</b> in all.</p>"
        f'<div class="grids">{tiles}</div>'
        f'<div class="share" role="img" aria-label="{total} tokens">{parts}</div>'
        f'<ul class="key">{key}</ul>'
    )


def tile(layout: Layout, look: Look, k: int) -> str:
    """Return a frame with its tokens' grid over the part of it that the tower saw."""
    is_slow, number = layout.slow[k], layout.chosen[k]
    rows, cols = layout.cells[is_slow]
    # a tower that crops does not see the edges: no token comes from there
    y0, x0, y1, x1 = (100 * edge for edge in look.info.covered)
    lines = [f"M{x0 + (x1 - x0) * c / cols:.1f} {y0:.1f}V{y1:.1f}" for c in range(cols + 1)]
    lines += [f"M{x0:.1f} {y0 + (y1 - y0) * r / rows:.1f}H{x1:.1f}" for r in range(rows + 1)]
    kind = "fine" if is_slow else "coarse"
    words = f"{look.what} at {look.times[number]:.2f} s, {kind}: {rows * cols} tokens"
    return (
        f'<div class="shot"><div><img src="{look.pictures[number]}" alt="{words}" {sized(look)}>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="{"".join(lines)}"/></svg></div>'
        f"<small>{look.times[number]:.2f} s · {rows * cols}</small></div>"
    )
