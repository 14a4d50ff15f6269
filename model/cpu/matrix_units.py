"""Whether this CPU multiplies bfloat16 in hardware, and a timer for two ways of computing the same.

CPUs with matrix units for bfloat16 multiply two to eight times as many bfloat16 as float32 numbers a
second; others convert each number and are slower. Torch reports the units; the gain is then measured, in
CPU seconds, which other work on the machine hardly changes.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Kind = TypeVar("Kind")

UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "sve_bf16": "SVE", "bf16": "NEON"}
"""Torch's name of a capability -> the units that multiply bfloat16; the fastest first."""
ROUNDS = 3
"""Timed rounds, after one that loads kernels."""


def matrix_units() -> str:
    """Return the units of this CPU that multiply bfloat16, "" where torch reports none."""
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
    """Return the least CPU seconds of each kind over `ROUNDS` rounds, the kinds taken in turn.

    take: the work, timed. prepare: called before it, not timed. The first round loads kernels and does
    not count, unless the first kind took longer than `long` seconds: then it is the only round.
    """
    # the least, not the mean: other work on the machine only ever adds
    spent: dict[Kind, float] = {}
    for number in range(1 + ROUNDS):
        for kind in kinds:
            prepare(kind)
            began = time.process_time()
            take(kind)
            seconds = time.process_time() - began
            spent[kind] = seconds if number < 2 else min(spent[kind], seconds)
        # a large tower's minute is not spent four times over a question that one round answers
        if spent[kinds[0]] > long:
            break
    return spent
