"""Numbers in text: each becomes one character, so that patterns of words and numbers can be matched.

    text_of("from <t:1.5> to 4 s").values   # {5: 1.5, 10: 4.0}

Coordinate markup keeps its axis. A clock (1:04) or a number with a unit (4 s, 1.5 min, 1 h 2 min 4 s)
is a time in seconds; minutes are the unit of both ends (1 to 4 min). Ordinals (3rd), numbers of other
units (50 %, 3 px, frame 7), those with a comma (3,5 s) and those that are parts of words (mp4) are words.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

# of Unicode's private use area: each is one place in a pattern, and no letter
TIME, X, Y, SECONDS, PLAIN = "\ue010\ue011\ue012\ue013\ue014"
"""Characters for `<t:…>`, `<x:…>`, `<y:…>`, a number of seconds, a number without a unit."""
MARKED = {"t": TIME, "x": X, "y": Y}
ANY = f"[{TIME}{X}{Y}{SECONDS}{PLAIN}]"
UNMARKED = f"[{SECONDS}{PLAIN}]"

_NUMBER = r"(?:\d+\.\d+|(?<!\w)\d+)"
_MINUTE = r"\s?(?:m|mins?|minutes?)(?![^\W\d_])"
_HOUR = r"\s?(?:h|hrs?|hours?)(?![^\W\d_])"
_AND = r",?\s?(?:and\s)?"
_UNIT = r"\s?(?:s|secs?|seconds?)(?![^\W\d_])"
_TOKEN = re.compile(
    rf"""
      <(?P<axis>[txy]):(?P<marked>-?\d+(?:\.\d+)?)>(?:{_UNIT})?
    | (?P<clock>(?<![\w.:])(?:\d+:)?\d{{1,2}}:[0-5]\d(?:\.\d+)?(?![\d:]))
    | (?P<shared>(?<![\w.,]){_NUMBER})(?=\s?(?:-|\u2013|to|and)\s?{_NUMBER}{_MINUTE})
    | (?P<hours>(?<![\w.,]){_NUMBER}){_HOUR}{_AND}
        (?:(?P<minutes_of_it>\d+){_MINUTE}(?:{_AND}(?P<rest_of_it>\d+(?:\.\d+)?){_UNIT})?
          |(?P<seconds_of_it>\d+(?:\.\d+)?){_UNIT})
    | (?P<minutes>(?<![\w.,]){_NUMBER}){_MINUTE}(?:\s?(?:and\s)?(?P<rest>\d+(?:\.\d+)?){_UNIT})?
    | (?<![\w.,])\d+(?P<comma>,)\d+(?:\.\d+)?(?:{_UNIT}|{_MINUTE})  # 3,5 or 3 and 5 or 3,500
    | (?<!\w)\d+(?P<ordinal>st|nd|rd|th)(?!\w)
    | (?P<frames>(?<!\w)frames?\s)\d+(?:\.\d+)?
    | {_NUMBER}\s?(?P<other>%|(?:percent|px|pixels?|ms|fps|frames?|h|hours?)(?!\w))
    | (?P<seconds>{_NUMBER}){_UNIT}
    | (?P<joined>\d+\.\d)(?=\d+\.\d)
    | (?P<plain>
        (?<!\d\s)(?<![\w)\]>])-(?:\d+\.\d+|\d+(?!\w))  # a dash after a number is no sign
      | \d+\.\d+
      | (?<!\w)(?<!\d\.)\d+(?!\w)
      | (?<![\w.])\.\d+
      )
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""joined: times written one after the other without a blank, as plain text has them: 1.04.0."""


@dataclass(frozen=True)
class Text:
    """A text whose numbers are single characters."""

    text: str
    values: dict[int, float]
    """Place of a number character -> its number."""

    @property
    def marks(self) -> str:
        """Its number characters, in order."""
        return self.at(self.values)

    def at(self, places: Iterable[int]) -> str:
        """Return the characters at some places."""
        return "".join(self.text[place] for place in places)

    @property
    def marked(self) -> list[int]:
        """The places of numbers in markup."""
        return [place for place in self.values if self.text[place] in MARKED.values()]

    def coordinates(self, axes: str) -> list[int]:
        """Return the places of the numbers that may be coordinates on some axes.

        All numbers, but where each of the axes has markup, that alone: the others are words.
        """
        in_markup = all(MARKED[axis] in self.marks for axis in axes)
        return self.marked if in_markup else list(self.values)


def text_of(raw: str) -> Text:
    """Return a text with each number as a character; blanks are single, and line breaks stay."""
    # the marks themselves first: a text may hold private-use characters of its own
    raw = re.sub(f"{ANY}|[^\\S\n]+", " ", raw).strip()
    raw = re.sub(r" ?\n\s*", "\n", raw)
    out, values, position = "", dict[int, float](), 0
    for match in _TOKEN.finditer(raw):
        out += raw[position : match.start()]
        position = match.end()
        mark, value = _read(match)
        # hundreds of digits, of a model that repeats itself, are read as infinity
        if value is not None and isfinite(value):
            values[len(out)] = value
        out += mark if value is None or isfinite(value) else "#"
    return Text(out + raw[position:], values)


def _read(match: re.Match[str]) -> tuple[str, float | None]:
    """Return the character or word that replaces a token, and its value."""
    found = match.groupdict()
    if found["axis"]:
        return MARKED[found["axis"].lower()], float(found["marked"])
    if found["clock"]:
        seconds = 0.0
        # 1:02:03 in base 60
        for part in found["clock"].split(":"):
            seconds = 60 * seconds + float(part)
        return SECONDS, seconds
    if found["shared"]:
        return SECONDS, 60 * float(found["shared"])
    if found["hours"]:
        minutes, rest = found["minutes_of_it"], found["rest_of_it"] or found["seconds_of_it"]
        return SECONDS, 3600 * float(found["hours"]) + 60 * float(minutes or 0) + float(rest or 0)
    if found["minutes"]:
        return SECONDS, 60 * float(found["minutes"]) + float(found["rest"] or 0)
    if found["seconds"]:
        return SECONDS, float(found["seconds"])
    if found["joined"] or found["plain"]:
        return PLAIN, float(found["joined"] or found["plain"])
    return (
        f"#{found['ordinal'] or found['frames'] or found['other'] or found['comma']}".lower().rstrip(),
        None,
    )
