"""Spliced records: parts of banked clips joined on a timeline, with questions about them.

    {"video": "a.mp4", "phrase": "a busy street", "start": 3, "end": 20}     # or "caption"
    {"video": "b.mp4", "phrase": ["a cat", "a small animal"]}                # of one meaning

Such rows describe a clip: all of it, or from `start` to `end`. A record is drawn from the run's seed, the
epoch and its number alone: every rank, the plan and a resumed run draw the same one, and each epoch
others. Phrases of one list mean the same: a part is named by one of them, and answered by the first.
Other phrases are assumed to differ in meaning, which is up to their author.
Questions come in random order, since the order of time would answer them, and each phrase is asked about
once; at most one more question asks for the order of all. Records are drawn as arrays, many at once,
because a plan counts a hundred thousand, and written as text one by one.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from shards.annotations.timeline import Cut
from shards.errors import UserError
from shards.read.timeline import Stretch, Timeline
from train.data.records import Record, Turn
from train.data.sources import Source, Tables, refuse_shared
from train.settings.drawn import BLANK, SpliceSettings, draw

ONE_MEDIUM = "<video>\n"
"""The beginning of the first question of a record of one medium."""
Asked = tuple[str, str]
"""A question and its answer."""
SPAN, COUNT, SEEN, ORDER = range(4)
KIND_NAMES = ("span", "count", "seen", "order")
KINDS = {"span": SPAN, "seen": SEEN}
"""Questions about one phrase, as many as there are rounds; the others come once."""
(PARTS, PHRASE_OF, SOURCE_OF, LENGTH, FRAME, BEFORE, TWICE, AGAIN, INSTEAD, SOURCE_AGAIN) = range(
    10
)
(ASKED, KIND, COUNTED, IN_ORDER, IN_ORDER_AT, MOMENT, LETTER, NAME, WORDING) = range(10, 19)
"""Purposes of random numbers, which enter their seed."""


class Layout(NamedTuple):
    """Spliced records as arrays, one a row; values beyond a row's parts and rounds are meaningless."""

    parts: np.ndarray
    """int64 `(records,)`, number of parts."""
    source: np.ndarray
    """int64 `(records, parts)`, index of each part's source."""
    first: np.ndarray
    last: np.ndarray
    """Banked frames [first, last) of its clip."""
    start: np.ndarray
    end: np.ndarray
    """Milliseconds of its clip."""
    once: np.ndarray
    """bool, whether no other part of the record has its phrase."""
    letter: np.ndarray
    """float64, whose order gives the letters of parts in a question of order."""
    name: np.ndarray
    """float64 in [0, 1), chooses the phrase by which a part is named."""
    rounds: np.ndarray
    """int64 `(records,)`, number of questions."""
    kind: np.ndarray
    """int64 `(records, rounds)`: SPAN, COUNT, SEEN or ORDER."""
    about: np.ndarray
    """int64 `(records, rounds)`, the part that is asked about."""
    moment: np.ndarray
    """float64, the share of the part at which SEEN asks, in [0.1, 0.9)."""
    wording: np.ndarray
    """float64 in [0, 1), chooses the wording of a question."""


