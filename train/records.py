"""Annotation files -> records, joined to banked clips; coordinate markup in their text.

A record is `{id, video, start?, end?, conversations: [{from: human|gpt, value}]}` with one
`<video>` or `<image>` tag per medium. Text may carry `<t:12.5>` (seconds of the clip), `<x:0.31>`
and `<y:0.52>` (fractions of the frame), or an anchor by name such as `<TEMP-037>`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shards.reader import Banks
from shards.schema import clip_id

MEDIA_TAG = re.compile(r"<(?:video|image)>")
MARKUP = re.compile(r"<([txy]):(-?\d+(?:\.\d+)?)>|<(TEMP|HEIGHT|WIDTH)-(\d{3})>")
AXIS = {"t": 0, "y": 1, "x": 2, "TEMP": 0, "HEIGHT": 1, "WIDTH": 2}
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


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


@dataclass(frozen=True)
class Coordinate:
    """A coordinate written in text, before it is normalised."""

    axis: int
    value: float
    """Seconds of the clip on the time axis, a fraction of the frame on the others."""
    anchor: int | None = None
    """The anchor's number where it was written by name."""


class UnsupervisedError(ValueError):
    """A record without an answer, from which nothing can be learned."""


def read_records(
    path: str | Path, problems: list[str], dropped: Counter[str] | None = None
) -> list[Record]:
    """Read a .json or .jsonl file; what is wrong with a record goes to `problems`, with its place.

    Records without an answer are a problem too, or - given `dropped` - left out and counted there.
    """
    path = Path(path)
    records = []
    try:
        for where, data in _items(path):
            try:
                records.append(parse_record(data, where))
            except UnsupervisedError as error:
                if dropped is None:
                    problems.append(f"{error}; mend it, or set unsupervised: drop")
                else:
                    dropped["no supervised text"] += 1
            except ValueError as error:
                problems.append(str(error))
    except (OSError, json.JSONDecodeError) as error:
        problems.append(f"{path}: not readable as records: {error}")
    return records


def _items(path: Path) -> Iterable[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{path}:{number}", json.loads(line)
    else:
        for index, item in enumerate(json.loads(text)):
            yield f"{path}[{index}]", item


def parse_record(data: Any, where: str) -> Record:
    """Return a record, or raise ValueError naming its place, its id and what is wrong."""
    if not isinstance(data, dict) or not isinstance(data.get("conversations"), list):
        raise ValueError(f"{where}: expected an object with `conversations`")
    name = f"{where} (id {data.get('id', '?')})"
    turns = []
    for turn in data["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or "value" not in turn:
            raise ValueError(
                f"{name}: a turn needs `from` (human or gpt) and `value`, got {turn!r}"
            )
        turns.append(Turn(ROLES[turn["from"]], str(turn["value"])))
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        raise UnsupervisedError(f"{name}: no supervised text: no gpt turn with an answer")
    video = data.get("video", data.get("image"))
    media = [] if video is None else video if isinstance(video, list) else [video]
    tags = sum(len(MEDIA_TAG.findall(turn.text)) for turn in turns)
    if tags != len(media):
        raise ValueError(
            f"{name}: {tags} <video>/<image> tags for {len(media)} media; write one tag per medium"
        )
    start, end = data.get("start"), data.get("end")
    if start is not None and end is not None and not start < end:
        raise ValueError(f"{name}: start {start} is not before end {end}")
    return Record(
        id=str(data.get("id", where)),
        clips=tuple(clip_id(str(medium), start, end) for medium in media),
        turns=tuple(turns),
        task=str(data.get("task", "")),
        where=where,
    )


def split_markup(text: str) -> list[str | Coordinate]:
    """Return a text as alternating plain pieces and coordinates, in order."""
    pieces: list[str | Coordinate] = []
    position = 0
    for match in MARKUP.finditer(text):
        if match.start() > position:
            pieces.append(text[position : match.start()])
        letter, number, name, anchor = match.groups()
        if letter:
            pieces.append(Coordinate(AXIS[letter], float(number)))
        else:
            pieces.append(Coordinate(AXIS[name], 0.0, anchor=int(anchor)))
        position = match.end()
    if position < len(text):
        pieces.append(text[position:])
    return pieces


def kind_of(reference: str) -> str:
    """Return what a reference answer is, by its markup: one of `TASKS`."""
    letters = "".join(match.group(1) or "?" for match in MARKUP.finditer(reference))
    return {"tt": "span", "t": "time", "xy": "point", "xyxy": "box"}.get(letters, "text")


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
) -> list[Record]:
    """Keep the records whose clips are banked; others are dropped when in quarantine or asked for.

    Returns the kept records; the others are counted in `dropped`, by reason.
    """
    kept = []
    quarantined = banks.quarantined()
    dropped = Counter() if dropped is None else dropped
    for record in records:
        unknown = [id_ for id_ in record.clips if id_ not in banks]
        if not unknown:
            kept.append(record)
        elif all(id_ in quarantined for id_ in unknown):
            dropped["clip in quarantine"] += 1
        elif missing == "drop":
            dropped["clip in no bank"] += 1
        else:
            problems.append(
                f"{record.where} (id {record.id}): no bank knows the clip {unknown[0]!r}; encode it, "
                "name its bank, or set missing: drop"
            )
    return kept


@dataclass(frozen=True)
class MixturePart:
    """One dataset of a mixture."""

    records: list[str]
    banks: list[str]
    repeats: int


def read_mixture(config: str, mixture: str, problems: list[str]) -> list[MixturePart]:
    """Return the datasets of a mixture such as `a+b*2`; an empty mixture takes each once.

    The YAML maps a name to `records` and, beside the run's own, `banks`; paths are relative to it.
    """
    try:
        named = yaml.safe_load(Path(config).read_text())
    except (OSError, yaml.YAMLError) as error:
        problems.append(f"data_config {config}: {error}")
        return []
    if not isinstance(named, dict):
        problems.append(
            f"data_config {config}: expected `name: {{records: ..., banks: ...}}` entries"
        )
        return []
    parts = []
    for term in mixture.split("+") if mixture else named:
        name, _, times = term.strip().partition("*")
        if name not in named:
            problems.append(
                f"data_mixture: no dataset {name!r} in {config} (has {', '.join(named)})"
            )
        elif times and not (times.isdigit() and int(times) > 0):
            problems.append(
                f"data_mixture {term.strip()!r}: repeat by a positive integer, like {name}*2"
            )
        elif not isinstance(named[name], dict) or "records" not in named[name]:
            problems.append(f"data_config {config}: {name} needs `records`")
        else:
            part = MixturePart(
                records=_paths(named[name]["records"], config),
                banks=_paths(named[name].get("banks", []), config),
                repeats=int(times or 1),
            )
            problems += [
                f"data_config {config}: {name}: no such file: {path}"
                for path in part.records
                if not Path(path).is_file()
            ]
            parts.append(part)
    return parts


def _paths(value: str | list[str], config: str) -> list[str]:
    return [
        str(Path(config).parent / path) for path in (value if isinstance(value, list) else [value])
    ]


def check_coordinates(record: Record, durations: Sequence[float], problems: list[str]) -> None:
    """Add a problem for each coordinate of a record that lies outside its clip or frame."""
    media = iter(durations)
    duration = durations[0] if durations else 0.0
    for turn in record.turns:
        for part in re.split(f"({MEDIA_TAG.pattern})", turn.text):
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


def order(seed: int, epoch: int, count: int) -> list[int]:
    """Return the order of an epoch: a permutation that depends on nothing but these numbers."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()
