"""A batch on a CPU as several forwards side by side, each in one thread.

Threads that share a forward wait for each other at every product: on two cores DINOv2-S took 60-70 ms a
frame that way and 50-57 ms in two forwards of half the batch, and a decoder that takes a core from one
thread holds up both. Sums of one thread do not depend on how many cores there are.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from model.cpu.threads import cpu_threads


def side_by_side(forward: Callable[[np.ndarray], Tensor], batch: np.ndarray, parts: int) -> Tensor:
    """Return forward(batch) from `parts` equal parts of the batch, each in a thread of its own.

    batch: `(rows, ...)`, rows a multiple of parts. forward: rows do not depend on each other.
    """
    # what a thread sets is also the number with which later threads of the process begin
    with (
        cpu_threads(1),
        ThreadPoolExecutor(parts, initializer=torch.set_num_threads, initargs=(1,)) as threads,
    ):
        return torch.cat(list(threads.map(forward, np.split(batch, parts))))
