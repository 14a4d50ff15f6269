"""Identify a file by its first bytes: a video, a picture, or something else under that name.

    kind_of(b"\\x1aE\\xdf\\xa3...")     # Kind("video", "a Matroska or WebM file", None)
    kind_of(b"<!doctype html>")       # Kind("none", "a web page", "the download failed, get it again")

Names mislead: a failed download is called .mp4, a video from the web has no suffix at all. The tables
list the magic numbers of file formats.
"""

import re
from typing import NamedTuple

HEAD = 1 << 16
"""Bytes that are read of a file."""
LFS = b"version https://git-lfs"
"""First bytes of the pointer that Git LFS leaves in place of a file."""


class Kind(NamedTuple):
    """The kind of a file."""

    family: str
    """video, animation, picture, sound or archive; none for everything else."""
    what: str
    fix: str | None = None
    """What to do about it, where a video was expected."""


UNPACK = "unpack it and name what is in it"
REDOWNLOAD = "the download failed, get it again"

STARTS: tuple[tuple[bytes, Kind], ...] = (
    (b"\x1a\x45\xdf\xa3", Kind("video", "a Matroska or WebM file")),
    (b"FLV\x01", Kind("video", "a Flash video")),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Kind("video", "a Windows Media file")),
    (b"\x00\x00\x01\xba", Kind("video", "an MPEG program stream")),
    (b"\x00\x00\x01\xb3", Kind("video", "an MPEG video stream")),
    (b"\x06\x0e\x2b\x34", Kind("video", "an MXF file")),
    (b"YUV4MPEG2", Kind("video", "raw video with a y4m header")),
    (b"DKIF", Kind("video", "an IVF file")),
    (b".RMF", Kind("video", "a RealMedia file")),
    (b"nut/multimedia container", Kind("video", "a NUT file")),
    (b"GIF87a", Kind("animation", "a GIF")),
    (b"GIF89a", Kind("animation", "a GIF")),
    (b"\xff\xd8\xff", Kind("picture", "a JPEG picture")),
    (b"BM", Kind("picture", "a BMP picture")),
    (b"II*\x00", Kind("picture", "a TIFF picture")),
    (b"MM\x00*", Kind("picture", "a TIFF picture")),
    (b"ID3", Kind("sound", "sound (MP3)", "it has no picture")),
    (b"fLaC", Kind("sound", "sound (FLAC)", "it has no picture")),
    (b"PK\x03\x04", Kind("archive", "a ZIP archive", UNPACK)),
    (b"PK\x05\x06", Kind("archive", "an empty ZIP archive")),
    (b"7z\xbc\xaf\x27\x1c", Kind("archive", "a 7-Zip archive", UNPACK)),
    (b"Rar!\x1a\x07", Kind("archive", "a RAR archive", UNPACK)),
    (b"\x1f\x8b", Kind("archive", "compressed with gzip", "unpack it: gunzip FILE")),
    (b"BZh", Kind("archive", "compressed with bzip2", "unpack it: bunzip2 FILE")),
    (b"\xfd7zXZ", Kind("archive", "compressed with xz", "unpack it: unxz FILE")),
    (b"\x28\xb5\x2f\xfd", Kind("archive", "compressed with zstandard", "unpack it: unzstd FILE")),
    (b"PAR1", Kind("none", "a parquet file")),
    (b"ARROW1", Kind("none", "an Arrow file")),
    (b"\xff\xff\xff\xff", Kind("none", "an Arrow stream")),
    (b"\x89HDF", Kind("none", "an HDF5 file")),
    (b"SQLite format 3", Kind("none", "an SQLite database")),
    (b"\x80", Kind("none", "a Python pickle")),
    (b"%PDF", Kind("none", "a PDF")),
    (b"\x7fELF", Kind("none", "a program")),
    (b"\xff\xfe", Kind("none", "UTF-16 text", "save it as UTF-8")),
    (b"\xfe\xff", Kind("none", "UTF-16 text", "save it as UTF-8")),
)
"""First bytes -> kind."""

