"""Spans and boxes in a record's text; refuses those that are misspelt or backwards.

A span is two times that the text joins: `from <t:1> to <t:2>`, `<t:1> - <t:2>`, `{<t:1><t:2>}`, or the
two times of an answer with little other text.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from shards.annotations.fault import RowError
from shards.annotations.forms import COORDINATE_SLOT, SLOTS
from train.data.markup import MARKUP, coordinate_of, misspelt

TIME = re.compile(r"(?<!\\)<(?:t:(-?\d+(?:\.\d+)?)(%?)|TEMP-(\d{3}))>")
BETWEEN = re.compile(r"\s*(?:to|until|till|through|-|\u2013|\u2014|~|\u2192|->)\s*", re.IGNORECASE)
"""The text between the two times of a span."""
FEW = 24
"""Most letters beside the two times of an answer that counts as a span."""
BOX = re.compile(
    r"(?<!\\)(?:<x:{0}><y:{0}><x:{0}><y:{0}>|<WIDTH-{1}><HEIGHT-{1}><WIDTH-{1}><HEIGHT-{1}>)".format(
        r"(-?\d+(?:\.\d+)?)", r"(\d{3})"
    )
)


def refuse_misspelt(turns: Sequence[tuple[str, str]]) -> None:
    """Raise RowError for misspelt markup, a slot without a number, a span or box that is backwards."""
    for number, (role, text) in enumerate(turns, start=1):
        # most turns have no markup at all
        if "<" in text and (fault := _fault(text, answer=role == "assistant")):
            what = f"turn {number} ({role}): {fault.what}"
            raise RowError(fault.reason, what, expected=fault.expected, fix=fault.fix)


@lru_cache(maxsize=2**16)
def _fault(text: str, *, answer: bool) -> RowError | None:
    """Return the first fault of a turn's text, kept for the next record with that text."""
    for written, meant in misspelt(text):
        return RowError(
            "misspelt coordinate",
            f"{written!a} is no coordinate, and would be read as text",
            expected=meant or "<t:12.5>, <t:41.3%>, <x:0.31>, <y:0.52> or <TEMP-037>",
            fix=f"where the text itself is meant, write \\{ascii(written)[1:-1]}",
        )
    if slot := COORDINATE_SLOT.search(text):
        return RowError(SLOTS, f"{slot[0]} without a number in `variables`")
    for first, second in spans(text, answer=answer):
        if _is_backward(first, second):
            what = f"a span from {first[0]} to {second[0]}"
            return RowError("span backwards", what, expected="its start before its end")
    for match in BOX.finditer(text):
        left, top, right, bottom = (float(number) for number in match.groups() if number)
        if left > right or top > bottom:
            what = f"a box {match[0]}"
            return RowError("box backwards", what, expected="left, top, right, bottom")
    return None


def spans(text: str, *, answer: bool) -> Iterator[tuple[re.Match[str], re.Match[str]]]:
    """Yield the two times of each span in a turn: both seconds, both shares, or both anchors."""
    times = list(TIME.finditer(text))
    if len(times) < 2:
        return
    rest = TIME.sub("", text)
    # in an answer two times with little text are a span, whatever joins them
    alone = answer and len(times) == 2 and len(rest) <= FEW and not MARKUP.search(rest)
    for first, second in pairwise(times):
        between = text[first.end() : second.start()]
        before, after = text[: first.start()].rstrip(), text[second.end() :].lstrip()
        bracketed = before[-1:] in tuple("[({") and after[:1] in tuple("])}")
        is_span = (
            alone
            or BETWEEN.fullmatch(between)
            # "and" alone joins two moments as often as the ends of a span
            or (between.strip().lower() == "and" and before.lower().endswith("between"))
            or (between.strip() in ("", ",") and bracketed)
        )
        # seconds and shares cannot be compared without the duration
        if is_span and unit_of(first) == unit_of(second):
            yield first, second


def forwards(answer: str) -> str:
    """Return an answer in which each span or box that ends before its start ends at its start."""
    ordered = BOX.sub(_box_forwards, answer)
    while backward := [pair for pair in spans(ordered, answer=True) if _is_backward(*pair)]:
        first, second = backward[0]
        ordered = ordered[: second.start()] + first[0] + ordered[second.end() :]
    return ordered


def _is_backward(first: re.Match[str], second: re.Match[str]) -> bool:
    return value_of(first) > value_of(second)


def _box_forwards(box: re.Match[str]) -> str:
    left, top, right, bottom = MARKUP.finditer(box[0])
    ends = (max(left, right, key=_place), max(top, bottom, key=_place))
    return "".join(mark[0] for mark in (left, top, *ends))


def _place(mark: re.Match[str]) -> float:
    coordinate = coordinate_of(mark)
    return coordinate.value if coordinate.anchor is None else coordinate.anchor


def unit_of(time: re.Match[str]) -> str:
    """Return the unit of a match of `TIME`: `s`, `%` or `anchor`."""
    return "anchor" if time[3] else time[2] or "s"


def value_of(time: re.Match[str]) -> float:
    """Return the number of a match of `TIME`, in its unit."""
    return float(time[1] or time[3])
