"""Resolves the coordinates of a record's text against its clips: shares to seconds, checks of range.

A span that ends after its clip may be clipped to it; nothing else is changed.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from model.lape.tokens import AXES
from shards.annotations.fault import RowError
from shards.errors import UserError
from shards.text import counted
from train.data.markup import (
    MARKUP,
    MEDIA_TAGS,
    SHARE,
    Coordinate,
    coordinate_of,
    split_markup,
)
from train.data.records import Record, Turn
from train.data.spans import spans, unit_of, value_of

UNNAMED = (100, 100, 100)
"""Anchors of each axis that names mean to a model without any: those of LLaVA-ST."""
SLACK = 0.1
"""Seconds by which a time may be beyond its clip: annotations are often rounded to one decimal."""
BEHIND = "time past the end of its clip"
OUTSIDE = "coordinate outside its clip or frame"
WORTH_SAYING = 0.01
"""Share of such records from which on there is a warning."""
CLIPPED = "times_past_end: clip ends such spans with their clip"


def resolved(
    record: Record, durations: Sequence[float], *, clip: bool
) -> tuple[Record, bool, list[RowError]]:
    """Return (record with its times in seconds, whether a span was clipped, faults).

    durations: seconds of each of its clips. clip: whether a span that begins in its clip and ends after
    it is ended with the clip.
    """
    # most records have all of their coordinates in all of their clips, and are handed on as they are
    shortest = min(durations, default=0.0)
    if all(_is_inside(turn.text, shortest) for turn in record.turns):
        return record, False, []
    if any(SHARE.search(turn.text) for turn in record.turns):
        record = rewritten(record, durations, _share_in_seconds)
        # a share of nothing: a picture has no duration
        if any(SHARE.search(turn.text) for turn in record.turns):
            error = RowError(OUTSIDE, "a time in %, and a medium without a duration")
            return record, False, [error.at(record.where, record.id)]
    clipped = rewritten(record, durations, _clipped) if clip else record
    faults = check_coordinates(clipped, durations, clip=clip)
    return clipped, clipped != record, faults


def _is_inside(text: str, duration: float) -> bool:
    """Return whether a text has no times in shares, and only coordinates in a clip of so many seconds."""
    if "<" not in text:
        return True
    found = _reach(text)
    if found is None:
        return False
    first, last = found
    return first > last or (duration > 0 and first >= -1e-3 and last <= duration + SLACK)


@lru_cache(maxsize=2**16)
def _reach(text: str) -> tuple[float, float] | None:
    """Return a text's first and last second, (inf, -inf) without times; None for what needs more care.

    That are times in shares, and places outside the frame.
    """
    if SHARE.search(text):
        return None
    found = [coordinate_of(match) for match in MARKUP.finditer(text)]
    if any(_outside(piece, 1.0) for piece in found if piece.axis != 0):
        return None
    times = [piece.value for piece in found if piece.axis == 0 and piece.anchor is None]
    return min(times, default=math.inf), max(times, default=-math.inf)


def rewritten(
    record: Record, durations: Sequence[float], change: Callable[[Turn, float], str]
) -> Record:
    """Return a record whose text is changed by a function of each stretch and its clip's seconds."""
    turns = []
    for turn, parts in zip(record.turns, stretches(record, durations), strict=True):
        texts = (
            part if duration is None else change(Turn(turn.role, part), duration)
            for part, duration in parts
        )
        turns.append(Turn(turn.role, "".join(texts)))
    return replace(record, turns=tuple(turns))


def stretches(
    record: Record, durations: Sequence[float]
) -> Iterator[list[tuple[str, float | None]]]:
    """Yield each turn as (stretch between media, seconds of its clip) and (tag of a medium, None)."""
    media = iter(durations)
    duration = durations[0] if durations else 0.0
    for turn in record.turns:
        parts: list[tuple[str, float | None]] = []
        # the pattern is a group, so that split keeps the tags: they are at the odd places
        for place, part in enumerate(MEDIA_TAGS.split(turn.text)):
            if place % 2:
                duration = next(media)
            parts.append((part, None if place % 2 else duration))
        yield parts


def _share_in_seconds(turn: Turn, duration: float) -> str:
    if duration <= 0:
        return turn.text
    seconds = duration / 100
    # .6f: to the microsecond, finer than any clock of frames
    return SHARE.sub(lambda share: f"<t:{float(share[1]) * seconds:.6f}>", turn.text)


