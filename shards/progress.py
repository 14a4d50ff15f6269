"""A progress bar of long work: on a terminal alone, by the first of a launcher's processes."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

DELAY = 2.0
"""Seconds before it is shown: short work needs none."""


def progress(what: str, unit: str, total: int, items: Iterable[Any] | None = None) -> "tqdm[Any]":
    """Return a bar of so many units, to iterate over if it is given items, else moved by `update`."""
    from tqdm import tqdm

    first = os.environ.get("RANK", "0") == "0"
    return tqdm(
        items,
        what,
        total,
        unit=f" {unit}",
        leave=False,
        delay=DELAY,
        disable=None if first else True,  # None: on a terminal alone
    )
