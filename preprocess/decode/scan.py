"""The packet scan of a video file: frame times, keyframes, and flags for what is unusual.

A scan demuxes the whole file and decodes its first frame only: 1 to 20 ms of CPU per clip, 1 to 7 % of
reading one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.decode.stream.appended import is_appended
from preprocess.decode.stream.choice import chosen, has_alpha_beside, moving
from preprocess.decode.stream.clock import Jumps
from preprocess.decode.stream.orientation import Orientation
from preprocess.decode.stream.packets import Packets, matrix_of, read_packets
from shards.errors import UserError
from shards.format.quarantine import Reason

# In others (MPEG-TS and PS, ASF, raw streams) a seek may land anywhere, or packets carry no true pts.
INDEXED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv")
SECONDS_SHORT = 1  # a video that ends more than this before its container's end is truncated


class VideoError(UserError):
    """A video that cannot be read: one line with file and fix, and the reason for the quarantine."""

    def __init__(
        self,
        reason: Reason,
        what: str,
        got: object = None,
        expected: str | None = None,
        where: object = None,
        fix: str | None = None,
    ) -> None:
        where = None if where is None else str(where)
        super().__init__(what, got, expected, where, fix)
        self.reason = Reason(reason)
        self.args = (
            self.reason,
            what,
            got,
            expected,
            where,
            fix,
        )  # pickle calls the class with these

    @property
    def retryable(self) -> bool:
        """Whether the machine may be at fault rather than the file."""
        return self.reason in (Reason.STALLED, Reason.DECODER_CRASHED)


@dataclass(frozen=True)
class Scan:
    """The result of a packet scan."""

    path: Path
    container: str
    stream: int
    """Index of FFmpeg's best video stream, which need not be the first."""
    codec: str
    width: int
    height: int
    """As the frames are coded, before they are turned for display."""
    orientation: Orientation
    time_base: Fraction
    pts: tuple[int, ...]
    """Of the frames that the file shows, sorted."""
    key_pts: tuple[int, ...]
    """Of all keyframes, hidden ones too, sorted."""
    last_duration: int
    """Of the frame shown last, in units of `time_base`."""
    packets: int
    promised_frames: int
    """Frames that the header announces; if none are, those of the announced duration at the mean rate."""
    flags: tuple[str, ...]
    jumps: Jumps = ()
    """Jumps of the file's own clock; `pts` are corrected for them."""

    @property
    def duration(self) -> Fraction:
        """Exact seconds from the first shown pts to the end of the last shown frame."""
        return (self.pts[-1] - self.pts[0] + self.last_duration) * self.time_base

    @property
    def fps(self) -> float:
        """Mean frame rate; 0 for a still picture, which has no duration."""
        return float(len(self.pts) / self.duration) if self.duration else 0.0

    @cached_property
    def seconds(self) -> np.ndarray:
        """Return float64 `(shown frames,)`: seconds from the first, each rounded once."""
        ticks = np.array(self.pts, dtype=np.int64) - self.pts[0]
        return ticks * self.time_base.numerator / self.time_base.denominator

    @property
    def display_size(self) -> tuple[int, int]:
        """(height, width) of a frame as displayed."""
        turned = self.orientation.transpose
        return (self.width, self.height) if turned else (self.height, self.width)


# -- scanning a file


def scan(path: Path) -> Scan:
    """Return the scan of a file; decodes only what its first frame needs. Raises VideoError.

    Of several video streams the first that decodes is taken, FFmpeg's best first; a flag names it.
    """
    best, decodes, others = _scan_stream(path, None)
    found = best
    # FFmpeg's best stream need not be decodable; then another one is better than none.
    for index in others:
        if decodes:
            break
        found, decodes, _ = _scan_stream(path, index)
    if not decodes:
        found = best
    if isinstance(found, VideoError):
        raise found
    flags = set(found.flags)
    if others:
        flags.add(f"stream{found.stream}")
    if found is not best:
        flags.add("best_fails")
    return replace(found, flags=tuple(sorted(flags)))


def _scan_stream(path: Path, index: int | None) -> tuple[Scan | VideoError, bool, list[int]]:
    """Return the scan of a stream, whether a frame of it could be decoded, and the other streams.

    index: of the stream in the file, None for FFmpeg's best.
    """
    with opened(path, index) as (container, stream):
        others = [other.index for other in moving(container) if other.index != stream.index]
        packets = read_packets(container, stream)
        if all(packets.hidden):
            empty = VideoError(
                Reason.NO_PACKETS,
                "the video stream is empty",
                where=path,
                fix="re-encode the video",
            )
            return empty, False, others
        # Used for packets without a duration, and for files without any times.
        rate = stream.average_rate or stream.guessed_rate or 25
        step = max(1, round(1 / (rate * stream.time_base)))
        ticks, jumps, odd_gaps = packets.clock(container, stream, step)
        order = sorted(range(len(ticks)), key=ticks.__getitem__)
        shown = [place for place in order if not packets.hidden[place]]
        last_duration = packets.durations[shown[-1]] or step
        flags = _flags(container, stream, packets, ticks, order)
        missing = Fraction(0)
        if "no_index" not in flags:
            delivered = (ticks[shown[-1]] + last_duration) * stream.time_base
            missing = _missing(container, stream, packets, delivered)
        # a GIF promises no length: its last byte, the trailer, is all that shows that it is whole
        cut_gif = container.format.name == "gif" and not _ends_with(path, b";")
        first = packets.first_frame
        also = {
            "truncated": missing > SECONDS_SHORT or cut_gif,
            "discontinuity": jumps,
            "gap": odd_gaps,
            "alpha": has_alpha_beside(stream),
            "first_lost": packets.begins_late(shown[0]),
            Reason.APPENDED.value: is_appended(path, container.format.name),
        }
        flags |= {name for name, is_set in also.items() if is_set}
        scanned = Scan(
            path=path,
            container=container.format.name,
            stream=stream.index,
            codec=stream.codec_context.codec.canonical_name,
            # the frame's own size, which need not be the header's
            width=first.width if first else stream.codec_context.width,
            height=first.height if first else stream.codec_context.height,
            orientation=_orientation(path, first),
            time_base=stream.time_base,
            pts=tuple(ticks[place] for place in shown),
            key_pts=tuple(sorted(ticks[place] for place in packets.keys)),
            last_duration=last_duration,
            packets=len(ticks),
            promised_frames=stream.frames or len(shown) + round(missing * rate),
            flags=tuple(sorted(flags)),
            jumps=jumps,
        )
        return scanned, first is not None, others


