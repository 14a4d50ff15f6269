"""Rows -> what all that read annotations agree on: turns of known roles, media, and their part.

    row = parse_row({"video": "a.mp4", "question": "Who?", "answer": "she"}, "train.jsonl:1")
    row.media, row.start, row.end           # ('a.mp4',), None, None

`encode` and the trainer read rows through this, so a file that one takes the other takes too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.annotations.files import ALL, Selection, UnreadableRow, read_rows
from shards.annotations.forms import MEDIA_TAG, Json, canonical
from shards.errors import UserError
from shards.text import printable

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class UnsupervisedError(UserError):
    """A row without an answer, from which nothing can be learned."""


@dataclass(frozen=True)
class Row:
    """What one row of an annotation file says."""

    id: str
    """Its own, or its place; as it may be printed."""
    media: tuple[str, ...]
    """Paths, in the order of the media tags."""
    start: float | None
    """Of the part of the media that is meant, in seconds."""
    end: float | None
    turns: tuple[tuple[str, str], ...]
    """(user, assistant or system; text)."""
    task: str
    """The row's own task name, or empty."""


def rows_of(
    path: str | Path, problems: list[str], chosen: Selection = ALL
) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of the chosen rows of a file or folder; what cannot be read is a problem."""
    try:
        rows = list(read_rows(path))
    except UserError as error:
        problems.append(str(error))
        return
    for k in chosen.of(len(rows)):
        where, row = rows[k]
        if isinstance(row, UnreadableRow):
            problems.append(f"{where}: {row}")
        else:
            yield where, row


def parse_row(
    data: Any, where: str, *, allow_outside: bool = False, media_only: bool = False
) -> Row:
    """Return what a row of any form says, or raise UserError naming its place, its id and the fault.

    allow_outside: paths may be absolute, or lead out of their root. media_only: a row need not have
    an answer, or turns at all. Without an answer it is else an UnsupervisedError.
    """
    given = data.get("id") if isinstance(data, dict) else None
    id_ = printable(where if given is None else str(given))
    name = where if given is None else f"{where} (id {id_})"
    try:
        return _parse(canonical(data, media_only=media_only), id_, allow_outside, media_only)
    except UnsupervisedError as error:
        raise UnsupervisedError(f"{name}: {error}") from None
    except UnicodeEncodeError:
        raise UserError(f"{name}: holds half of a UTF-16 pair; write UTF-8 text") from None
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _parse(data: Json, id_: str, allow_outside: bool, media_only: bool) -> Row:
    turns = []
    for turn in data["conversations"]:
        if turn["from"] not in ROLES:
            raise UserError(
                f"a turn needs `from` (human or gpt) and `value`: unknown role {turn['from']!a}; "
                f"known are {', '.join(ROLES)}"
            )
        turn["value"].encode()
        turns.append((ROLES[turn["from"]], turn["value"]))
    answered = any(role == "assistant" and text.strip() for role, text in turns)
    if not answered and not media_only:
        raise UnsupervisedError("no supervised text: no gpt turn with an answer")
    video = data.get("video", [])
    media = video if isinstance(video, list) else [video]
    for medium in media:
        medium.encode()
        if not allow_outside:
            check_inside(medium)
    tags = sum(len(MEDIA_TAG.findall(text)) for _, text in turns)
    if answered and tags != len(media):
        raise UserError(
            f"{tags} <video>/<image> tags for {len(media)} media; write one tag per medium"
        )
    start, end = _part(data)
    return Row(id_, tuple(media), start, end, tuple(turns), str(data.get("task", "")))


def _part(data: Json) -> tuple[float | None, float | None]:
    times = data.get("start"), data.get("end")
    for side, time in zip(("start", "end"), times, strict=True):
        a_number = isinstance(time, int | float) and not isinstance(time, bool)
        if time is not None and not (a_number and 0 <= time < math.inf):
            raise UserError(f"{side} must be seconds, not negative, got {time!a}")
    start, end = times
    if start is not None and end is not None and not start < end:
        raise UserError(f"start {start} is not before end {end}")
    return start, end


def check_inside(medium: str) -> None:
    """Raise UserError for the path of a medium that may lie elsewhere than under its root."""
    if leads_outside(medium):
        raise UserError(
            f"video {medium!a} leads out of its root; name it relative to the folder that is "
            "encoded, or trust the file: encode --allow-outside, train allow_outside: true; or take "
            "leading folders off in training: strip_prefix"
        )


def leads_outside(path: str) -> bool:
    """Tell whether a path that should lie under a root may lie elsewhere: absolute, or with `..`.

    Links are not followed: those under a root are of whoever made the root, not of who wrote a path.
    """
    return path.startswith("/") or ".." in path.split("/")
