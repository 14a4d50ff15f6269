"""Parameters of which the default tests take a few, and `make test-all` all.

@pytest.mark.parametrize("family", few(FAMILIES, 5))      # every fifth
"""

from collections.abc import Collection
from typing import Any

import pytest


def few(values: Collection[Any], every: int) -> list[Any]:
    """Return all values, marked slow but for the first and each one `every` places after it."""
    return [
        value if not place % every else pytest.param(*_row(value), marks=pytest.mark.slow)
        for place, value in enumerate(values)
    ]


def _row(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
