"""M-RoPE: rotary positions of frames' tokens are time, row and column; of text, its place alone.

    positions = mrope_positions(...)            # int64 (3, length), with the batch
    rotary = install(llm_decoder, (16, 24, 24))
    with rotary.at(positions): llm_decoder(...)

The formula is transformers' for Qwen2-VL, Qwen2.5-VL and Qwen3-VL (`get_rope_index`): the positions of a
run of frames count on from the text before it in three directions; the text after it goes on as many
places later as its frames have rows or columns, whichever are more, however long the run lasts. In
Qwen3-VL, which writes the time between frames, each frame is a run of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from model.config import VLMConfig
from model.grid import Grid
from shards.errors import UserError

AXES = 3
"""Time, row, column."""
NEARLY = 1e-6
"""Added before rounding down: sums of floats may be this little below a whole number."""
EVEN = 1e-6
"""Tolerance, in seconds, for frames to count as evenly spaced."""


class FrameSpan(Protocol):
    """The places of a frame's tokens in a row, and its time in its clip."""

    @property
    def first(self) -> int:
        """Place of the first cell in the row."""

    @property
    def tokens(self) -> int:
        """Number of cells, row-major, and after them a closing token where there is one."""

    @property
    def grid(self) -> Grid: ...

    @property
    def medium(self) -> int:
        """Number of the medium in the row: time starts at 0 in each, and goes on from part to part."""

    @property
    def seconds(self) -> float:
        """On the medium's clock."""


def mrope_rows(
    frames: Sequence[Sequence[FrameSpan]],
    position: np.ndarray,
    sample: np.ndarray,
    config: VLMConfig,
) -> Tensor | None:
    """Return the three positions of each token, int64 `(3, rows, length)`; None without M-RoPE.

    frames: of each row. position, sample: int `(rows, length)`, as in `mrope_positions`.
    """
    if config.frame_positions != "mrope":
        return None
    unit = config.slow_stride * config.pooled
    rows = [
        mrope_positions(*row, unit, config.mrope_tokens_per_second)
        for row in zip(position, sample, frames, strict=True)
    ]
    return torch.from_numpy(np.stack(rows, axis=1))


