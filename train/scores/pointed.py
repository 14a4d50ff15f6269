"""The spans and places that a text points at in a clip, and the text in seconds and pixels."""

import re
from typing import NamedTuple

from train.data.markup import MARKUP, split_markup
from train.scores.reading import read_coordinates

GROUPS = re.compile("(t?)(xyxy|xy)|tt|t")
PLAIN = {"span": "<t:0> to <t:1>", "box": "<x:0><y:0><x:1><y:1>", "point": "<x:0><y:0>"}
"""Kind -> a reference to search by, in this order, in answers with plain numbers."""

Numbers = tuple[float, ...]


class Places(NamedTuple):
    """Times in seconds, places as fractions of the frame."""

    spans: tuple[tuple[float, float], ...]
    """(start, end); a single time has no length; spans that end before they begin are left out."""
    places: tuple[tuple[Numbers, Numbers], ...]
    """(times, x y or x1 y1 x2 y2); no times where the text and the question name none."""


def pointed(text: str, question: str) -> Places:
    """Return the spans and places of a text that answers a question.

    A place belongs to the time before it, else to the one time that the question names, else to the
    spans of the text.
    """
    marks = [piece for piece in split_markup(text) if not isinstance(piece, str)]
    letters = "".join("tyx"[mark.axis] for mark in marks)
    numbers = [mark.value for mark in marks]
    # a model without coordinate tokens writes numbers: they are read by the same rules as for its score
    if not marks:
        letters, numbers = written_plainly(text)
    spans: list[tuple[float, float]] = []
    found: list[tuple[Numbers, Numbers]] = []
    for match in GROUPS.finditer(letters):
        values = tuple(numbers[match.start() : match.end()])
        if match[2]:
            found.append((values[:1], values[1:]) if match[1] else ((), values))
        elif values[0] <= values[-1]:
            spans.append((values[0], values[-1]))
    asked = [p for p in split_markup(question) if not isinstance(p, str) and p.axis == 0]
    # with several times in the question it is open which one a place is of
    when = (asked[0].value,) if len(asked) == 1 and not spans else ()
    return Places(tuple(spans), tuple((times or when, place) for times, place in found))


def written_plainly(text: str) -> tuple[str, list[float]]:
    """Return the axes (`tt`, `xyxy`, `xy`) and numbers of a span, box or point without markup."""
    for kind, reference in PLAIN.items():
        reading = read_coordinates(kind, reference, text)
        if reading.parsed:
            return {"span": "tt", "box": "xyxy", "point": "xy"}[kind], list(reading.numbers)
    return "", []


def in_pixels(answer: str, display_size: tuple[int, int] | None) -> str:
    """Return an answer with its markup written out: times in seconds, places in pixels.

    Without one size of all frames (None) places are in percent of the frame.
    """
    height, width = display_size or (100, 100)
    unit = "px" if display_size else "%"

    def written(match: re.Match[str]) -> str:
        letter, number = match.group(1), float(match.group(2))
        if letter == "t":
            return f"{number:.2f} s"
        return f"{letter} {number * (width if letter == 'x' else height):.0f} {unit} "

    return MARKUP.sub(written, answer).strip()
