"""Sources of spliced records: parts of banked clips, and phrases that describe them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from shards.annotations.fault import RowError, short
from shards.annotations.fields import is_empty, refuse_parts
from shards.annotations.forms import MEDIA_TAG
from shards.annotations.records import check_inside, parse_row
from shards.annotations.timeline import Cut
from shards.errors import UserError
from shards.format.samples import clip_id
from shards.read.banks import Banks
from shards.read.timeline import Stretch, Timeline
from train.data.markup import MARKUP
from train.data.records import PLAIN, Record, Turn, known_id
from train.data.spans import refuse_misspelt
from train.settings.config import DataSettings
from train.settings.folders import Folders

PHRASE = ("phrase", "caption")
SOURCE = "no source of splice"
EXPECTED = "one `video`, and its `phrase` or `caption`"


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
        """Return the source of a record of `parse_source`, joined to its clip."""
        (timeline,), (clip,) = record.places, record.clips
        assert isinstance(timeline, Timeline)
        (stretch,) = timeline.stretches
        info = stretch.place.clip().info
        times = info.timestamps - info.start
        return cls(tuple(turn.text for turn in record.turns), clip, stretch, times)


def parse_source(data: Any, where: str, settings: DataSettings, folders: Folders = PLAIN) -> Record:
    """Return a source of splices: a record whose medium is a part of a clip, its turns the phrases.

    Raises RowError with its place and id.
    """
    # paths are checked without their prefix below: /data/videos/a.mp4 may become a.mp4
    lenient = settings.allow_outside or bool(folders.strip_prefix)
    ignored = settings.ignore_fields
    row = parse_row(data, where, allow_outside=lenient, media_only=True, ignored=ignored)
    try:
        given = {name: data[name] for name in PHRASE if not is_empty(data.get(name))}
        if len(given) != 1 or len(row.media) != 1:
            got = f"{len(row.media)} media, {len(given)} phrases"
            raise RowError(SOURCE, "a source of splice", got=got, expected=EXPECTED)
        ((name, value),) = given.items()
        phrases = value if isinstance(value, list) else [value]
        for phrase in phrases:
            if not isinstance(phrase, str) or MARKUP.search(phrase) or MEDIA_TAG.search(phrase):
                expected = "a text without tags and coordinates, or a list of some of one meaning"
                raise RowError(SOURCE, f"`{name}`", got=short(phrase), expected=expected)
            refuse_misspelt([("assistant", phrase)])
        refuse_parts(data, {"start", "end", *ignored})
        (medium,) = row.media
        if not settings.allow_outside:
            check_inside(folders.stripped(medium))
    except RowError as error:
        raise error.at(where, row.id) from None
    # without a full stop: phrases are put into the middle of questions
    texts = dict.fromkeys(" ".join(phrase.split()).removesuffix(".") for phrase in phrases)
    cut = Cut(medium, row.start, row.end)
    source = data.get("data_source")
    named = source if isinstance(source, str) else ""
    turns = tuple(Turn("assistant", text) for text in texts)
    return Record(row.id, (medium,), turns, "", where, named, (cut,))


def as_banked(source: Record, banks: Banks, folders: Folders) -> Record:
    """Return a source; where its part of a video is banked as a clip of its own, of that clip."""
    (cut,) = source.cuts
    id_ = clip_id(cut.video, cut.start, cut.end)
    if cut[1:] == (None, None) or known_id(id_, source.source, banks, (), folders) is None:
        return source
    return replace(source, clips=(id_,), cuts=(Cut(id_),))


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