@dataclass(frozen=True)
class Splice:
    """Draws the spliced records of one dataset."""

    settings: SpliceSettings
    sources: tuple[Source, ...]
    """Those of the same phrases are neighbours."""
    records: tuple[Record, ...]
    """The sources' records."""
    name: str
    """The files' names, for messages."""
    key: int
    """From the files' bytes, so that two datasets of a run draw differently."""
    seed: int
    independent: bool = False
    """Whether a record has independent turns."""

    @classmethod
    def of(
        cls,
        settings: SpliceSettings,
        records: Sequence[Record],
        name: str,
        key: int,
        seed: int,
        *,
        independent: bool = False,
    ) -> "Splice":
        """Return the splice of records of `sources.parse_source`; UserError for too few phrases."""
        phrases: dict[tuple[str, ...], list[tuple[Source, Record]]] = {}
        for record in records:
            source = Source.of(record)
            phrases.setdefault(source.phrases, []).append((source, record))
        refuse_shared(phrases, name)
        if len(phrases) < settings.parts[0]:
            raise UserError(
                f"{len(phrases)} different phrases",
                expected=f"{settings.parts[0]:.0f} or more, one for each part of a medium",
                where=f"{name}: splice",
                fix="name more clips, or lower its parts",
            )
        sources, own = zip(*(pair for alike in phrases.values() for pair in alike), strict=True)
        return cls(settings, sources, own, name, key, seed, independent)

    @property
    def count(self) -> int:
        """Records of an epoch, without repeats."""
        return self.settings.records

    @cached_property
    def _tables(self) -> Tables:
        return Tables.of(self.sources)

    def layout(self, epoch: int, numbers: np.ndarray) -> Layout:
        """Return records of an epoch; numbers: int64 `(records,)`."""
        tables = self._tables

        def drawn(what: int, *columns: int) -> np.ndarray:
            """Return random numbers in [0, 1): `(records, *columns)`."""
            # counted numbers as a key, no state: any rank and any resumed run draws the same record
            key = (self.key, self.seed, epoch)
            wide = numbers.reshape(-1, *(1 for _ in columns))
            return draw(*key, wide, what, *map(np.arange, columns))

        source, parts = self._sources(tables, drawn)
        first, last, start, end = self._stretches(tables, source, drawn)
        on = np.arange(source.shape[1]) < parts[:, None]
        # -1: columns beyond a record's parts are equal to none of its phrases
        phrase = np.where(on, tables.phrase[source], -1)
        alike = (phrase[:, :, None] == phrase[:, None, :]) & on[:, :, None]
        once = on & (alike.sum(axis=1) == 1)
        # a phrase that is shown twice is asked about once, at its first part
        earlier = np.tril(alike.transpose(0, 2, 1), -1).any(axis=2)
        asked = self._asked(on & ~earlier, once, drawn)
        letter, name = drawn(LETTER, source.shape[1]), drawn(NAME, source.shape[1])
        wording = drawn(WORDING, asked[1].shape[1])
        return Layout(parts, source, first, last, start, end, once, letter, name, *asked, wording)

    def _sources(self, tables: Tables, drawn: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, parts), of different phrases and clips, but for a phrase to be counted."""
        phrases = len(tables.begin)
        fewest, most = (min(int(n), phrases) for n in self.settings.parts)
        parts = fewest + (drawn(PARTS) * (most - fewest + 1)).astype(np.int64)
        chosen = np.zeros((len(parts), 0), np.int64)
        lots = drawn(PHRASE_OF, most)
        for column in range(most):  # the r-th of those phrases that are not chosen yet
            other = (lots[:, column] * (phrases - column)).astype(np.int64)
            for before in np.sort(chosen, axis=1).T:
                other += other >= before
            chosen = np.column_stack([chosen, other])
        source = tables.pick(chosen, drawn(SOURCE_OF, most))
        on = np.arange(most) < parts[:, None]
        # numbers of their own for columns that are not on, which so repeat no clip
        clip = np.where(on, tables.clip[source], -1 - np.arange(most))
        # not the same clip twice: another phrase of it may describe the same frames
        on &= ~np.tril(clip[:, :, None] == clip[:, None, :], -1).any(axis=2)
        # parts that stay move to the left, in their order
        kept = np.argsort(~on, axis=1, kind="stable")
        source, parts = np.take_along_axis(source, kept, axis=1), on.sum(axis=1)
        if "count" in self.settings.questions:
            self._repeat(tables, source, parts, drawn)
        return source, parts

    def _repeat(self, tables: Tables, source: np.ndarray, parts: np.ndarray, drawn: Any) -> None:
        """Repeat a phrase in about half of the records, in place of one that is not its neighbour."""
        again, instead = ((drawn(what) * parts).astype(np.int64) for what in (AGAIN, INSTEAD))
        # 1: two neighbours of one phrase would be one long stretch, and the count open to dispute
        rows = np.flatnonzero((drawn(TWICE) < 0.5) & (np.abs(again - instead) > 1))
        own = source[rows, again[rows]]
        other = tables.pick(tables.phrase[own], drawn(SOURCE_AGAIN)[rows])
        taken = (tables.clip[source[rows]] == tables.clip[other][:, None]).any(axis=1)
        source[rows, instead[rows]] = np.where(taken, own, other)

    def _stretches(
        self, tables: Tables, source: np.ndarray, drawn: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return (first, last, start, end) of each part: a random frame, and a random time around it."""
        columns = source.shape[1]
        low, high = tables.low[source], tables.high[source]
        shortest, longest = (round(1000 * t) for t in self.settings.seconds)
        length = shortest + (drawn(LENGTH, columns) * (longest - shortest + 1)).astype(np.int64)
        length = np.minimum(length, high - low)
        frames = tables.last[source] - tables.first[source]
        frame = tables.first[source] + (drawn(FRAME, columns) * frames).astype(np.int64)
        line = tables.line[source]
        moment = (tables.times[line + frame] - tables.base[source]) // 1000
        # the drawn frame is inside: no part is without a frame
        # 0.9: the drawn frame is never at the very end, where rounding could leave it out
        start = moment - (drawn(BEFORE, columns) * 0.9 * length).astype(np.int64)
        start = np.clip(start, low, high - length)
        first, last = (
            np.searchsorted(tables.times, tables.base[source] + 1000 * time - 1) - line
            for time in (start, start + length)
        )
        return first, last, start, start + length

    def _asked(
        self, free: np.ndarray, once: np.ndarray, drawn: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return (rounds, kind, about, moment). free: `(records, parts)`, one part of each phrase."""
        asked = self.settings.questions
        plain = np.asarray([k for name, k in KINDS.items() if name in asked] or [COUNT])
        rounds = np.minimum(self.settings.rounds, free.sum(axis=1))
        most = min(self.settings.rounds, free.shape[1])
        # 2 sorts behind all numbers below 1: parts that cannot be asked about come last
        lots = np.where(free, drawn(ASKED, free.shape[1]), 2.0)
        about = np.argsort(lots, axis=1, kind="stable")[:, :most]
        kind = plain[(drawn(KIND, most) * len(plain)).astype(np.int64)]
        # a phrase that is shown twice has no single span, so it is asked for by number
        twice = ~np.take_along_axis(once, about, axis=1) & (np.arange(most) < rounds[:, None])
        if "count" in asked:
            any_ = (drawn(COUNTED) * rounds).astype(np.int64)
            at = np.where(twice.any(axis=1), np.argmax(twice, axis=1), any_)
            kind[np.arange(len(at)), at] = COUNT
        if "order" in asked:
            only = len(asked) == 1
            ordered = (once.sum(axis=1) > 1) & (only | (drawn(IN_ORDER) < 0.5))
            rounds = np.where(only, 1, rounds)
            rows = np.flatnonzero(ordered)
            kind[rows, (drawn(IN_ORDER_AT) * rounds).astype(np.int64)[rows]] = ORDER
        # the middle four fifths: near a cut both parts could be meant
        return rounds, kind, about, 0.1 + 0.8 * drawn(MOMENT, most)

    def draw(self, epoch: int, number: int) -> Record:
        """Return a record of an epoch."""
        laid = self._row(epoch, number)
        stretches, cuts = [], []
        for k in range(laid.parts[0]):
            source = self.sources[laid.source[0, k]]
            start, end = float(laid.start[0, k]) / 1000, float(laid.end[0, k]) / 1000
            first, last = int(laid.first[0, k]), int(laid.last[0, k])
            stretches.append(Stretch(source.stretch.place, first, last, start, end))
            cuts.append(Cut(source.clip, start, end))
        (asked,) = self.questions(laid)
        turns = [Turn(role, text) for pair in asked for role, text in zip(ROLES, pair, strict=True)]
        return Record(
            id=f"splice-{epoch}-{number}",
            clips=tuple(cut.video for cut in cuts),
            turns=tuple(turns),
            task="",
            where=f"{self.name}[splice {epoch}][{number}]",
            cuts=tuple(cuts),
            places=(Timeline(tuple(stretches)),),
            independent=self.independent and len(asked) > 1,
        )

    def frame_times(self, laid: Layout) -> np.ndarray:
        """Return the seconds on each record's clock of all frames of its parts: float64, concatenated.

        Bit for bit those of the opened medium (`shards.read.timeline`).
        """
        on = np.arange(laid.source.shape[1]) < laid.parts[:, None]
        start, end = laid.start / 1000, laid.end / 1000
        begins = np.cumsum(np.column_stack([0 * laid.parts, end - start]), axis=1)[:, :-1][on]
        counts = (laid.last - laid.first)[on]
        part = np.repeat(np.arange(len(counts)), counts)
        frame = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)
        line = (self._tables.line[laid.source] + laid.first)[on]
        seconds: np.ndarray = self._tables.seconds[line[part] + frame]
        return begins[part] + (seconds - start[on][part])

    @cached_property
    def _kept(self) -> dict[int, Layout]:
        """The last two whole epochs that were drawn."""
        return {}

    def _row(self, epoch: int, number: int) -> Layout:
        """Return the layout of one record, from its whole epoch's if that is not too long."""
        if number >= MOST_KEPT:
            return self.layout(epoch, np.asarray([number]))
        laid = self._kept.get(epoch)
        if laid is None:
            laid = self.layout(epoch, np.arange(min(self.count, MOST_KEPT)))
            # two: the next epoch's records are prepared while the last ones of this
            # epoch are still asked for
            while len(self._kept) > 1:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[epoch] = laid
        if number >= len(laid.parts):
            return self.layout(epoch, np.asarray([number]))
        return Layout(*(column[number : number + 1] for column in laid))

    def questions(self, laid: Layout, *, timed: bool = True) -> list[list[Asked]]:
        """Return `write_questions` of these records."""
        return write_questions(laid, self.sources, self.settings, timed=timed)


ROLES = ("user", "assistant")
MOST_KEPT = 2**18
"""Most records of an epoch that are drawn at once and kept, 500 bytes each: one by one is far slower."""


def write_questions(
    laid: Layout, sources: Sequence[Source], settings: SpliceSettings, *, timed: bool = True
) -> list[list[Asked]]:
    """Return the questions and answers of each record; without `timed`, every time in them is 0."""
    ends = np.cumsum(laid.end - laid.start, axis=1) / 1000 * timed
    begins = ends - (laid.end - laid.start) / 1000 * timed
    columns = (laid.parts, laid.source, laid.name, laid.rounds, laid.kind, laid.about)
    drawn = (laid.moment, laid.wording, begins, ends)
    rows = zip(*(column.tolist() for column in (*columns, *drawn)), strict=True)
    texts = [settings.wordings[kind] for kind in KIND_NAMES]
    out = []
    for record, row in enumerate(rows):
        parts, own_sources, names, rounds, kinds, about, moments, wordings, begin, end = row
        known = [sources[k].phrases for k in own_sources[:parts]]
        shown = [own[int(lot * len(own))] for own, lot in zip(known, names, strict=False)]
        asked = []
        rest = zip(kinds[:rounds], about, moments, wordings, strict=False)
        for kind, part, moment, lot in rest:
            text = texts[kind][int(lot * len(texts[kind]))]
            if kind == ORDER:
                once = np.flatnonzero(laid.once[record]).tolist()
                asked.append(_order(text, shown, once, laid.letter[record].tolist()))
            elif kind == COUNT:
                asked.append((text.replace(BLANK, shown[part]), str(known.count(known[part]))))
            elif kind == SEEN:
                time = begin[part] + moment * (end[part] - begin[part])
                asked.append((text.replace(BLANK, f"<t:{time:.3f}>"), known[part][0]))
            else:
                span = f"from <t:{begin[part]:.3f}> to <t:{end[part]:.3f}>"
                asked.append((text.replace(BLANK, shown[part]), span))
        question, answer = asked[0]
        asked[0] = f"{ONE_MEDIUM}{question}", answer
        out.append(asked)
    return out


def _order(text: str, shown: Sequence[str], once: Sequence[int], letter: Sequence[float]) -> Asked:
    """Return the question for the order of phrases in time, and the answer in letters."""
    by_letter = sorted(once, key=lambda part: letter[part])[: len(string.ascii_uppercase)]
    named = dict(zip(by_letter, string.ascii_uppercase, strict=False))
    lines = "\n".join(f"{named[part]}. {shown[part]}" for part in by_letter)
    answer = ", ".join(named[part] for part in sorted(named))
    return f"{text}\n{lines}", answer
