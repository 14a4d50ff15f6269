"""Annotation files -> records, joined to banked clips; coordinate markup in their text.

A record is `{id, video, start?, end?, conversations: [{from: human|gpt, value}]}` with one
`<video>` or `<image>` tag per medium; `shards.annotations` brings other forms into this one. Text may
carry `<t:12.5>` (seconds of the clip) or `<t:41.3%>` (a share of it), `<x:0.31>` and `<y:0.52>`
(fractions of the frame), or an anchor by name such as `<TEMP-037>`.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shards.annotations.files import ALL, Selection
from shards.annotations.forms import MEDIA_TAG, Json, canonical
from shards.annotations.records import UnsupervisedError, check_inside, parse_row, rows_of
from shards.errors import UserError
from shards.format.samples import clip_id
from shards.read.banks import Banks, Place
from train.data.folders import Folders, advice, several
from train.data.markup import MEDIA_TAGS, SHARE, kind_of, split_markup


@dataclass(frozen=True)
class Turn:
    role: str
    """user, assistant or system."""
    text: str


@dataclass(frozen=True)
class Record:
    """One training example: a conversation about banked clips."""

    id: str
    clips: tuple[str, ...]
    """Clip ids, in the order of the media tags."""
    turns: tuple[Turn, ...]
    task: str
    """The record's own task name, or empty."""
    where: str
    """`file:line` or `file[index]`, for messages."""
    source: str = ""
    """LLaVA-Video's `data_source`: a folder that its media may be banked under."""
    places: tuple[Place, ...] = field(default=(), compare=False, repr=False)
    """Of the clips, once the record is joined to banks."""


PLAIN = Folders()
"""Records name clips by their ids."""
TASKS = ("text", "time", "span", "point", "box")
"""What an answer may be; the losses are split by it."""


def read_records(
    path: str | Path,
    problems: list[str],
    dropped: Counter[str] | None = None,
    *,
    allow_outside: bool = False,
    chosen: Selection = ALL,
    folders: Folders = PLAIN,
) -> list[Record]:
    """Read a file or folder of any form; what is wrong with a record goes to `problems`, by place.

    Records without an answer are a problem too, or - given `dropped` - left out and counted there.
    chosen: which rows are read. allow_outside: paths may be absolute, or lead out of their root;
    without it they may not once the prefixes of `folders` are taken off.
    """
    records = []
    for where, row in rows_of(path, problems, chosen):
        try:
            records.append(parse_record(row, where, allow_outside=allow_outside, folders=folders))
        except UnsupervisedError as error:
            if dropped is None:
                problems.append(f"{error}; mend it, or set unsupervised: drop")
            else:
                dropped["no supervised text"] += 1
        except UserError as error:
            problems.append(str(error))
    return records


def checked_rows(
    path: str | Path, problems: list[str], *, allow_outside: bool = False
) -> list[Json]:
    """Return the rows of a file as rows of ours, as `read_records` understands them."""
    rows = []
    for where, row in rows_of(path, problems):
        try:
            parse_record(row, where, allow_outside=allow_outside)
            rows.append(canonical(row))
        except UserError as error:
            problems.append(str(error))
    return rows


def parse_record(
    data: Any, where: str, *, allow_outside: bool = False, folders: Folders = PLAIN
) -> Record:
    """Return a record, or raise UserError naming its place, its id and what is wrong."""
    row = parse_row(data, where, allow_outside=allow_outside or bool(folders.strip_prefix))
    try:
        for medium in [] if allow_outside else row.media:
            check_inside(folders.stripped(medium))
    except UserError as error:
        raise UserError(f"{where} (id {row.id}): {error}") from None
    source = data.get("data_source")
    return Record(
        id=row.id,
        clips=tuple(clip_id(medium, row.start, row.end) for medium in row.media),
        turns=tuple(Turn(role, text) for role, text in row.turns),
        task=row.task,
        where=where,
        source=source if isinstance(source, str) else "",
    )


def duration_before(record: Record, durations: Sequence[float], turn: int) -> float:
    """Return the seconds of the medium that a turn's first times belong to: the last one before it.

    durations: of the record's media, in order. Before the first medium it is the first one's.
    """
    media = sum(len(MEDIA_TAG.findall(t.text)) for t in record.turns[:turn])
    return durations[max(media - 1, 0)] if durations else 0.0


