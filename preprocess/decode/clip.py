"""One source, or a part of it, to a `Clip`: decoded frames and their true times.

    clip = read_clip(ReadRequest(Path("bikes.mp4"), Sampling(fps="1", max_frames=64)))

A source is a video file, a folder of pictures, an animation or a still picture. A packet scan,
without decoding, chooses the reader. decord is fast, but on some files it returns wrong frames
without a word, so it gets only files of kinds on which it was measured to be right. PyAV by seek
checks the pts of every frame; PyAV from the start is always right, and slowest; Pillow reads
pictures. Every failure is one `VideoError`. A decoder can loop for ever: `preprocess.decode.child`
runs all this in a process that can be killed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from model.slow_fast import uniform_indices
from model.tower.pixels import Pixels
from preprocess.decode.canvas import Canvas, Distrust
from preprocess.decode.read_decord import decord_trouble, read_decord
from preprocess.decode.read_pictures import (
    PICTURE_FPS,
    PICTURES,
    holds_pictures,
    read_pictures,
    scan_pictures,
)
from preprocess.decode.read_pyav import decode_all, read_seek
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import Scan, VideoError, scan
from shards.errors import UserError
from shards.format.features import Sampling
from shards.format.quarantine import Reason

# Not VP8 and VP9: decord shows damaged frames of theirs without a word, and PyAV is faster.
DECORD_CODECS = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg")
FROM_START = {"nopts", "no_index", "avi_b", "first_not_key", "dup", "corrupt", "truncated"}


@dataclass(frozen=True)
class Clip:
    """Sampled frames of a video or of a part of it."""

    frames: np.ndarray
    """uint8 `(frames, height, width, 3)`, RGB, turned as displayed; or at a tower's size."""
    display_size: tuple[int, int]
    """(height, width) of a frame as displayed, in pixels, before any resizing."""
    timestamps: np.ndarray
    """float64 `(frames,)`, seconds from the file's first shown pts."""
    frame_index: np.ndarray
    """int64 `(frames,)`, place among the frames that the file shows."""
    start: float
    end: float
    """Seconds at which the clip's last frame stops being shown, or the part ends."""
    fps: float
    """Mean frame rate of the source."""
    frame_count: int
    """Frames that the source shows within the clip."""
    decoder: str
    """`decord`, `pyav-seek`, `pyav-scan` or `pillow`."""
    flags: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.frames)
        assert self.frames.dtype == np.uint8
        assert self.frames.ndim == 4
        assert self.frames.shape[3] == 3
        assert 1 <= count <= self.frame_count
        assert self.timestamps.dtype == np.float64
        assert self.frame_index.dtype == np.int64
        assert self.timestamps.shape == self.frame_index.shape == (count,)
        assert (np.diff(self.frame_index) > 0).all(), "a frame is never repeated"
        assert self.start <= self.timestamps[0]
        assert self.timestamps[-1] <= self.end


def read_clip(request: ReadRequest) -> Clip:
    """Return the sampled frames of a source, or of a part of it; raises VideoError."""
    return read_scanned(scan_source(request.path, request.picture_fps), request)


def scan_source(path: Path, picture_fps: str = PICTURE_FPS) -> Scan:
    """Return what there is to see in a file or a folder, before any frame is wanted."""
    return scan_pictures(path, picture_fps) if holds_pictures(path) else scan(path)


def sample_indices(times: np.ndarray, end: float, sampling: Sampling) -> list[int]:
    """Return which frames are taken, rising.

    times: float64 `(shown frames,)`, sorted seconds from the clip's start; end: its length. A time
    before the first frame takes the first, so that no clip is empty.
    """
    if sampling.num_frames is not None:
        return uniform_indices(len(times), sampling.num_frames)
    assert sampling.fps is not None
    rate = Fraction(sampling.fps)
    steps = np.arange(int(Fraction(end) * rate) + 2, dtype=np.int64)
    # Whole numbers until one division: rounded once, as the times are, so equal times stay equal.
    targets = steps * rate.denominator / rate.numerator
    last_shown = np.searchsorted(times, targets[targets < end], side="right") - 1
    taken = np.unique(np.maximum(last_shown, 0)).tolist() or [0]
    if sampling.max_frames is not None and len(taken) > sampling.max_frames:
        return uniform_indices(len(times), sampling.max_frames)
    return taken


