"""What all processes do together, or none: an error of one is an error of all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

T = TypeVar("T")


def own_rank() -> int:
    """Return this process' number, 0 for the first of all, or one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Return whether this process is the first of all, or alone."""
    return own_rank() == 0


def on_first(act: Callable[[], object]) -> None:
    """Run `act` on the first process while the others wait; see `on_all`."""
    on_all(lambda: act() if is_first() else None)


def on_all(act: Callable[[], T]) -> list[T]:
    """Run `act` on every process, which all call this; return what it returned on each.

    Raises OSError on all of them where the disk failed one: none waits for another that has ended.
    """
    mine: tuple[Any, str]
    try:
        mine = act(), ""
    except (OSError, SafetensorError) as error:
        # an error without words would pass for none
        mine = None, str(error) or repr(error)
    found: list[Any] = [mine]
    if dist.is_initialized():
        found = found * dist.get_world_size()
        dist.all_gather_object(found, mine)
    for rank, (_, problem) in enumerate(found):
        if problem:
            raise OSError(f"process {rank}: {problem}")
    return [result for result, _ in found]
