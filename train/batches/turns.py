"""Tokens of many conversations of one shape, turn by turn: each text is tokenised once.

Control tokens of a template keep turns apart: what stands on one side of them is tokenised as if there
were no other. Where a template has none between two turns, or the sum is not that of a whole
conversation, nothing is counted this way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shards.annotations.forms import MEDIA_TAG
from train.batches.chat import OWN_THOUGHT, WHOLLY, Chat, Piece, Pieces
from train.batches.segments import Segment
from train.data.markup import MARKUP, MEDIA_TAGS
from train.data.records import Turn

ROLES = ("user", "assistant")
CHECKED = 64
"""Conversations that are also counted whole."""
Rounds = Sequence[tuple[str, str]]
"""Questions, each with its answer."""


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