def _orientation(path: Path, frame: Any) -> Orientation:
    found = Orientation.of_matrix(matrix_of(frame))
    if found is None:
        raise VideoError(
            Reason.ODD_MATRIX,
            "its display matrix is neither a quarter turn nor a mirror image",
            where=path,
            fix="re-encode the video, turned as it should be shown",
        )
    return found


# -- what is unusual about a stream


def _flags(
    container: Any, stream: Any, packets: Packets, ticks: list[int], order: list[int]
) -> set[str]:
    """Return the flags of what is unusual about a stream. order: places of its packets, by time."""
    rank = {place: nth for nth, place in enumerate(order)}
    flags = {
        # An edit list hides packets: readers that count them return frames that are not shown.
        "discard": packets.discard,
        # Without times there is nothing by which a seek could be checked.
        "nopts": None in packets.pts,
        # The file begins within a group of pictures, whose first frames cannot be decoded.
        "first_not_key": packets.keys[:1] != [0],
        # Open groups of pictures: leading frames are decoded after a keyframe and shown before it, which
        # is where decord is one or two frames off.
        "key_order": any(rank[place] != place for place in packets.keys),
        "no_index": container.format.name not in INDEXED_CONTAINERS,
        # An AVI stores no pts, so that with B-frames FFmpeg has to guess them.
        "avi_b": container.format.name == "avi" and stream.codec_context.has_b_frames,
        # Two frames of one time: a seek cannot tell them apart.
        "dup": len(set(ticks)) < len(ticks),
        "corrupt": packets.corrupt,
        # The header announces more frames than there are packets.
        "short": stream.frames > len(ticks),
    }
    return {name for name, is_set in flags.items() if is_set}


def _missing(container: Any, stream: Any, packets: Packets, delivered: Fraction) -> Fraction:
    """Return by how many seconds the file's packets end before the duration in its header.

    delivered: the time at which the stream's last frame stops being shown, in seconds.
    """
    import av

    if stream.duration:
        promised = ((stream.start_time or 0) + stream.duration) * stream.time_base
        return max(Fraction(0), promised - delivered)
    if not container.duration:
        return Fraction(0)
    # This is the duration of the file, not of the video: compare with the longest stream, since sound may
    # outlast the picture.
    promised = Fraction(container.duration, av.time_base)
    if not container.format.name.startswith("matroska"):  # whose durations FFmpeg counts from zero
        promised += Fraction(container.start_time or 0, av.time_base)
    ends = [end * container.streams[k].time_base for k, end in packets.furthest.items()]
    return max(Fraction(0), promised - max([delivered, *ends]))


# -- opening a file


@contextmanager
def opened(path: Path, index: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Yield PyAV's container and a video stream of it (by default FFmpeg's best), with one thread."""
    import av

    if not path.is_file():
        raise VideoError(Reason.CANNOT_OPEN, "no such file", where=path, fix="check the path")
    try:
        # An absolute path is never taken for a URL; tags need not be UTF-8.
        container = av.open(str(path.absolute()), metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:
        what = "empty" if not path.stat().st_size else f"not a readable video ({error.strerror})"
        raise VideoError(
            Reason.CANNOT_OPEN, what, where=path, fix="fetch it again or remove it"
        ) from None
    with container:
        if index is not None and index >= len(container.streams):
            raise VideoError(
                Reason.DECODE_FAILED, "its streams change", where=path, fix="re-encode the video"
            )
        stream = chosen(container) if index is None else container.streams[index]
        if stream is None:
            raise VideoError(
                Reason.NO_VIDEO_STREAM, "has no video stream", where=path, fix="remove it"
            )
        # Two processes on two clips decode 1.98 times as fast as one, two FFmpeg threads on a clip 1.28.
        stream.codec_context.thread_count = 1
        try:
            yield container, stream
        except av.error.FFmpegError as error:  # one that no reader handled: still the file's fault
            raise VideoError(
                Reason.DECODE_FAILED, f"FFmpeg: {error}", where=path, fix="re-encode the video"
            ) from None


def _ends_with(path: Path, tail: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(-len(tail), os.SEEK_END)
        return file.read() == tail
