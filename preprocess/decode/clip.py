"""Read one source, or a part of it, as a `Clip`: decoded frames and their true times.

    clip = read_clip(ReadRequest(Path("bikes.mp4"), Sampling(fps="1", max_frames=64)))

A source is a video file, a folder of pictures, an animation or a still picture. A packet scan,
without decoding, chooses the reader: PyAV by seek checks the pts of every frame; PyAV from the start
is always right, and slowest; Pillow reads pictures. decord is used only on request: on some files it
returns wrong frames without an error. Every failure is one `VideoError`. A decoder can loop for ever,
so `preprocess.decode.decode_child` runs all this in a process that can be killed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from model.tower.pixels import Pixels
from preprocess.decode.events import Begin, Clip, ClipFacts, Distrust, Event, Transform, collect
from preprocess.decode.read_decord import read_decord
from preprocess.decode.read_pictures import (
    PICTURE_FPS,
    PICTURES,
    holds_pictures,
    read_pictures,
    scan_pictures,
)
from preprocess.decode.read_pyav import WholeFile, read_seek
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import Scan, VideoError, scan
from preprocess.decode.stream.sampling import sample_indices
from shards.errors import UserError
from shards.format.quarantine import Reason

# Flags of files on which a seek is not to be trusted. Wrong frames raise nothing, so the reader is chosen
# by flags and not by trying. Against a full decode by ffmpeg, on deliberately odd files, PyAV from the
# start had 0 of 922 frames wrong; by seek 38 of 946, 36 of them in files with these flags; decord 129 of
# 996, because it numbers keyframes in decode order and frames in display order.
FROM_START = {
    "nopts",
    "no_index",
    "avi_b",
    "first_not_key",
    "first_lost",
    "dup",
    "corrupt",
    "truncated",
    "discontinuity",
    "alpha",
}


def read_clip(request: ReadRequest) -> Clip:
    """Return the sampled frames of a source, or of a part of it; raises VideoError."""
    return collect(FileReader().events(request))


def scan_source(path: Path, picture_fps: str = PICTURE_FPS) -> Scan:
    """Return the scan of a video file, a picture file or a folder of pictures; decodes one frame."""
    return scan_pictures(path, picture_fps) if holds_pictures(path) else scan(path)


# -- reading: scan, choice of the reader, events


class FileReader:
    """Reads clips; the scan and frames of a file are kept for the next parts of the same file."""

    def __init__(self) -> None:
        self._of: tuple[object, ...] = ()
        self._scan: Scan | None = None
        self._whole: WholeFile | None = None

    def scan(self, request: ReadRequest) -> Scan:
        """Return the scan of a request's file, reused if the last request had the same file."""
        of = _identity(request)
        if self._scan is None or of != self._of:
            self._scan, self._whole = None, None
            self._scan, self._of = scan_source(request.path, request.picture_fps), of
        return self._scan

    def events(self, request: ReadRequest) -> Iterator[Event]:
        """Yield `Begin`, the frames of a request, then `ClipFacts`; raises VideoError."""
        scan = self.scan(request)
        if not request.allow_truncated:
            _refuse_incomplete(scan)
        transform = _resizing(scan, request.pixels)
        distrust = ""
        for reader in _readers(scan, request.decoder):
            try:
                if reader == "pyav-scan":
                    # the next part of the file goes on in the same pass
                    self._whole = self._whole or WholeFile(scan, transform)
                    yield from _from_start(self._whole, request)
                    return
                picked = _pick(scan, request, request.start, request.end)
                yield Begin(len(picked.index))
                yield from READERS[reader](scan, picked.index, transform)
            except Distrust as error:
                distrust = str(error)  # the error itself would keep the reader open
                continue
            yield _facts(scan, picked, reader)
            return
        raise VideoError(
            Reason.DECODE_FAILED, distrust, where=scan.path, fix="leave the reader to the scan"
        )


def _identity(request: ReadRequest) -> tuple[object, ...]:
    """Return a key that changes when the file or the way of reading it does, within one process."""
    try:
        stat = request.path.stat()
    except OSError:
        # equal to nothing: a file that cannot be looked at is never taken for the last one
        return (object(),)
    how = request.pixels, request.picture_fps, request.decoder, request.allow_truncated
    return request.path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, *how


def _facts(scan: Scan, picked: "_Picked", reader: str) -> ClipFacts:
    return ClipFacts(
        display_size=scan.display_size,
        # a frame that was on the screen already counts from the part's start, so
        # that times stay in the part
        timestamps=np.maximum(scan.seconds[picked.index], picked.start),
        frame_index=np.array(picked.index, dtype=np.int64),
        start=picked.start,
        end=picked.end,
        fps=scan.fps,
        frame_count=picked.frame_count,
        decoder=reader,
        flags=scan.flags,
    )


# -- parts of a file, and the frames that they take


@dataclass(frozen=True)
class _Picked:
    index: list[int]
    start: float
    end: float
    frame_count: int


