"""Rows of annotation files -> `Row`: turns of known roles, media, and the part of them.

    row = parse_row({"video": "a.mp4", "question": "Who?", "answer": "she"}, "train.jsonl:1")
    row.media, row.start, row.end           # ('a.mp4',), None, None

`encode` and the trainer both read rows through this, so that they accept the same files.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.annotations.fault import RowError, UnsupervisedError, short
from shards.annotations.fields import kinds_of
from shards.annotations.files import UnreadableRow, parsed, unparsed_rows
from shards.annotations.forms import (
    FORMS,
    MEDIA_TAG,
    ROLES,
    TAGS,
    TURNS,
    Json,
    canonical,
    tags_in,
)
from shards.annotations.selection import ALL, Selection
from shards.annotations.timeline import Cut
from shards.errors import UserError
from shards.progress import progress
from shards.text import printable

Turns = tuple[tuple[str, str], ...]
"""(user, assistant or system; text) of each turn."""


@dataclass(frozen=True)
class Row:
    """One row of an annotation file."""

    id: str
    """Its own id, or its place; printable."""
    media: tuple[str, ...]
    """Paths, in the order of the media tags."""
    start: float | None
    """Start of the part of the media, in seconds."""
    end: float | None
    turns: Turns
    """Consecutive turns have different roles."""
    task: str
    """The row's own task name, or empty."""
    timeline: tuple[Cut, ...] = ()
    """If the media are joined into one: its parts, one per medium."""


def rows_of(
    path: str | Path, problems: list[str], chosen: Selection = ALL
) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of the chosen rows of a file or folder; adds unreadable files to `problems`.

    A row that cannot be read comes as an `UnreadableRow`, which `parse_row` refuses.
    """
    try:
        # all rows first: a file that cannot be read to its end gives none, and a
        # share is one of its number
        rows = list(unparsed_rows(path))
    except UserError as error:
        problems.append(str(error))
        return
    wanted = chosen.of(len(rows))
    for k in progress(f"reading {Path(path).name}", "rows", len(wanted), wanted):
        where, row = rows[k]
        yield where, parsed(row)


def parse_row(
    data: Any,
    where: str,
    *,
    allow_outside: bool = False,
    media_only: bool = False,
    ignored: Collection[str] = (),
) -> Row:
    """Return a row of any form; raises RowError with its place, its id and the fault.

    allow_outside: paths may be absolute, or lead out of their root. media_only: a row needs no answer,
    and no turns; otherwise one without an answer is an UnsupervisedError. ignored: fields of the row
    that are not read.
    """
    # before anything is parsed: the fault of a row is reported with its id, whatever the fault is
    given = data.get("id") if isinstance(data, dict) else None
    id_ = printable(where if given is None else str(given))
    own_id = "" if given is None else id_
    try:
        if isinstance(data, UnreadableRow):
            raise RowError("not readable", str(data))
        plain = None if media_only or ignored else _plain(data, id_, allow_outside)
        if plain is not None:
            return plain
        ours = canonical(data, media_only=media_only, ignored=ignored)
        return _parse(ours, id_, allow_outside, media_only)
    except UnicodeEncodeError:
        what = "holds half of a UTF-16 pair; write UTF-8 text"
        raise RowError("not readable", what).at(where, own_id) from None
    except RowError as error:
        raise error.at(where, own_id) from None
    except UserError as error:  # a form added by a user may raise it
        raise RowError("no known form", str(error)).at(where, own_id) from None


def _parse(data: Json, id_: str, allow_outside: bool, media_only: bool) -> Row:
    turns = []
    for turn in data["conversations"]:
        role = ROLES.get(turn["from"].lower())
        if role is None:
            raise RowError(
                TURNS,
                f"a turn needs `from` (human or gpt) and `value`: unknown role {turn['from']!a}; "
                f"known are {', '.join(ROLES)}",
            )
        refuse_halves(turn["value"])
        turns.append((role, turn["value"]))
    timeline = tuple(Cut(**part) for part in data.get("timeline", []))
    video = data.get("video", [cut.video for cut in timeline])
    media = video if isinstance(video, list) else [video]
    for medium in media:
        refuse_halves(medium)
        if not allow_outside:
            check_inside(medium)
    start, end = _part(data)
    # encode needs only the media: what a row says is training's concern
    if not media_only:
        refuse_unanswered(turns)
    # without an answer (encode alone reads such rows) tags are not counted: nothing is learned from them
    if any(role == "assistant" and text.strip() for role, text in turns):
        turns = with_tags(joined(turns), 1 if timeline else len(media))
    return Row(id_, tuple(media), start, end, tuple(turns), str(data.get("task", "")), timeline)


# -- plain rows


PLAIN = {"id", "video", "conversations", "task", "data_source"}
"""The fields of a plain row that say something."""
READ = {
    *("start", "end", "videos", "image", "images", "media_dir", "timeline", "is_video"),
    *("variables", "system", "system_prompt", "system_message"),
}
"""Other fields that a conversation's row is read for."""


