"""The turns of a record one by one: as conversations of their own, and counted separately.

A record of independent turns is one row: first the tokens that records of one turn each would share, up
to the end of the media, then the rest of each. Every id is as in a record of that turn alone.

Many conversations of one shape are counted turn by turn, each text tokenised once: a template's control
tokens separate turns, and the texts on either side of one are tokenised independently. Where a template
has none between two turns, or the sum differs from a whole conversation's, nothing is counted this way.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from shards.annotations.forms import MEDIA_TAG
from train.batches.chat import MEDIA, OWN_THOUGHT, Chat, Encoded, Stretch
from train.batches.segments import WHOLLY, Piece, Pieces, Segment
from train.data.markup import MARKUP, MEDIA_TAGS
from train.data.records import Record, Turn, media_end, one_by_one
from train.data.splice import ONE_MEDIUM

ROLES = ("user", "assistant")
CHECKED = 64
"""Conversations that are also counted whole, to check that turns can be counted separately."""
Rounds = Sequence[tuple[str, str]]
"""Questions, each with its answer."""


class Count(NamedTuple):
    """Numbers of a record's tokens that are not a frame's."""

    text: int
    supervised: int
    shared: int
    """Those that all turns see; all of a dialogue's."""
    longest: int = 0
    """Those of the longest independent turn; 0 for a dialogue."""
    pairs: int = 0
    """(query, key) pairs inside independent turns."""


def encode_apart(chat: Chat, record: Record, durations: Sequence[float]) -> Encoded:
    """Return the tokens of a record of independent turns; raises as `Chat.encode`."""
    talks = [chat.encode(turns, durations) for turns in one_by_one(record.turns)]
    first = talks[0].ids
    # up to the last medium: what stands before it is the same in every turn's own conversation
    end = len(first) - first[::-1].index(MEDIA) if MEDIA in first else 0
    columns = ("ids", "axis", "coord", "supervised")
    heads = [[getattr(talk, name)[:end] for name in columns] for talk in talks]
    # a template is rendered for a pattern of roles, whatever the texts are
    assert all(head == heads[0] for head in heads), "conversations of one pattern begin alike"
    joined = [
        [*head, *(value for talk in talks for value in getattr(talk, name)[end:])]
        for name, head in zip(columns, heads[0], strict=True)
    ]
    sizes = [len(talk.ids) - end for talk in talks]
    ids, axis, coord, supervised = joined
    starts = tuple(end + sum(sizes[:k]) for k in range(len(sizes)))
    return Encoded(ids, axis, coord, supervised, starts)


class Tally:
    """Counts conversations stretch by stretch: one that several share is cut and tokenised once."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        # where times are tokens there is one for each, whichever time it is
        self._timeless = chat.anchors is not None and 0 in chat.anchors.axes
        self._rounds: dict[tuple[object, ...], list[int]] = {}
        """Conversation of one question -> its stretches."""
        self._known: dict[tuple[Stretch, str | None], tuple[int, str | None]] = {}
        """Stretch and the control token before it -> its number, and the control token that ends it."""
        self._new: list[list[Piece]] = []
        """The pieces of stretches that are not counted yet."""
        self._counts = np.zeros((0, 3), np.int64)
        """Of each stretch: tokens, supervised ones, and tokens up to its last medium."""

    def stretches(self, record: Record, durations: Sequence[float]) -> list[list[int]]:
        """Return the numbers of the stretches of a record's conversation, or of its independent turns'.

        Raises as `Chat.encode`.
        """
        if self._timeless:
            durations = [1.0 if seconds > 0 else seconds for seconds in durations]
        if not record.independent:
            return [self._numbers(record.turns, durations)]
        found = []
        texts = [turn.text for turn in record.turns]
        begin = len(texts) % 2  # after the system prompt
        media = texts[begin][: media_end(texts[begin])]
        for k in range(begin, len(texts), 2):
            key = (*texts[:begin], media, *texts[k : k + 2], k == begin, *durations)
            numbers = self._rounds.get(key)
            if numbers is None:
                # as `one_by_one` has them, without the turns of the other questions
                asked = record.turns[k] if k == begin else Turn("user", media + texts[k])
                alone = (*record.turns[:begin], asked, record.turns[k + 1])
                numbers = self._rounds[key] = self._numbers(alone, durations)
            found.append(numbers)
        return found

    def _numbers(self, turns: Sequence[Turn], durations: Sequence[float]) -> list[int]:
        numbers, before = [], None
        for stretch in self.chat.stretches(turns, durations):
            known = self._known.get((stretch, before))
            if known is None:
                pieces, after = self.chat.cut(stretch, before)
                known = self._known[stretch, before] = len(self._counts) + len(self._new), after
                self._new.append(pieces)
            number, before = known
            numbers.append(number)
        return numbers

    def count(self, talks: Sequence[list[list[int]]], apart_: Sequence[bool]) -> np.ndarray:
        """Return the counts of records by their stretches: int64 `(records, 5)`, columns as in `Count`.

        apart_: whether each has independent turns.
        """
        self._count_new()
        if not talks:
            return np.zeros((0, len(Count._fields)), np.int64)
        flat = [numbers for talk in talks for numbers in talk]
        sizes = np.asarray(list(map(len, flat)))
        counts = self._counts[list(chain.from_iterable(flat))]
        own = np.add.reduceat(counts[:, :2], np.cumsum(sizes) - sizes)
        # media stand before the first answer, and all turns see what is before the last of them
        shared = self._counts[[talk[0][0] for talk in talks], 2]
        found = apart(own, list(map(len, talks)), shared)
        # a dialogue is one conversation, all of it shared
        found[~np.asarray(apart_), 2:] = 0
        found[:, 2] += np.where(apart_, 0, found[:, 0])
        return found

    def forget(self) -> None:
        """Forget what is known: for data whose texts are all different."""
        self._rounds.clear()
        self._known.clear()
        self._counts = self._counts[:0]

    def __len__(self) -> int:
        return len(self._counts)

    def _count_new(self) -> None:
        """Count the stretches that are new since the last time."""
        if self._new:
            whole = self.chat.count([*self._new, *map(up_to_media, self._new)])
            counts = np.asarray(whole, np.int64).reshape(2, -1, 2)
            own = np.column_stack([counts[0], counts[1, :, 0]])
            self._counts = np.concatenate([self._counts, own])
            self._new = []


def up_to_media(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces up to the last medium; none without one."""
    ends = [k for k, own in enumerate(pieces, 1) if own.segment is None and own.axis == MEDIA]
    return list(pieces[: ends[-1]]) if ends else []


