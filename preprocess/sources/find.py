"""Inputs -> clips: files, folders, archives and annotation files, each clip once.

found = find_clips(["videos/", "train.json"], FindOptions(video_roots=("videos",)))
found.clips, found.skips        # what to encode; what else was found, and why it is left out
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from preprocess.decode.archive import is_archive
from preprocess.decode.read_pictures import PICTURE_FPS, PICTURE_SUFFIXES
from preprocess.sources.annotations import Lookup, annotated_media
from preprocess.sources.folder import CLIP_SUFFIXES, head_of, in_folder, is_utf8
from preprocess.sources.members import archive_members
from preprocess.sources.skips import Skip, Why, report
from shards.annotations.files import SUFFIXES, annotation_files, is_hub_name, local_copy, suffix_of
from shards.errors import UserError
from shards.format.plan import ClipSource
from shards.format.samples import clip_id, sample_key
from shards.kinds import kind_of
from shards.storage import refuse_url


@dataclass(frozen=True)
class FindOptions(Lookup):
    """How to search inputs for clips."""

    picture_fps: str = PICTURE_FPS
    """Frames per second of folders of pictures."""
    follow_links: bool = False
    """Enter links to folders, too."""
    archive_ids: bool = False
    """Ids of archived clips begin with their archive's name, `shard.tar/key.mp4`."""


