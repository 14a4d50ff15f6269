"""In which arithmetic a tower runs fastest here: bfloat16 where that is clearly faster than float32.

choice = fastest(tower, threads=2)      # tower: in float32, as it was loaded; left as it was
retype(tower, choice.dtype)

Torch is asked for matrix units, and then one unit of frames is timed.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.cpu.matrix_units import least_seconds, matrix_units
from model.tower.trial import Tried, check_size, test_picture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEWEST_WEIGHTS = 5_000_000
"""A tower of fewer is not asked: what it gains is lost in starting its layers."""
LEAST_GAIN = 1.5
"""CPU seconds in float32 over those in bfloat16: what is measured twice differs by less."""
LONG_SECONDS = 2.0
"""A round that takes longer is believed at once."""
PICTURE = 480, 640
"""(height, width) of the frame that is timed, where the tower takes frames as large as they are."""


class Retyped(Tried, Protocol):
    """What `Tower` is here."""

    def encode_batch(self, frames: np.ndarray, shape: int) -> Tensor: ...


@dataclass(frozen=True)
class Choice:
    """The dtype of a tower's arithmetic, and why that one."""

    dtype: str
    reason: str


def arithmetic(device: str, dtype: str) -> str:
    """Return what the last bits of features hang on beside dtype and tower: the kind of device.

    The units of CPUs round their sums of bfloat16 in ways of their own.
    """
    kind = device.partition(":")[0]
    if kind != "cpu" or dtype != "bfloat16":
        return kind
    return f"cpu, {matrix_units() or 'no'} units for bfloat16"


def fastest(tower: Retyped, threads: int) -> Choice:
    """Return what a tower on the CPU, loaded in float32, computes fastest in.

    threads: of the CPU, while the tower runs. Raises UserError for a tower that cannot take what its
    image processor makes.
    """
    weights = sum(weight.numel() for weight in tower.model.parameters())
    if weights < FEWEST_WEIGHTS:
        return Choice("float32", f"a tower of {weights / 1e6:.1f} M weights gains nothing")
    units = matrix_units()
    if not units:
        return Choice("float32", "this CPU has no matrix units for bfloat16")
    check_size(tower)
    return decided(units, *timed(tower, threads))


def decided(units: str, float32: float, bfloat16: float, error: float) -> Choice:
    """Return the choice between so many CPU seconds of the same frames.

    error: of the features in bfloat16, relative to their norm.
    """
    gain = float32 / bfloat16
    if gain < LEAST_GAIN:
        return Choice("float32", f"bfloat16 is {gain:.2g} times as fast here ({units})")
    return Choice(
        "bfloat16",
        f"{gain:.2g} times as fast as float32 here ({units}), features differ by {error:.2%}",
    )


def timed(tower: Retyped, threads: int) -> tuple[float, float, float]:
    """Return the least CPU seconds of a unit of frames in float32 and in bfloat16, and how far their
    features lie apart, relative to the norm of those in float32."""
    picture = tower.pixels.resize(test_picture(*PICTURE)[None])
    frames = np.repeat(picture, tower.frames_per_unit, 0)
    weights = [weight.data for weight in tower.model.parameters()]
    found: dict[str, Tensor] = {}

    def take(dtype: str) -> None:
        found[dtype] = tower.encode_batch(frames, len(frames))

    others = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        spent = least_seconds(
            ("float32", "bfloat16"),
            take,
            lambda dtype: retype(tower, dtype, weights),
            LONG_SECONDS,
        )
    finally:
        torch.set_num_threads(others)
        retype(tower, "float32", weights)
    error = (found["bfloat16"] - found["float32"]).norm() / found["float32"].norm()
    return spent["float32"], spent["bfloat16"], float(error)


def retype(tower: Retyped, dtype: str, weights: list[Tensor] | None = None) -> None:
    """Bring a tower's arithmetic to another dtype, rounding its weights. weights: instead of its own."""
    for place, weight in enumerate(
        tower.model.parameters()
    ):  # no buffers: rotary frequencies stay exact
        weight.data = (weights[place] if weights else weight.data).to(DTYPES[dtype])
    tower.dtype = dtype
