"""The turns of a record one by one: as conversations of their own, and counted without the others.

Turns that do not see each other are laid out as one row of what records of one turn each have in common,
up to the end of the media, and of the rest of each; every id is what it is in such a record.

Many conversations of one shape are counted turn by turn, each text tokenised once: control tokens of a
template keep turns apart, and what stands on one side of them is tokenised as if there were no other.
Where a template has none between two turns, or the sum is not that of a whole conversation, nothing is
counted this way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shards.annotations.forms import MEDIA_TAG
from train.batches.chat import MEDIA, OWN_THOUGHT, WHOLLY, Chat, Encoded, Piece, Pieces
from train.batches.segments import Segment
from train.data.markup import MARKUP, MEDIA_TAGS
from train.data.records import Record, Turn, one_by_one
from train.data.splice import ONE_MEDIUM

ROLES = ("user", "assistant")
CHECKED = 64
"""Conversations that are also counted whole."""
Rounds = Sequence[tuple[str, str]]
"""Questions, each with its answer."""


class Count(NamedTuple):
    """Tokens of a record that are no frame's."""

    text: int
    supervised: int
    shared: int
    """Those that all turns see; of a dialogue all."""
    longest: int = 0
    """Of the longest turn that sees no other; 0 in a dialogue."""
    pairs: int = 0
    """(query, key) pairs inside such turns."""


def encode_apart(chat: Chat, record: Record, durations: Sequence[float]) -> Encoded:
    """Return a record whose turns do not see each other as tokens; raises as `Chat.encode`."""
    talks = [chat.encode(turns, durations) for turns in one_by_one(record.turns)]
    first = talks[0].ids
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


class Talk(NamedTuple):
    """A record in pieces: its conversation, or those of its turns where they do not see each other."""

    pieces: list[list[Piece]]
    shared: list[Piece] | None
    """What such turns have in common; None of a dialogue."""

    @classmethod
    def of(cls, chat: Chat, record: Record, durations: Sequence[float]) -> "Talk":
        """Raises as `Chat.pieces`."""
        if not record.independent:
            return cls([chat.pieces(record.turns, durations)], None)
        pieces = [chat.pieces(turns, durations) for turns in one_by_one(record.turns)]
        whole = [piece.segment is None and piece.axis == MEDIA for piece in pieces[0]]
        return cls(pieces, pieces[0][: len(whole) - whole[::-1].index(True)] if any(whole) else [])


def count_talks(chat: Chat, talks: Sequence[Talk]) -> list[Count]:
    """Return the counts of records, exactly of what `encode_apart` or `Chat.encode` makes of them."""
    if not talks:
        return []
    flat = [pieces for talk in talks for pieces in talk.pieces]
    found = np.asarray(chat.count(flat + [talk.shared or [] for talk in talks]), np.int64)
    own, shared = found[: len(flat)], found[len(flat) :, 0]
    counted = apart(own, [len(talk.pieces) for talk in talks], shared)
    return [
        Count(text, supervised, shared=text)
        if talk.shared is None
        else Count(text, supervised, *more)
        for talk, (text, supervised, *more) in zip(talks, counted.tolist(), strict=True)
    ]