def _clipped(turn: Turn, duration: float) -> str:
    text = turn.text
    # from the last one: what is replaced moves only what stands behind it
    for first, second in reversed(list(spans(turn.text, answer=turn.role == "assistant"))):
        if unit_of(second) == "s" and value_of(first) < duration < value_of(second) - SLACK:
            text = f"{text[: second.start()]}<t:{duration:.6f}>{text[second.end() :]}"
    return text


def check_coordinates(
    record: Record, durations: Sequence[float], *, clip: bool = False
) -> list[RowError]:
    """Return a fault for each coordinate of a record that is outside its clip or frame.

    clip: whether spans have been ended with their clip, so that to do so is no fix.
    """
    return [
        fault.at(record.where, record.id)
        for turn in stretches(record, durations)
        for part, duration in turn
        if duration is not None
        for match in MARKUP.finditer(part)
        if (fault := _outside(coordinate_of(match), duration, clip=clip))
    ]


def anchor_share(axis: int, anchor: int, counts: Sequence[int]) -> float:
    """Return an anchor's coordinate on its axis, in [0, 1]; UserError for one beyond the last.

    counts: anchors of each axis.
    """
    if anchor >= counts[axis]:
        raise UserError(
            f"anchor {anchor:03d} of {AXES[axis]}: the model has {counts[axis]}, 000 to "
            f"{counts[axis] - 1:03d}"
        )
    return anchor / (counts[axis] - 1)


def in_numbers(text: str, duration: float, counts: Sequence[int]) -> str:
    """Return a text with anchors by name (`<TEMP-037>`) written as times and places (`<t:4.5>`).

    duration: seconds of the medium of its times. counts: anchors of each axis.
    """

    def written(match: re.Match[str]) -> str:
        piece = coordinate_of(match)
        if piece.anchor is None:
            return match[0]
        share = anchor_share(piece.axis, piece.anchor, counts)
        return f"<{'tyx'[piece.axis]}:{share * duration if piece.axis == 0 else share:.6f}>"

    return MARKUP.sub(written, text)


def repeating(record: Record) -> bool:
    """Return whether an answer of a record repeats a coordinate of an earlier question or answer.

    What its own question says gives nothing away.
    """
    # turns that do not see each other repeat nothing
    if record.independent:
        return False
    before, asked = set[Coordinate](), set[Coordinate]()
    for turn in record.turns:
        own = {piece for piece in split_markup(turn.text) if isinstance(piece, Coordinate)}
        if turn.role != "assistant":
            asked |= own
            continue
        if (own - asked) & before:
            return True
        before |= own | asked
        asked = set()
    return False


def repeats_note(name: str, records: Sequence[Record]) -> tuple[str, ...]:
    """Return a line where answers of a dataset's dialogues can be copied from what is before them."""
    found = sum(map(repeating, records))
    if found < max(1, len(records) * WORTH_SAYING):
        return ()
    return (
        f"{name}: in {found / len(records):.0%} of the records later answers repeat coordinates of "
        "earlier turns, and can be copied from them; set turns: independent",
    )


def numbers_note(records: Iterable[Record]) -> tuple[str, ...]:
    """Return a line where no answer of some records has a coordinate, which LAPE's tokens learn from."""
    count = 0
    for record in records:
        # the first one with a coordinate ends it: records are made as they are asked for
        if any(turn.role == "assistant" and MARKUP.search(turn.text) for turn in record.turns):
            return ()
        count += 1
    if not count:
        return ()
    return (
        f"LAPE: no answer of {counted(count, 'record')} looked at has a coordinate such as "
        "<t:12.5> or <x:0.31>, so none trains its tokens; numbers in another form stay text",
    )


def _outside(piece: Coordinate, duration: float, *, clip: bool = False) -> RowError | None:
    """Return the fault of a coordinate, None if it is inside; duration: of its clip, 0 without one."""
    limit = duration if piece.axis == 0 else 1.0
    # 1e-3: places are often rounded to three digits
    slack = SLACK if piece.axis == 0 else 1e-3
    if piece.anchor is not None or (limit > 0 and -1e-3 <= piece.value <= limit + slack):
        return None
    kind = "time" if piece.axis == 0 else "coordinate"
    behind = piece.axis == 0 and 0 < limit < piece.value
    fix: str | None = "places are fractions of the frame: divide pixels by its width or height"
    if piece.axis == 0:
        fix = CLIPPED if behind and not clip else None
    what = f"{kind} {piece.value:g} is outside [0, {limit:g}]"
    return RowError(BEHIND if behind else OUTSIDE, what, fix=fix)
