"""How frames reach a GPU: by pinned buffers in turn, on a stream of their own.

    inlet = Inlet(torch.device("cuda:0"))
    there = inlet.bring(frames)         # returns at once; what follows on the current stream waits for it

So the frames of a batch travel while the GPU is at the batch before. A buffer is written again only
when its last copy has left it.
"""

from collections import deque

import numpy as np
import torch
from torch import Tensor

BUFFERS = 2


class Inlet:
    """Brings frames to one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def bring(self, frames: np.ndarray) -> Tensor:
        """Return frames, uint8 of any shape, on the device."""
        pinned, left = self._buffer(frames.size)
        pinned = pinned[: frames.size].view(frames.shape)
        pinned.numpy()[...] = frames
        # from pageable memory the copy would wait for the host; on the current
        # stream, for the batch before
        with torch.cuda.stream(self._stream):
            there = pinned.to(self._device, non_blocking=True)
            left.record(self._stream)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(left)
        there.record_stream(current)  # its memory is of the other stream's pool
        return there

    def _buffer(self, nbytes: int) -> tuple[Tensor, torch.cuda.Event]:
        """Return a buffer that nothing is copied out of any more, and the event of its next copy."""
        if len(self._buffers) < BUFFERS:
            self._buffers.append((_pinned(nbytes), torch.cuda.Event()))
        else:
            self._buffers.rotate(-1)
            pinned, left = self._buffers[-1]
            # written while its copy still runs, the GPU would get parts of two batches
            left.synchronize()
            if len(pinned) < nbytes:
                self._buffers[-1] = _pinned(nbytes), left
        return self._buffers[-1]


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def brought_back(values: Tensor) -> Tensor:
    """Return values on the host, to be read when the current stream has come so far."""
    if not values.is_cuda:
        return values
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values, non_blocking=True)
