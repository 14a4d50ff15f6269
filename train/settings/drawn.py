"""Settings of what a run draws in each epoch: spliced records, chosen frames; as words, `name=value`.

--splice records=4000 parts=2-6 questions=span+seen        splice: {records: 4000, parts: 2-6}
--splice records=4000 "span=When does {} happen?"          splice: {span: ["When does {} happen?", ...]}
--augment jitter ratio=0.25+0.5 drop=0.3                   augment: [jitter, ratio=0.25+0.5, drop=0.3]
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

from model.slow_fast import STRATEGIES, is_ratio
from shards.errors import UserError


def draw(*key: int | np.ndarray) -> np.ndarray:
    """Return a float64 number in [0, 1) for each key: a hash of it, by the mixer of splitmix64.

    key: non-negative integers, or arrays of them that broadcast. No state: any rank, order and resume
    gives the same numbers.
    """
    mixed = np.zeros(np.broadcast_shapes((1,), *(np.shape(part) for part in key)), np.uint64)
    # splitmix64's finaliser (Stafford's variant 13), once for each part of the key: neighbouring
    # records and epochs give unrelated numbers
    for part in key:
        mixed = mixed + np.uint64(0x9E3779B97F4A7C15) + np.asarray(part).astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    # the upper 53 bits: as many as a float64 holds exactly
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


TAG = re.compile(r"<[^>]*>")
QUESTIONS = ("span", "order", "count", "seen")
BLANK = "{}"
"""Placeholder in a question's text for the phrase or time that it asks about."""


@dataclass(frozen=True)
class SpliceSettings:
    """How records are spliced from clips with phrases."""

    records: int = 10_000
    """Records of an epoch."""
    parts: tuple[float, float] = (2, 6)
    """Clips of a medium, fewest and most."""
    seconds: tuple[float, float] = (2.0, 6.0)
    """Shortest (where the clip is that long) and longest part of a clip."""
    rounds: int = 4
    """Most questions of a record."""
    questions: tuple[str, ...] = QUESTIONS
    span: tuple[str, ...] = ("When is this seen: {}?",)
    """Wordings of a kind of question, of which each question draws one; see `BLANK`."""
    order: tuple[str, ...] = ("In which order are these seen?",)
    """The text above the lettered phrases."""
    count: tuple[str, ...] = ("How many times is this seen: {}?",)
    seen: tuple[str, ...] = ("What is seen at {}?",)

    @property
    def wordings(self) -> dict[str, tuple[str, ...]]:
        """The wordings of each kind of question."""
        return {"span": self.span, "order": self.order, "count": self.count, "seen": self.seen}


@dataclass(frozen=True)
class AugmentSettings:
    """Random choices of a medium's frames, in place of evenly spaced ones in a fixed pattern."""

    jitter: bool = False
    """Whether each frame is a random one of its equal share of the banked frames."""
    pattern: tuple[str, ...] = ()
    """Strategies, of which a record draws one (`pattern` alone: all); empty: the run's."""
    ratio: tuple[Fraction, ...] = ()
    """Shares of slow frames, of which a record draws one; empty: the run's."""
    drop: float = 0.0
    """The largest share of a medium's banked frames, consecutive ones, that is left out."""

    @property
    def is_on(self) -> bool:
        """Whether anything is drawn."""
        return self != AugmentSettings()


T = TypeVar("T", SpliceSettings, AugmentSettings)


def read_splice(words: Sequence[str]) -> SpliceSettings:
    """Return the settings of `splice`; UserError for an unknown word or an invalid value."""
    found = _read(SpliceSettings, words, _SPLICE)
    if found.parts[0] < 1 or found.seconds[0] < 0.1:
        raise UserError("parts are at least 1, seconds at least 0.1", got=" ".join(words))
    return found


def read_augment(words: Sequence[str]) -> AugmentSettings:
    """Return the settings of `augment`; UserError for an unknown word or an invalid value."""
    return _read(AugmentSettings, words, _AUGMENT)


def words_of(mapping: dict[str, Any]) -> list[str]:
    """Return a YAML mapping as the words of a command line."""
    words = []
    for name, value in mapping.items():
        between = "|" if name in QUESTIONS else "+"
        text = between.join(map(str, value)) if isinstance(value, list) else value
        words.append(f"{name}={text}")
    return words


def problem_of(read: Callable[[Sequence[str]], object], words: Sequence[str]) -> str | None:
    """Return what is wrong with words, None if they are valid."""
    try:
        read(words)
    except UserError as error:
        return str(error)
    return None


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition("-")
    found = float(low), float(high or low)
    if not re.fullmatch(r"[\d.]+(-[\d.]+)?", text) or found[0] > found[1]:
        raise ValueError
    return found


def _counts(text: str) -> tuple[float, float]:
    low, high = _range(text)
    return int(low), int(high) if low == int(low) and high == int(high) else _no()


def _count(text: str) -> int:
    return int(text) if re.fullmatch(r"[1-9]\d{0,8}", text) else _no()


def _share(text: str) -> float:
    # at most 0.9: of every medium something has to be left
    return float(text) if re.fullmatch(r"0?\.\d+", text) and float(text) <= 0.9 else _no()


def _some(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split("+"))
        return chosen if set(chosen) <= set(choices) and len(set(chosen)) == len(chosen) else _no()

    return read


def _patterns(text: str) -> tuple[str, ...]:
    return _some(STRATEGIES)(text) if text else STRATEGIES


def _ratios(text: str) -> tuple[Fraction, ...]:
    return tuple(Fraction(word) if is_ratio(word) else _no() for word in text.split("+"))


def _wordings(blanks: int) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        texts = tuple(" ".join(one.split()) for one in text.split("|"))
        good = (one and one.count(BLANK) == blanks and not TAG.search(one) for one in texts)
        return texts if all(good) else _no()

    return read


def _yes(text: str) -> bool:
    return text in ("", "true", "True") or _no()


def _no() -> Any:
    raise ValueError


Reader = Callable[[str], Any]
_SPLICE: dict[str, tuple[Reader, str]] = {
    "records": (_count, "a positive integer, such as 4000"),
    "parts": (_counts, "a number of clips, or a range such as 2-6"),
    "seconds": (_range, "seconds, or a range such as 2-6"),
    "rounds": (_count, "a positive integer, such as 4"),
    "questions": (_some(QUESTIONS), f"some of {'+'.join(QUESTIONS)}"),
    "span": (_wordings(1), 'such as "When does {} happen?", several of them with | between'),
    "order": (_wordings(0), 'a text without {}, such as "In which order are these seen?"'),
    "count": (_wordings(1), 'such as "How often is {} seen?"'),
    "seen": (_wordings(1), 'such as "What happens at {}?"'),
}
_AUGMENT: dict[str, tuple[Reader, str]] = {
    "jitter": (_yes, "no value"),
    "pattern": (_patterns, f"some of {'+'.join(STRATEGIES)}"),
    "ratio": (_ratios, "shares of slow frames, such as 0.25+0.5"),
    "drop": (_share, "a share up to 0.9, such as 0.3"),
}


def _read(kind: type[T], words: Sequence[str], readers: dict[str, tuple[Reader, str]]) -> T:
    values: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in readers:
            known = ", ".join(field.name for field in fields(kind))
            raise UserError(f"knows no {name!a}", expected=f"some of {known}")
        if name in values:
            raise UserError(f"has {name} twice", fix="keep one")
        read, expected = readers[name]
        try:
            values[name] = read(text)
        except ValueError:
            raise UserError(f"{name}", got=repr(text), expected=expected) from None
    return kind(**values)
