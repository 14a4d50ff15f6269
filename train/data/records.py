"""Annotation files -> records, joined to banked clips; coordinate markup in their text.

A record is `{id, video, start?, end?, conversations: [{from: human|gpt, value}]}` with one
`<video>` or `<image>` tag per medium, or a `timeline` of parts that are one (`shards.read.timeline`);
`shards.annotations` converts other forms to this one. Text may hold `<t:12.5>` (seconds of the clip)
or `<t:41.3%>` (a share of it), `<x:0.31>` and `<y:0.52>` (fractions of the frame), or an anchor by name
such as `<TEMP-037>`.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from shards.annotations.fault import RowError, short
from shards.annotations.forms import MEDIA_TAG, Json, canonical, tags_in
from shards.annotations.records import check_inside, parse_row, rows_of
from shards.annotations.selection import ALL, Selection
from shards.annotations.timeline import Cut
from shards.errors import UserError
from shards.format.samples import clip_id
from shards.read.banks import Banks, Place
from shards.read.timeline import Timeline
from shards.signed import canonical_json, digest
from train.data.markup import kind_of
from train.data.spans import refuse_misspelt
from train.settings.config import DataSettings
from train.settings.folders import Folders, several, unknown_clips


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation."""

    role: str
    """user, assistant or system."""
    text: str


@dataclass(frozen=True)
class Record:
    """One training example: a conversation about banked clips."""

    id: str
    clips: tuple[str, ...]
    """Clip ids, in the order of the media tags; of a timeline, those of its parts."""
    turns: tuple[Turn, ...]
    task: str
    """The record's own task name, or empty."""
    where: str
    """`file:line` or `file[index]`, for messages."""
    source: str = ""
    """LLaVA-Video's `data_source`: a folder that its media may be banked under."""
    cuts: tuple[Cut, ...] = ()
    """Of a timeline: the parts of clips on it, which are one medium."""
    places: tuple[Place | Timeline, ...] = field(default=(), compare=False, repr=False)
    """Places of the media in banks, once the record is joined to them."""
    independent: bool = False
    """Whether it has several turns that do not see each other."""

    @property
    def media(self) -> int:
        """Number of media, and of their tags."""
        return 1 if self.cuts else len(self.clips)

    @property
    def questions(self) -> int:
        """Number of answers."""
        return sum(turn.role == "assistant" for turn in self.turns)


def records_digest(records: Sequence[Record]) -> str:
    """Return a digest of what records ask, of which clips, how, and of how the answers are scored."""
    said = [
        [
            [r.id, r.clips, [cut.to_json() for cut in r.cuts], r.task, r.independent],
            [[turn.role, turn.text] for turn in r.turns],
        ]
        for r in records
    ]
    return digest(canonical_json({"records": said}))


_turn = lru_cache(maxsize=2**16)(Turn)
"""A turn: the same one for all records that ask or answer the same."""
PLAIN = Folders()
"""For records that name clips by their ids."""
ENTANGLED = "turns that cannot be independent"
"""Reason for which a record cannot have independent turns."""
TASKS = ("text", "time", "span", "point", "box")
"""Kinds of answers, by which losses are logged."""


def read_records(
    path: str | Path,
    problems: list[str],
    bad: list[RowError] | None = None,
    *,
    allow_outside: bool = False,
    ignored: Collection[str] = (),
    chosen: Selection = ALL,
    folders: Folders = PLAIN,
) -> list[Record]:
    """Read a file or folder of any form; faults are added to `problems`, with their places.

    bad: gets the faults of single records, if given. chosen: the rows to read. allow_outside: whether
    paths may be absolute or lead out of their root; else they may not, after the prefixes of `folders`
    are removed. ignored: fields that are not read.
    """
    rows = rows_of(path, problems, chosen)
    return records_of(
        rows, problems, bad, allow_outside=allow_outside, ignored=ignored, folders=folders
    )


def records_of(
    rows: Iterable[tuple[str, Any]],
    problems: list[str],
    bad: list[RowError] | None = None,
    *,
    allow_outside: bool = False,
    ignored: Collection[str] = (),
    folders: Folders = PLAIN,
) -> list[Record]:
    """Return the records of rows, each given with its place; otherwise as `read_records`."""
    records = []
    for where, row in rows:
        try:
            record = parse_record(
                row, where, allow_outside=allow_outside, ignored=ignored, folders=folders
            )
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
    """Return the sound rows of a file in this project's form; faults are added to `bad`."""
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
    data: Any,
    where: str,
    *,
    allow_outside: bool = False,
    ignored: Collection[str] = (),
    folders: Folders = PLAIN,
) -> Record:
    """Return the record of a row; RowError, with its place and id, where it is invalid."""
    # checked below instead, without the prefix
    lenient = allow_outside or bool(folders.strip_prefix)
    row = parse_row(data, where, allow_outside=lenient, ignored=ignored)
    try:
        for medium in [] if allow_outside else row.media:
            check_inside(folders.stripped(medium))
        refuse_misspelt(row.turns)
    except RowError as error:
        raise error.at(where, row.id if data.get("id") is not None else "") from None
    source = data.get("data_source")
    return Record(
        id=row.id,
        clips=tuple([clip_id(medium, row.start, row.end) for medium in row.media]),
        turns=tuple([_turn(role, text) for role, text in row.turns]),
        task=row.task,
        where=where,
        source=source if isinstance(source, str) else "",
        cuts=row.timeline,
    )


