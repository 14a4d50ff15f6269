"""A planned clip -> its frames, wherever it lies: a file, a folder of pictures, an archive.

    with SourceReader(DecodeChild(), bank) as reader:
        outcome = reader.read(source, request)

It never raises for a clip: an `Outcome` holds the clip, or the error that goes into the quarantine.
It raises OSError where the machine fails: the disk that videos are unpacked to is full, no process can
be started. It raises `ChildBug` for a bug.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from preprocess.decode.archive import Unpacker
from preprocess.decode.child import DecodeChild
from preprocess.decode.clip import Clip
from preprocess.decode.read_pictures import picture_files
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from preprocess.decode.verdict import explained, refuse_encrypted
from shards.format.plan import ClipSource
from shards.format.quarantine import Reason
from shards.signed import digest

HEAD_TAIL = 64 * 1024
ATTEMPTS = 2  # where the machine may be at fault rather than the file


@dataclass(frozen=True)
class Outcome:
    """What came of reading a clip."""

    clip: Clip | None
    size: int
    """Bytes of the source."""
    digest: str
    """Of the source's size, first and last 64 KiB."""
    error: VideoError | None
    attempts: int
    seconds: float


class SourceReader(ExitStack):
    """Reads planned clips through one decode child, which it closes."""

    def __init__(self, child: DecodeChild, folder: Path) -> None:
        """folder: on whose disk a video out of an archive lies while it is read."""
        super().__init__()
        self.child = self.enter_context(child)
        self._unpacker = self.enter_context(Unpacker(folder))

    def read(self, source: ClipSource, request: ReadRequest) -> Outcome:
        """Read a clip; once more, in a fresh child, if the first one stalled or crashed."""
        began, attempts = time.monotonic(), 0
        clip, size, hash_, error = None, 0, "", None
        while attempts < ATTEMPTS and clip is None and (error is None or error.retryable):
            attempts += 1
            try:
                clip, size, hash_ = self._read(source, request)
            except VideoError as failure:
                error = failure
        return Outcome(
            clip=clip,
            size=size,
            digest=hash_,
            error=None if clip else error,
            attempts=attempts,
            seconds=time.monotonic() - began,
        )

    def _read(self, source: ClipSource, request: ReadRequest) -> tuple[Clip, int, str]:
        if source.offset is None:
            return self._read_file(request), *_identity(source, request.path)
        assert source.nbytes is not None
        unpacked = self._unpacker.unpacked(request.path, source.offset, source.nbytes)
        with unpacked as path:
            try:
                clip = self._read_file(replace(request, path=path))
            except VideoError as error:  # names the file that the member was read from
                reason, what, got, expected, _, fix = error.args
                raise VideoError(reason, what, got, expected, source.where, fix) from None
            return clip, *_identity(source, path)

    def _read_file(self, request: ReadRequest) -> Clip:
        """Read a file or a folder; raises VideoError that says what it is, where it is no clip."""
        refuse_encrypted(request.path)
        try:
            return self.child.read_clip(request)
        except VideoError as error:
            raise explained(error, request.path) from None


def _identity(source: ClipSource, path: Path) -> tuple[int, str]:
    try:
        return identity(path)
    except OSError as error:
        raise VideoError(
            Reason.CANNOT_OPEN, str(error), where=source.path, fix="check the disk"
        ) from None


def identity(path: Path) -> tuple[int, str]:
    """Return a source's size, and a hash of its size, first and last 64 KiB.

    Of a folder of pictures: their sizes together, and a hash of their names and hashes.
    """
    if path.is_dir():
        parts = [(file.name, *identity(file)) for file in picture_files(path)]
        return sum(size for _, size, _ in parts), digest(repr(parts).encode())
    with open(path, "rb") as file:
        return identity_of(file, 0, file.seek(0, 2))


def identity_of(file: IO[bytes], offset: int, size: int) -> tuple[int, str]:
    """Return the identity of `size` bytes of an open file."""
    file.seek(offset)
    head = file.read(min(size, HEAD_TAIL))
    file.seek(offset + max(0, size - HEAD_TAIL))
    return size, digest(str(size).encode() + head + file.read(min(size, HEAD_TAIL)))
