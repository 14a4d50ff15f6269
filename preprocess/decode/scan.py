"""What the packets of a video file say before a frame is wanted: frame times, and what to mistrust.

A scan demuxes the whole file and decodes its first frame only: milliseconds per clip.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError

# Elsewhere (MPEG-TS and PS, ASF, raw streams) a seek lands anywhere, or packets carry no true pts.
INDEXED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv")
SECONDS_SHORT = 1  # a video that ends this much before its container says is truncated


class VideoError(UserError):
    """A video that cannot be had: `reason` is a short slug, the text one line with file and fix."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
        self.args = (reason, message)  # what pickle makes it again of

    @property
    def retryable(self) -> bool:
        """Whether the machine may be at fault rather than the file."""
        return self.reason in ("stalled", "decoder-crashed")


@dataclass(frozen=True)
class Scan:
    """What the packets of a file say, before any frame is wanted."""

    path: Path
    container: str
    stream: int
    """Index of FFmpeg's best video stream, which need not be the first."""
    codec: str
    width: int
    height: int
    """Before rotation."""
    rotation: int
    """Degrees counter-clockwise by which a frame is turned for display."""
    time_base: Fraction
    pts: tuple[int, ...]
    """Of the frames that the file shows, sorted."""
    key_pts: tuple[int, ...]
    """Of all keyframes, hidden ones too, sorted."""
    last_duration: int
    """Of the frame shown last, in units of `time_base`."""
    packets: int
    promised_frames: int
    """How many frames the container says there are; where it does not, the time it says, filled."""
    flags: tuple[str, ...]

    @property
    def duration(self) -> Fraction:
        """Exact seconds from the first shown pts to the end of the last shown frame."""
        return (self.pts[-1] - self.pts[0] + self.last_duration) * self.time_base

    @property
    def fps(self) -> float:
        """Mean frame rate; 0 for a still picture, which has no duration."""
        return float(len(self.pts) / self.duration) if self.duration else 0.0

    @property
    def seconds(self) -> np.ndarray:
        """Return float64 `(shown frames,)`: seconds from the first, each rounded once."""
        ticks = np.array(self.pts, dtype=np.int64) - self.pts[0]
        return ticks * self.time_base.numerator / self.time_base.denominator

    @property
    def display_size(self) -> tuple[int, int]:
        """(height, width) of a frame as displayed."""
        turned = round(self.rotation / 90) % 2
        return (self.width, self.height) if turned else (self.height, self.width)


