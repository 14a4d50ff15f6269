"""Frames of one clip -> what a bank stores of them, a batch at a time.

pooling = Pooling(tower, frames=100, strides=(4, 8), threads=2)
for batch in batches:                     # uint8, `pooling.shape` frames each, the last one fewer
    pooling.add(batch)
pooling.stored                            # per stride `(units, cell_rows, cell_cols, width)`
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.grid import pool
from shards.errors import UserError

LARGEST_FLOAT16 = torch.finfo(torch.float16).max


class FeatureRangeError(UserError):
    """Features that the stored type cannot hold: of the clip, not of us."""


class GpuMemoryError(UserError):
    """A batch that the GPU cannot hold."""

    def __init__(self, frames: int, fewer: int) -> None:
        """frames: of the batch. fewer: half of them, 0 where there is no smaller batch."""
        fix = f"--batch-frames {fewer}" if fewer else "a smaller tower"
        super().__init__(
            "the GPU has no memory left for the tower",
            got=f"a batch of {frames} frames",
            expected="a batch that fits",
            fix=f"encode with {fix}, or on a GPU that nothing else uses",
        )
        self.args = (frames, fewer)  # what pickle makes it again of
        self.fewer = fewer


class BatchEncoder(Protocol):
    """What `Tower` is here: frames in batches of one shape -> patches."""

    frames_per_unit: int

    def batch_shape(self, frames: int, batch_frames: int) -> int: ...

    def encode(self, frames: np.ndarray, *, shape: int) -> Tensor: ...


class Pooling:
    """The features of one clip, as they grow."""

    def __init__(
        self,
        tower: BatchEncoder,
        frames: int,
        strides: Sequence[int],
        *,
        pool_mode: str = "average",
        dtype: str = "float16",
        batch_frames: int = 16,
        threads: int,
    ) -> None:
        """frames: of the whole clip. threads: of the CPU, while the tower runs."""
        self.tower, self.strides = tower, strides
        self.pool_mode, self.dtype, self.threads = pool_mode, dtype, threads
        self.shape = tower.batch_shape(frames, batch_frames)
        self.stored: dict[int, np.ndarray] = {}
        """float16, or uint16 that holds bfloat16."""
        self.underflowed = 0
        self._frames = frames
        self._units = -(-frames // tower.frames_per_unit)
        self._done = 0

    def add(self, frames: np.ndarray) -> None:
        """Encode and pool the next batch: `shape` frames, fewer only at the end.

        Raises FeatureRangeError naming the first frame and stride whose values the type cannot hold,
        GpuMemoryError where the batch is too large: no smaller one is tried, since the last bits of
        features depend on its shape.
        """
        try:
            self._add(frames)
        except torch.OutOfMemoryError:
            fewer = self.tower.batch_shape(self._frames, self.shape // 2)
            raise GpuMemoryError(self.shape, fewer if fewer < self.shape else 0) from None

    def add_all(self, frames: np.ndarray) -> tuple[dict[int, np.ndarray], int]:
        """Take the whole clip; return what a bank stores of it, and how many values underflowed."""
        for cut in range(0, len(frames), self.shape):
            self.add(frames[cut : cut + self.shape])
        return self.stored, self.underflowed

    def _add(self, frames: np.ndarray) -> None:
        others = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            patches = self.tower.encode(frames, shape=self.shape)
        finally:
            torch.set_num_threads(others)
        most = math.inf if self.dtype == "bfloat16" else LARGEST_FLOAT16
        until = self._done + len(patches)
        for stride in self.strides:
            cells = pool(patches, stride, self.pool_mode)
            _refuse_too_large(cells, stride, most, self._done, self.tower.frames_per_unit)
            if self.dtype == "bfloat16":
                kept = cells.bfloat16().view(torch.uint16).cpu().numpy()
            else:
                half = cells.half()
                self.underflowed += int(((half == 0) & (cells != 0)).sum())
                kept = half.cpu().numpy()
            if stride not in self.stored:
                self.stored[stride] = np.empty((self._units, *kept.shape[1:]), kept.dtype)
            self.stored[stride][self._done : until] = kept
        self._done = until


def _refuse_too_large(
    cells: Tensor, stride: int, most: float, done: int, frames_per_unit: int
) -> None:
    for unit, largest in enumerate(cells.abs().amax(dim=(1, 2, 3)).tolist()):
        where = f"frame {(done + unit) * frames_per_unit}, stride {stride}"
        if not math.isfinite(largest):
            raise FeatureRangeError(
                f"{where}: the tower's output holds NaN or infinity; try --tower-dtype float32"
            )
        if largest > most:
            raise FeatureRangeError(
                f"{where}: |feature| up to {largest:.0f} does not fit float16; use --dtype bfloat16"
            )
