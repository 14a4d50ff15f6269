"""Records that are spliced: stretches of banked clips on a timeline, with questions about them.

    {"video": "a.mp4", "phrase": "a busy street", "start": 3, "end": 20}     # or "caption"

Such rows say what a clip shows: all of it, or from `start` to `end`. A record is drawn by nothing but the
run's seed, the epoch and its number: any rank, a plan and a resumed run draw the same one, and every
epoch others. Its phrases are different texts; that two texts do not mean the same is up to their author.
Questions come in random order, as an order of time would answer them, and none is about a phrase
that an earlier answer of the record has placed in time.
"""

import math
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from shards.annotations.fault import RowError, short
from shards.annotations.fields import is_empty
from shards.annotations.forms import MEDIA_TAG
from shards.annotations.records import check_inside, parse_row
from shards.annotations.timeline import Cut
from shards.errors import UserError
from train.data.folders import Folders
from train.data.markup import MARKUP
from train.data.records import PLAIN, Record, Turn
from train.data.spans import refuse_misspelt
from train.data.timeline import Stretch, Timeline, frames_between
from train.settings.config import DataSettings
from train.settings.drawn import SpliceSettings

PHRASE = ("phrase", "caption")
SOURCE = "no source of splice"
EXPECTED = "one `video`, and its `phrase` or `caption`"
Asked = tuple[str, str]
"""A question, and its answer."""


@dataclass(frozen=True)
class Source:
    """A stretch of a banked clip, and a phrase that says what it shows."""

    phrase: str
    clip: str
    """Its id."""
    stretch: Stretch
    times: tuple[float, ...]
    """Seconds of the clip, of all its banked frames."""

    @classmethod
    def of(cls, record: Record) -> "Source":
        """Return what a row of `parse_source` is, once its medium is found."""
        (timeline,), (clip,), (turn,) = record.places, record.clips, record.turns
        assert isinstance(timeline, Timeline)
        (stretch,) = timeline.stretches
        info = stretch.place.clip().info
        times = tuple((info.timestamps - info.start).tolist())
        return cls(turn.text, clip, stretch, times)


def parse_source(data: Any, where: str, settings: DataSettings, folders: Folders = PLAIN) -> Record:
    """Return a row as a record whose medium is a stretch of one clip, and whose text is its phrase.

    RowError names its place, its id and what is wrong.
    """
    lenient = settings.allow_outside or bool(folders.strip_prefix)
    ignored = settings.ignore_fields
    row = parse_row(data, where, allow_outside=lenient, media_only=True, ignored=ignored)
    try:
        told = {name: data[name] for name in PHRASE if not is_empty(data.get(name))}
        if len(told) != 1 or len(row.media) != 1:
            got = f"{len(row.media)} media, {len(told)} phrases"
            raise RowError(SOURCE, "a source of splice", got=got, expected=EXPECTED)
        ((name, phrase),) = told.items()
        if not isinstance(phrase, str) or MARKUP.search(phrase) or MEDIA_TAG.search(phrase):
            expected = "a text without tags and coordinates"
            raise RowError(SOURCE, f"`{name}`", got=short(phrase), expected=expected)
        refuse_misspelt([("assistant", phrase)])
        (medium,) = row.media
        if not settings.allow_outside:
            check_inside(folders.stripped(medium))
    except RowError as error:
        raise error.at(where, row.id) from None
    text = Turn("assistant", " ".join(phrase.split()).removesuffix("."))
    cut = Cut(medium, row.start, row.end)
    source = data.get("data_source")
    named = source if isinstance(source, str) else ""
    return Record(row.id, (medium,), (text,), "", where, named, (cut,))


@dataclass(frozen=True)
class Shown:
    """A stretch of a spliced medium and what it shows."""

    source: Source
    begins: float
    ends: float
    """Seconds of the medium."""

    @property
    def phrase(self) -> str:
        return self.source.phrase


