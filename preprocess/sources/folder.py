"""List a folder: its clips, and every other file with the reason why it is not a clip.

    in_folder(Path("videos"), follow_links=False)      # ([clips], [skips])

A clip is a video or an animation by its suffix (by its content where it has none, or an ambiguous one),
and each folder that contains nothing but pictures. Files that operating systems leave behind
(`Thumbs.db`, `._a.mp4`, `__MACOSX/`) do not count. Links to files are read as files; links to folders are
followed on request.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from preprocess.decode.read_pictures import PICTURE_SUFFIXES
from preprocess.sources.skips import Skip, Why
from shards.annotations.files import SUFFIXES, suffix_of
from shards.kinds import HEAD, is_text, kind_of

VIDEO_SUFFIXES = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".qt", ".mj2", ".3gp", ".3g2", ".f4v", ".ismv", ".cmfv"),
        *(".mkv", ".mk3d", ".webm", ".avi", ".divx", ".xvid"),
        *(
            ".mpg",
            ".mpeg",
            ".mpe",
            ".mpv",
            ".m1v",
            ".m2v",
            ".m2p",
            ".mpeg2",
            ".mp2v",
            ".vob",
            ".evo",
            ".vro",
        ),
        *(".ts", ".mts", ".m2ts", ".m2t", ".trp", ".tp", ".dav"),
        *(".flv", ".wmv", ".asf", ".dvr-ms", ".wtv", ".ogv", ".ogm", ".rm", ".rmvb"),
        *(
            ".mxf",
            ".gxf",
            ".dv",
            ".dif",
            ".y4m",
            ".ivf",
            ".nut",
            ".nsv",
            ".amv",
            ".bik",
            ".smk",
            ".roq",
        ),
        *(".h264", ".264", ".avc", ".h265", ".265", ".hevc", ".h263", ".obu", ".av1"),
        *(".mjpg", ".mjpeg", ".mve", ".fli", ".flc"),
    )
)
"""Suffixes of files that FFmpeg reads as video."""
MAYBE_ANIMATED = frozenset((".webp", ".png", ".avif", ".heic", ".heif"))
PICTURE_HEAD = 1 << 14
"""Bytes read of a picture: the chunk that marks an animation is near the start."""
TEXT_TOO = frozenset((".ts", ".mts"))
"""Also suffixes of TypeScript: a text file is not a clip."""
DATA_TOO = frozenset((".dat", ".mod", ".tod", ".ps", ".ogg"))
"""Also suffixes of data, music and print: a file that does not begin as a video is not a clip."""
UNSURE = TEXT_TOO | DATA_TOO
CLIP_SUFFIXES = VIDEO_SUFFIXES | DATA_TOO | {".gif", ".apng"}
"""Suffixes that make a file in a folder a clip."""
BY_CONTENT = MAYBE_ANIMATED | UNSURE | {""}
"""Suffixes that leave open what a file is."""
ARCHIVE_SUFFIXES = frozenset(
    (
        *(".tar", ".tgz", ".txz", ".tbz2", ".tbz", ".tzst"),
        *(".gz", ".xz", ".bz2", ".zst", ".zip", ".7z", ".rar"),
    )
)
JUNK = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r", ".ds_store"))
JUNK_FOLDERS = frozenset(("__macosx", "@eadir", "$recycle.bin", "system volume information"))


class Contents(NamedTuple):
    """The clips and the skips of a folder."""

    clips: list[str]
    """POSIX paths below the root; `.` is the root itself, a folder of pictures."""
    skips: list[Skip]


def in_folder(root: Path, follow_links: bool) -> Contents:
    """Return the clips below a folder, and a skip for everything else in it."""
    found = Contents([], [])
    for folder, entries in _walk(root, follow_links, found.skips):
        in_junk = any(part.lower() in JUNK_FOLDERS for part in folder.relative_to(root).parts)
        for name, parts in _clips_in(folder, entries, in_junk, found.skips):
            relative = (folder / name).relative_to(root).as_posix()
            if is_utf8(relative):
                found.clips.append(relative)
            else:
                found.skips.extend(Skip(Why.NAME, str(part)) for part in parts)
    return found


# -- walking


class _Entries(NamedTuple):
    """The names in one folder."""

    files: list[str]
    folders: list[str]


def _walk(root: Path, follow_links: bool, skips: list[Skip]) -> Iterator[tuple[Path, _Entries]]:
    """Yield each folder that can be entered, in order of path; adds special files to `skips`."""
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        try:
            with os.scandir(folder) as scanned:
                # sorted, because disks list names in any order, and skips are shown in this one
                entries = sorted(scanned, key=lambda entry: entry.name)
            facts = os.stat(folder)
        except OSError as error:
            skips.append(Skip(Why.FOLDER, str(folder), error.strerror or ""))
            continue
        # Device and inode of the folders above: a link to one of them would be followed for ever.
        here = above | {(facts.st_dev, facts.st_ino)}
        found = _Entries([], [])
        for entry in entries:
            kind = _entry_kind(entry, here, follow_links)
            if isinstance(kind, Why):
                skips.append(Skip(kind, str(folder / entry.name)))
            else:
                (found.folders if kind == "folder" else found.files).append(entry.name)
        yield folder, found
        # reversed: the stack gives the last one first
        waiting += [(folder / name, here) for name in reversed(found.folders)]


def _entry_kind(
    entry: "os.DirEntry[str]", above: frozenset[tuple[int, int]], follow_links: bool
) -> Why | str:
    """Return `file` or `folder`, or why an entry is neither. Only links need a stat of their own."""
    if not entry.is_symlink():
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        return "file" if entry.is_file(follow_symlinks=False) else Why.SPECIAL
    try:
        facts = entry.stat()
    except OSError:  # its target is missing, circular, or not permitted
        return Why.DEAD_LINK
    if stat.S_ISREG(facts.st_mode):
        return "file"
    if not stat.S_ISDIR(facts.st_mode):
        return Why.SPECIAL
    if (facts.st_dev, facts.st_ino) in above:
        return Why.LOOP
    return "folder" if follow_links else Why.LINK


# -- what a file is


def _clips_in(
    folder: Path, entries: _Entries, in_junk: bool, skips: list[Skip]
) -> Iterator[tuple[str, Sequence[Path]]]:
    """Yield the names of a folder's clips, `.` for itself, with their files; adds the rest to `skips`."""
    pictures, alone = [], True
    for name in entries.files:
        path = folder / name
        why = Why.SYSTEM if in_junk or is_junk(name) else why_no_clip(path)
        if why is Why.PICTURE:
            pictures.append(path)
            continue
        alone &= why is Why.SYSTEM
        if why is None:
            yield name, [path]
        else:
            skips.append(Skip(why, str(path)))
    # beside other files pictures may be thumbnails or covers: nothing is guessed
    if pictures and alone and all(name.lower() in JUNK_FOLDERS for name in entries.folders):
        yield ".", pictures
    else:
        skips += [Skip(Why.PICTURE, str(path)) for path in pictures]