def task_of(record: Record) -> int:
    """Return the place in `TASKS` of a record's first answer that is more than text."""
    kinds = [TASKS.index(kind_of(t.text)) for t in record.turns if t.role == "assistant"]
    return next((kind for kind in kinds if kind), 0)


def join(
    records: Sequence[Record],
    banks: Banks,
    missing: str,
    problems: list[str],
    dropped: Counter[str] | None = None,
    folders: Folders = PLAIN,
) -> list[Record]:
    """Keep the records whose clips are banked; others are dropped when in quarantine or asked for.

    folders: what leads from their names to ids. Returns the kept records, with the ids and the places
    of their clips; the others are counted in `dropped`, by reason.
    """
    kept = []
    quarantined = banks.quarantined()
    dropped = Counter() if dropped is None else dropped
    for record in records:
        named = f"{record.where} (id {record.id})"
        try:
            ids = [
                known_id(id_, record.source, banks, quarantined, folders) for id_ in record.clips
            ]
        except UserError as error:
            problems.append(f"{named}: {error}")
            continue
        places = [banks.find(id_) if id_ is not None else None for id_ in ids]
        found = replace(
            record,
            clips=tuple(id_ for id_ in ids if id_ is not None),
            places=tuple(place for place in places if place is not None),
        )
        if len(found.places) == len(record.clips):
            kept.append(in_seconds(found, problems))
        elif len(found.clips) == len(record.clips):
            dropped["clip in quarantine"] += 1
        elif missing == "drop":
            dropped["clip in no bank"] += 1
        else:
            unknown = record.clips[ids.index(None)]
            problems.append(
                f"{named}: no bank knows the clip {unknown!r}; {advice(unknown, banks)}, or set "
                "missing: drop"
            )
    return kept


def known_id(
    id_: str, source: str, banks: Banks, quarantined: Collection[str], folders: Folders
) -> str | None:
    """Return the id that a clip is banked or quarantined under, None where it is not known.

    The id itself wins over what `folders` makes of it; UserError where that is several clips.
    """
    if id_ in banks or id_ in quarantined:
        return id_
    names = folders.other_names(id_, source)
    found = [name for name in names if name in banks or name in quarantined]
    if len(found) > 1:
        raise several(id_, found)
    return found[0] if found else None


def in_seconds(
    record: Record, problems: list[str], lasting: Sequence[float] | None = None
) -> Record:
    """Return a record with the times that are shares of a clip in seconds of it.

    lasting: seconds of its media; None where it is joined, and its places tell.
    """
    if not any(SHARE.search(turn.text) for turn in record.turns):
        return record
    banked = [place.clip().info.duration for place in record.places]
    durations = banked if lasting is None else lasting
    if not durations or min(durations) <= 0:
        problems.append(
            f"{record.where} (id {record.id}): a time in %, and a medium without a duration"
        )
    media = iter(durations)
    duration = durations[0] if durations else 0.0
    turns = []
    for turn in record.turns:
        text = ""
        for place, part in enumerate(MEDIA_TAGS.split(turn.text)):
            duration = next(media) if place % 2 else duration
            seconds = duration / 100
            text += SHARE.sub(lambda share, s=seconds: f"<t:{float(share[1]) * s:.6f}>", part)
        turns.append(Turn(turn.role, text))
    return replace(record, turns=tuple(turns))


def check_coordinates(record: Record, durations: Sequence[float], problems: list[str]) -> None:
    """Add a problem for each coordinate of a record that lies outside its clip or frame."""
    media = iter(durations)
    duration = durations[0] if durations else 0.0
    for turn in record.turns:
        for part in MEDIA_TAGS.split(turn.text):
            if MEDIA_TAG.fullmatch(part):
                duration = next(media)
                continue
            for piece in split_markup(part):
                if isinstance(piece, str) or piece.anchor is not None:
                    continue
                limit = duration if piece.axis == 0 else 1.0
                # seconds are often rounded to one decimal, so an end may lie a little behind
                if limit == 0 or not -1e-3 <= piece.value <= limit + (
                    0.1 if piece.axis == 0 else 1e-3
                ):
                    kind = "time" if piece.axis == 0 else "coordinate"
                    problems.append(
                        f"{record.where} (id {record.id}): {kind} {piece.value:g} is outside "
                        f"[0, {limit:g}]"
                    )
