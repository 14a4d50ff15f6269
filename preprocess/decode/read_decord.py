"""Read frames of a scanned file by decord, with the checks without which it cannot be trusted."""

import functools
import importlib.metadata
import os
import re
import stat
from collections.abc import Iterator, Sequence

import numpy as np

from preprocess.decode.events import Distrust, Transform
from preprocess.decode.scan import Scan
from shards.errors import first_line

DECORD_BATCH_BYTES = 8 << 20
"""Bytes of frames per call of decord: fewer pages to fault in than all at once."""
DECORD_KEPT_BYTES = 64 << 20
"""Bytes of frames kept at native size until the reader is closed: while it is open and idle, decord
decodes frames that nobody reads (a fifth of all CPU seconds at 64 frames)."""
# What FFmpeg writes at level "info" about an undamaged file.
BENIGN = re.compile(
    rb"\s*$|\[swscaler @ \w+\] deprecated pixel format|\[NULL @ \w+\] Failed to parse extradata"
)


@functools.cache
def decord_trouble() -> str | None:
    """Return why decord cannot be used; None if it can.

    decord2 and eva-decord install a module of the same name, which is wrong on other files.
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


def read_decord(scan: Scan, index: Sequence[int], transform: Transform) -> Iterator[np.ndarray]:
    """Yield the shown frames `index` (ascending); raises Distrust where they may be wrong."""
    said_before = _stderr_size()
    frame_bytes = scan.height * scan.width * 3
    together = max(1, DECORD_KEPT_BYTES // frame_bytes)
    for first in range(0, len(index), together):
        yield from map(transform, _native(scan, index[first : first + together]))
    if said_before is not None and _complaint(said_before):
        raise Distrust("FFmpeg complained while decord was reading")


def _native(scan: Scan, index: Sequence[int]) -> list[np.ndarray]:
    """Return frames at their native size, from a reader that is closed before this returns.

    Left open after one call, decord decoded on in the background: +270 MiB a second at 1080p.
    """
    if scan.orientation.is_mirrored:
        raise Distrust("decord does not mirror pictures")
    import decord
    from decord._ffi.base import DECORDError, DECORDLimitReachedError

    if _stderr_size() is not None:
        decord.logging.set_level(
            decord.logging.INFO
        )  # the level at which its FFmpeg reports concealed damage
    frames: list[np.ndarray] = []
    step = max(1, DECORD_BATCH_BYTES // (scan.height * scan.width * 3))
    try:
        # num_threads=1: by default each open reader starts threads of its own; fault_tol=1: damage
        # raises rather than repeats the last good frame
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
        reader = None  # closes it: decord has no method for that
    # the packets are counted apart from it: an edit list's hidden ones make decord count too many
    if counted != len(scan.pts):
        raise Distrust(f"decord counts {counted} frames, the packets {len(scan.pts)}")
    return frames


def _stderr_size() -> int | None:
    """Return the size of stderr in bytes if it is a file, as in a decode child; else None."""
    status = os.fstat(2)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _complaint(begin: int) -> bool:
    """Return whether FFmpeg has reported damage on stderr since `begin`: decord conceals it silently."""
    try:
        said = os.pread(2, 1 << 16, begin)
    except OSError:  # a file opened for writing only
        return _stderr_size() != begin
    return any(not BENIGN.match(line) for line in said.split(b"\n"))