def apart(talks: np.ndarray, sizes: Sequence[int], shared: np.ndarray | int) -> np.ndarray:
    """Return the counts of records whose turns do not see each other: int64 `(records, 5)`, as `Count`.

    talks: int64 `(turns, 2)`, (tokens, supervised ones) of each turn's conversation; sizes: turns of
    each record; shared: tokens that those of a record have in common.
    """
    begins = np.cumsum(sizes, dtype=np.int64) - np.asarray(sizes)
    shared = np.broadcast_to(shared, len(begins))
    own = talks[:, 0] - np.repeat(shared, sizes)
    columns = (own, talks[:, 1], own * (own + 1) // 2)
    text, supervised, pairs = (np.add.reduceat(column, begins) for column in columns)
    return np.stack([shared + text, supervised, shared, np.maximum.reduceat(own, begins), pairs], 1)


def counted_on(length: int, starts: Sequence[int]) -> tuple[np.ndarray | None, np.ndarray]:
    """Return (turn, position) of a conversation's tokens, int64 each; None where all turns see all.

    starts: where turns begin that do not see each other, as of `Encoded`.
    """
    place = np.arange(length)
    if not starts:
        return None, place
    turn = np.searchsorted(starts, place, side="right")
    return turn, place - np.asarray([starts[0], *starts])[turn] + starts[0]


def numbered(sample: np.ndarray, turn: np.ndarray | None) -> np.ndarray:
    """Return the number in a row of each token's record, or of its turn that sees no other."""
    begins = np.diff(sample, prepend=-1) > 0
    if turn is not None:  # what turns share is the first one's
        begins |= (np.diff(turn, prepend=0) > 0) & (turn > 1)
    return np.cumsum(begins) - 1


class _Gap(NamedTuple):
    """What a template writes between two texts, cut at its control tokens."""

    tail: str
    """Up to the first one, which closes the text before."""
    closing: str | None
    """That one; None at a row's start."""
    middle: str
    """From there to the last one."""
    opening: str | None
    """That one; None where there is none, at a row's start."""
    head: str
    """What follows it, before the next text."""


def count_rounds(
    chat: Chat, talks: Sequence[Rounds], durations: Sequence[float]
) -> np.ndarray | None:
    """Return int64 `(talks, 2)`: tokens without media, supervised tokens, as `Chat.count` has them.

    talks: the first question of each has the tag of its one medium, of so many seconds. Times in them
    may be any where they are tokens of their own. None where turns cannot be counted apart.
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
    if any(OWN_THOUGHT.match(text) for text, _ in numbers):
        return None
    kinds = [*sides]
    turns = [_turn(chat, text, *kinds[side]) for text, side in numbers]
    frames = [_between(gaps) for gaps in shapes.values() if gaps]
    counts = np.asarray(chat.count([*turns, *frames]), np.int64).reshape(-1, 2)
    lengths = np.asarray([2 * len(talk) for talk in talks])
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
    first = Record("", ("",), tuple(as_turns(talks[0])), "", "", independent=True)
    shared = chat.count([Talk.of(chat, first, durations[:1]).shared or []])[0][0]
    return apart(counts, sizes, shared)


def as_turns(talk: Rounds) -> list[Turn]:
    """Return questions and answers as turns."""
    return [Turn(role, text) for pair in talk for role, text in zip(ROLES, pair, strict=True)]


def _written(text: str, duration: float) -> str:
    """Return a text with its times as the numbers that `Chat` writes without tokens for them."""
    if "<t:" not in text:
        return text
    return MARKUP.sub(lambda match: f"{float(match[2]) / duration * duration:.1f}", text)


def _gaps(chat: Chat, turns: int) -> list[_Gap] | None:
    """Return what stands before each turn and after the last; None where turns are not kept apart."""
    rendered = chat.rendered(ROLES * (turns // 2))
    gaps = []
    for place, text in enumerate([rendered[0], *rendered[4::4]]):
        found = [match.span() for match in chat.segments.controls_in.finditer(text)]
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
    """Return what a template writes that belongs to no turn."""
    texts = [gap.middle for gap in gaps[:-1]] + [gaps[-1].middle + gaps[-1].head]
    return [
        Piece(Segment(((text, True),), gap.closing))
        for text, gap in zip(texts, gaps, strict=True)
        if text
    ]


def _turn(chat: Chat, text: str, role: str, before: _Gap, after: _Gap) -> list[Piece]:
    """Return a turn in pieces, as `Chat.pieces` cuts it, but for what belongs to no turn."""
    out = Pieces(chat.segments, before.opening)
    answers = role == "assistant"
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
