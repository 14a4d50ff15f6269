"""Annotation files -> records, joined to banked clips; coordinate markup in their text.

A record is `{id, video, start?, end?, conversations: [{from: human|gpt, value}]}` with one
`<video>` or `<image>` tag per medium; `shards.annotations` brings other forms into this one. Text may
carry `<t:12.5>` (seconds of the clip) or `<t:41.3%>` (a share of it), `<x:0.31>` and `<y:0.52>`
(fractions of the frame), or an anchor by name such as `<TEMP-037>`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.annotations.fault import RowError
from shards.annotations.files import ALL, Selection
from shards.annotations.forms import Json, canonical
from shards.annotations.records import parse_row, rows_of
from shards.format.samples import clip_id
from shards.read.banks import Banks
from train.data.markup import kind_of
from train.data.spans import refuse_misspelt
from train.settings.config import DataSettings


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


TASKS = ("text", "time", "span", "point", "box")
"""What an answer may be; the losses are split by it."""


def read_records(
    path: str | Path,
    problems: list[str],
    bad: list[RowError] | None = None,
    *,
    allow_outside: bool = False,
    ignored: Collection[str] = (),
    chosen: Selection = ALL,
) -> list[Record]:
    """Read a file or folder of any form; what is wrong with it goes to `problems`, by place.

    bad: takes what is wrong with single records, where it is given. chosen: which rows are read.
    allow_outside: paths may be absolute, or lead out of their root. ignored: fields not looked at.
    """
    records = []
    for where, row in rows_of(path, problems, chosen):
        try:
            record = parse_record(row, where, allow_outside=allow_outside, ignored=ignored)
        except RowError as error:
            problems.append(str(error)) if bad is None else bad.append(error)
        else:
            records.append(record)
    return records


def checked_rows(
    path: str | Path,
    problems: list[str],
    bad: list[RowError],
    settings: DataSettings,
) -> list[Json]:
    """Return the rows of a file as rows of ours, as `read_records` understands them."""
    rows = []
    allow_outside, ignored = settings.allow_outside, settings.ignore_fields
    for where, row in rows_of(path, problems):
        try:
            parse_record(row, where, allow_outside=allow_outside, ignored=ignored)
        except RowError as error:
            bad.append(error)
        else:
            rows.append(canonical(row, ignored=ignored))
    return rows


def parse_record(
    data: Any, where: str, *, allow_outside: bool = False, ignored: Collection[str] = ()
) -> Record:
    """Return a record, or raise RowError naming its place, its id and what is wrong."""
    row = parse_row(data, where, allow_outside=allow_outside, ignored=ignored)
    record = Record(
        id=row.id,
        clips=tuple(clip_id(medium, row.start, row.end) for medium in row.media),
        turns=tuple(Turn(role, text) for role, text in row.turns),
        task=row.task,
        where=where,
    )
    try:
        refuse_misspelt(row.turns)
    except RowError as error:
        given = data.get("id") is not None
        raise error.at(where, row.id if given else "") from None
    return record


def task_of(record: Record) -> int:
    """Return the place in `TASKS` of a record's first answer that is more than text."""
    kinds = [TASKS.index(kind_of(t.text)) for t in record.turns if t.role == "assistant"]
    return next((kind for kind in kinds if kind), 0)


def join(
    records: Sequence[Record],
    banks: Banks,
    missing: str,
    problems: list[str],
    dropped: list[tuple[Record, str]] | None = None,
) -> list[Record]:
    """Keep the records whose clips are banked; others are dropped when in quarantine or asked for.

    Returns the kept records; the others go to `dropped`, each with its reason.
    """
    kept = []
    quarantined = banks.quarantined()
    dropped = [] if dropped is None else dropped
    elsewhere: dict[str, list[str]] = {}
    for record in records:
        unknown = [id_ for id_ in record.clips if id_ not in banks]
        if not unknown:
            kept.append(record)
        elif all(id_ in quarantined for id_ in unknown):
            dropped.append((record, "clip in quarantine"))
        elif missing == "drop":
            dropped.append((record, "clip in no bank"))
        else:
            elsewhere = elsewhere or by_name(banks)
            alike = elsewhere.get(file_name(unknown[0]), [])
            has = (
                f"the bank has {', '.join(map(repr, alike[:3]))}: are the records' paths relative to "
                "another root? Encode from that folder, or with --video-root"
                if alike
                else "encode it, name its bank"
            )
            problems.append(
                f"{record.where} (id {record.id}): no bank knows the clip {unknown[0]!r}; {has}, or "
                "set missing: drop"
            )
    return kept


def by_name(banks: Banks) -> dict[str, list[str]]:
    """Return the ids of all banked clips by the name of their file, without its folder."""
    found: dict[str, list[str]] = {}
    for bank in banks.banks:
        for id_ in bank.ids:
            found.setdefault(file_name(id_), []).append(id_)
    return found


def file_name(id_: str) -> str:
    """Return the name of a clip's file, without folder and part."""
    return id_.partition("#")[0].rpartition("/")[2]
