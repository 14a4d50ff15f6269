"""Say why a source cannot be read, by its own bytes: FFmpeg only says `invalid data`.

refuse_encrypted(path)          # before it is read: decoders return pictures of encrypted samples, too
explained(error, path)          # the same error; or encrypted, a web page, cut short, a pipe ...
"""

import os
import stat
from pathlib import Path
from typing import IO

from preprocess.decode.scan import VideoError
from preprocess.decode.stream.appended import boxes
from shards.format.quarantine import Reason
from shards.kinds import HEAD, MP4, Kind, is_text, kind_of

LARGEST_INDEX = 1 << 28
"""Bytes of the largest MP4 index that is searched for encryption."""
SCRAMBLED_SHARE = 2 / 3
"""A transport stream is scrambled where more than this share of its packets is."""


def refuse_encrypted(path: Path) -> None:
    """Raise VideoError for an MP4 or QuickTime file whose video is encrypted."""
    try:
        if not path.is_file():  # a pipe could be read for ever
            return
        with open(path, "rb") as file:
            if kind_of(file.read(16)) == MP4 and _is_encrypted_mp4(file):
                raise _encrypted(path)
    except OSError:  # the reader will say so
        return


def explained(error: VideoError, path: Path) -> VideoError:
    """Return a more precise error for a source that could not be read, where its bytes allow one."""
    reason, _, _, _, where, _ = error.args
    if path.is_dir():  # of pictures: the error names one of them
        path = Path(where or path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            return error if stat.S_ISDIR(mode) else _special(where)
        with open(path, "rb") as file:
            head = file.read(HEAD)
            if _is_scrambled(head) or _is_encrypted_matroska(head):
                return _encrypted(where)
            # a file that was opened is a video: its reader knows best what is wrong with it
            if reason is not Reason.CANNOT_OPEN:
                return error
            kind = kind_of(head)
            if kind == MP4:
                return _cut_short(file, where) or error
    except OSError:
        return error
    return _other_kind(kind, head, where) or error


# -- the errors


def _special(where: str) -> VideoError:
    return VideoError(
        Reason.CANNOT_OPEN, "a pipe, socket or device, not a file", where=where, fix="remove it"
    )


def _encrypted(where: object) -> VideoError:
    return VideoError(
        Reason.ENCRYPTED, Reason.ENCRYPTED.value, where=where, fix="decrypt it or leave it out"
    )


def _other_kind(kind: Kind | None, head: bytes, where: str) -> VideoError | None:
    """Return the error for a file that is neither a video nor a picture; None where it is one."""
    if kind is None and is_text(head):
        kind = Kind("none", "text")
    if kind is None or kind.family in ("video", "picture", "animation"):
        if Path(where).suffix.lower() in (".heic", ".heif"):
            what, fix = "a HEIC picture, for which Pillow needs a plugin", "pip install pillow-heif"
            return VideoError(Reason.CANNOT_OPEN, what, where=where, fix=fix)
        return None
    whole = kind.what == "empty" or kind.what.endswith("not the file")
    what = kind.what if whole else f"{kind.what}, no video or picture"
    return VideoError(Reason.CANNOT_OPEN, what, where=where, fix=kind.fix or "remove it")


def _cut_short(file: IO[bytes], where: str) -> VideoError | None:
    """Return the error for an MP4 file without its index (which is often at the end); else None."""
    size = file.seek(0, os.SEEK_END)
    found = list(boxes(file))
    if any(box.name == b"moov" for box in found):
        return None
    # a box that ends beyond the file says how long it was to be
    more = f" of at least {found[-1].end:,}" if found and found[-1].end > size else ""
    return VideoError(
        Reason.CANNOT_OPEN,
        f"cut short: it has {size:,} bytes{more}, and no index (moov)",
        where=where,
        fix="fetch it again",
    )


# -- signs of encryption in the bytes


def _is_encrypted_mp4(file: IO[bytes]) -> bool:
    """Return whether a sample description is that of encrypted video, `encv` (ISO/IEC 23001-7)."""
    for box in boxes(file):
        # bounded: a file that claims a huge index is not read into memory
        if box.name == b"moov" and box.end - box.begin < LARGEST_INDEX:
            file.seek(box.begin)
            return b"encv" in file.read(box.end - box.begin)
    return False


ENCRYPTION = (0x18538067, 0x1654AE6B, 0xAE, 0x6D80, 0x6240, 0x5035)
"""Segment, Tracks, TrackEntry, ContentEncodings, ContentEncoding, ContentEncryption (RFC 9559)."""


def _is_encrypted_matroska(head: bytes) -> bool:
    """Return whether a track of a Matroska or WebM file is marked as encrypted."""
    return head.startswith(b"\x1a\x45\xdf\xa3") and _holds(head, 0, len(head), ENCRYPTION)


def _holds(data: bytes, at: int, end: int, path: tuple[int, ...]) -> bool:
    """Return whether EBML elements are nested as the ids in `path` (RFC 8794, sections 4 to 6)."""
    # the leading zeros of an id's first byte tell its length: a zero byte begins none
    while at < end and data[at]:
        head = 9 - data[at].bit_length()  # bytes of the id
        size_at = at + head
        if size_at >= end or not data[size_at]:
            return False
        wide = 9 - data[size_at].bit_length()
        body = size_at + wide
        bits = (1 << 7 * wide) - 1
        size = int.from_bytes(data[size_at:body]) & bits
        stop = end if size == bits else min(body + size, end)  # all ones: unknown, to the end
        if int.from_bytes(data[at:size_at]) == path[0] and (
            len(path) == 1 or _holds(data, body, stop, path[1:])
        ):
            return True
        at = stop
    return False


def _is_scrambled(head: bytes) -> bool:
    """Return whether the packets of a transport stream are scrambled (ISO/IEC 13818-1, 2.4.3.3)."""
    # sizes of packets: plain, with a time code before each (M2TS), with error correction (DVB)
    for size, skip in ((188, 0), (192, 4), (204, 0)):
        packets = [head[at : at + 4] for at in range(skip, len(head) - 3, size)]
        # 0x47 begins each packet; three in a row are no chance
        if len(packets) > 2 and all(packet[0] == 0x47 for packet in packets):
            return sum(packet[3] >> 6 > 1 for packet in packets) > SCRAMBLED_SHARE * len(packets)
    return False
