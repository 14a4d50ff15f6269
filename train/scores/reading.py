"""Reads the coordinates that a reference asks for from a text that a model wrote.

An answer is searched for the reference's own words with numbers in place of its coordinates; other
numbers in those words, and ordinals, may differ. Where those words are missing, it is searched for the
common ways to write the kind. A value counts when it is given once and ends the answer, see `runs_on`:
else a model that lists many values would be scored by its luckiest. train/README.md has a table of
examples, which a test reads.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from train.scores.numerals import ANY, MARKED, PLAIN, SECONDS, UNMARKED, Text, text_of
from train.scores.words import folded, without_thinking

MOST_WORDS = 12
"""Words that may follow an answer's last number, where its reference has not more than half as many."""
TO = r"(?:-|\u2013|\u2014|~|→|->|\.\.\.?|to|till|until|through|up to)"
END = (
    r"(?:(?:and|,|;) ?)*(?:it )?(?:ends?|ending|stops?|finishes)"
    r"(?: ?(?:is|at|in|on|time|:|=|around|about))*"
)
SPANS = (
    rf"({{t}})[\])}}}}]?,?\s?(?:{TO}|{END})\s?(?:about |around )?[\[({{{{]?({{t}})"
    r"|between ({t}) and ({t})",
    r"({t})[\])}}]?\s?(?:,|;|and|/|\|)?\s?[\[({{]?({t})",
)
"""Two times joined by a word or a dash; then two times beside each other."""
_GAP = r"[\s,;:=()\[\]{{}}]*(?:(?:and|to)\s)?[\s()\[\]{{}}]*"
_NAME = r"(?:(?<!\w){0}_?(?:\d|min|max)?\s?[:=]?\s?)?"
_PLACE = rf"{_NAME.format('x')}({{x}}){_GAP}{_NAME.format('y')}({{y}})"
COMMON = {
    "time": (f"([{MARKED['t']}{SECONDS}])", "({t})"),
    "span": SPANS,
    "point": (_PLACE,),
    "box": (f"{_PLACE}{_GAP}{_PLACE}",),
}
"""Kind -> patterns of its coordinates; the first that matches is read."""


@dataclass(frozen=True)
class Reading:
    """The coordinates of an answer, in the reference's order, if it has them."""

    numbers: tuple[float, ...] = ()
    run_on: bool = False
    """Whether it has them and goes on, so that they do not count."""

    @property
    def parsed(self) -> bool:
        """Whether coordinates were read."""
        return bool(self.numbers)


NOTHING = Reading()
RUN_ON = Reading(run_on=True)


def read_coordinates(kind: str, reference: str, said: str) -> Reading:
    """Return the coordinates of an answer: as many as the reference has, on the same axes."""
    answer, asked = answer_text(said), text_of(reference)
    patterns = [own_words(asked)]
    if not re.search(r"\w", re.sub(ANY, "", asked.text)) and kind in COMMON:
        patterns = []  # a reference without words of its own would match any number
    patterns += COMMON.get(kind, ())
    for pattern in patterns:
        found = list(_search(pattern, answer))
        if found:
            return RUN_ON if len(found) > 1 else _alone(answer, found, tail_of(asked))
    return _in_order(answer, asked)


def read_windows(reference: str, said: str) -> Reading:
    """Return the starts and ends of all spans that an answer lists."""
    answer = answer_text(said)
    for pattern in SPANS:
        found = list(_search(pattern, answer))
        if found:
            reading = _alone(answer, found, tail_of(text_of(reference)))
            # a span that is listed twice is a model that repeats itself
            pairs = list(zip(reading.numbers[::2], reading.numbers[1::2], strict=True))
            return RUN_ON if len(set(pairs)) < len(pairs) else reading
    return NOTHING


def read_tube(reference: str, said: str) -> Reading:
    """Return an answer's span, where it has one, and its boxes, each after its time.

    More boxes than the reference has are a run-on if some are repeated or after the span.
    """
    answer, asked = answer_text(said), text_of(reference)
    # its own words first: among plain numbers only they tell boxes from "2 men"
    own = _search(own_words(asked), answer)
    if len(own) == 1 and (reading := _alone(answer, own, tail_of(asked))).parsed:
        return reading
    places = answer.coordinates("txy")
    shape = _filled("({t}{t})?((?:{t}{x}{y}{x}{y})+)", answer)
    found = re.fullmatch(shape, answer.at(places))
    if not found:
        return NOTHING
    numbers = tuple(answer.values[place] for place in places)
    rows = [numbers[k : k + 5] for k in range(len(found[1] or ""), len(numbers), 5)]
    behind = found[1] is not None and rows[-1][0] > numbers[1]
    # more boxes than the reference has are right if they are others, of times within the span
    more = len(rows) > len(asked.marked) // 5
    repeats = more and (len(set(rows)) < len(rows) or behind)
    over = runs_on(answer.text[places[-1] + 1 :], tail_of(asked))
    return RUN_ON if repeats or over else Reading(numbers)


