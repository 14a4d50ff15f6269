"""Throughput of a run, and its share of the devices' peak (MFU)."""

import resource
import sys
import time
from collections.abc import Callable

import torch

from model.vlm import VLM
from shards.signed import Json
from train.flops import MFU_IS, LlmShape, mfu, peak_flops, step_flops
from train.loop.metrics import FIELDS

CLOCK = FIELDS.keys() & {
    "seconds",
    "data_wait",
    "tokens_per_second",
    "supervised_per_second",
    "mfu",
    "memory_gb",
    "eta_seconds",
}
"""Fields that differ between repetitions of a run."""


class StepTimer:
    """Times the steps of a run: `data_ready()` when a step's data are there, `rates()` after it.

    `pause_over()` after an evaluation or a checkpoint leaves its time out of `seconds`, not of the ETA.

    flops: FLOPs of a step by its metrics, or None. devices, peak: their number, and FLOP/s of each.
    """

    def __init__(
        self,
        first: int,
        total: int,
        flops: Callable[[Json], float] | None = None,
        devices: int = 1,
        peak: float | None = None,
    ) -> None:
        self.first, self.total = first, total
        self.flops, self.devices, self.peak = flops, devices, peak
        self._started = self._waiting = self._began = time.monotonic()

    @property
    def legend(self) -> str:
        """The definition of MFU in this run, or the reason why there is none."""
        if self.flops and self.peak:
            return f"{MFU_IS}; peak {self.peak / 1e12:g} TFLOP/s a device"
        missing = "this device's peak" if self.flops else "this LLM's shape"
        return f"no MFU: {missing} is not known" + ("; set device_flops" if self.flops else "")

    def data_ready(self) -> None:
        self._began = time.monotonic()

    def rates(self, step: int, metrics: Json) -> Json:
        """Return the rates of the step that has just ended; step: steps taken so far, with this one."""
        now = time.monotonic()
        seconds = now - self._waiting
        out: Json = {
            "seconds": seconds,
            "data_wait": (self._began - self._waiting) / seconds,
            "tokens_per_second": metrics["tokens"] / seconds,
            "supervised_per_second": metrics["supervised_tokens"] / seconds,
            "memory_gb": memory_gb(),
            # from the mean over the run, pauses included: later checkpoints and evaluations take time
            "eta_seconds": (now - self._started) / (step - self.first) * (self.total - step),
        }
        if self.flops and self.peak:
            out["mfu"] = mfu(self.flops(metrics), seconds, self.devices, self.peak)
        self._waiting = now
        return out

    def pause_over(self) -> None:
        self._waiting = time.monotonic()


def make_timer(
    model: VLM,
    tune_llm: str,
    device_flops: float,
    device: torch.device,
    world: int,
    first: int,
    total: int,
) -> StepTimer:
    """Return the timer of a run, with MFU where the LLM's shape and the device's peak are known.

    device_flops: a device's peak FLOP/s; 0 takes that of the GPU's data sheet.
    """
    shape = LlmShape.of(model.llm.config.to_dict())
    peak = device_flops or None
    if peak is None and device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device))

    def flops(metrics: Json) -> float:
        assert shape
        tokens, pairs, supervised = (metrics[n] for n in ("tokens", "pairs", "supervised_tokens"))
        return float(step_flops(shape, tokens, pairs, supervised, tune_llm))

    return StepTimer(first, total, flops if shape else None, world, peak)


def memory_gb() -> float:
    """Return the peak memory of this process in GB: allocated on its GPU, resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    # getrusage counts bytes on macOS, kilobytes on Linux
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