def is_junk(name: str) -> bool:
    """Return whether operating systems create files of that name; `.a.mp4` may be a user's."""
    small = name.lower()
    hidden = name.startswith(".") and PurePosixPath(small).suffix not in CLIP_SUFFIXES
    return small in JUNK or small.startswith("._") or hidden


def why_no_clip(path: Path) -> Why | None:
    """Return why a file in a folder is not a clip by itself; None if it is one."""
    ending = path.suffix.lower()
    if ending in BY_CONTENT:
        try:
            few = PICTURE_HEAD if ending in MAYBE_ANIMATED else HEAD
            return why_by_content(ending, head_of(path, few))
        except OSError:
            if ending in CLIP_SUFFIXES:
                return None  # it should be a clip: the quarantine will say why it cannot be read
            return Why.FILE if not ending else Why.PICTURE
    if ending in CLIP_SUFFIXES:
        return None
    if ending in PICTURE_SUFFIXES:
        return Why.PICTURE
    if suffix_of(path) in SUFFIXES:
        return Why.ANNOTATIONS
    return Why.ARCHIVE if ending in ARCHIVE_SUFFIXES else Why.UNKNOWN


def why_by_content(ending: str, head: bytes) -> Why | None:
    kind = kind_of(head)
    family = kind.family if kind else "none"
    if ending in MAYBE_ANIMATED:
        return None if family == "animation" else Why.PICTURE
    if ending in TEXT_TOO:
        return Why.UNKNOWN if is_text(head) else None
    if not ending and family == "archive":
        return Why.ARCHIVE
    return None if family in ("video", "animation") else Why.UNKNOWN


def head_of(path: Path, nbytes: int = HEAD) -> bytes:
    with open(path, "rb") as file:
        return file.read(nbytes)


def is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