def answer_text(said: str) -> Text:
    """Return an answer without its think block, its numbers as characters."""
    return text_of(without_thinking(said))


def words_of(said: str) -> str:
    """Return the words of a text without its numbers."""
    return folded(re.sub(ANY, " ", answer_text(said).text))


def runs_on(tail: str, own: str) -> bool:
    """Return whether an answer goes on after its last number by more than a few words.

    By a number, another line, more than `MOST_WORDS` words, or a word three times in a row; what the
    reference has of these after its own last number does not count. own: that part of the reference.
    """
    tail, own = tail.rstrip(), own.rstrip()
    signs = (ANY, r"\n\s*\w|<", r"(?i)(\b\w+\b)(?:\W+\1\b){2}")
    over = any(len(re.findall(sign, tail)) > len(re.findall(sign, own)) for sign in signs)
    # twice: the same said in other words may take more of them
    return over or len(tail.split()) > max(MOST_WORDS, 2 * len(own.split()))


def tail_of(asked: Text) -> str:
    """Return the words of a reference after its last coordinate."""
    return asked.text[max(asked.marked, default=len(asked.text)) + 1 :]


def own_words(asked: Text) -> str:
    """Return the pattern of a reference's own words, with its coordinates as groups."""
    text = asked.text.rstrip(" .!")
    pattern = r"(?<!\w)" if re.match(r"\w", text) else ""
    axes = {mark: axis for axis, mark in MARKED.items()}
    for char in text:
        if char in axes:
            pattern += rf"\s*({{{axes[char]}}})\s*"
        elif char in (SECONDS, PLAIN):
            pattern += UNMARKED
        else:
            pattern += r"\s*" if char.isspace() else re.escape(char).translate(_BRACES)
    return pattern


_BRACES = str.maketrans({"{": "{{", "}": "}}"})
"""Escapes braces of a reference: patterns are filled in by `str.format`."""


def _filled(pattern: str, answer: Text) -> str:
    """Return a pattern with the characters of time, x and y: markup, or plain numbers without any."""
    plain = {"t": UNMARKED, "x": PLAIN, "y": PLAIN}
    marks = answer.marks
    return pattern.format(**{a: MARKED[a] if MARKED[a] in marks else plain[a] for a in MARKED})


def _search(pattern: str, answer: Text) -> list[list[int]]:
    """Return the places of the numbers of each match of a pattern."""
    found = re.finditer(_filled(pattern, answer), answer.text, re.IGNORECASE)
    return [[m.start(k + 1) for k, group in enumerate(m.groups()) if group] for m in found]


def _alone(answer: Text, found: Sequence[Sequence[int]], own: str) -> Reading:
    """Return the numbers at some places, unless the answer has more coordinates, or goes on.

    own: the reference's words after its last coordinate.
    """
    places = [place for match in found for place in match]
    # marked coordinates beyond those asked for: a list of guesses, of which one would be right by luck
    others = {answer.text[place] for place in answer.values if place not in places}
    if others & set(MARKED.values()) or runs_on(answer.text[places[-1] + 1 :], own):
        return RUN_ON
    return Reading(tuple(answer.values[place] for place in places))


def _axes(text: Text) -> str:
    """Return the axis of each coordinate of a text."""
    axes = {mark: axis for axis, mark in MARKED.items()}
    return "".join(axes.get(mark, "") for mark in text.marks)


def _in_order(answer: Text, asked: Text) -> Reading:
    """Return the numbers of an answer with exactly one for each coordinate asked for, and no other."""
    axes = _axes(asked)
    places = answer.coordinates(axes)
    shape = _filled("".join(f"{{{axis}}}" for axis in axes), answer)
    if not places or not re.fullmatch(shape, answer.at(places)):
        return NOTHING
    return _alone(answer, [places], tail_of(asked))