@dataclass(frozen=True)
class Splice:
    """What draws the spliced records of one dataset."""

    settings: SpliceSettings
    sources: tuple[tuple[Source, ...], ...]
    """Those of each phrase."""
    records: tuple[Record, ...]
    """Of all sources."""
    name: str
    """Of the files, for messages."""
    key: str
    """Of their bytes, so that two datasets of a run draw differently."""
    seed: int

    @classmethod
    def of(
        cls, settings: SpliceSettings, records: Sequence[Record], name: str, key: str, seed: int
    ) -> "Splice":
        """Return what splices the stretches of records of `parse_source`; UserError for too few."""
        phrases: dict[str, list[Source]] = {}
        for record in records:
            source = Source.of(record)
            phrases.setdefault(source.phrase, []).append(source)
        if len(phrases) < settings.parts[0]:
            raise UserError(
                f"{len(phrases)} different phrases",
                expected=f"{settings.parts[0]} or more, one for each part of a medium",
                where=f"{name}: splice",
                fix="name more clips, or lower its parts",
            )
        return cls(settings, tuple(map(tuple, phrases.values())), tuple(records), name, key, seed)

    @property
    def count(self) -> int:
        """Records of an epoch, without repeats."""
        return self.settings.records

    def draw(self, epoch: int, number: int) -> Record:
        """Return a record of an epoch."""
        drawn_by = blake2b(f"{self.key} {self.seed} {epoch} {number}".encode(), digest_size=16)
        rng = random.Random(drawn_by.digest())
        stretches, shown, begins = [], [], 0
        for source in self._chosen(rng):
            first, last, start, end = self._stretch(source, rng)
            place = source.stretch.place
            stretches.append(Stretch(place, first, last, start / 1000, end / 1000))
            ends = begins + end - start
            shown.append(Shown(source, begins / 1000, ends / 1000))
            begins = ends
        cuts = [
            Cut(part.source.clip, s.start, s.end) for part, s in zip(shown, stretches, strict=True)
        ]
        asked = questions(shown, self.settings, rng)
        turns = [Turn(role, text) for pair in asked for role, text in zip(ROLES, pair, strict=True)]
        turns[0] = Turn(turns[0].role, f"<video>\n{turns[0].text}")
        return Record(
            id=f"splice-{epoch}-{number}",
            clips=tuple(cut.video for cut in cuts),
            turns=tuple(turns),
            task="",
            where=f"{self.name}[splice {epoch}][{number}]",
            cuts=tuple(cuts),
            places=(Timeline(tuple(stretches)),),
        )

    def _chosen(self, rng: random.Random) -> list[Source]:
        """Return the sources of a record: of different phrases, but for those that are to be counted."""
        fewest, most = (int(n) for n in self.settings.parts)
        count = min(rng.randint(fewest, most), len(self.sources))
        drawn: dict[str, tuple[int, Source]] = {}
        for k in rng.sample(range(len(self.sources)), count):
            source = rng.choice(self.sources[k])
            # another phrase of a clip may be true of the same frames
            drawn.setdefault(source.clip, (k, source))
        chosen = [source for _, source in drawn.values()]
        if "count" in self.settings.questions and len(chosen) > 2 and rng.random() < 0.5:
            again, place = rng.sample(range(len(chosen)), 2)
            # in place of one that is no neighbour, so that it is seen twice and not longer
            if abs(place - again) > 1:
                k, own = [*drawn.values()][again]
                free = [s for s in self.sources[k] if s is own or s.clip not in drawn]
                chosen[place] = rng.choice(free)
        return chosen

    def _stretch(self, source: Source, rng: random.Random) -> tuple[int, int, int, int]:
        """Return (first frame, one after the last, start, end) of what is taken, in milliseconds.

        It holds a frame: one is drawn, and the stretch is laid around it.
        """
        own = source.stretch
        low, high = math.floor(1000 * own.start), math.ceil(1000 * own.end)
        shortest, longest = (round(1000 * t) for t in self.settings.seconds)
        length = min(rng.randint(shortest, longest), high - low)
        moment = int(1000 * source.times[rng.randrange(own.first, own.last)])
        start = min(max(moment - rng.randint(0, length * 9 // 10), low), high - length)
        frames = frames_between(source.times, start / 1000, (start + length) / 1000)
        return *frames, start, start + length


ROLES = ("user", "assistant")


def questions(shown: Sequence[Shown], settings: SpliceSettings, rng: random.Random) -> list[Asked]:
    """Return questions about a medium with their answers, in random order.

    A phrase is asked about once, and at most one question is about the order of all.
    """
    free = [part.phrase for part in shown]
    rng.shuffle(free)
    phrases = list(dict.fromkeys(free))
    once = [part for part in shown if free.count(part.phrase) == 1]
    kinds = [*settings.questions]
    asked: list[Asked] = []
    while len(asked) < settings.rounds and kinds:
        kind = rng.choice(kinds)
        pair = ASK[kind](shown, once, phrases, rng)
        if pair is None or kind == "order":
            kinds.remove(kind)
        asked += [pair] if pair else []
    return asked or [_count(shown, shown[0].phrase)]


def _next(phrases: list[str], shown: Sequence[Shown]) -> Shown | None:
    """Return a part whose phrase is not yet asked about, which then is; None where there is none."""
    found = next((part for phrase in phrases for part in shown if part.phrase == phrase), None)
    if found:
        phrases.remove(found.phrase)
    return found


def ask_span(
    shown: Sequence[Shown], once: Sequence[Shown], phrases: list[str], rng: random.Random
) -> Asked | None:
    part = _next(phrases, once)
    if part is None:
        return None
    span = f"from <t:{part.begins:.3f}> to <t:{part.ends:.3f}>"
    return f"When is this seen: {part.phrase}?", span


def ask_seen(
    shown: Sequence[Shown], once: Sequence[Shown], phrases: list[str], rng: random.Random
) -> Asked | None:
    part = _next(phrases, shown)
    if part is None:
        return None
    inside = part.begins + (part.ends - part.begins) * rng.uniform(0.1, 0.9)
    return f"What is seen at <t:{inside:.3f}>?", part.phrase


def ask_count(
    shown: Sequence[Shown], once: Sequence[Shown], phrases: list[str], rng: random.Random
) -> Asked | None:
    part = _next(phrases, shown)
    return None if part is None else _count(shown, part.phrase)


def _count(shown: Sequence[Shown], phrase: str) -> Asked:
    times = sum(part.phrase == phrase for part in shown)
    return f"How many times is this seen: {phrase}?", str(times)


def ask_order(
    shown: Sequence[Shown], once: Sequence[Shown], phrases: list[str], rng: random.Random
) -> Asked | None:
    """Ask for the letters of phrases in the order of time; of two or more that are seen once."""
    if len(once) < 2:
        return None
    letters = rng.sample(string.ascii_uppercase[: len(once)], len(once)) if len(once) <= 26 else []
    if not letters:
        return None
    named = sorted(zip(letters, (part.phrase for part in once), strict=True))
    lines = "\n".join(f"{letter}. {phrase}" for letter, phrase in named)
    return f"In which order are these seen?\n{lines}", ", ".join(letters)


ASK: dict[str, Callable[..., Any]] = {
    "span": ask_span,
    "order": ask_order,
    "count": ask_count,
    "seen": ask_seen,
}
"""The kinds of `QUESTIONS`."""