def apart(talks: np.ndarray, sizes: Sequence[int], shared: np.ndarray | int) -> np.ndarray:
    """Return the counts of records of independent turns: int64 `(records, 5)`, columns as in `Count`.

    talks: int64 `(turns, 2)`, (tokens, supervised ones) of each turn's conversation. sizes: turns of
    each record. shared: tokens that the turns of a record share.
    """
    begins = np.cumsum(sizes, dtype=np.int64) - np.asarray(sizes)
    shared = np.broadcast_to(shared, len(begins))
    own = talks[:, 0] - np.repeat(shared, sizes)
    # causal pairs of n tokens: 1 + 2 + ... + n
    columns = (own, talks[:, 1], own * (own + 1) // 2)
    text, supervised, pairs = (np.add.reduceat(column, begins) for column in columns)
    return np.stack([shared + text, supervised, shared, np.maximum.reduceat(own, begins), pairs], 1)


def counted_on(length: int, starts: Sequence[int]) -> tuple[np.ndarray | None, np.ndarray]:
    """Return (turn, position) of a conversation's tokens, int64 each; turn is None for a dialogue.

    starts: where independent turns begin, see `Encoded.turns`. Positions of each turn go on from the end
    of the shared tokens.
    """
    place = np.arange(length)
    if not starts:
        return None, place
    turn = np.searchsorted(starts, place, side="right")
    return turn, place - np.asarray([starts[0], *starts])[turn] + starts[0]


def numbered(sample: np.ndarray, turn: np.ndarray | None) -> np.ndarray:
    """Return the number in a row of each token's record, or of its independent turn: int64."""
    begins = np.diff(sample, prepend=-1) > 0
    if turn is not None:  # shared tokens count as the first turn's
        begins |= (np.diff(turn, prepend=0) > 0) & (turn > 1)
    return np.cumsum(begins) - 1


class _Gap(NamedTuple):
    """A template's text between two turns, cut at its control tokens."""

    tail: str
    """Up to the end of the first control token, which closes the turn before."""
    closing: str | None
    """That control token; None at a row's start."""
    middle: str
    """From there to the end of the last control token."""
    opening: str | None
    """That last one; None at a row's start without one."""
    head: str
    """The text after it, before the next turn."""


def count_rounds(
    chat: Chat, talks: Sequence[Rounds], durations: Sequence[float]
) -> np.ndarray | None:
    """Return int64 `(talks, 2)`: tokens without media, supervised tokens, as `Chat.count` has them.

    talks: the first question of each has the tag of its one medium, whose seconds `durations` gives.
    Times in them may be any where times are tokens. None where turns cannot be counted separately.
    """
    shapes = {2 * count: _gaps(chat, 2 * count) for count in {len(talk) for talk in talks}}
    if None in shapes.values():
        return None
    sides: dict[tuple[str, _Gap, _Gap], int] = {}
    beside = {
        length: [
            sides.setdefault((ROLES[k % 2], gaps[k], gaps[k + 1]), len(sides))
            for k in range(length)
        ]
        for length, gaps in shapes.items()
        if gaps
    }
    in_words = chat.anchors is None or 0 not in chat.anchors.axes
    numbers: dict[tuple[str, int], int] = {}
    used: list[int] = []
    for talk, duration in zip(talks, durations, strict=True):
        texts = [text for pair in talk for text in pair]
        if in_words:
            texts = [_written(text, duration) for text in texts]
        used += [
            numbers.setdefault(key, len(numbers))
            for key in zip(texts, beside[len(texts)], strict=True)
        ]
    # an answer with thoughts of its own changes the template's text before it
    if any(OWN_THOUGHT.match(text) for text, _ in numbers):
        return None
    kinds = [*sides]
    turns = [_turn(chat, text, *kinds[side]) for text, side in numbers]
    frames = [_between(gaps) for gaps in shapes.values() if gaps]
    counts = np.asarray(chat.count([*turns, *frames]), np.int64).reshape(-1, 2)
    lengths = np.asarray([2 * len(talk) for talk in talks])
    # each text is tokenised once, however many records have it, and added up by record
    found = np.add.reduceat(counts[used], np.cumsum(lengths) - lengths)
    for length, frame in zip(shapes, counts[len(turns) :], strict=True):
        found[lengths == length] += frame
    few = zip(talks[:CHECKED], durations, strict=False)
    whole = chat.count([chat.pieces(as_turns(talk), [seconds]) for talk, seconds in few])
    return found if found[:CHECKED].tolist() == list(map(list, whole)) else None


def count_rounds_apart(
    chat: Chat, talks: Sequence[Rounds], durations: Sequence[float]
) -> np.ndarray | None:
    """Return int64 `(talks, 5)`: a `Count` of each, whose turns do not see each other; as `count_rounds`.

    The first question of each begins with its one medium, `ONE_MEDIUM`.
    """
    assert all(talk[0][0].startswith(ONE_MEDIUM) for talk in talks)
    sizes = [len(talk) for talk in talks]
    alone = [
        [(f"{ONE_MEDIUM}{question}" if k else question, answer)]
        for talk in talks
        for k, (question, answer) in enumerate(talk)
    ]
    counts = count_rounds(chat, alone, np.repeat(durations, sizes).tolist())
    if counts is None:
        return None
    first = chat.pieces(as_turns(alone[0]), durations[:1])
    shared = chat.count([up_to_media(first)])[0][0]
    return apart(counts, sizes, shared)


def as_turns(talk: Rounds) -> list[Turn]:
    """Return questions and answers as turns."""
    return [Turn(role, text) for pair in talk for role, text in zip(ROLES, pair, strict=True)]


def _written(text: str, duration: float) -> str:
    """Return a text with its times as plain numbers, as `Chat` writes them without anchors."""
    if "<t:" not in text:
        return text
    return MARKUP.sub(lambda match: f"{float(match[2]) / duration * duration:.1f}", text)


def _gaps(chat: Chat, turns: int) -> list[_Gap] | None:
    """Return the gaps before each turn and after the last; None without a control token in one."""
    rendered = chat.rendered(ROLES * (turns // 2))
    gaps = []
    for place, text in enumerate([rendered[0], *rendered[4::4]]):
        found = [match.span() for match in chat.segments.controls_in.finditer(text)]
        # before the first turn there is none to close
        if place == 0:
            end = found[-1][1] if found else 0
            opening = text[slice(*found[-1])] if found else None
            gaps.append(_Gap("", None, text[:end], opening, text[end:]))
        elif found:
            (first, closed), (opened, end) = found[0], found[-1]
            parts = text[:closed], text[first:closed], text[closed:end], text[opened:end]
            gaps.append(_Gap(*parts, text[end:]))
        else:
            return None
    return gaps


def _between(gaps: Sequence[_Gap]) -> list[Piece]:
    """Return the pieces of a template's own text that belong to no turn."""
    texts = [gap.middle for gap in gaps[:-1]] + [gaps[-1].middle + gaps[-1].head]
    return [
        Piece(Segment(((text, True),), gap.closing))
        for text, gap in zip(texts, gaps, strict=True)
        if text
    ]


def _turn(chat: Chat, text: str, role: str, before: _Gap, after: _Gap) -> list[Piece]:
    """Return a turn's pieces, as `Chat.pieces` cuts them, without the text that belongs to no turn."""
    out = Pieces(chat.segments, before.opening)
    answers = role == "assistant"
    # as `Chat.pieces`: a blank before an answer belongs to the answer's first token
    kept = before.head.rstrip(" ") if answers else before.head
    out.template(kept)
    if answers:
        out.cut()
        out.learned = WHOLLY
        out.template(before.head[len(kept) :])
    for part in MEDIA_TAGS.split(text):
        if MEDIA_TAG.fullmatch(part):
            out.medium(chat.around)
        elif part:
            chat.add_content(out, part, 1.0)
    if answers:
        out.close(after.tail)
    else:
        out.template(after.tail)
    out.cut()
    return out.pieces
