"""Frames of a scanned file by decord, with all that it takes to trust it."""

import functools
import importlib.metadata
import os
import re
import stat
from collections.abc import Iterator, Sequence

import numpy as np

from preprocess.decode.frames import Distrust, Shape
from preprocess.decode.scan import Scan
from shards.errors import first_line

DECORD_BATCH_BYTES = 8 << 20
"""Frames that decord returns together: fewer pages to fault in than all at once."""
DECORD_KEPT_BYTES = 64 << 20
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
    try:
        import decord  # noqa: F401
    except (
        Exception
    ) as error:  # a library that it links to is missing, or built for another machine
        return f"decord is installed and cannot be imported ({first_line(error)})"
    return None


def read_decord(scan: Scan, index: Sequence[int], shape: Shape) -> Iterator[np.ndarray]:
    """Yield the shown frames `index`, rising; what may be wrong ends in Distrust."""
    said_before = _stderr_size()
    frame_bytes = scan.height * scan.width * 3
    together = max(1, DECORD_KEPT_BYTES // frame_bytes)
    for first in range(0, len(index), together):
        yield from map(shape, _native(scan, index[first : first + together]))
    if said_before is not None and _complaint(said_before):
        raise Distrust("FFmpeg complained while decord was reading")


def _native(scan: Scan, index: Sequence[int]) -> list[np.ndarray]:
    """Return frames at their native size, from a reader that is closed again.

    Left open it decodes on while the caller takes them, for nobody.
    """
    if scan.orientation.is_mirrored:
        raise Distrust("decord turns pictures, and mirrors none")
    import decord
    from decord._ffi.base import DECORDError, DECORDLimitReachedError

    if _stderr_size() is not None:
        decord.logging.set_level(decord.logging.INFO)  # its FFmpeg tells of concealed damage there
    frames: list[np.ndarray] = []
    step = max(1, DECORD_BATCH_BYTES // (scan.height * scan.width * 3))
    try:
        reader = decord.VideoReader(str(scan.path.absolute()), num_threads=1, fault_tol=1)
        for first in range(0, len(index), step):
            batch = reader.get_batch(index[first : first + step]).asnumpy()
            if batch.shape[1:3] != scan.display_size:
                raise Distrust(f"decord gives {batch.shape[1:3]}, not {scan.display_size}")
            frames += list(batch)
        counted = len(reader)
    except (DECORDError, DECORDLimitReachedError, RuntimeError, IndexError) as error:
        raise Distrust(f"decord: {first_line(error)}") from None
    finally:
        reader = None
    if counted != len(scan.pts):
        raise Distrust(f"decord counts {counted} frames, the packets {len(scan.pts)}")
    return frames


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