def scan(path: Path) -> Scan:
    """Read all packets of a file; decode none but those that its first frame needs (rotation).

    Of several video streams it takes the first that decodes, FFmpeg's best first, and says which.
    """
    best, decodes, others = _scan_stream(path, None)
    found = best
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
    import av

    corrupt = discard = False
    pts: list[int | None] = []
    hidden: list[bool] = []
    durations: list[int] = []
    keys: list[int] = []
    furthest: dict[int, int] = {}  # per stream, the end of its last packet
    first_frame = None
    with opened(path, index) as (container, stream):
        others = [
            other.index
            for other in container.streams.video
            if other.index != stream.index and _is_moving(other)
        ]
        packets = container.demux()
        while True:
            try:
                packet = next(packets, None)
            except (av.error.FFmpegError, IndexError):  # the latter: a stream found late
                corrupt = True
                break
            if packet is None:
                break
            if packet.pts is not None:
                reach = packet.pts + (packet.duration or 0)
                furthest[packet.stream_index] = max(reach, furthest.get(packet.stream_index, reach))
            if packet.stream_index != stream.index or not packet.size:
                continue
            if packet.is_keyframe:
                keys.append(len(pts))
            pts.append(packet.pts)
            hidden.append(packet.is_discard or packet.is_corrupt)
            discard |= packet.is_discard
            durations.append(packet.duration or 0)
            corrupt |= packet.is_corrupt
            if first_frame is None:
                first_frame = _first_frame(stream, packet)
        if all(hidden):
            empty = f"{path}: the video stream is empty; encode the file again"
            return VideoError("no-packets", empty), False, others
        first_frame = first_frame or _first_frame(stream, None)
        # For a file that gives no frame duration, and one that gives no times at all.
        rate = stream.average_rate or stream.guessed_rate or 25
        step = max(1, round(1 / (rate * stream.time_base)))
        ticks = [i * step if value is None else value for i, value in enumerate(pts)]
        if None in pts:
            ticks = [i * step for i in range(len(pts))]
        order = sorted(range(len(ticks)), key=ticks.__getitem__)
        rank = {index: place for place, index in enumerate(order)}
        shown = [index for index in order if not hidden[index]]
        last = shown[-1]

        flags = {
            "discard": discard,
            "nopts": None in pts,
            "first_not_key": keys[:1] != [0],
            "key_order": any(rank[index] != index for index in keys),
            "no_index": container.format.name not in INDEXED_CONTAINERS,
            "avi_b": container.format.name == "avi" and stream.codec_context.has_b_frames,
            "dup": len(set(ticks)) < len(ticks),
            "corrupt": corrupt,
            "short": stream.frames > len(pts),
        }
        delivered = (ticks[last] + (durations[last] or step)) * stream.time_base
        promised = None
        if stream.duration:
            promised = ((stream.start_time or 0) + stream.duration) * stream.time_base
        elif container.duration:
            # The file's, not the video's: sound may outlast the picture.
            promised = Fraction(container.duration, av.time_base)
            if not container.format.name.startswith("matroska"):  # there FFmpeg counts from zero
                promised += Fraction(container.start_time or 0, av.time_base)
            delivered = max(
                [delivered]
                + [end * container.streams[index].time_base for index, end in furthest.items()]
            )
        missing = Fraction(0)
        if promised is not None and not flags["no_index"]:
            missing = max(missing, promised - delivered)
        flags["truncated"] = missing > SECONDS_SHORT or (
            container.format.name == "gif" and not _ends_with(path, b";")
        )
        scanned = Scan(
            path=path,
            container=container.format.name,
            stream=stream.index,
            codec=stream.codec_context.codec.canonical_name,
            width=first_frame.width if first_frame else stream.codec_context.width,
            height=first_frame.height if first_frame else stream.codec_context.height,
            rotation=first_frame.rotation if first_frame else 0,
            time_base=stream.time_base,
            pts=tuple(ticks[index] for index in shown),
            key_pts=tuple(sorted(ticks[index] for index in keys)),
            last_duration=durations[last] or step,
            packets=len(pts),
            promised_frames=stream.frames or len(shown) + round(missing * rate),
            flags=tuple(sorted(name for name, is_set in flags.items() if is_set)),
        )
        return scanned, first_frame is not None, others


@contextmanager
def opened(path: Path, index: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Give PyAV's container and a video stream of it (FFmpeg's best), decoded by one thread."""
    import av

    if not path.is_file():
        raise VideoError("cannot-open", f"{path}: no such file; check the path")
    try:
        # An absolute path is never taken for a URL; tags need not be UTF-8.
        container = av.open(str(path.absolute()), metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:
        what = "empty" if not path.stat().st_size else f"not a readable video ({error.strerror})"
        raise VideoError("cannot-open", f"{path}: {what}; fetch it again or remove it") from None
    with container:
        if index is not None and index >= len(container.streams):
            raise VideoError("decode-failed", f"{path}: its streams change; encode it again")
        stream = _best(container) if index is None else container.streams[index]
        if stream is None or not _is_moving(stream):
            # FFmpeg holds a cover for best where the video is small or of an unknown codec
            stream = next(filter(_is_moving, container.streams.video), None)
        if stream is None:
            raise VideoError("no-video-stream", f"{path}: has no video stream; remove it")
        stream.codec_context.thread_count = 1
        yield container, stream


def _best(container: Any) -> Any:
    try:
        return container.streams.best("video")
    except IndexError:  # a stream that PyAV had not seen when it opened the file
        return None


def _is_moving(stream: Any) -> bool:
    """Whether a video stream is no cover picture, and there is a decoder for it."""
    from av.stream import Disposition

    return stream.codec_context and not stream.disposition & Disposition.attached_pic


def _ends_with(path: Path, tail: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(-len(tail), os.SEEK_END)
        return file.read() == tail


def _first_frame(stream: Any, packet: Any) -> Any:
    import av

    try:
        return next(iter(stream.decode(packet)), None)
    except av.error.FFmpegError:
        return None
