"""List an archive: its videos, and every other member with the reason why it is not a clip.

    members, skips = archive_members(Path("0_30_s_academic_v0_1_videos_1.tar.gz"))

Tars that were concatenated are read to the last one; of two members of one name the later counts, as
when they are unpacked.
"""

import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from preprocess.decode.archive import UNREADABLE, is_zip, open_tar
from preprocess.decode.read_pictures import PICTURE_SUFFIXES
from preprocess.sources.folder import (
    BY_CONTENT,
    CLIP_SUFFIXES,
    JUNK_FOLDERS,
    is_junk,
    is_utf8,
    why_by_content,
)
from preprocess.sources.skips import Skip, Why
from shards.errors import UserError
from shards.kinds import HEAD

COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
UTF8_NAME, WITH_PASSWORD = 0x800, 0x1  # bits of a zip member's flags


@dataclass(frozen=True)
class Member:
    """A video in an archive."""

    name: str
    offset: int
    """Offset of its bytes in the uncompressed tar, or of its header in the zip."""
    nbytes: int


Entry = tuple[Member, Why | None]
"""A member that is not a folder, and why it is not a clip; None if it is one."""


def archive_members(path: Path) -> tuple[list[Member], list[Skip]]:
    """Return the videos of an archive in its order, and a skip for each other member.

    Raises UserError for a file that is cut off, damaged or not an archive.
    """
    clips: dict[str, Member] = {}
    skips: list[Skip] = []
    try:
        for member, why in _zip_entries(path) if is_zip(path) else _tar_entries(path):
            if why is None and member.name in clips:
                skips.append(_skip(Why.REPLACED, path, clips.pop(member.name)))
            if why is None:
                clips[member.name] = member
            else:
                skips.append(_skip(why, path, member))
    except UNREADABLE as error:
        raise UserError(
            f"cut off or damaged after {len(clips)} videos ({error})",
            where=path,
            fix="fetch it again",
        ) from None
    return list(clips.values()), skips


def _skip(why: Why, path: Path, member: Member) -> Skip:
    return Skip(why, f"{path}: {member.name}")


# -- tar


def _tar_entries(path: Path) -> Iterator[Entry]:
    with open_tar(path) as file:
        begin: int | None = 0
        while begin is not None:
            file.seek(begin)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if not info.isdir():
                        member = Member(_plain(info.name), info.offset_data, info.size)
                        plain = info.isreg() and not info.issparse()
                        why = None if plain else _no_file(info)
                        yield member, why or _why_no_clip(member.name, tar, info)
                begin = _next_tar(file, tar.offset)


def _no_file(info: tarfile.TarInfo) -> Why:
    if info.issparse():
        return Why.METHOD
    return Why.MEMBER_LINK if info.issym() or info.islnk() else Why.SPECIAL


def _next_tar(file: IO[bytes], end: int) -> int | None:
    """Return the offset of the next concatenated tar after the end of one; None if nothing follows.

    Raises ReadError for a damaged header, which `tarfile` treats as the end of the archive. Reads to the
    end of the file, so that the checksum of a compressed tar is checked.
    """
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {end}")
    at = end + tarfile.BLOCKSIZE
    while data := file.read(2048 * tarfile.BLOCKSIZE):
        # after its end a tar may be padded to any length; the next header begins at a whole block
        rest = data.lstrip(b"\0")
        if rest:
            zeros = len(data) - len(rest)
            return at + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        at += len(data)
    return None


# -- zip


def _zip_entries(path: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(path) as opened:
        for info in opened.infolist():
            if info.is_dir():
                continue
            member = Member(_plain(_zip_name(info)), info.header_offset, info.file_size)
            if stat.S_ISLNK(info.external_attr >> 16):
                yield member, Why.MEMBER_LINK
            elif info.flag_bits & WITH_PASSWORD:
                yield member, Why.LOCKED
            elif info.compress_type not in COMPRESSIONS:
                yield member, Why.METHOD
            else:
                yield member, _why_no_clip(member.name, opened, info)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name, as UTF-8 if its bytes are valid UTF-8, whether or not its flag is set."""
    # Many packers write UTF-8 without the flag; zipfile then decodes cp437 (PKWARE APPNOTE, D.1).
    if info.flag_bits & UTF8_NAME:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


# -- clips among the members


def _plain(name: str) -> str:
    return PurePosixPath(name).as_posix()


def _why_no_clip(name: str, archive: tarfile.TarFile | zipfile.ZipFile, info: Any) -> Why | None:
    """Return why a file in an archive is not a clip, by its content where its name leaves it open.

    archive: an open TarFile or ZipFile. info: the member in it.
    """
    path = PurePosixPath(name)
    if any(part.lower() in JUNK_FOLDERS for part in path.parts[:-1]) or is_junk(path.name):
        return Why.SYSTEM
    ending = path.suffix.lower()
    why: Why | None = None
    if ending in BY_CONTENT:
        why = why_by_content(ending, _head(archive, info))
    elif ending in PICTURE_SUFFIXES:
        why = Why.PICTURE
    elif ending not in CLIP_SUFFIXES:
        why = Why.UNKNOWN
    if why is Why.PICTURE:
        return Why.ARCHIVED_PICTURE
    if why is None and (path.is_absolute() or ".." in path.parts):
        return Why.OUTSIDE
    return Why.NAME if why is None and not is_utf8(name) else why


def _head(archive: tarfile.TarFile | zipfile.ZipFile, info: Any) -> bytes:
    if isinstance(archive, zipfile.ZipFile):
        with archive.open(info) as file:
            return file.read(HEAD)
    opened = archive.extractfile(info)
    assert opened
    return opened.read(HEAD)
