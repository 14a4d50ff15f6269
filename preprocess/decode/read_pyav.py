"""Read frames of a scanned file by PyAV, by seeking or from the start, and check each frame's pts.

Each reader passes every picture (uint8 `(height, width, 3)`, RGB, as displayed) to `transform` as soon as
it is decoded and yields the result, so only one picture at a time is held at its native size.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from preprocess.decode.events import Distrust, Transform, over_white
from preprocess.decode.scan import Scan, VideoError, opened
from preprocess.decode.stream.choice import decoder_of, has_alpha
from preprocess.decode.stream.clock import shift_of
from shards.format.quarantine import Reason

# Containers that store the pts of each packet.
TRUE_PTS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")
KEPT_BYTES = 32 << 20
"""Bytes of pictures kept from one part of a file for later parts that also contain them."""


def picture(frame: Any, scan: Scan) -> np.ndarray:
    """Return uint8 `(height, width, 3)` as displayed; scaled if the stream changes its size."""
    clear = has_alpha(frame.format)
    size = {"width": scan.width, "height": scan.height}
    rgb = frame.to_ndarray(format="rgba" if clear else "rgb24", **size)
    return scan.orientation.apply(over_white(rgb) if clear else rgb)


def _av_errors() -> int:
    """Return how many errors FFmpeg has reported so far; not all of them set a frame's corrupt flag."""
    from av import logging

    logging.set_level(logging.PANIC)  # errors are still counted at this level, but not printed
    return int(logging.get_last_error()[0])


def read_seek(scan: Scan, index: Sequence[int], transform: Transform) -> Iterator[np.ndarray]:
    """Yield the shown frames `index` (ascending): decode from the keyframe before each to its exact pts.

    Raises Distrust where a frame of that very pts does not come, or FFmpeg reports damage on the way.
    """
    import av

    position = entry = None
    with opened(scan.path, scan.stream) as (container, stream):
        for wanted in (scan.pts[i] for i in index):
            errors = _av_errors()
            key = scan.key_pts[bisect_right(scan.key_pts, wanted) - 1]
            try:
                # Decode on from the last frame unless a later keyframe is before the wanted one: a seek
                # back to the same keyframe would decode its frames a second time.
                if position is None or key > position:
                    container.seek(key, stream=stream)
                    decoded, entry = container.decode(stream), key
                while position is None or position < wanted:
                    frame = next(decoded)
                    position = frame.pts
                    if position is None or (position >= entry and frame.is_corrupt):
                        raise Distrust(f"the frame of pts {position} on the way is damaged")
            except (av.error.FFmpegError, StopIteration):
                raise Distrust(f"no frame could be decoded for pts {wanted}") from None
            if _av_errors() != errors:
                raise Distrust(f"FFmpeg reported an error on the way to pts {wanted}")
            # A wrong seek raises nothing: only equal pts proves that this is the frame.
            if position != wanted:
                raise Distrust(f"the seek for pts {wanted} gave pts {position}")
            yield transform(picture(frame, scan))