@dataclass
class Found:
    """What was found in the inputs."""

    clips: list[ClipSource] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Lines to print."""


def clips_under(clips: Sequence[ClipSource], roots: Sequence[str]) -> list[ClipSource]:
    """Return the clips; one whose path no longer exists gets that of the same name under a root."""
    return [clip if Path(clip.path).exists() else _under(clip, roots) for clip in clips]


def _under(clip: ClipSource, roots: Sequence[str]) -> ClipSource:
    name = clip.relative if clip.offset is None else clip.archive
    paths = [Path(root) / name for root in roots]
    found = next((path for path in paths if path.exists()), None)
    return replace(clip, path=str(found.absolute())) if found else clip


def find_clips(inputs: Sequence[str], options: FindOptions = FindOptions()) -> Found:
    """Return the clips of files, folders, archives and annotation files, each once, and the skips.

    A folder gives its videos and animations, at any depth, and one clip for each folder that contains
    nothing but pictures; a folder without any of these may contain annotation files, of one kind.
    Archives are read only if they are inputs themselves. `owner/name` that is not a path is a dataset
    of the Hub, whose annotation files are read. Raises UserError that lists every input which is not
    found and every pair of different files with one id.
    """
    # All problems are collected and listed at once, so that they need not be found one run at a time.
    found = Found()
    problems = [
        f"--video-root {root}: no such folder"
        for root in options.video_roots
        if not Path(root).is_dir()
    ]
    problems += [
        f"--video-root {ascii(root)[1:-1]}: its path is not UTF-8; name a link to it (ln -s)"
        for root in options.video_roots
        if not is_utf8(os.path.abspath(root))
    ]
    clips: dict[str, ClipSource] = {}
    clashes: dict[tuple[str, str, bool], list[str]] = {}
    for text in inputs:
        try:
            sources = _sources(text, options, found, problems)
        except UserError as error:
            problems.append(str(error))
            continue
        for source in sources:
            if Path(source.path).is_dir():
                source = replace(source, picture_fps=options.picture_fps)
            other = clips.setdefault(source.id, source)
            # a file that two inputs name is one clip; two files of one id would overwrite each other
            same_file = os.path.realpath(other.path) == os.path.realpath(source.path)
            if not same_file or other.offset != source.offset:
                clashes.setdefault(_place(source, other), []).append(source.id)
    problems += [_clash(*places, ids) for places, ids in clashes.items()]
    if not clips and not problems:
        problems = [f"no clips are left to encode; {line}" for line in report(found.skips)]
    if problems:
        raise UserError.of(problems)
    found.clips = list(clips.values())
    return found


# -- ids that clash


def _place(source: ClipSource, other: ClipSource) -> tuple[str, str, bool]:
    """Return two names that distinguish clips of one id, and whether they are in two archives."""
    if source.offset is None or other.offset is None:
        return source.where, other.where, False
    return source.path, other.path, True


def _clash(here: str, there: str, archived: bool, ids: Sequence[str]) -> str:
    """Return the message on ids that two sources share: WebDataset shards each number from zero."""
    same = f"{here}: has the id {ids[0]!r}, as {there} has"
    if not archived:
        return f"{same}; encode them from a common folder, or into two banks"
    more = f", and {len(ids) - 1:,} more" if len(ids) > 1 else ""
    if ids[0].startswith(f"{Path(here).name}/"):  # as --archive-ids made it, or as if
        return f"{same}{more}; name one of the archives by a link of another name (ln -s)"
    return (
        f"{same}{more}; --archive-ids makes them {Path(here).name}/{ids[0]} and so on, else encode "
        "them into two banks"
    )


# -- one input, by what it is


def _sources(
    text: str, options: FindOptions, found: Found, problems: list[str]
) -> list[ClipSource]:
    """Return the clips of one input."""
    refuse_url(text, "an input")
    path = Path(text)
    if not is_utf8(str(path.absolute())):  # PyAV accepts only UTF-8 paths
        fix = "rename it, or name a link to its folder (ln -s)"
        raise UserError("its path is not UTF-8", where=ascii(text)[1:-1], fix=fix)
    if not path.exists():
        # `clips/a.mp4` has the form of a Hub name: a missing video is said to be missing
        if not is_hub_name(text) or path.suffix.lower() in CLIP_SUFFIXES | PICTURE_SUFFIXES:
            broken = "a broken link" if path.is_symlink() else "no such file or folder"
            raise UserError(broken, where=path)
        path = Path(local_copy(text))
    if path.is_dir():
        return _of_folder(path, options, found, problems)
    if not path.is_file():
        raise UserError("a pipe, socket or device", where=path, fix="name a file or a folder")
    if suffix_of(path) in SUFFIXES:
        return _annotated(path, options, found, problems)
    if is_archive(path):
        return _archived(path, options, found)
    _refuse_other_archive(path)
    return [_source(path, path.name)]


def _of_folder(
    root: Path, options: FindOptions, found: Found, problems: list[str]
) -> list[ClipSource]:
    clips, skips = in_folder(root, options.follow_links)
    # A folder of pictures that is itself the input gets its own name as id, as a file does.
    own = os.path.basename(os.path.abspath(root))
    sources = [_source(root / name, own if name == "." else name) for name in clips]
    if sources:
        found.skips += skips
        return sources
    if not any(skip.reason is Why.ANNOTATIONS for skip in skips):
        holds = "".join(f"; {line}" for line in report(skips))
        raise UserError(f"no video files in this folder{holds}", where=root)
    read = {str(file) for file in annotation_files(root)}
    found.skips += [skip for skip in skips if skip.where not in read]
    return _annotated(root, options, found, problems)


def _annotated(
    path: Path, options: FindOptions, found: Found, problems: list[str]
) -> list[ClipSource]:
    media = annotated_media(path, options, problems)
    found.skips += media.skips
    found.notes += media.notes
    return [_source(*clip) for clip in media.clips]


def _archived(path: Path, options: FindOptions, found: Found) -> list[ClipSource]:
    """Return the clips of an archive's videos; their ids are their paths in it."""
    members, skips = archive_members(path)
    if not members:
        holds = "".join(f"; {line}" for line in report(skips))
        raise UserError(f"no video files in this archive{holds}", where=path)
    found.skips += skips
    lead = f"{path.name}/" if options.archive_ids else ""
    return [
        replace(
            _source(path, f"{lead}{member.name}"),
            relative=member.name,
            offset=member.offset,
            nbytes=member.nbytes,
        )
        for member in members
    ]


def _refuse_other_archive(path: Path) -> None:
    """Raise UserError for a file that is an archive by its content but not by its name."""
    try:
        kind = kind_of(head_of(path))
    except OSError:  # reading it fails later too, and puts it into the quarantine
        return
    if kind and kind.family == "archive":
        raise UserError(f"this is {kind.what}, not a video", where=path, fix=kind.fix)


def _source(
    file: Path, relative: str, start: float | None = None, end: float | None = None
) -> ClipSource:
    id_ = clip_id(relative, start, end)
    return ClipSource(id_, sample_key(id_), str(file.absolute()), relative, start, end)