def _resizing(scan: Scan, pixels: Pixels | None) -> Transform:
    """Return the function that resizes each picture as soon as it is decoded."""
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
    if Reason.APPENDED in scan.flags:
        raise VideoError(
            Reason.APPENDED,
            f"another file is appended to it, of which no frame comes: {len(scan.pts)} are the first's",
            where=scan.path,
            fix="cut or join them with FFmpeg, or take what comes with --allow-truncated",
        )
    for reason in (Reason.TRUNCATED, Reason.DAMAGED):
        if reason in scan.flags:
            raise VideoError(
                reason,
                f"{reason}, {len(scan.pts)} frames come of {scan.promised_frames} "
                "that the file promises",
                where=scan.path,
                fix="fetch the video again, or bank what comes with --allow-truncated",
            )


def _readers(scan: Scan, decoder: str) -> tuple[str, ...]:
    """Return the readers to try, in order. They depend on the scan alone, so every run reads alike.

    PyAV replaced decord here: on equal frames decord took a seventh more CPU time than PyAV by seek,
    on no clip less than 0.98 of it, and is wrong on more files. It is used only on request.
    """
    # Which stream was taken, and how long a frame is held, are no reasons to distrust a seek.
    flags = {flag for flag in scan.flags if flag not in ("short", "gap", Reason.APPENDED)}
    flags = {flag for flag in flags if not flag.startswith("stream")}
    if scan.codec == PICTURES:
        return ("pillow",)
    if decoder == "decord":
        return ("decord",)
    # An AVI addresses frames by number: where some are missing, each reader numbers the rest differently.
    miscounted = "short" in scan.flags and scan.container == "avi"
    return ("pyav-scan",) if flags & FROM_START or miscounted else ("pyav-seek", "pyav-scan")


def _pick(scan: Scan, request: ReadRequest, start_: float | None, end_: float | None) -> _Picked:
    """Return the sampled frames among those that are shown within a part of the file.

    The frame that is on screen when the part starts is the first of them.
    """
    times, whole = scan.seconds, scan.duration
    start = Fraction(str(start_ or 0))
    end = whole if end_ is None else min(Fraction(str(end_)), whole)
    is_empty = end_ is not None and Fraction(str(end_)) <= start
    if start < 0 or is_empty or (start and start >= whole):
        part = f"from {float(start):g} s" + ("" if end_ is None else f" to {end_:g} s")
        raise VideoError(
            Reason.EMPTY_PART,
            f"shows nothing {part}; it lasts {float(whole):.3f} s: correct the part",
            where=scan.path,
        )
    first = int(np.searchsorted(times, float(start)))
    # a frame is shown until the next one: at a start between two, the earlier one is on the screen
    if first == len(times) or times[first] > float(start):
        first = max(0, first - 1)
    stop = len(times)
    if end_ is not None:
        stop = max(first + 1, int(np.searchsorted(times, end_)))
    since_start = times[first:stop]
    if start:
        # exact ticks: floats of a late part would differ from those of the same
        # frames in a file of their own
        ticks = scan.pts[first:stop]
        since_start = np.array([float((t - scan.pts[0]) * scan.time_base - start) for t in ticks])
    taken = sample_indices(since_start, float(end - start), scan.fps, request.sampling)
    index = [first + place for place in taken]
    return _Picked(index, float(start), float(end), stop - first)


def _from_start(whole: WholeFile, request: ReadRequest) -> Iterator[Event]:
    """Yield the frames of a part of a file that is read from its start.

    The frames that the packets promise are yielded while decoding. If other frames came (damage), a
    second `Begin` follows with the frames sampled among those.
    """
    expected: list[int] = []
    if whole.decoded is None:
        # the packets may promise no frame here, and some may come all the same
        with suppress(VideoError):
            expected = _pick(whole.scan, request, request.start, request.end).index
        if expected:
            yield Begin(len(expected))
        yield from whole.first(
            set(expected), _later(whole.scan, range(len(whole.scan.pts)), request)
        )
    assert whole.decoded
    decoded, order = whole.decoded
    if not request.allow_truncated:
        _refuse_incomplete(decoded)
    picked = _pick(decoded, request, request.start, request.end)
    wanted = [order[place] for place in picked.index]
    if wanted != expected:
        yield Begin(len(wanted))
        yield from whole.pictures(wanted, _later(decoded, order, request))
    yield _facts(decoded, picked, "pyav-scan")


def _later(scan: Scan, order: Sequence[int], request: ReadRequest) -> set[int]:
    """Return the counts of the frames that the next parts of the file will take."""
    wanted: set[int] = set()
    for start, end in request.next_parts:
        with suppress(VideoError):
            wanted.update(order[place] for place in _pick(scan, request, start, end).index)
    return wanted


READERS: dict[str, Callable[[Scan, Sequence[int], Transform], Iterator[np.ndarray]]] = {
    "pillow": read_pictures,
    "decord": read_decord,
    "pyav-seek": read_seek,
}
