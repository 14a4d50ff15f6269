"""Frames of one clip -> the features that a bank stores, a batch at a time.

pooling = Pooling(tower, frames=100, strides=(4, 8), threads=2)
for batch in batches:                     # uint8, `pooling.shape` frames each, the last one fewer
    pooling.add(batch)
pooling.end()
pooling.stored                            # per stride `(units, cell_rows, cell_cols, width)`

A GPU is given a batch before the last one is looked at, so that it does not wait for that.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.cpu.threads import cpu_threads
from model.grid import pool
from model.tower.faults import FeatureRangeError, GpuMemoryError
from model.tower.inlet import brought_back

LARGEST_FLOAT16 = torch.finfo(torch.float16).max


class BatchEncoder(Protocol):
    """The part of `Tower` that pooling uses: frames in batches of one shape -> patches."""

    frames_per_unit: int

    def batch_shape(self, frames: int, batch_frames: int) -> int: ...

    def encode(self, frames: np.ndarray, *, shape: int, threads: int) -> Tensor: ...


@dataclass(frozen=True)
class Pooled:
    """The cells of a batch and stride; on a GPU they are still being computed."""

    stride: int
    kept: Tensor
    """As they are stored, on the host."""
    largest: Tensor
    """Of each unit, the largest absolute value before rounding."""
    underflowed: Tensor


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

        batch_frames: the most frames of a batch. threads is fixed: other parts of a batch, and sums split
        over another number of threads, may round otherwise, and a clip's bytes must not depend on who
        encodes it.
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
        self._computed: deque[tuple[list[Pooled], torch.cuda.Event | None]] = deque()

    def add(self, frames: np.ndarray) -> None:
        """Encode and pool the next batch: uint8 `(shape, height, width, 3)`, fewer frames at the end.

        Raises FeatureRangeError naming the first frame and stride whose values the type cannot hold, of
        this batch or the one before, GpuMemoryError where the batch is too large: no smaller one is
        tried, since the last bits of features depend on its shape.
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
        self.end()
        return self.stored, self.underflowed

    def _add(self, frames: np.ndarray) -> None:
        # the tower alone runs in the bank's number of threads: what its features round to depends on it
        with cpu_threads(self.threads):
            patches = self.tower.encode(frames, shape=self.shape, threads=self.threads)
        event = torch.cuda.Event() if patches.is_cuda else None
        self._computed.append(([self._pooled(patches, stride) for stride in self.strides], event))
        if event:
            event.record(torch.cuda.current_stream(patches.device))
        # on a GPU the newest batch is left in flight, so that the next one is launched before it is read
        while len(self._computed) > (1 if event else 0):
            self._keep()

    def end(self) -> None:
        """Take in what is still being computed; `stored` is whole then. Raises what `add` raises."""
        while self._computed:
            self._keep()

    def _pooled(self, patches: Tensor, stride: int) -> Pooled:
        cells = pool(patches, stride, self.pool_mode)
        if self.dtype == "bfloat16":
            kept, lost = cells.bfloat16().view(torch.uint16), torch.zeros((), dtype=torch.int64)
        else:
            kept = cells.half()
            lost = ((kept == 0) & (cells != 0)).sum()
        # in fp32, before rounding: as float16 a value of 70000 is infinite, and its size is lost
        largest = cells.abs().amax(dim=(1, 2, 3))
        return Pooled(stride, *map(brought_back, (kept, largest, lost)))

    def _keep(self) -> None:
        """Look at the first of the batches that are computed, and store it."""
        batch, event = self._computed.popleft()
        if event:
            event.synchronize()
        most = math.inf if self.dtype == "bfloat16" else LARGEST_FLOAT16
        for one in batch:
            _refuse_too_large(one, most, self._done, self.tower.frames_per_unit)
            self.underflowed += int(one.underflowed)
            kept = one.kept.numpy()
            if one.stride not in self.stored:
                # once, at its whole size: joining batches at the end would hold the clip twice
                self.stored[one.stride] = np.empty((self._units, *kept.shape[1:]), kept.dtype)
            self.stored[one.stride][self._done : self._done + len(kept)] = kept
        self._done += len(batch[0].kept)


def _refuse_too_large(batch: Pooled, most: float, done: int, frames_per_unit: int) -> None:
    for unit, largest in enumerate(batch.largest.tolist()):
        where = f"frame {(done + unit) * frames_per_unit}, stride {batch.stride}"
        if not math.isfinite(largest):
            raise FeatureRangeError(
                f"{where}: the tower's output holds NaN or infinity; try --tower-dtype float32"
            )
        if largest > most:
            raise FeatureRangeError(
                f"{where}: |feature| up to {largest:.0f} does not fit float16; use --dtype bfloat16"
            )
