"""Sources of spliced records: parts of banked clips, and phrases that describe them."""

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
    """A part of a banked clip, and phrases that describe it."""

    phrases: tuple[str, ...]
    """Phrases of one meaning."""
    clip: str
    """Id of the clip."""
    stretch: Stretch
    times: np.ndarray
    """float64, seconds on the clip's clock of all its banked frames."""

    @classmethod
    def of(cls, record: Record) -> "Source":
        """Return the source of a record of `reading.parse_source`, joined to its clip."""
        (timeline,), (clip,) = record.places, record.clips
        assert isinstance(timeline, Timeline)
        (stretch,) = timeline.stretches
        info = stretch.place.clip().info
        times = info.timestamps - info.start
        return cls(tuple(turn.text for turn in record.turns), clip, stretch, times)


def refuse_shared(lists: Iterable[tuple[str, ...]], name: str) -> None:
    """Raise UserError where a phrase is in two different lists, which therefore contradict each other."""
    owner: dict[str, tuple[str, ...]] = {}
    for phrases in lists:
        for phrase in phrases:
            other = owner.setdefault(phrase, phrases)
            if other != phrases:
                raise UserError(
                    f"phrase {phrase!a} is in two different lists of phrases",
                    got=f"{list(other)} and {list(phrases)}",
                    where=f"{name}: splice",
                    fix="write the same list, in the same order, for all clips that show the same",
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
    """Index of its clip's first frame in `times`."""
    base: np.ndarray
    """Offset of its clip's times there."""
    times: np.ndarray
    """Microseconds of all clips' frames, one clip after the other, rising."""
    seconds: np.ndarray
    """float64, the same frames' seconds on their own clip's clock."""
    begin: np.ndarray
    """`(phrases,)`, index of a phrase's first source."""
    size: np.ndarray
    """`(phrases,)`, number of a phrase's sources."""

    @classmethod
    def of(cls, sources: Sequence[Source]) -> "Tables":
        """Return the tables of sources, those of one phrase next to each other."""
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
                # in integers, so that a clip's times are as exact behind a thousand clips as behind none
                times.append(base + np.rint(1e6 * source.times).astype(np.int64))
                frames += len(source.times)
                # a gap of a thousand seconds between clips: one sorted array of all
                # times, searched once for all
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
        """Return the index of a source of each phrase; lot: random numbers in [0, 1)."""
        return self.begin[phrase] + (lot * self.size[phrase]).astype(np.int64)
