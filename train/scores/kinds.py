"""The kind of each answer (span, box, number, ...), by its reference, its question and its task."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from shards.annotations.forms import DESCRIBE
from train.data.markup import Coordinate, split_markup, unescaped
from train.data.records import Record
from train.scores.words import items_of, letter_of, number_of

CAPTION_WORDS = 10
"""A text of this many words or more is compared as a caption, not for equality."""
LINKS = {*("from", "to", "and", "between", "then", "until", "till", "s", "seconds", "also", "at")}
"""Words between spans that carry no meaning."""
LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\)?\s+(\S.*?)\s*$", re.MULTILINE)
GROUPS = re.compile("xyxy|xy|tt|t|x|y")


@dataclass(frozen=True)
class Asked:
    """All that an answer is scored against."""

    kind: str
    """time, span, windows, point, box, tube, mixed; number, choice, order, caption, text."""
    reference: str
    """Times in seconds, places as fractions, in markup."""
    duration: float = 0.0
    """Seconds of the medium that its times belong to."""
    options: tuple[str, ...] = ()
    """For a choice: the texts of A, B, C and so on."""

    @property
    def coordinates(self) -> tuple[float, ...]:
        """The reference's coordinates, in order."""
        return tuple(mark.value for mark in _marks(self.reference))


def asked_of(record: Record, turn: int, reference: str, duration: float) -> Asked:
    """Return what the answer in a record's turn number `turn` is scored against.

    reference: its text, with anchors by name written as times and places.
    """
    before = [t.text for t in record.turns[:turn] if t.role == "user"]
    return asked(reference, duration, question=before[-1] if before else "", task=record.task)


def asked(reference: str, duration: float = 0.0, *, question: str = "", task: str = "") -> Asked:
    """Return what an answer is scored against."""
    options = options_of(unescaped(question))
    kind = _kind(reference, question, task.lower(), options)
    if not _marks(reference):
        reference = unescaped(reference)  # as it is learned and answered
    return Asked(kind, reference, duration, options if kind == "choice" else ())


def options_of(question: str) -> tuple[str, ...]:
    """Return the texts of a question's lettered lines, A, B and so on, if it has two or more."""
    lines = LETTERED.findall(question)
    in_order = "".join(letter for letter, _ in lines) == string.ascii_uppercase[: len(lines)]
    return tuple(text for _, text in lines) if len(lines) > 1 and in_order else ()


def groups_of(reference: str) -> list[str]:
    """Return a reference's coordinates as groups, in order: tt, t, xyxy, xy, x or y."""
    return GROUPS.findall("".join("tyx"[mark.axis] for mark in _marks(reference)))


def _kind(reference: str, question: str, task: str, options: Sequence[str]) -> str:
    marks = _marks(reference)
    if marks:
        return _kind_of_coordinates(reference, marks, task)
    reference = unescaped(reference)
    # -- from the narrowest form to the widest: a single letter is a choice before it is a text
    if letter_of(reference, options) and (options or re.fullmatch(r"\(?[A-Z][.)]?", reference)):
        return "choice"
    if number_of(reference) is not None:
        return "number"
    ordered = re.search(r"(?<![a-z])(?:order|sequence)", task) and len(items_of(reference)) > 1
    if ordered or _is_order(reference):
        return "order"
    described = "caption" in task or question.endswith(DESCRIBE)
    return "caption" if described or len(reference.split()) >= CAPTION_WORDS else "text"


def _kind_of_coordinates(reference: str, marks: Sequence[Coordinate], task: str) -> str:
    letters = "".join("tyx"[mark.axis] for mark in marks)
    values = [mark.value for mark in marks]
    if letters in ("t", "xy"):
        return {"t": "time", "xy": "point"}[letters]
    # a box that is not upper left, lower right is no box: scored as numbers in order, `mixed`
    if letters == "xyxy" and values[0] <= values[2] and values[1] <= values[3]:
        return "box"
    if re.fullmatch("(tt)+", letters) and _in_order(values) and _linked(reference):
        # one window, too, where the benchmark scores windows (QVHighlights): its mAP is not an IoU
        several = len(marks) > 2 or task in ("windows", "qvhighlights")
        return "windows" if several else "span"
    # HC-STVG's answers: a box after each time, with or without the span before them
    tube = re.fullmatch("(tt)?((?:txyxy)+)", letters)
    if tube and ((tube[1] and values[0] < values[1]) or (not tube[1] and values[0] < values[-5])):
        return "tube"
    return "mixed"


def _in_order(times: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(times[::2], times[1::2], strict=True))


def _linked(reference: str) -> bool:
    """Return whether only joining words are between a reference's spans."""
    pieces = split_markup(reference)
    places = [k for k, piece in enumerate(pieces) if not isinstance(piece, str)]
    between = " ".join(p for p in pieces[places[1] : places[-1]] if isinstance(p, str))
    return not set(re.findall(r"\w+", between.lower())) - LINKS


def _is_order(reference: str) -> bool:
    """Return whether a text is a sequence of letters or of numbers, each once, such as B, A, C."""
    items = items_of(reference)
    short = all(re.fullmatch(r"[a-z]|\d{1,2}", item) for item in items)
    return len(items) > 1 and short and len(set(items)) == len(items)


def _marks(reference: str) -> list[Coordinate]:
    return [piece for piece in split_markup(reference) if not isinstance(piece, str)]
