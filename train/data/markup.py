"""Coordinate markup in text: `<t:12.5>`, `<x:0.31>`, `<y:0.52>`, anchors by name."""

import re
from dataclasses import dataclass

from shards.annotations.forms import MEDIA_TAG

MEDIA_TAGS = re.compile(f"({MEDIA_TAG.pattern})")
SHARE = re.compile(r"<t:(\d+(?:\.\d+)?)%>")
"""A time as a share of its clip; `join` writes it in seconds."""
MARKUP = re.compile(r"<([txy]):(-?\d+(?:\.\d+)?)>|<(TEMP|HEIGHT|WIDTH)-(\d{3})>")
AXIS = {"t": 0, "y": 1, "x": 2, "TEMP": 0, "HEIGHT": 1, "WIDTH": 2}


@dataclass(frozen=True)
class Coordinate:
    """A coordinate written in text, before it is normalised."""

    axis: int
    value: float
    """Seconds of the clip on the time axis, a fraction of the frame on the others."""
    anchor: int | None = None
    """The anchor's number where it was written by name."""


def split_markup(text: str) -> list[str | Coordinate]:
    """Return a text as alternating plain pieces and coordinates, in order."""
    pieces: list[str | Coordinate] = []
    position = 0
    for match in MARKUP.finditer(text):
        if match.start() > position:
            pieces.append(text[position : match.start()])
        letter, number, name, anchor = match.groups()
        if letter:
            pieces.append(Coordinate(AXIS[letter], float(number)))
        else:
            pieces.append(Coordinate(AXIS[name], 0.0, anchor=int(anchor)))
        position = match.end()
    if position < len(text):
        pieces.append(text[position:])
    return pieces


def kind_of(reference: str) -> str:
    """Return what a reference answer is, by its markup: one of `TASKS`."""
    found = [match.group(1) or match.group(3) for match in MARKUP.finditer(reference)]
    letters = "".join("tyx"[AXIS[axis]] for axis in found)
    return {"tt": "span", "t": "time", "xy": "point", "xyxy": "box"}.get(letters, "text")
