"""What records are spliced from: stretches of banked clips, and the phrases that say what they show."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shards.errors import UserError
from shards.read.timeline import Stretch, Timeline
from train.data.records import Record


@dataclass(frozen=True)
class Source:
    """A stretch of a banked clip, and what says what it shows."""

    phrases: tuple[str, ...]
    """All of one meaning."""
    clip: str
    """Its id."""
    stretch: Stretch
    times: np.ndarray
    """float64 seconds of the clip, of all its banked frames."""

    @classmethod
    def of(cls, record: Record) -> "Source":
        """Return what a row of `reading.parse_source` is, once its medium is found."""
        (timeline,), (clip,) = record.places, record.clips
        assert isinstance(timeline, Timeline)
        (stretch,) = timeline.stretches
        info = stretch.place.clip().info
        times = info.timestamps - info.start
        return cls(tuple(turn.text for turn in record.turns), clip, stretch, times)


def refuse_shared(lists: Iterable[tuple[str, ...]], name: str) -> None:
    """Raise UserError where a phrase stands in two different lists: one of them denies the other."""
    owner: dict[str, tuple[str, ...]] = {}
    for phrases in lists:
        for phrase in phrases:
            other = owner.setdefault(phrase, phrases)
            if other != phrases:
                raise UserError(
                    f"phrase {phrase!a} stands in two different lists of phrases",
                    got=f"{list(other)} and {list(phrases)}",
                    where=f"{name}: splice",
                    fix="write the same list, in the same order, wherever the same is shown",
                )


class Tables(NamedTuple):
    """The sources as arrays: int64."""

    phrase: np.ndarray
    """`(sources,)`, the number of its phrase."""
    clip: np.ndarray
    """The number of its clip."""
    first: np.ndarray
    last: np.ndarray
    """Banked frames [first, last) of its clip."""
    low: np.ndarray
    high: np.ndarray
    """Milliseconds of its clip."""
    line: np.ndarray
    """Where its clip's frames begin among `times`."""
    base: np.ndarray
    """What is added to its clip's times there."""
    times: np.ndarray
    """Microseconds of all clips' frames, one clip after the other, rising."""
    seconds: np.ndarray
    """float64, the same frames, each in its clip."""
    begin: np.ndarray
    """`(phrases,)`, its first source."""
    size: np.ndarray
    """How many it has."""

    @classmethod
    def of(cls, sources: Sequence[Source]) -> "Tables":
        numbers: dict[tuple[str, ...], int] = {}
        clips: dict[str, int] = {}
        lines, bases, times, seconds = [], [], [], []
        frames = base = 0
        for source in sources:
            numbers.setdefault(source.phrases, len(numbers))
            if source.clip not in clips:
                clips[source.clip] = len(clips)
                lines.append(frames)
                bases.append(base)
                seconds.append(source.times)
                times.append(base + np.rint(1e6 * source.times).astype(np.int64))
                frames += len(source.times)
                base = int(times[-1][-1]) + math.ceil(1e6 * source.stretch.end) + 10**9
        phrase = np.asarray([numbers[source.phrases] for source in sources])
        clip = np.asarray([clips[source.clip] for source in sources])
        spans = [source.stretch for source in sources]
        first, last = (np.asarray([s[k] for s in spans], np.int64) for k in (1, 2))
        low = np.asarray([math.floor(1000 * s.start) for s in spans])
        high = np.asarray([math.ceil(1000 * s.end) for s in spans])
        size = np.bincount(phrase)
        own = np.asarray(lines)[clip], np.asarray(bases)[clip]
        frames_of_all = np.concatenate(times), np.concatenate(seconds)
        return cls(
            phrase, clip, first, last, low, high, *own, *frames_of_all, np.cumsum(size) - size, size
        )

    def pick(self, phrase: np.ndarray, lot: np.ndarray) -> np.ndarray:
        """Return a source of each phrase; lot: numbers in [0, 1)."""
        return self.begin[phrase] + (lot * self.size[phrase]).astype(np.int64)
