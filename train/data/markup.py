r"""Coordinate markup in text: `<t:12.5>`, `<x:0.31>`, `<y:0.52>`, anchors by name; and misspelt markup.

A backslash before markup, or before a media tag, makes plain text of it: `\<t:3.5>`, `\<image>`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from shards.annotations.forms import MEDIA_TAG

MEDIA_TAGS = re.compile(f"({MEDIA_TAG.pattern})")
SHARE = re.compile(r"(?<!\\)<t:(\d+(?:\.\d+)?)%>")
"""A time as a share of its clip; `coordinates.resolved` writes it in seconds."""
MARKUP = re.compile(r"(?<!\\)(?:<([txy]):(-?\d+(?:\.\d+)?)>|<(TEMP|HEIGHT|WIDTH)-(\d{3})>)")
AXIS = {"t": 0, "y": 1, "x": 2, "TEMP": 0, "HEIGHT": 1, "WIDTH": 2}
MEANT = {"t": "t", "x": "x", "y": "y", "time": "t", "timestamp": "t", "sec": "t", "seconds": "t"}
ALMOST = re.compile(
    r"<\s*(?P<name>t|x|y|time|timestamp|sec|seconds|temp|height|width)"
    r"(?P<between>\s*[:=_\uff1a-]\s*|\s+|(?=\d))"
    r"(?P<number>[-+]?[\d.,:]*\d[\d.,:]*|[-+]?(?:nan|inf)|none|null)(?P<rest>[^<>\n]{0,16})(?P<end>>?)",
    re.IGNORECASE,
)
"""Text that looks like markup: a name, a number, and the characters around them."""
ESCAPE = re.compile(rf"\\(?={MEDIA_TAG.pattern.partition(')')[2]}|{ALMOST.pattern})", re.IGNORECASE)


@dataclass(frozen=True)
class Coordinate:
    """A coordinate written in text, before it is normalised."""

    axis: int
    value: float
    """Seconds of the clip on the time axis, a fraction of the frame on the others."""
    anchor: int | None = None
    """The anchor's number where it was written by name."""


def split_markup(text: str) -> list[str | Coordinate]:
    """Return a text as alternating plain pieces, without their escapes, and coordinates, in order."""
    pieces: list[str | Coordinate] = []
    position = 0
    for match in MARKUP.finditer(text):
        if match.start() > position:
            pieces.append(unescaped(text[position : match.start()]))
        pieces.append(coordinate_of(match))
        position = match.end()
    if position < len(text):
        pieces.append(unescaped(text[position:]))
    return pieces


def coordinate_of(match: re.Match[str]) -> Coordinate:
    """Return the coordinate of a match of `MARKUP`."""
    letter, number, name, anchor = match.groups()
    if letter:
        return Coordinate(AXIS[letter], float(number))
    return Coordinate(AXIS[name], 0.0, anchor=int(anchor))


def unescaped(text: str) -> str:
    """Return a plain text without the backslashes that escape markup."""
    return ESCAPE.sub("", text) if "\\<" in text else text


def kind_of(reference: str) -> str:
    """Return the task of a reference answer, by its markup: one of `TASKS`."""
    found = [match.group(1) or match.group(3) for match in MARKUP.finditer(reference)]
    letters = "".join("tyx"[AXIS[axis]] for axis in found)
    return {"tt": "span", "t": "time", "xy": "point", "xyxy": "box"}.get(letters, "text")


def misspelt(text: str) -> Iterator[tuple[str, str]]:
    """Yield (text as written, markup probably meant or empty) for each misspelt markup."""
    if "<" not in text:
        return
    for match in ALMOST.finditer(text):
        start = match.start()
        if MARKUP.match(text, start) or SHARE.match(text, start):
            continue
        # `x <y 3` compares, and is no markup
        compared = not match["end"] and re.match(r"[\w)\]]", text[start - 1 : start])
        if text[:start].endswith("\\") or compared or not _is_near(match):
            continue
        yield match[0] if match["end"] else text[start : match.end("number")], _meant(match)


def _is_near(match: re.Match[str]) -> bool:
    """Return whether text that looks like markup is hardly anything else, as `x <y 3` and `<t1>` are."""
    name, between, rest = match["name"].lower(), match["between"].strip(), match["rest"].strip()
    # a colon after t, x or y stands in no other text; \uff1a is the full-width one of Chinese keyboards
    if between == ":" or between == "\uff1a":
        return True
    if name in ("temp", "height", "width"):
        return between in ("-", "_", "") and bool(match["end"]) and not rest
    a_unit = re.fullmatch(r"%|[a-z]{0,7}\.?", rest, re.IGNORECASE) is not None
    # <t1> may be a tag of something else, <t1.5> hardly
    a_fraction = "." in match["number"].strip(".,")
    return bool(match["end"]) and a_unit and (bool(match["between"]) or a_fraction)


def _meant(match: re.Match[str]) -> str:
    """Return the markup that was probably meant, empty if unclear."""
    name, number, rest = match["name"].lower(), match["number"], match["rest"].strip().lower()
    if not match["end"]:
        rest = rest[:1] if rest.startswith("%") else ""
    if name in ("temp", "height", "width"):
        return f"<{name.upper()}-{int(number):03d}>" if re.fullmatch(r"\d{1,4}", number) else ""
    letter = MEANT[name]
    clock = re.fullmatch(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", number)
    if clock and letter == "t" and rest in ("", "s"):
        hours, minutes, seconds = (float(part or 0) for part in clock.groups())
        return f"<t:{hours * 3600 + minutes * 60 + seconds:g}>"
    # 1,5 is 1.5 in many languages
    plain = number.replace(",", ".").lstrip("+")
    if not re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", plain):
        return ""
    if rest == "%":
        return f"<t:{float(plain):g}%>" if letter == "t" else f"<{letter}:{float(plain) / 100:g}>"
    if rest in ("", "s", "sec", "secs", "second", "seconds") and (letter == "t" or not rest):
        return f"<{letter}:{float(plain):g}>"
    return ""
