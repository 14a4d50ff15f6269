"""`--share`: where among the units of a plan a worker begins, so that many do not ask for the same.

start_of("3/8", os.environ)      # 0.375: after three eighths of them
start_of("auto", os.environ)     # what the scheduler has told this process

It is only where a worker starts: each goes round and takes what is left, so that a share that is wrong
costs a little time and loses nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shards.errors import UserError

GOLDEN = 0.6180339887498949
"""Multiples of it, without their whole part, lie apart from each other however many there are."""


@dataclass(frozen=True)
class Numbered:
    """The variables by which a scheduler numbers the processes that it starts."""

    number: str
    count: str
    first: str = ""
    """With the least number."""
    step: str = ""
    least: int = 0
    """Where no variable says."""


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
    Numbered("JOB_COMPLETION_INDEX", ""),  # Kubernetes does not say of how many
)


def start_of(share: str, environ: Mapping[str, str]) -> float:
    """Return the part of the units, in [0, 1), after which to begin.

    share: `K/N`, K from 0 to N - 1, or `auto`: of the first scheduler whose number is in `environ`, 0
    without one. Raises UserError for anything else.
    """
    if share == "auto":
        return next((_told(by, environ) for by in SCHEDULERS if _is_numbered(by, environ)), 0.0)
    match = re.fullmatch(r"(\d+)/(\d+)", share)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError("--share", got=repr(share), expected="auto, or K/N with K from 0 to N - 1")
    return int(match[1]) / int(match[2])


def _is_numbered(by: Numbered, environ: Mapping[str, str]) -> bool:
    value = environ.get(by.number, "")
    return bool(value) and not (by.number == "LSB_JOBINDEX" and value == "0")  # no array


def _told(by: Numbered, environ: Mapping[str, str]) -> float:
    first = _whole(by.first, environ) if by.first in environ else by.least
    step = _whole(by.step, environ) if by.step in environ else 1
    number = (_whole(by.number, environ) - first) // max(step, 1)
    if by.count not in environ:
        return number * GOLDEN % 1
    count = _whole(by.count, environ)
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
