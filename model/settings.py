"""Declares a setting once: its default, its meaning, the values it takes; torch-free.

    learning_rate: float = setting(2e-5, "of the LLM", more_than=0)

Every reader of values (flags, YAML, a model's config.json) checks them by `problem_of`.
"""

import math
import types
from collections.abc import Callable
from dataclasses import Field, field
from typing import Any

SWITCH = bool | str
"""The type of a setting that is true, false or one of its `choices`."""
LARGEST_INTEGER = 2**31 - 1
"""Bound of integers that have none of their own: above it NumPy and torch may overflow an int32."""


def setting(
    default: Any,
    help_: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    more_than: float | None = None,
    less_than: float | None = None,
    finite: bool = True,
    valid: tuple[Callable[[str], bool], str] | None = None,
) -> Any:
    """Declare a dataclass field. Bounds are inclusive (`least`, `most`) or exclusive.

    help_: its meaning, for `--help`. choices: the texts it may be, for a `SWITCH` beside true and false.
    finite: whether infinity is refused; NaN always is. valid: a test of a text, and which texts pass it,
    in words.
    """
    facts = {
        "help": help_,
        "choices": choices,
        "least": least,
        "most": most,
        "more_than": more_than,
        "less_than": less_than,
        "finite": finite,
        "valid": valid,
    }
    # one list shared by all instances would keep what the first of them appends
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=facts)
    return field(default=default, metadata=facts)


def problem_of(item: Field[Any], value: object) -> str | None:
    """Return what is wrong with a value of a setting, as `must be ...`; None if it is allowed."""
    facts = item.metadata
    wrong = f"must be {expected(item)}"
    if not _is_of(value, item.type):
        return wrong
    if facts["choices"] and not isinstance(value, bool) and value not in facts["choices"]:
        return wrong
    if facts["valid"] and not facts["valid"][0](value):
        return wrong
    # a switch has no bounds, though a bool is an int in Python
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # before the bounds: every comparison with NaN is false, so no bound would refuse it
    if math.isnan(value) or (facts["finite"] and math.isinf(value)):
        return "must be a finite number"
    if not _within(facts, value):
        return wrong
    if isinstance(value, int) and facts["most"] is None and value > LARGEST_INTEGER:
        return f"must be at most {LARGEST_INTEGER}"
    return None


def expected(item: Field[Any]) -> str:
    """Return the values that a setting takes, in words: `an integer in [2, 1000]`, `true or false`."""
    kind, facts = item.type, item.metadata
    if kind == SWITCH:
        return f"true, false or {' or '.join(facts['choices'])}"
    if facts["choices"]:
        return f"one of {', '.join(facts['choices'])}"
    if facts["valid"]:
        return str(facts["valid"][1])
    if kind is bool:
        return "true or false"
    if kind not in (int, float):
        return "a list" if isinstance(kind, types.GenericAlias) else "a text"
    # the words come from the bounds themselves, so that a message cannot differ from the check
    noun = "integer" if kind is int else "number"
    article = "an" if kind is int else "a"
    least, most, more_than, less_than = (
        facts[name] for name in ("least", "most", "more_than", "less_than")
    )
    if most is not None or less_than is not None:
        low = f"[{least:g}" if least is not None else f"({more_than:g}"
        high = f"{most}]" if most is not None else f"{less_than})"
        return f"{article} {noun} in {low}, {high}"
    if more_than == 0 or (kind is int and least == 1):
        return f"a positive {noun}"
    assert least == 0, f"{item.name}: a bound that has no words here"
    return f"{article} {noun}, not negative"


def _is_of(value: object, kind: Any) -> bool:
    """Return whether a value is of a setting's type; integers are numbers, true and false are not."""
    if isinstance(kind, types.GenericAlias):
        return isinstance(value, list)
    # `learning_rate: true` is a slip of the pen, not a rate of 1
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _within(facts: Any, value: float) -> bool:
    least, most, more_than, less_than = (
        facts[name] for name in ("least", "most", "more_than", "less_than")
    )
    return (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (more_than is None or value > more_than)
        and (less_than is None or value < less_than)
    )
