"""The readers: frames of a scanned file, by decord, by PyAV with seek, by PyAV from the start.

Each hands every picture to the canvas as it comes (uint8 `(height, width, 3)`, RGB, as displayed) and
keeps what that makes of it: frames resized there never lie side by side at their native size.
"""

import functools
import importlib.metadata
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from preprocess.packets import Scan, VideoError, opened

DECORD_BATCH_BYTES = 8 << 20
"""Frames that decord returns together: fewer pages to fault in than all at once."""
DECORD_KEPT_BYTES = 128 << 20
"""Frames kept at their native size until the reader is closed: while it is open and not asked,
decord decodes ahead, for nobody (a fifth of all CPU seconds at 64 frames)."""
# What FFmpeg writes at level "info" about a file that is well.
BENIGN = re.compile(
    rb"\s*$|\[swscaler @ \w+\] deprecated pixel format|\[NULL @ \w+\] Failed to parse extradata"
)
# Containers that give each packet its pts.
TRUE_PTS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")


@dataclass(frozen=True)
class Canvas:
    """What is done to each picture, and where all of them come to lie."""

    shape: Callable[[np.ndarray], np.ndarray] = lambda picture: picture
    allocate: Callable[[tuple[int, ...]], np.ndarray] = lambda shape: np.empty(shape, np.uint8)

    def gather(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return shaped pictures as one array."""
        return np.stack(pictures, out=self.allocate((len(pictures), *pictures[0].shape)))


class Distrust(Exception):
    """This reader may be wrong about this file: take the next."""


@functools.cache
def decord_trouble() -> str | None:
    """Say why decord cannot be used, None where it can.

    decord2 and eva-decord install a module of the same name, in which other files read wrong.
    """
    owners = sorted(set(importlib.metadata.packages_distributions().get("decord", [])))
    if not owners:
        return "decord is not installed"
    if owners != ["decord"]:
        return f"the module decord comes from {', '.join(owners)}, which was not measured"
    return None


def picture(frame: Any, scan: Scan) -> np.ndarray:
    """Return uint8 `(height, width, 3)` as displayed; a stream that changes size keeps its first."""
    rgb = frame.to_ndarray(format="rgb24", width=scan.width, height=scan.height)
    return np.rot90(rgb, round(scan.rotation / 90))


def read_decord(scan: Scan, index: Sequence[int], canvas: Canvas, forced: bool) -> np.ndarray:
    """Return uint8 `(frames, height, width, 3)` of the shown frames `index`, rising."""
    import decord
    from decord._ffi.base import DECORDError, DECORDLimitReachedError

    said_before = _stderr_size()
    if said_before is not None:
        decord.logging.set_level(decord.logging.INFO)  # its FFmpeg tells of concealed damage there
    pictures: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    try:
        reader = decord.VideoReader(str(scan.path.absolute()), num_threads=1, fault_tol=1)
        if len(reader) != len(scan.pts) and not forced:
            raise Distrust(f"decord counts {len(reader)} frames, the packets {len(scan.pts)}")
        step = max(1, DECORD_BATCH_BYTES // (scan.height * scan.width * 3))
        for first in range(0, len(index), step):
            frames = reader.get_batch(index[first : first + step]).asnumpy()
            if frames.shape[1:3] != scan.display_size:
                raise Distrust(f"decord gives {frames.shape[1:3]}, not {scan.display_size}")
            kept += list(frames)
            if len(kept) * frames[0].nbytes > DECORD_KEPT_BYTES:
                pictures += map(canvas.shape, kept)
                kept = []
    except (DECORDError, DECORDLimitReachedError, RuntimeError, IndexError) as error:
        raise Distrust(f"decord: {str(error).splitlines()[0]}") from None
    finally:
        reader = None  # left open it goes on decoding, for nobody
    if said_before is not None and not forced and _complaint(said_before):
        raise Distrust("FFmpeg complained while decord was reading")
    return canvas.gather([*pictures, *map(canvas.shape, kept)])


def _stderr_size() -> int | None:
    """Return the bytes written to stderr where it is a file, as in a decode child; else None."""
    status = os.fstat(2)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _complaint(begin: int) -> bool:
    """Whether FFmpeg wrote of damage to stderr since: decord itself conceals it in silence."""
    try:
        said = os.pread(2, 1 << 16, begin)
    except OSError:  # a file opened for writing only
        return _stderr_size() != begin
    return any(not BENIGN.match(line) for line in said.split(b"\n"))


def _av_errors() -> int:
    """Return how many errors PyAV's FFmpeg has reported so far; not all of them mark a frame."""
    from av import logging

    logging.set_level(logging.PANIC)  # errors are counted, and printed nowhere
    return int(logging.get_last_error()[0])


def read_seek(scan: Scan, index: Sequence[int], canvas: Canvas) -> np.ndarray:
    """Return what `read_decord` does: from the keyframe before a frame up to its exact pts."""
    import av

    pictures = []
    position = entry = None
    with opened(scan.path, scan.stream) as (container, stream):
        errors = _av_errors()
        for wanted in (scan.pts[i] for i in index):
            key = scan.key_pts[bisect_right(scan.key_pts, wanted) - 1]
            try:
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
            if position != wanted:
                raise Distrust(f"the seek for pts {wanted} gave pts {position}")
            pictures.append(canvas.shape(picture(frame, scan)))
    return canvas.gather(pictures)


def decode_all(
    scan: Scan, keep: frozenset[int], canvas: Canvas
) -> tuple[Scan, list[int], dict[int, np.ndarray]]:
    """Decode the whole file, counting the frames as they come.

    Returns them as a scan, the count of each frame of the scan, and the pictures of the counts in
    `keep`.
    """
    import av

    pts: list[int | None] = []
    pictures: dict[int, np.ndarray] = {}
    damaged = False
    duration = None
    with opened(scan.path, scan.stream) as (container, stream):
        packets = container.demux(stream)
        errors = _av_errors()
        ended = False
        while not ended:
            try:
                packet = next(packets, None)
                ended = packet is None or not packet.size
                frames = stream.decode(packet)
            except av.error.EOFError:
                break
            except av.error.FFmpegError:
                damaged = True
                continue
            if frames and not pts and "first_not_key" in scan.flags:
                errors = _av_errors()  # what precedes the first keyframe cannot be decoded
            for frame in frames:
                damaged |= frame.is_corrupt
                if len(pts) in keep:
                    pictures[len(pts)] = canvas.shape(picture(frame, scan))
                pts.append(frame.pts)
                duration = frame.duration
        damaged |= _av_errors() != errors
    if not pts:
        raise VideoError("decode-failed", f"{scan.path}: no frame can be decoded; encode it again")
    last_duration = duration or scan.last_duration
    known = [value for value in pts if value is not None]
    if len(known) < len(pts):
        known = [i * last_duration for i in range(len(pts))]
    order = list(range(len(known)))
    if scan.container in TRUE_PTS:
        order.sort(key=known.__getitem__)
    # Elsewhere frames come in the order of display, with pts that FFmpeg guessed (AVI, ASF).
    flags = set(scan.flags) | ({"damaged"} if damaged else set())
    came = replace(
        scan,
        pts=tuple(sorted(known)),
        last_duration=last_duration,
        promised_frames=max(scan.promised_frames, len(scan.pts)),
        flags=tuple(sorted(flags)),
    )
    return came, order, pictures
