"""Read the frames of a planned clip from a file, a folder of pictures or an archive.

    with SourceReader(DecodeChild(), bank) as reader:
        outcome = reader.read(source, request)

It never raises for a clip: an `Outcome` holds the clip, or the error that goes into the quarantine.
It raises OSError where the machine fails (the disk that videos are unpacked to is full, no process can
be started) and `ChildBug` for a bug.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Generic, TypeVar

import numpy as np

from preprocess.decode.archive import Unpacker
from preprocess.decode.decode_child import TOGETHER, DecodeChild
from preprocess.decode.events import Begin, Clip, ClipFacts, Event, NoFacts, collect
from preprocess.decode.read_pictures import picture_files
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from preprocess.decode.verdict import explained, refuse_encrypted
from shards.format.plan import ClipSource
from shards.format.quarantine import Reason
from shards.signed import digest

HEAD_TAIL = 64 * 1024
"""Bytes hashed at each end of a source; a hash of all would read every video once more."""
ATTEMPTS = 2
"""Reads of a clip whose decoder stalled or crashed: the machine may be at fault rather than the file."""


Taken = TypeVar("Taken", bound=ClipFacts, covariant=True)


@dataclass(frozen=True)
class Outcome(Generic[Taken]):
    """The result of reading a clip."""

    clip: Taken | None
    """`Clip`, or `ClipFacts` of a clip that was read event by event; None where reading failed."""
    size: int
    """Bytes of the source."""
    digest: str
    """Of the source's size, first and last 64 KiB."""
    error: VideoError | None
    attempts: int
    seconds: float


class SourceReader(ExitStack):
    """Reads planned clips through one decode child, which it closes."""

    def __init__(self, child: DecodeChild, place: Path | Unpacker) -> None:
        """place: a folder on the disk that a video from an archive is unpacked to while it is read; or
        an Unpacker that several readers share."""
        super().__init__()
        self.child = self.enter_context(child)
        if not isinstance(place, Unpacker):
            place = self.enter_context(Unpacker(place))
        self._unpacker = place
        self._member = self.enter_context(ExitStack())
        self._unpacked: tuple[tuple[str, int | None], Path] | None = None

    def read(self, source: ClipSource, request: ReadRequest) -> Outcome[Clip]:
        """Return a clip with all its frames; tries once more in a new child after a stall or crash."""
        seen: list[Outcome[ClipFacts]] = []

        def events() -> Iterator[Event]:
            for event in self.events(source, request, TOGETHER):
                if isinstance(event, Outcome):
                    seen.append(event)
                    if event.clip is not None:
                        yield event.clip
                else:
                    yield event

        try:
            clip = collect(events())
        except NoFacts:
            clip = None
        (outcome,) = seen
        return Outcome(**vars(outcome) | {"clip": clip})

    def events(
        self, source: ClipSource, request: ReadRequest, together: int
    ) -> Iterator[Begin | np.ndarray | Outcome[ClipFacts]]:
        """Yield a clip's frames, `together` at a time, and its Outcome last.

        They start over, with a new `Begin`, in a new child if the first one stalled or crashed.
        """
        seconds, attempts = 0.0, 0
        facts, size, hash_, error = None, 0, "", None
        # a damaged file fails the same way each time; a stall or a crash may be the machine's
        while attempts < ATTEMPTS and facts is None and (error is None or error.retryable):
            attempts += 1
            began = time.monotonic()
            try:
                path = self._path(source)
                for event in self._named(source, replace(request, path=path), together):
                    if isinstance(event, ClipFacts):
                        facts = event
                        continue
                    seconds += time.monotonic() - began
                    yield event
                    began = time.monotonic()  # leave out the time that the caller took
                size, hash_ = _identity(source, path)
            except VideoError as failure:
                facts, error = None, failure
            seconds += time.monotonic() - began
        yield Outcome(facts, size, hash_, None if facts else error, attempts, seconds)

    def _named(self, source: ClipSource, request: ReadRequest, together: int) -> Iterator[Event]:
        """Yield the child's events; errors say what kind of file it is, and name an archive's member."""
        try:
            # Before decoding: decoders return pictures of encrypted samples without an error.
            refuse_encrypted(request.path)
            yield from self.child.events(request, together)
        except VideoError as error:
            better = explained(error, request.path)
            if source.offset is None:
                raise better from None
            reason, what, got, expected, _, fix = better.args
            # the path of the unpacked copy says nothing to the user: the archive and its member do
            raise VideoError(reason, what, got, expected, source.where, fix) from None

    def unpack_ahead(self, source: ClipSource) -> None:
        """Unpack a member of an archive before it is read; errors are left to the reading."""
        with suppress(VideoError):
            self._path(source)

    def _path(self, source: ClipSource) -> Path:
        """Return the path of a source's bytes; a member of an archive is kept for its next part."""
        if source.offset is None:
            return Path(source.path)
        assert source.nbytes is not None
        place = source.path, source.offset
        # parts of one member follow each other: it stays unpacked for the next
        if self._unpacked is None or self._unpacked[0] != place:
            self._unpacked = None
            self._member.close()
            unpacked = self._unpacker.unpacked(Path(source.path), source.offset, source.nbytes)
            self._unpacked = place, self._member.enter_context(unpacked)
        return self._unpacked[1]


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
    # the size is hashed too: two files may share their ends
    return size, digest(str(size).encode() + head + file.read(min(size, HEAD_TAIL)))
