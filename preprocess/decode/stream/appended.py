"""Find out whether a second file was appended to a file whose readers stop at the end of the first.

is_appended(path, container.format.name)
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")


class Box(NamedTuple):
    """A part of an MP4 or QuickTime file (ISO/IEC 14496-12, 4.2)."""

    name: bytes
    begin: int
    end: int
    """As announced: a file that is cut short ends before."""


def is_appended(path: Path, container: str) -> bool:
    """Return whether a second file begins within an MP4, QuickTime, ASF or FLV file.

    container: FFmpeg's name of the format. False for others, which readers read to the end.
    """
    with open(path, "rb") as file:
        if container.startswith("mov,mp4"):
            names = [box.name for box in boxes(file)]
            after = names[names.index(b"moov") + 1 :] if b"moov" in names else []
            return b"moov" in after or b"ftyp" in after  # the index comes once, the type before it
        if container == "asf":
            return _has_second_header_asf(file)
        return container == "flv" and _has_second_header_flv(file)


def boxes(file: IO[bytes]) -> Iterator[Box]:
    """Yield the boxes of an MP4 or QuickTime file, one after the other."""
    size, begin = file.seek(0, os.SEEK_END), 0
    while begin + 8 <= size:
        file.seek(begin)
        head = file.read(16)
        length = int.from_bytes(head[:4])
        # a box of more than 4 GiB: its length is in the 8 bytes that follow
        if length == 1:
            length = int.from_bytes(head[8:])
        elif length == 0:  # to the file's end
            length = size - begin
        if length < 8:
            return
        yield Box(head[4:8], begin, begin + length)
        begin += length


def _has_second_header_asf(file: IO[bytes]) -> bool:
    """Return whether a second header follows the first one's data (ASF specification, 2.1)."""
    at = 0
    while len(head := file.read(24)) == 24:
        if at and head.startswith(ASF_HEADER):
            return True
        length = int.from_bytes(head[16:], "little")
        if length < 24:  # a broadcast, whose length is not known when its header is written
            return False
        at = file.seek(at + length)
    return False


def _has_second_header_flv(file: IO[bytes]) -> bool:
    """Return whether a second header follows a tag (FLV specification 10.1, E.2 to E.4)."""
    at = 9
    file.seek(at)
    while len(head := file.read(15)) == 15:  # the size of the tag before, type, size, time, stream
        if head[4:7] == b"FLV":
            return True
        if head[4] & 0x1F not in (8, 9, 18):  # sound, picture, script
            return False
        at = file.seek(at + 15 + int.from_bytes(head[5:8]))
    return False
