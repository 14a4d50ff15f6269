"""`--share`: at which unit of a plan a worker begins, so that workers do not compete for the same one.

start_of("3/8", os.environ)      # 0.375: after three eighths of them
start_of("auto", os.environ)     # by the scheduler's environment variables

This is only the start: each worker goes round all units and takes those that are left, so a wrong share
costs a little time and loses nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shards.errors import UserError

GOLDEN = 0.6180339887498949
"""Golden ratio - 1: the fractional parts of its first n multiples are spread evenly over
[0, 1) (Knuth, The Art of Computer Programming, 6.4)."""


@dataclass(frozen=True)
class Numbered:
    """The environment variables in which a scheduler numbers its processes."""

    number: str
    count: str
    first: str = ""
    """Variable of the lowest number."""
    step: str = ""
    least: int = 0
    """The lowest number where no variable gives it."""


SCHEDULERS = (
    Numbered(
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_COUNT",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_STEP",
    ),
    Numbered("RANK", "WORLD_SIZE"),
    Numbered("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    Numbered("LSB_JOBINDEX", "LSB_JOBINDEX_END", least=1),
    Numbered("JOB_COMPLETION_INDEX", ""),  # Kubernetes does not give the count
)


def start_of(share: str, environ: Mapping[str, str]) -> float:
    """Return the fraction of the units, in [0, 1), after which to begin.

    share: `K/N`, K from 0 to N - 1, or `auto`: by the first scheduler whose number is in `environ`, 0
    without one. Raises UserError for anything else.
    """
    if share == "auto":
        return next((_fraction(by, environ) for by in SCHEDULERS if _is_numbered(by, environ)), 0.0)
    match = re.fullmatch(r"(\d+)/(\d+)", share)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError("--share", got=repr(share), expected="auto, or K/N with K from 0 to N - 1")
    return int(match[1]) / int(match[2])


def _is_numbered(by: Numbered, environ: Mapping[str, str]) -> bool:
    value = environ.get(by.number, "")
    return bool(value) and not (
        by.number == "LSB_JOBINDEX" and value == "0"
    )  # LSF sets 0 outside of job arrays


def _fraction(by: Numbered, environ: Mapping[str, str]) -> float:
    # a variable that is empty is not set: containers pass on what they were not given
    first = _whole(by.first, environ) if environ.get(by.first) else by.least
    # an array 0-100:10 has the numbers 0, 10, 20 ...
    step = _whole(by.step, environ) if environ.get(by.step) else 1
    number = (_whole(by.number, environ) - first) // max(step, 1)
    if not environ.get(by.count):
        return number * GOLDEN % 1
    count = _whole(by.count, environ)
    # an array with holes has numbers beyond its count
    return number / count if 0 <= number < count else number * GOLDEN % 1


def _whole(name: str, environ: Mapping[str, str]) -> int:
    value = environ[name]
    if not value.isascii() or not value.isdecimal():
        raise UserError(
            f"the variable {name}",
            got=repr(value),
            expected="a whole number",
            fix="unset it, or name a share: --share K/N",
        )
    return int(value)