def read_scanned(scan: Scan, request: ReadRequest, canvas: Canvas | None = None) -> Clip:
    """Do what `read_clip` does after the scan; the frames lie where `canvas` allocates them."""
    if not request.allow_truncated:
        _refuse_incomplete(scan)
    canvas = replace(canvas or Canvas(), shape=_resizing(scan, request.pixels))
    for reader in _readers(scan, request.decoder):
        try:
            if reader == "pyav-scan":
                scan, picked, frames = _read_from_start(scan, request, canvas)
            else:
                picked = _pick(scan, request)
                if reader == "pillow":
                    frames = read_pictures(scan, picked.index, canvas)
                elif reader == "decord":
                    forced = request.decoder == "decord"
                    frames = read_decord(scan, picked.index, canvas, forced=forced)
                else:
                    frames = read_seek(scan, picked.index, canvas)
        except Distrust as error:
            distrust = str(error)  # the error itself would keep the reader open
            continue
        return Clip(
            frames=frames,
            display_size=scan.display_size,
            timestamps=scan.seconds[picked.index],
            frame_index=np.array(picked.index, dtype=np.int64),
            start=picked.start,
            end=picked.end,
            fps=scan.fps,
            frame_count=picked.frame_count,
            decoder=reader,
            flags=scan.flags,
        )
    raise VideoError(
        Reason.DECODE_FAILED, distrust, where=scan.path, fix="leave the reader to the scan"
    )


@dataclass(frozen=True)
class _Picked:
    index: list[int]
    start: float
    end: float
    frame_count: int


def _resizing(scan: Scan, pixels: Pixels | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return what is done to each picture as it comes."""
    if pixels is None:
        return lambda picture: picture
    try:
        pixels.check(*scan.display_size)
    except UserError as error:
        raise VideoError(
            Reason.CANNOT_RESIZE, str(error), where=scan.path, fix="leave it out"
        ) from None
    return lambda picture: pixels.resize(picture[None])[0]


def _refuse_incomplete(scan: Scan) -> None:
    for reason in (Reason.TRUNCATED, Reason.DAMAGED):
        if reason in scan.flags:
            raise VideoError(
                reason,
                f"{reason}, {len(scan.pts)} frames come of {scan.promised_frames} "
                "that the file promises",
                where=scan.path,
                fix="fetch or encode it again",
            )


def _readers(scan: Scan, decoder: str) -> tuple[str, ...]:
    """Return the readers to try, in order: by the scan alone, so that no run reads otherwise."""
    # Which stream was taken is no reason to mistrust: decord takes FFmpeg's best too.
    flags = {flag for flag in scan.flags if flag != "short" and not flag.startswith("stream")}
    if scan.codec == PICTURES:
        return ("pillow",)
    if decoder == "decord":
        return ("decord",)
    # An AVI counts its frames: where some are missing, each reader counts on in its own way.
    miscounted = "short" in scan.flags and scan.container == "avi"
    if flags & FROM_START or miscounted:
        return ("pyav-scan",)
    if decoder == "pyav" or flags or scan.codec not in DECORD_CODECS or decord_trouble():
        return ("pyav-seek", "pyav-scan")
    return ("decord", "pyav-seek", "pyav-scan")


def _pick(scan: Scan, request: ReadRequest) -> _Picked:
    """Return which of the file's shown frames the request takes."""
    start = Fraction(str(request.start or 0))
    end = scan.duration
    times = scan.seconds
    inside = times >= float(start)
    if request.end is not None:
        end = min(Fraction(str(request.end)), end)
        inside &= times < request.end
    shown = np.flatnonzero(inside)
    if start < 0 or not len(shown):
        raise VideoError(
            Reason.EMPTY_PART,
            f"no frame starts within {request.start} to {request.end} s; the file shows frames "
            f"from 0 to {times[-1]:.3f} s: correct the part",
            where=scan.path,
        )
    since_start = times
    if start:
        since_start = np.array(
            [float((scan.pts[i] - scan.pts[0]) * scan.time_base - start) for i in shown]
        )
    taken = sample_indices(since_start[: len(shown)], float(end - start), request.sampling)
    return _Picked(shown[taken].tolist(), float(start), float(end), len(shown))


def _read_from_start(
    scan: Scan, request: ReadRequest, canvas: Canvas
) -> tuple[Scan, _Picked, np.ndarray]:
    """Return the scan corrected by the frames that really came, what it picks, and the frames."""
    try:
        expected = _pick(scan, request).index
    except VideoError:
        expected = []
    came, order, pictures = decode_all(scan, frozenset(expected), canvas)
    if not request.allow_truncated:
        _refuse_incomplete(came)
    picked = _pick(came, request)
    wanted = [order[i] for i in picked.index]
    if not set(wanted) <= set(pictures):
        _, _, pictures = decode_all(scan, frozenset(wanted), canvas)
    return came, picked, canvas.gather([pictures[i] for i in wanted])
