"""Inputs -> clips: files, folders, archives and annotation files, each clip once."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from preprocess.decode.archive import archive_members, is_archive
from preprocess.decode.read_pictures import PICTURE_FPS, PICTURE_SUFFIXES
from preprocess.sources.annotations import annotated_media, holds_annotations
from shards.annotations.files import is_hub_name, local_copy
from shards.errors import UserError
from shards.format.plan import ClipSource
from shards.format.samples import clip_id, sample_key

VIDEO_SUFFIXES = frozenset(
    [
        ".mp4",
        ".mkv",
        ".webm",
        ".avi",
        ".mov",
        ".m4v",
        ".mpg",
        ".mpeg",
        ".ts",
        ".m2ts",
        ".flv",
        ".wmv",
        ".ogv",
        ".3gp",
    ]
)
# In a folder these are clips by themselves, as videos are.
CLIP_SUFFIXES = VIDEO_SUFFIXES | {".gif", ".apng"}


def clips_under(clips: Sequence[ClipSource], roots: Sequence[str]) -> list[ClipSource]:
    """Return the clips; those whose path is gone with that of the same name under a root."""
    return [clip if Path(clip.path).exists() else _under(clip, roots) for clip in clips]


def _under(clip: ClipSource, roots: Sequence[str]) -> ClipSource:
    name = clip.relative if clip.offset is None else clip.archive
    paths = [Path(root) / name for root in roots]
    found = next((path for path in paths if path.exists()), None)
    return replace(clip, path=str(found.absolute())) if found else clip


def find_clips(
    inputs: Sequence[str],
    video_roots: Sequence[str],
    picture_fps: str = PICTURE_FPS,
    *,
    allow_outside: bool = False,
) -> list[ClipSource]:
    """Return the clips of files, folders, archives and annotation files, each once.

    A folder gives its videos and animations (.gif), at any depth, and one clip for each folder in
    which there is nothing but pictures; one without any may hold annotation files, of one kind.
    Archives are read where they are named themselves. `owner/name` that is no path is a dataset of
    the Hub, of which the annotation files are read. Raises UserError that lists every input which
    cannot be found and every pair of different files with one id. allow_outside: annotation files
    may name videos outside of their roots.
    """
    found: dict[str, ClipSource] = {}
    problems = [
        f"--video-root {root}: no such folder" for root in video_roots if not Path(root).is_dir()
    ]
    for text in inputs:
        for source in _sources(text, video_roots, problems, allow_outside):
            if Path(source.path).is_dir():
                source = replace(source, picture_fps=picture_fps)
            other = found.setdefault(source.id, source)
            same_file = os.path.realpath(other.path) == os.path.realpath(source.path)
            if not same_file or other.offset != source.offset:
                problems.append(
                    f"{source.where}: has the id {source.id!r}, as {other.where} has; encode them "
                    "from a common folder, or into two banks"
                )
    if problems:
        raise UserError.of(problems)
    return list(found.values())


def _sources(
    text: str, roots: Sequence[str], problems: list[str], allow_outside: bool
) -> list[ClipSource]:
    """Return the clips of one input."""
    path = Path(text)
    if not path.exists():
        if not is_hub_name(text) or path.suffix.lower() in CLIP_SUFFIXES | PICTURE_SUFFIXES:
            problems.append(f"{path}: no such file or folder")
            return []
        try:
            path = Path(local_copy(text))
        except UserError as error:
            problems.append(str(error))
            return []
    if path.is_dir():
        sources = _in_folder(path)
        if sources:
            return sources
        if not holds_annotations(path):
            problems.append(f"{path}: no video files in this folder")
            return []
    if holds_annotations(path):
        return [_source(*media) for media in annotated_media(path, roots, problems, allow_outside)]
    return _archived(path, problems) if is_archive(path) else [_source(path, path.name)]


def _in_folder(root: Path) -> list[ClipSource]:
    sources = []
    for folder, names, files in os.walk(root):
        names.sort()
        here = Path(folder)
        clips = [name for name in sorted(files) if Path(name).suffix.lower() in CLIP_SUFFIXES]
        sources += [_source(here / n, (here / n).relative_to(root).as_posix()) for n in clips]
        seen = [name for name in files if not name.startswith(".")]
        if seen and not names and all(Path(n).suffix.lower() in PICTURE_SUFFIXES for n in seen):
            # The folder given is named from its own folder, as a file is.
            own = os.path.basename(os.path.abspath(root))
            sources.append(
                _source(here, own if here == root else here.relative_to(root).as_posix())
            )
    return sources


def _archived(path: Path, problems: list[str]) -> list[ClipSource]:
    """Return the videos in an archive: their ids are their paths in it."""
    try:
        members = archive_members(path, CLIP_SUFFIXES)
    except UserError as error:
        problems.append(str(error))
        return []
    if not members:
        problems.append(f"{path}: no video files in this archive")
    return [
        replace(_source(path, member.name), offset=member.offset, nbytes=member.nbytes)
        for member in members
    ]


def _source(
    file: Path, relative: str, start: float | None = None, end: float | None = None
) -> ClipSource:
    id_ = clip_id(relative, start, end)
    try:
        key = sample_key(id_)
    except UnicodeEncodeError:
        raise UserError("its name is not UTF-8", where=ascii(str(file)), fix="rename it") from None
    return ClipSource(id_, key, str(file.absolute()), relative, start, end)
