"""The readers that are always right: frames of a scanned file by PyAV, with seek or from the start.

Each hands every picture to the canvas as it comes (uint8 `(height, width, 3)`, RGB, as displayed) and
keeps what that makes of it: frames resized there never lie side by side at their native size.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from preprocess.decode.canvas import Canvas, Distrust
from preprocess.decode.scan import Scan, VideoError, opened
from shards.format.quarantine import Reason

# Containers that give each packet its pts.
TRUE_PTS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")


def picture(frame: Any, scan: Scan) -> np.ndarray:
    """Return uint8 `(height, width, 3)` as displayed; a stream that changes size keeps its first."""
    rgb = frame.to_ndarray(format="rgb24", width=scan.width, height=scan.height)
    return np.rot90(rgb, round(scan.rotation / 90))


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
        raise VideoError(
            Reason.DECODE_FAILED, "no frame can be decoded", where=scan.path, fix="encode it again"
        )
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
