"""Frames of a scanned file by decord, with all that it takes to trust it."""

import functools
import importlib.metadata
import os
import re
import stat
from collections.abc import Sequence

import numpy as np

from preprocess.decode.canvas import Canvas, Distrust
from preprocess.decode.scan import Scan

DECORD_BATCH_BYTES = 8 << 20
"""Frames that decord returns together: fewer pages to fault in than all at once."""
DECORD_KEPT_BYTES = 128 << 20
"""Frames kept at their native size until the reader is closed: while it is open and not asked,
decord decodes ahead, for nobody (a fifth of all CPU seconds at 64 frames)."""
# What FFmpeg writes at level "info" about a file that is well.
BENIGN = re.compile(
    rb"\s*$|\[swscaler @ \w+\] deprecated pixel format|\[NULL @ \w+\] Failed to parse extradata"
)


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