def mrope_positions(
    position: np.ndarray,
    sample: np.ndarray,
    frames: Sequence[FrameSpan],
    unit: int,
    tokens_per_second: float,
) -> np.ndarray:
    """Return the three positions of each token of a row: int64 `(3, length)`.

    position: int `(length,)`, each token's place in its record. sample: int `(length,)`, the number of
    that record in the row; positions start at 0 in each record.
    frames: in order; those of a medium with no token between them are a run. unit: the stride whose
    cells rows and columns are counted in: a frame of a coarser grid has wider steps.
    tokens_per_second: see `MRopeFacts`.
    """
    # position minus place of the text after the frames of its record
    shift = np.zeros(len(position), np.int64)
    out = np.zeros((AXES, len(position)), np.int64)
    for run in runs_of(frames):
        first, behind = run[0].first, run[-1].first + run[-1].tokens
        start = int(position[first]) + int(shift[first])
        extent = 0
        times = time_positions([frame.seconds for frame in run], tokens_per_second)
        for frame, time in zip(run, times, strict=True):
            # a coarse frame covers the same picture: its cells are further apart, not in a corner of it
            step = max(frame.grid.stride // unit, 1)
            rows, cols = np.indices((frame.grid.rows, frame.grid.cols)).reshape(2, -1) * step
            ends = np.asarray([[frame.grid.rows * step], [frame.grid.cols * step]])
            # the closing token, which Qwen does not have, is put after the last row and column
            places = np.concatenate([np.stack([rows, cols]), ends], axis=1)[:, : frame.tokens]
            until = frame.first + frame.tokens
            out[0, frame.first : until] = start + time
            out[1:, frame.first : until] = start + places
            extent = max(extent, int(places.max()) + 1)
        # within the record alone: the next one in the row starts at 0
        rest = (np.arange(len(position)) >= behind) & (sample == sample[first])
        shift[rest] = start + extent - (int(position[first]) + behind - first)
    text = np.ones(len(position), bool)
    for frame in frames:
        text[frame.first : frame.first + frame.tokens] = False
    out[:, text] = (position + shift)[text]
    return out


def runs_of(frames: Sequence[FrameSpan]) -> list[list[FrameSpan]]:
    """Return the runs of frames: those of one medium with no token between them, a list each."""
    runs: list[list[FrameSpan]] = []
    for frame in frames:
        last = runs[-1][-1] if runs else None
        if last and last.medium == frame.medium and last.first + last.tokens == frame.first:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return runs


def time_positions(seconds: Sequence[float], tokens_per_second: float) -> list[int]:
    """Return the time positions of a run's frames, from 0: their number, or floor(seconds x rate).

    Evenly spaced frames are computed as transformers does it, in float32, to give its integers.
    """
    number = np.arange(len(seconds))
    if not tokens_per_second:
        return number.tolist()
    since = np.asarray(seconds, np.float64) - seconds[0]
    step = since[-1] / max(len(seconds) - 1, 1)
    if np.abs(since - number * step).max() < EVEN:
        places = number.astype(np.float32) * np.float32(step * tokens_per_second)
    else:
        places = since * tokens_per_second + NEARLY
    return np.floor(places).astype(int).tolist()


class MRope(nn.Module):
    """An LLM's rotary embedding that turns by three positions inside `at`, by one elsewhere."""

    def __init__(self, rotary: nn.Module, sections: Sequence[int], interleaved: bool) -> None:
        super().__init__()
        self.rotary = rotary
        self.axes = axes_of(sections, interleaved)
        """Axis of each frequency: 0 time, 1 row, 2 column."""
        self.positions: Tensor | None = None

    @contextmanager
    def at(self, positions: Tensor | None) -> Iterator[None]:
        """Use these positions in forwards inside the context: int64 `(3, rows, length)`, or None."""
        self.positions = positions
        try:
            yield
        finally:
            self.positions = None

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return (cos, sin), each `(rows, length, head_dim)`."""
        if self.positions is None:
            return self.rotary(x, position_ids, *args, **kwargs)
        assert self.positions.shape[1:] == x.shape[:2], "positions of other rows"
        # three directions as three times as many rows: the LLM's own rotary computes every angle
        every = self.rotary(x, self.positions.flatten(0, 1), *args, **kwargs)
        return tuple(self._joined(part.unflatten(0, (AXES, -1))) for part in every)

    def _joined(self, part: Tensor) -> Tensor:
        """`(3, rows, length, head_dim)` -> `(rows, length, head_dim)`, each frequency from its axis."""
        # the rotary repeats its frequencies in both halves, as `rotate_half` in transformers pairs them
        half = part[..., : part.shape[-1] // 2]
        axes = torch.tensor(self.axes, device=half.device).expand(1, *half.shape[1:])
        chosen = half.gather(0, axes)[0]
        return torch.cat([chosen, chosen], dim=-1)


def axes_of(sections: Sequence[int], interleaved: bool) -> list[int]:
    """Return the axis of each rotary frequency.

    sections: number of frequencies for time, row, column. Interleaved ones alternate while rows and
    columns have some left, and time has all the others (`recomposition_frequencies` of Qwen3-VL).
    """
    if not interleaved:
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    axes = [0] * sum(sections)
    for axis in range(1, AXES):
        for place in range(axis, min(AXES * sections[axis], len(axes)), AXES):
            axes[place] = axis
    return axes


def install(decoder: Any, sections: Sequence[int], *, interleaved: bool = False) -> MRope:
    """Replace a decoder's rotary embedding by an M-RoPE, once; UserError where sections do not fit."""
    rotary = getattr(decoder, "rotary_emb", None)
    if isinstance(rotary, MRope):
        assert rotary.axes == axes_of(sections, interleaved)
        return rotary
    frequencies = getattr(rotary, "inv_freq", None)
    count = None if frequencies is None else len(frequencies)
    if count is None or sum(sections) != count or len(sections) != AXES:
        raise UserError(
            f"frame_positions mrope: sections {', '.join(map(str, sections))} do not fit "
            f"{type(decoder).__name__}",
            got=f"{count or 'no'} rotary frequencies",
            fix="set frame_positions: plain, or start from a Qwen-VL checkpoint",
        )
    assert isinstance(rotary, nn.Module)
    wrapped = MRope(rotary, sections, interleaved)
    decoder.rotary_emb = wrapped
    return wrapped
