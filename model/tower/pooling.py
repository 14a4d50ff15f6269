"""Frames of one clip -> the features that a bank stores, a batch at a time.

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
from model.tower.faults import FeatureRangeError, GpuMemoryError

LARGEST_FLOAT16 = torch.finfo(torch.float16).max


class BatchEncoder(Protocol):
    """The part of `Tower` that pooling uses: frames in batches of one shape -> patches."""

    frames_per_unit: int

    def batch_shape(self, frames: int, batch_frames: int) -> int: ...

    def encode(self, frames: np.ndarray, *, shape: int) -> Tensor: ...


class Pooling:
    """Collects the features of one clip, batch by batch.

    Each batch is pooled and rounded on the device at once, so memory does not grow with the patches of a
    long clip: 64 frames of SigLIP's 27x27 patches are 215 MB in fp32, their cells at strides 4 and 8 as
    float16 9.6 MB.
    """

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
        """frames: of the whole clip. dtype: stored, float16 or bfloat16. threads: of the CPU.

        batch_frames: the most frames of a batch. threads is fixed because sums split over another number
        of threads may round otherwise, and a clip's bytes must not depend on who encodes it.
        """
        self.tower, self.strides = tower, strides
        self.pool_mode, self.dtype, self.threads = pool_mode, dtype, threads
        self.shape = tower.batch_shape(frames, batch_frames)
        self.stored: dict[int, np.ndarray] = {}
        """Per stride `(units, cell_rows, cell_cols, width)`, float16, or uint16 with bfloat16's bits."""
        self.underflowed = 0
        """Values that are 0 as float16 and were not before."""
        self._frames = frames
        self._units = -(-frames // tower.frames_per_unit)
        self._done = 0

    def add(self, frames: np.ndarray) -> None:
        """Encode and pool the next batch: uint8 `(shape, height, width, 3)`, fewer frames at the end.

        Raises FeatureRangeError naming the first frame and stride whose values the type cannot hold,
        and GpuMemoryError where the batch is too large. No smaller batch is tried, since the last bits
        of features depend on its shape.
        """
        try:
            self._add(frames)
        except torch.OutOfMemoryError:
            fewer = self.tower.batch_shape(self._frames, self.shape // 2)
            raise GpuMemoryError(self.shape, fewer if fewer < self.shape else 0) from None

    def add_all(self, frames: np.ndarray) -> tuple[dict[int, np.ndarray], int]:
        """Add all frames of the clip; return `stored` and `underflowed`."""
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
