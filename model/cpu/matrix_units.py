"""Whether this CPU multiplies bfloat16 itself, and what timing two ways of computing takes.

CPUs with matrix units for bfloat16 multiply two to eight times as many of them a second as of float32;
others convert every number and are slower. Which it is here torch is asked, and then it is timed, in CPU
seconds, which other work on the machine hardly changes.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Kind = TypeVar("Kind")

UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "sve_bf16": "SVE", "bf16": "NEON"}
"""What torch calls the units that multiply bfloat16, and what they are; the fastest first."""
ROUNDS = 3


def matrix_units() -> str:
    """Return which units of this CPU multiply bfloat16, "" where torch knows of none."""
    asked = getattr(torch.cpu, "get_capabilities", None)
    if asked:
        has = asked()
    else:  # torch before 2.11
        has = {
            "amx_bf16": getattr(torch.cpu, "_is_amx_tile_supported", bool)(),
            "avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)(),
        }
    return next((shown for name, shown in UNITS.items() if has.get(name)), "")


def least_seconds(
    kinds: Sequence[Kind],
    take: Callable[[Kind], None],
    prepare: Callable[[Kind], None] = lambda _: None,
    long: float = float("inf"),
) -> dict[Kind, float]:
    """Return the CPU seconds of each kind, the least of some rounds, which come in turn.

    The first round loads kernels and does not count, unless one of the first kind took longer than
    `long`: then it is believed at once. prepare: what is not timed.
    """
    spent: dict[Kind, float] = {}
    for number in range(1 + ROUNDS):
        for kind in kinds:
            prepare(kind)
            began = time.process_time()
            take(kind)
            seconds = time.process_time() - began
            spent[kind] = seconds if number < 2 else min(spent[kind], seconds)
        if spent[kinds[0]] > long:
            break
    return spent