class WholeDecode:
    """One pass over a whole file from its start, which numbers the frames as they come."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.pts: list[int | None] = []
        self._damaged = False
        self._duration: int | None = None

    def frames(self) -> Iterator[Any]:
        """Yield PyAV's frames; the pts of each is appended to `pts` before it is yielded."""
        import av

        with opened(self.scan.path, self.scan.stream) as (container, stream):
            # demuxed here, not by `container.decode`: after a damaged packet decoding
            # goes on with the next one
            packets, decoder = container.demux(stream), decoder_of(stream)
            errors = _av_errors()
            ended, count = False, 0
            while not ended:
                try:
                    packet = next(packets, None)
                    ended = packet is None or not packet.size
                    if packet is not None and packet.size:
                        if packet.pts is not None:
                            # before decoding, so that frames come with the straightened clock
                            packet.pts += shift_of(count, self.scan.jumps)
                        count += 1
                    frames = decoder.decode(packet)
                except av.error.EOFError:
                    break
                except av.error.FFmpegError:
                    self._damaged = True
                    continue
                if frames and not self.pts and "first_not_key" in self.scan.flags:
                    errors = _av_errors()  # what precedes the first keyframe cannot be decoded
                self._damaged |= _av_errors() != errors
                for frame in frames:
                    self._damaged |= frame.is_corrupt
                    self.pts.append(frame.pts)
                    self._duration = frame.duration
                    yield frame
                errors = (
                    _av_errors()
                )  # the count is global, and the consumer may have read other files
            self._damaged |= _av_errors() != errors

    def decoded(self) -> tuple[Scan, list[int]]:
        """Return a scan of the frames that were decoded, and the number of each; after the last frame."""
        scan, pts = self.scan, self.pts
        if not pts:
            raise VideoError(
                Reason.DECODE_FAILED,
                "no frame can be decoded",
                where=scan.path,
                fix="re-encode the video",
            )
        last_duration = self._duration or scan.last_duration
        known = [value for value in pts if value is not None]
        if len(known) < len(pts):
            # one frame without a time makes all times doubtful: frames are then evenly spaced
            known = [i * last_duration for i in range(len(pts))]
        order = list(range(len(known)))
        if scan.container in TRUE_PTS and not scan.jumps:
            order.sort(key=known.__getitem__)
        # In other containers (AVI, ASF) FFmpeg guesses pts, but frames come in display order.
        flags = set(scan.flags) | ({"damaged"} if self._damaged else set())
        found = replace(
            scan,
            pts=tuple(sorted(known)),
            last_duration=last_duration,
            promised_frames=max(scan.promised_frames, len(scan.pts)),
            flags=tuple(sorted(flags)),
        )
        return found, order


class WholeFile:
    """A file that can only be read from its start, from which parts are read one after another.

    Ascending parts are read in one pass; pictures that a later part also contains are kept, up to
    `KEPT_BYTES`.
    """

    def __init__(self, scan: Scan, transform: Transform) -> None:
        self.scan = scan
        self.decoded: tuple[Scan, list[int]] | None = None
        """Scan of the decoded frames and their numbers; None until the file was decoded to its end."""
        self._transform = transform
        self._kept: dict[int, np.ndarray] = {}
        self._frames: Iterator[Any] = iter(())
        self._position = 0
        """Number of the next frame."""

    def first(self, wanted: Collection[int], later: Collection[int]) -> Iterator[np.ndarray]:
        """Decode the file to its end, yielding the pictures of the frames `wanted` (numbers)."""
        decode = WholeDecode(self.scan)
        for count, frame in enumerate(decode.frames()):
            # all frames are decoded, as each is needed for the next; only some become pictures
            if count in wanted or count in later:
                resized = self._transform(picture(frame, self.scan))
                if count in later:
                    self._keep(count, resized)
                if count in wanted:
                    yield resized
        self.decoded = decode.decoded()

    def pictures(self, wanted: Sequence[int], later: Collection[int]) -> Iterator[np.ndarray]:
        """Yield the pictures of the frames `wanted` (numbers), in that order. later: frames to keep."""
        self._kept = {k: kept for k, kept in self._kept.items() if k in later or k in set(wanted)}
        waiting = set(wanted)
        for count in wanted:
            if count not in self._kept:
                self._advance(count, waiting, later)
            waiting.discard(count)
            resized = self._kept[count]
            if count not in later:
                del self._kept[count]
            yield resized

    def _advance(self, count: int, waiting: Collection[int], later: Collection[int]) -> None:
        """Decode up to a frame, and keep it."""
        # back, or not begun: a decoder can only go forwards
        if count < self._position or not self._position:
            self._frames, self._position = WholeDecode(self.scan).frames(), 0
        while self._position <= count:
            frame = next(self._frames)
            if self._position in waiting:
                self._kept[self._position] = self._transform(picture(frame, self.scan))
            elif self._position in later:
                self._keep(self._position, self._transform(picture(frame, self.scan)))
            self._position += 1

    def _keep(self, count: int, resized: np.ndarray) -> None:
        if (len(self._kept) + 1) * resized.nbytes <= KEPT_BYTES:
            self._kept[count] = resized