def _plain(data: Any, id_: str, allow_outside: bool) -> Row | None:
    """Return a row of a video and alternating turns with nothing unusual in it; None for any other.

    It is the one that `_parse` returns. Most rows are such, and far sooner read as a whole than turn by
    turn.
    """
    if not isinstance(data, dict):
        return None
    video, talk, task = data.get("video"), data.get("conversations"), data.get("task", "")
    if not (isinstance(video, str) and isinstance(talk, list) and isinstance(task, str)):
        return None
    if not all(_is_aside(name, data[name]) for name in data.keys() - PLAIN):
        return None
    try:
        asked = [turn["from"] for turn in talk]
        texts = [turn["value"] for turn in talk]
    except (TypeError, KeyError):
        return None
    rounds = len(talk) // 2
    if asked not in (["human", "gpt"] * rounds, ["user", "assistant"] * rounds):
        return None
    if set(map(len, talk)) != {2} or set(map(type, texts)) != {str}:
        return None
    said = "\n".join(texts)
    tags = said.count("<video>") + said.count("<image>")
    # slots of variables, escapes, several media, tags elsewhere, URLs and empty answers take more care
    if "PUT>" in said or "\\<" in said or tags > 1 or tags != tags_in(texts[0]):
        return None
    if ":" in video or not video.strip() or not all(map(str.strip, texts[1::2])):
        return None
    refuse_halves(said)
    refuse_halves(video)
    if not allow_outside:
        check_inside(video)
    if not tags:
        texts[0] = f"<video>\n{texts[0]}"
    turns = tuple(zip(("user", "assistant") * rounds, texts, strict=True))
    return Row(id_, (video,), None, None, turns, task if task.strip() else "")


def _is_aside(name: str, value: Any) -> bool:
    """Return whether a field of a row with turns and a video says nothing that matters."""
    if value is None:
        return True
    says_more, says_when, _ = kinds_of(name)
    known = name in READ or name in FORMS
    return not (known or says_more or says_when or isinstance(value, dict))


# -- turns


def refuse_halves(text: str) -> None:
    """Raise UnicodeEncodeError for half of a surrogate pair, which JSON may contain, and is not text."""
    if not text.isascii():
        text.encode()


def refuse_unanswered(turns: Sequence[tuple[str, str]]) -> None:
    """Raise RowError for an empty answer, and for a last question without an answer."""
    blank = [k for k, (role, text) in enumerate(turns) if role == "assistant" and not text.strip()]
    if len(blank) == [role for role, _ in turns].count("assistant"):
        raise UnsupervisedError(
            "no supervised text", "no supervised text: no gpt turn with an answer"
        )
    if blank:
        raise RowError(
            "empty answer",
            f"turn {blank[0] + 1} of {len(turns)} (gpt) is empty",
            got=short(turns[blank[0]][1]),
            expected="an answer",
        )
    # a question at the end is a file that was cut off, or an answer that was lost
    if turns[-1][0] != "assistant":
        raise RowError(
            "last question without an answer",
            f"turn {len(turns)}, the last, is of {turns[-1][0]}",
            got=short(turns[-1][1]),
            expected="an answer after it",
        )


def joined(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the turns with consecutive turns of one role joined by a new line.

    Half of all chat templates refuse such turns, and others show them as separate messages.
    """
    out: list[tuple[str, str]] = []
    for role, text in turns:
        if out and out[-1][0] == role:
            out[-1] = role, "\n".join(part for part in (out[-1][1], text) if part.strip())
        else:
            out.append((role, text))
    return out


def with_tags(turns: Sequence[tuple[str, str]], media: int) -> list[tuple[str, str]]:
    """Return turns with a tag for each medium; if they have none, all tags before the first question."""
    tags = [tags_in(text) for _, text in turns]
    escape = "for the literal text, write \\<image> or \\<video>"
    for number, count in enumerate(tags, start=1):
        if count and turns[number - 1][0] == "assistant":
            text = turns[number - 1][1]
            raise RowError(
                TAGS,
                f"turn {number} (gpt) has the tag {MEDIA_TAG.findall(text)[0]}, and tags belong in "
                f"questions; {escape}",
            )
    found = sum(tags)
    if found == media:
        return list(turns)
    first = next((k for k, (role, _) in enumerate(turns) if role == "user"), None)
    if media and not found and first is not None:
        # without any tag the media come first, before what is asked about them
        asked = turns[first][0], "<video>\n" * media + turns[first][1]
        return [*turns[:first], asked, *turns[first + 1 :]]
    raise RowError(
        TAGS,
        f"{found} <video>/<image> tags for {media} media; write one tag per medium; {escape}",
    )


# -- parts and paths


def _part(data: Json) -> tuple[float | None, float | None]:
    times = data.get("start"), data.get("end")
    for side, time in zip(("start", "end"), times, strict=True):
        # bool is an int in Python, and `true` no second
        a_number = isinstance(time, int | float) and not isinstance(time, bool)
        if time is not None and not (a_number and 0 <= time < math.inf):
            raise RowError(
                "bad start or end", f"{side} must be seconds, not negative, got {short(time)}"
            )
    start, end = times
    if start is not None and end is not None and not start < end:
        raise RowError("start not before end", f"start {start} is not before end {end}")
    return start, end


def check_inside(medium: str) -> None:
    """Raise RowError for the path of a medium that may lead out of its root."""
    if leads_outside(medium):
        raise RowError(
            "path out of its root",
            f"video {medium!a} leads out of its root; name it relative to the folder that is "
            "encoded, or trust the file: encode --allow-outside, train allow_outside: true; or take "
            "leading folders off in training: strip_prefix",
        )


def leads_outside(path: str) -> bool:
    """Return whether a path may lead out of its root: absolute, or with `..`.

    Links are not checked: those under a root were made by its owner, not by the author of the path.
    """
    return path.startswith("/") or ".." in path.split("/")