MOVING_AVIF = Kind("animation", "an AVIF sequence")
MOVING_WEBP = Kind("animation", "a WebP picture")
MOVING_PNG = Kind("animation", "a PNG picture")
BRANDS = {
    **dict.fromkeys(
        (b"avif", b"heic", b"heix", b"mif1"), Kind("picture", "an AVIF or HEIC picture")
    ),
    b"avis": MOVING_AVIF,
    **dict.fromkeys((b"hevc", b"hevx", b"msf1"), Kind("animation", "a picture sequence")),
    **dict.fromkeys((b"M4A ", b"M4B "), Kind("sound", "sound (M4A)", "it has no picture")),
}
"""Brands in the `ftyp` box of an ISO file that do not mean video."""
MP4 = Kind("video", "an MP4 or QuickTime file")
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"pnot")
RIFFS = {
    b"AVI ": Kind("video", "an AVI file"),
    b"CDXA": Kind("video", "a file of a video CD"),
    b"WAVE": Kind("sound", "sound (WAV)", "it has no picture"),
}
START_CODE = re.compile(rb"\x00{2,3}\x01(?:[\x09\x67\x27\x47\x40\x42]|\x01\xb6)")
"""First bytes of a bare H.264, HEVC or MPEG-4 stream: a delimiter, or parameter sets."""


def kind_of(head: bytes) -> Kind | None:
    """Return the kind of a file by its first bytes; None for one that is in no table.

    head: the first `HEAD` bytes, or all of a shorter file.
    """
    # containers before plain starts: `BM` or 0x80 begin many files by chance, a named box does not
    for find in (_nothing, _iso, _riff, _ogg, _png, _start, _transport, _text):
        if found := find(head):
            return found
    return None


# -- finders, tried in order


def _nothing(head: bytes) -> Kind | None:
    if not head.strip():
        return Kind("none", "empty", "get it again")
    # some download tools reserve the whole file as zeros before they fetch it
    if len(head) >= 512 and not head.strip(b"\0"):
        return Kind("none", "nothing but zeros", "its download was not finished, get it again")
    return None


def _iso(head: bytes) -> Kind | None:
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], MP4)
    return MP4 if head[4:8] in BOXES else None


def _riff(head: bytes) -> Kind | None:
    if head[:4] != b"RIFF":
        return None
    if head[8:12] == b"WEBP":
        moves = (
            head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2
        )  # its flag (RFC 9649, 2.7)
        return MOVING_WEBP if moves else Kind("picture", "a WebP picture")
    return RIFFS.get(head[8:12])


def _ogg(head: bytes) -> Kind | None:
    if not head.startswith(b"OggS"):
        return None
    # an Ogg file lists all of its streams in its first pages: Theora, VP8, Dirac, or Skeleton's index
    moves = any(codec in head[:4096] for codec in (b"\x80theora", b"OVP80", b"BBCD", b"fishead"))
    return (
        Kind("video", "an Ogg file") if moves else Kind("sound", "sound (Ogg)", "it has no picture")
    )


def _png(head: bytes) -> Kind | None:
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    moves = (
        b"acTL" in head.partition(b"IDAT")[0]
    )  # an APNG has this chunk, before the first picture's data
    return MOVING_PNG if moves else Kind("picture", "a PNG picture")


def _start(head: bytes) -> Kind | None:
    if START_CODE.match(head):
        return Kind("video", "a bare video stream")
    return next((kind for start, kind in STARTS if head.startswith(start)), None)


def _transport(head: bytes) -> Kind | None:
    # Packets of 188 bytes (ISO/IEC 13818-1), 192 with a time code before each (M2TS), 204 with error
    # correction (DVB); each begins with 0x47.
    for size, skip in ((188, 0), (192, 4), (204, 0)):
        syncs = head[skip : skip + 4 * size : size]
        # 0x47 is the letter G: one proves nothing, two at a packet's distance do
        if len(syncs) >= 2 and set(syncs) == {0x47}:
            return Kind("video", "an MPEG transport stream")
    return None


def _text(head: bytes) -> Kind | None:
    if head.startswith(LFS):
        size = re.search(rb"size (\d+)", head)
        held = f" for a file of {int(size[1]):,} bytes" if size else ""
        return Kind(
            "none",
            f"a Git LFS pointer{held}, not the file",
            "run `git lfs pull` in its repository, or download it with `hf download`",
        )
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        title = re.search(rb"<title[^>]*>\s*(.*?)\s*</title", head, re.IGNORECASE | re.DOTALL)
        said = f" ({title[1][:60].decode('utf-8', 'replace')!a})" if title else ""
        return Kind("none", f"a web page{said}", REDOWNLOAD)
    if start.startswith(b"<"):
        return Kind("none", "XML", "if it is a server's error, get the file again")
    return None


LETTERS = re.compile(rb"[^\x00-\x08\x0e-\x1a\x1c-\x1f]*")


def is_text(head: bytes) -> bool:
    """Return whether a file with these first bytes is text: UTF-8 without control characters."""
    # control characters beside tab, newline, form feed and escape are in no text that people write
    if not head or not LETTERS.fullmatch(head):
        return False
    try:
        # a full head may end within a character, which has at most 4 bytes
        head[: -3 if len(head) == HEAD else None].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
