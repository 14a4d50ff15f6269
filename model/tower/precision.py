"""Chooses a tower's arithmetic on a CPU: bfloat16 where that is clearly faster than float32.

choice = fastest(tower, threads=2)      # tower: in float32, as it was loaded; left as it was
retype(tower, choice.dtype)

If torch reports matrix units for bfloat16, one unit of frames is timed in both. On a CPU with AMX
DINOv2-S ran 79 frames/s in place of 18.6, with features 1.1 % of their norm apart.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.cpu.matrix_units import least_seconds, matrix_units
from model.cpu.threads import cpu_threads
from model.tower.trial import Tried, check_size, test_picture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEWEST_WEIGHTS = 5_000_000
"""Towers of fewer weights stay float32: their time goes into starting layers, not into products."""
LEAST_GAIN = 1.5
"""Least ratio of CPU seconds, float32 / bfloat16: repeated measurements differ by less."""
LONG_SECONDS = 2.0
"""A first round that takes longer in float32 is not repeated."""
PICTURE = 480, 640
"""(height, width) of the timed frame before resizing, which matters where frames keep their size."""


class Retyped(Tried, Protocol):
    """The part of `Tower` that is used here."""

    def encode_batch(self, frames: np.ndarray, shape: int) -> Tensor: ...


@dataclass(frozen=True)
class Choice:
    """The dtype of a tower's arithmetic, and the reason in words."""

    dtype: str
    reason: str


def arithmetic(device: str, dtype: str) -> str:
    """Return the kind of device, on which the last bits of features depend beside dtype and tower.

    In bfloat16 the CPU's matrix units belong to it: each kind rounds its sums in its own way.
    """
    kind = device.partition(":")[0]
    if kind != "cpu" or dtype != "bfloat16":
        return kind
    return f"cpu, {matrix_units() or 'no'} units for bfloat16"


def fastest(tower: Retyped, threads: int) -> Choice:
    """Return the faster dtype of a tower on the CPU, loaded in float32.

    threads: of the CPU, while the tower runs. Raises UserError for a tower that cannot take the pixels
    of its image processor.
    """
    weights = sum(weight.numel() for weight in tower.model.parameters())
    if weights < FEWEST_WEIGHTS:
        return Choice("float32", f"a tower of {weights / 1e6:.1f} M weights gains nothing")
    units = matrix_units()
    if not units:
        return Choice("float32", "this CPU has no matrix units for bfloat16")
    # a tower that cannot run at all is to be refused in its own words, not fail in a timer
    check_size(tower)
    return decided(units, *timed(tower, threads))


def decided(units: str, float32: float, bfloat16: float, error: float) -> Choice:
    """Return the choice, from the CPU seconds that the same frames took in each dtype.

    units: of the CPU, in words. error: of the features in bfloat16, relative to their norm.
    """
    gain = float32 / bfloat16
    if gain < LEAST_GAIN:
        return Choice("float32", f"bfloat16 is {gain:.2g} times as fast here ({units})")
    return Choice(
        "bfloat16",
        f"{gain:.2g} times as fast as float32 here ({units}), features differ by {error:.2%}",
    )


def timed(tower: Retyped, threads: int) -> tuple[float, float, float]:
    """Return the least CPU seconds of a unit of frames in float32 and in bfloat16, and the difference of
    their features, relative to the norm of those in float32."""
    picture = tower.pixels.resize(test_picture(*PICTURE)[None])
    frames = np.repeat(picture, tower.frames_per_unit, 0)
    # the loaded ones, unrounded: from bfloat16 there is no way back to float32
    weights = [weight.data for weight in tower.model.parameters()]
    found: dict[str, Tensor] = {}

    def take(dtype: str) -> None:
        found[dtype] = tower.encode_batch(frames, len(frames))

    try:
        with cpu_threads(threads):
            spent = least_seconds(
                ("float32", "bfloat16"),
                take,
                lambda dtype: retype(tower, dtype, weights),
                LONG_SECONDS,
            )
    finally:
        retype(tower, "float32", weights)
    error = (found["bfloat16"] - found["float32"]).norm() / found["float32"].norm()
    return spent["float32"], spent["bfloat16"], float(error)


def retype(tower: Retyped, dtype: str, weights: list[Tensor] | None = None) -> None:
    """Convert a tower's weights to a dtype, in which it then computes.

    weights: fp32 ones to convert in place of its own, which may be rounded already.
    """
    # parameters alone, no buffers: rotary frequencies stay exact
    for place, weight in enumerate(tower.model.parameters()):
        weight.data = (weights[place] if weights else weight.data).to(DTYPES[dtype])
    tower.dtype = dtype
