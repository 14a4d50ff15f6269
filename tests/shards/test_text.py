"""Words for people: lists that end, durations, bytes, and nothing that steers a terminal.

pytest tests/shards/test_text.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.text import counted, duration, in_bytes, printable, some


@pytest.mark.parametrize(
    ("items", "shown"),
    [([], ""), ("a", "a"), ("abc", "a, b, c"), ("abcd", "a, b, c and 1 more")],
)
def test_a_list_is_cut_after_three_items_and_says_how_many_are_left(items: str, shown: str) -> None:
    assert some(list(items)) == shown


def test_a_list_of_thousands_with_its_own_separator() -> None:
    assert some(range(1502), most=2, separator="; ") == "0; 1 and 1,500 more"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (754, "12m34s"), (4321, "1h12m"), (1e5, "1d03h")],
)
def test_a_duration_has_two_units_at_most(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_numbers_carry_their_noun_and_unit() -> None:
    assert (counted(1, "clip"), counted(2000, "clip")) == ("1 clip", "2,000 clips")
    assert (in_bytes(999), in_bytes(6100)) == ("999 B", "6.1 kB")


@given(st.text())
def test_printable_text_is_printable_and_keeps_what_was(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
