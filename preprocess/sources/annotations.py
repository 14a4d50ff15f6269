"""Annotation files -> the media they name, resolved against folders.

An annotation file may come from a stranger: it is read as data, and a path in it that leads out of
its root is refused unless the file is trusted.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from preprocess.decode.read_pictures import picture_files
from shards.format.samples import leads_outside
from shards.signed import Json

ANNOTATION_SUFFIXES = frozenset((".json", ".jsonl"))
OTHER_RECORDS = frozenset((".csv", ".parquet"))
AS_RECORDS = "write it as records first: python -m shards.annotations.forms {} --out records.jsonl"
MEDIA_FIELDS = ("video", "videos", "image", "images")


def annotated_media(
    path: Path, roots: Sequence[str], problems: list[str], allow_outside: bool
) -> list[tuple[Path, str, float | None, float | None]]:
    """Return (file, path under its root, start, end) of the clips that an annotation file names.

    What cannot be found, or may not be looked for, goes to `problems`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".jsonl":
            items = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            items = json.loads(text)
        named: set[tuple[str, float | None, float | None]] = {
            (str(video), item.get("start"), item.get("end"))
            for item in items
            for video in _videos(item)
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        problems.append(f"{path}: not readable as records: {error}")
        return []
    if not named:
        problems.append(
            f"{path}: names no media in {', '.join(MEDIA_FIELDS)}; if they are in its messages, "
            + AS_RECORDS.format(path)
        )
    sources, missing = [], []
    for video, start, end in sorted(named, key=str):
        if leads_outside(video) and not allow_outside:
            problems.append(
                f"{path}: {video!a} leads out of its root; write it relative to a --video-root, or "
                "trust the file with --allow-outside"
            )
            continue
        under = [root / video for root in map(Path, roots) if _is_source(root / video)]
        beside = [path.parent / video] if _is_source(path.parent / video) else []
        files = {os.path.realpath(file): file for file in (under or beside)[::-1]}
        if len(files) > 1:
            problems.append(
                f"{path}: {video!a} is under several roots, as {' and '.join(sorted(files))}; name "
                "one of them with --video-root"
            )
            continue
        file = next(iter(files.values()), None)
        if not _is_part(start, end):
            problems.append(
                f"{path}: {video}: start {start!r} and end {end!r} bound no part; write seconds, "
                "start before end"
            )
        elif file is None:
            missing.append(video)
        else:
            sources.append((file, Path(video).as_posix(), start, end))
    if missing:
        looked = ", ".join([*map(str, roots), str(path.parent)])
        problems.append(
            f"{path}: {len(missing)} of {len(named)} videos not found, first {missing[0]!r} "
            f"(looked under {looked}); name their folder with --video-root"
        )
    return sources


def _is_source(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and bool(picture_files(path)))


def _is_part(start: object, end: object) -> bool:
    times = [time for time in (start, end) if time is not None]
    numbers = [time for time in times if isinstance(time, int | float) and 0 <= time < math.inf]
    return len(numbers) == len(times) and sorted(set(numbers)) == numbers


def _videos(item: Json) -> list[str]:
    named = [item[field] for field in MEDIA_FIELDS if item.get(field) is not None]
    return [one for media in named for one in (media if isinstance(media, list) else [media])]
