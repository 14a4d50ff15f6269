"""Annotation files -> the media they name, resolved against folders.

Files are read as training reads them (`shards.annotations`); this module searches for their media. A
file may come from a stranger, so a path that leads out of its root is refused unless allowed. Every row
is refused, counted as skipped, or names a clip.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from unicodedata import normalize

from preprocess.decode.read_pictures import picture_files
from preprocess.sources.skips import Skip, Why
from shards.annotations.fault import RowError
from shards.annotations.files import annotation_files
from shards.annotations.records import parse_row, rows_of
from shards.errors import UserError
from shards.text import some

MOST_PROBLEMS = 30
"""Problems of one file that are listed."""
NAMED = 3
"""Missing videos that are listed."""


@dataclass(frozen=True)
class Lookup:
    """How to search for the media of annotation files."""

    video_roots: tuple[str, ...] = ()
    allow_outside: bool = False
    """Annotation files may name videos by absolute paths, or by `..`."""
    missing: str = "refuse"
    """refuse, or drop: rows whose videos are not found."""
    on_bad_record: str = "refuse"
    """refuse, or drop: rows that are damaged, or name paths that are not allowed."""


class Named(NamedTuple):
    """A medium as an annotation file names it, or a part of it."""

    medium: str
    start: float | None
    end: float | None


@dataclass
class Media:
    """The media that annotation files name."""

    clips: list[tuple[Path, str, float | None, float | None]] = field(default_factory=list)
    """(file, path under its root, start, end)."""
    skips: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def annotated_media(path: Path, lookup: Lookup, problems: list[str]) -> Media:
    """Return the clips that annotation files name, and the rows that are left out.

    path: a file, or a folder of files of one kind. A line for each row or medium that cannot be read,
    is not found, or is not allowed is added to `problems`, unless it is to be dropped.
    """
    found = Media()
    try:
        files = annotation_files(path)
    except UserError as error:
        problems.append(str(error))
        return found
    for file in files:
        _look_for(file, lookup, found, problems)
    return found


def _look_for(file: Path, lookup: Lookup, found: Media, problems: list[str]) -> None:
    """Add the clips, skips and notes of one file to `found`."""
    places: dict[str, Path | None] = {}
    named: dict[Named, Path] = {}
    missing: set[Named] = set()
    folders = [*map(Path, lookup.video_roots), file.parent]
    for where, names in _named(file, lookup, found, problems):
        for name in names:
            # thousands of rows may name one video: each is looked up once
            if name.medium not in places:
                places[name.medium] = _place(file, name.medium, folders, problems)
            place = places[name.medium]
            if place:
                named[name] = place
            else:
                missing.add(name)
        lost = [name.medium for name in names if name in missing]
        if lost and lookup.missing == "drop":
            found.skips.append(Skip(Why.MISSING, where, some(lost)))
    # sorted: the plan must not depend on the order of rows
    for name in sorted(named, key=str):
        relative = Path(name.medium).as_posix()
        found.clips.append((named[name], relative, name.start, name.end))
    if missing and lookup.missing != "drop":
        first = some([repr(medium) for medium in sorted({name.medium for name in missing})], NAMED)
        problems.append(
            f"{file}: {len(missing)} of {len(missing) + len(named)} videos not found, first {first} "
            f"(looked under {', '.join(map(str, folders))}); name their folder with --video-root, or "
            "leave their rows out: --missing drop"
        )
    found.notes += _notes_of_form(file, places)


def _named(
    file: Path, lookup: Lookup, found: Media, problems: list[str]
) -> Iterator[tuple[str, list[Named]]]:
    """Yield the place in the file and the media of each row that names some."""
    wrong: list[str] = []
    any_named = False
    for where, data in rows_of(file, wrong):
        try:
            row = parse_row(data, where, allow_outside=lookup.allow_outside, media_only=True)
        except RowError as error:
            if lookup.on_bad_record == "drop":
                found.skips.append(Skip(Why.BAD_ROW, where, str(error)))
            else:
                wrong.append(str(error))
            continue
        if row.media:
            any_named = True
            yield where, [Named(medium, row.start, row.end) for medium in row.media]
        else:
            found.skips.append(Skip(Why.NO_MEDIA, where))
    problems += wrong[:MOST_PROBLEMS]
    if len(wrong) > MOST_PROBLEMS:
        problems.append(f"{file}: and {len(wrong) - MOST_PROBLEMS} more like these")
    if not any_named and not wrong:
        problems.append(f"{file}: names no media")


def _place(file: Path, medium: str, folders: Sequence[Path], problems: list[str]) -> Path | None:
    """Return the path of a medium: under the roots, else beside its file, which is the last folder."""
    *roots, beside = [_reached(folder, medium) for folder in folders]
    # beside its file only if no root has it: a root is what the user has named
    there = [path for path in roots if _is_source(path)] or [beside] * _is_source(beside)
    # by real paths: two roots that lead to one file are no contradiction
    places = {os.path.realpath(path): path for path in there[::-1]}
    if len(places) > 1:
        problems.append(
            f"{file}: {medium!a} is under several roots, as {' and '.join(sorted(places))}; name one "
            "of them with --video-root"
        )
    return there[0] if there else None


def _reached(folder: Path, medium: str) -> Path:
    """Return the path of a medium below a folder; in another Unicode form if only that exists.

    HFS+ of macOS stores accents apart from their letters (NFD); most others keep what is written (NFC).
    """
    # ASCII has one form, and a name that is there needs no search
    if medium.isascii() or os.path.lexists(folder / medium):
        return folder / medium
    here = folder
    for part in PurePosixPath(medium).parts:
        forms = (part, normalize("NFC", part), normalize("NFD", part))
        here = next((here / form for form in forms if os.path.lexists(here / form)), here / part)
    return here


def _notes_of_form(file: Path, places: dict[str, Path | None]) -> list[str]:
    other = [
        medium
        for medium, path in places.items()
        if path and not medium.isascii() and not str(path).endswith(Path(medium).as_posix())
    ]
    if not other:
        return []
    return [
        f"note: {file} writes {len(other)} names in another Unicode form (NFC, NFD) than the disk, first "
        f"{some([repr(name) for name in other], NAMED)}; their ids are as the file has them"
    ]


def _is_source(path: Path) -> bool:
    try:
        return path.is_file() or (path.is_dir() and bool(picture_files(path)))
    except OSError:  # no permission
        return False
