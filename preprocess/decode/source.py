"""A planned clip -> its frames, wherever it lies: a file, a folder of pictures, an archive.

    with SourceReader(DecodeChild(), bank) as reader:
        outcome = reader.read(source, sampling, pixels)

It never raises for a clip: an `Outcome` holds the clip, or the error that goes into the quarantine.
It raises OSError where the disk that videos are unpacked to is full.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from model.tower.pixels import Pixels
from preprocess.decode.archive import DISK_FULL, Unpacker
from preprocess.decode.child import DecodeChild
from preprocess.decode.clip import Clip
from preprocess.decode.read_pictures import PICTURE_FPS, picture_files
from preprocess.decode.scan import VideoError
from shards.format.features import Sampling
from shards.format.plan import ClipSource
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


class SourceReader:
    """Reads planned clips through one decode child."""

    def __init__(self, child: DecodeChild, folder: Path) -> None:
        """folder: on whose disk a video out of an archive lies while it is read."""
        self.child = child
        self._unpacker = Unpacker(folder)

    def __enter__(self) -> "SourceReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._unpacker.__exit__(kind, error, at)
        self.child.__exit__(kind, error, at)

    def read(
        self,
        source: ClipSource,
        sampling: Sampling,
        pixels: Pixels | None = None,
        *,
        decoder: str = "auto",
        allow_truncated: bool = False,
    ) -> Outcome:
        """Read a clip; once more, in a fresh child, if the first one stalled or crashed."""
        began, attempts = time.monotonic(), 0
        clip, size, hash_, error = None, 0, "", None
        while attempts < ATTEMPTS and clip is None and (error is None or error.retryable):
            attempts += 1
            try:
                clip, size, hash_ = self._read(source, sampling, pixels, decoder, allow_truncated)
            except VideoError as failure:
                error = failure
            except OSError as failure:
                if failure.errno in DISK_FULL:
                    raise
                error = VideoError("cannot-open", f"{source.path}: {failure}; check the disk")
        return Outcome(
            clip=clip,
            size=size,
            digest=hash_,
            error=None if clip else error,
            attempts=attempts,
            seconds=time.monotonic() - began,
        )

    def _read(
        self,
        source: ClipSource,
        sampling: Sampling,
        pixels: Pixels | None,
        decoder: str,
        allow_truncated: bool,
    ) -> tuple[Clip, int, str]:
        path = Path(source.path)
        with ExitStack() as stack:
            if source.offset is not None:
                assert source.nbytes is not None
                path = stack.enter_context(
                    self._unpacker.unpacked(path, source.offset, source.nbytes)
                )
            try:
                clip = self.child.read_clip(
                    path,
                    sampling,
                    start=source.start,
                    end=source.end,
                    decoder=decoder,
                    allow_truncated=allow_truncated,
                    pixels=pixels,
                    picture_fps=source.picture_fps or PICTURE_FPS,
                )
            except VideoError as error:
                # A member of an archive was read under another name.
                named = str(error).replace(str(path), source.where)
                raise VideoError(error.reason, named) from None
            return clip, *identity(path)


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
