"""Annotation files -> the media they name, resolved against folders.

What a file says is read as training reads it (`shards.annotations`); here its media are looked for. A
file may come from a stranger: a path in it that leads out of its root is refused unless it is trusted.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from preprocess.decode.read_pictures import picture_files
from shards.annotations.files import SUFFIXES, annotation_files, suffix_of
from shards.annotations.records import parse_row, rows_of
from shards.errors import UserError

MOST_PROBLEMS = 30
"""Of a file, that are shown."""


class Named(NamedTuple):
    """A medium as an annotation file names it, or a part of it."""

    medium: str
    start: float | None
    end: float | None


def holds_annotations(path: Path) -> bool:
    """Whether a file, or any file of a folder, is an annotation file by its ending."""
    files = path.rglob("*") if path.is_dir() else [path]
    return any(suffix_of(file) in SUFFIXES for file in files)


def annotated_media(
    path: Path, roots: Sequence[str], problems: list[str], allow_outside: bool
) -> list[tuple[Path, str, float | None, float | None]]:
    """Return (file, path under its root, start, end) of the clips that annotation files name.

    path: a file, or a folder of files of one kind. What cannot be read, found, or may not be looked
    for goes to `problems`.
    """
    try:
        files = annotation_files(path)
    except UserError as error:
        problems.append(str(error))
        return []
    found: list[tuple[Path, str, float | None, float | None]] = []
    for file in files:
        named, missing = _named(file, problems, allow_outside), []
        for name in named:
            places = _places(name.medium, [*map(Path, roots), file.parent])
            if len(places) > 1:
                problems.append(
                    f"{file}: {name.medium!a} is under several roots, as "
                    f"{' and '.join(sorted(places))}; name one of them with --video-root"
                )
            elif not places:
                missing.append(name.medium)
            else:
                relative = Path(name.medium).as_posix()
                found.append((next(iter(places.values())), relative, name.start, name.end))
        if missing:
            looked = ", ".join([*map(str, roots), str(file.parent)])
            problems.append(
                f"{file}: {len(missing)} of {len(named)} videos not found, first {missing[0]!r} "
                f"(looked under {looked}); name their folder with --video-root"
            )
    return found


def _named(file: Path, problems: list[str], allow_outside: bool) -> list[Named]:
    """Return what a file names, each once and in order."""
    named: set[Named] = set()
    wrong: list[str] = []
    for where, data in rows_of(file, wrong):
        try:
            row = parse_row(data, where, allow_outside=allow_outside, media_only=True)
        except UserError as error:
            wrong.append(str(error))
            continue
        named |= {Named(medium, row.start, row.end) for medium in row.media}
    problems += wrong[:MOST_PROBLEMS]
    if len(wrong) > MOST_PROBLEMS:
        problems.append(f"{file}: and {len(wrong) - MOST_PROBLEMS} more like these")
    if not named and not wrong:
        problems.append(f"{file}: names no media")
    return sorted(named, key=str)


def _places(medium: str, folders: Sequence[Path]) -> dict[str, Path]:
    """Return where a medium is, by its real path: under the roots, else beside its file, the last."""
    *roots, beside = [folder / medium for folder in folders]
    there = [path for path in roots if _is_source(path)] or [beside] * _is_source(beside)
    return {os.path.realpath(path): path for path in there[::-1]}


def _is_source(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and bool(picture_files(path)))