def duration_before(record: Record, durations: Sequence[float], turn: int) -> float:
    """Return the seconds of the medium of a turn's first times: the last medium before the turn.

    durations: of the record's media, in order. Before the first medium it is the first one.
    """
    media = sum(len(MEDIA_TAG.findall(t.text)) for t in record.turns[:turn])
    return durations[max(media - 1, 0)] if durations else 0.0


def task_of(record: Record) -> int:
    """Return the index in `TASKS` of a record's first answer that is more than text; 0 if none is."""
    # a dialogue counts as its first answer with coordinates: losses by task are per record, not per turn
    return next((kind for kind in _kinds(record) if kind), 0)


def tasks_of(record: Record) -> list[int]:
    """Return `task_of` in a list, or the task of each independent turn."""
    return _kinds(record) if record.independent else [task_of(record)]


def _kinds(record: Record) -> list[int]:
    return [TASKS.index(kind_of(t.text)) for t in record.turns if t.role == "assistant"]


def made_independent(record: Record) -> Record:
    """Return a record with independent turns; unchanged where it has only one question.

    Raises RowError where a turn would lack its question, its answer, or the media.
    """
    roles = [turn.role for turn in record.turns]
    if roles.count("assistant") < 2:
        return record
    questions = record.turns[roles[0] == "system" :]
    first, system = questions[0].text, record.turns[: -len(questions)]
    others = "\n".join([turn.text for turn in (*questions[1:], *system)])
    got = expected = ""
    # -- alone, each question needs its answer, and all need the media, which only the first one has
    if roles[-len(questions) :] != ["user", "assistant"] * (len(questions) // 2):
        got, expected = ", ".join(roles), "user, assistant, user, assistant, ..."
    elif tags_in(others):
        got, expected = "media in another turn", "all in the first question"
    elif MEDIA_TAG.sub("", first[: media_end(first)]).strip():
        got, expected = f"text before them: {short(first)}", "the media first in their question"
    if got:
        fix = "set turns: dialogue for these records, or make a record of each question"
        raise RowError(ENTANGLED, "turns: independent", got, expected, fix=fix)
    return replace(record, independent=True)


def one_by_one(turns: Sequence[Turn]) -> list[tuple[Turn, ...]]:
    """Return, for each question of a record, the turns of a record with that question alone.

    Each has the system prompt, and the media of the first question.
    """
    system = tuple(turns[: turns[0].role == "system"])
    questions, answers = turns[len(system) :: 2], turns[len(system) + 1 :: 2]
    first = questions[0].text
    # as text, tags and all: a record of that question alone would be written so
    media = first[: media_end(first)]
    asked = [questions[0], *(Turn("user", media + turn.text) for turn in questions[1:])]
    return [(*system, *pair) for pair in zip(asked, answers, strict=True)]


@lru_cache(maxsize=64)  # asked several times for each record
def media_end(text: str) -> int:
    """Return the end of a text's last media tag, the blanks after it included; 0 without tags."""
    end = max((match.end() for match in MEDIA_TAG.finditer(text)), default=0)
    return len(text) - len(text[end:].lstrip()) if end else 0


def join(
    records: Sequence[Record],
    banks: Banks,
    missing: str,
    problems: list[str],
    dropped: list[tuple[Record, str]] | None = None,
    folders: Folders = PLAIN,
) -> list[Record]:
    """Return the records whose clips are banked, with the ids and places of their clips.

    folders: how names become ids. Records with a quarantined clip are added to `dropped`, with a reason;
    those with an unknown clip too if missing is `drop`, else they are lines in `problems`.
    """
    kept = []
    quarantined = banks.quarantined()
    # data sets ask several questions about a clip, each a row
    find = lru_cache(maxsize=None)(banks.find)
    dropped = [] if dropped is None else dropped
    unknown: list[tuple[str, str]] = []
    for record in records:
        try:
            ids = [
                id_ if find(id_) else known_id(id_, record.source, banks, quarantined, folders)
                for id_ in record.clips
            ]
        except UserError as error:
            problems.append(f"{record.where} (id {record.id}): {error}")
            continue
        places = [find(id_) for id_ in ids if id_ is not None]
        found = replace(
            record,
            clips=tuple([id_ for id_ in ids if id_ is not None]),
            places=tuple([place for place in places if place is not None]),
        )
        if len(found.places) == len(record.clips):
            kept.append(found)
        # dropped, not refused: why the clip cannot be read is recorded in its bank's quarantine
        elif len(found.clips) == len(record.clips):
            dropped.append((record, "clip in quarantine"))
        elif missing == "drop":
            dropped.append((record, "clip in no bank"))
        else:
            unknown.append((f"{record.where} (id {record.id})", record.clips[ids.index(None)]))
    problems += [f"{line}, or set missing: drop" for line in unknown_clips(unknown, banks)]
    return kept


def known_id(
    id_: str, source: str, banks: Banks, quarantined: Collection[str], folders: Folders
) -> str | None:
    """Return the id under which a clip is banked or quarantined, None where it is unknown.

    The id itself wins over other names by `folders`; UserError where these are of several clips.
    """
    if id_ in banks or id_ in quarantined:
        return id_
    names = folders.other_names(id_, source)
    found = [name for name in names if name in banks or name in quarantined]
    if len(found) > 1:  # a guess could train on another clip
        raise several(id_, found)
    return found[0] if found else None
