"""Read the length and size in a source's header, in a process that can be killed.

    with HeaderChild() as child:
        header = child.header(Path("bikes.mp4"), picture_fps="2")

The kernel ends the process after a few CPU seconds, so a hostile file can neither hang nor crash the
caller. The child is this module run as a script. Linux only.
"""

import math
import resource
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from preprocess.decode.child_process import ChildDied, ChildProcess, serve
from preprocess.decode.read_pictures import holds_pictures, scan_pictures
from preprocess.decode.scan import opened
from shards.format.features import Sampling
from shards.signed import Json

CPU_SECONDS = 5


class Header(NamedTuple):
    """Length and frame size by a source's header; None where it does not say."""

    seconds: float | None
    fps: float | None
    height: int | None = None
    width: int | None = None
    """As coded: the rotation for display is only known after decoding a frame."""


class HeaderChild(ChildProcess):
    """Opens files, one at a time."""

    program = ("-m", "preprocess.sources.header")
    stall_seconds = 60.0
    """Wall-clock seconds after which a disk is taken to have failed."""

    def header(self, path: Path, picture_fps: str) -> Header | None:
        """Return a source's header; None if it cannot be opened, or not in time."""
        self.ensure_running()
        self._deadline = time.monotonic() + self.stall_seconds
        try:
            with self.exchange({"path": str(path.absolute()), "picture_fps": picture_fps}):
                answer = self.receive()
        except (ChildDied, TimeoutError):
            return None
        return Header(**answer["header"]) if "header" in answer else None

    def watch(self) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError


def predicted_frames(
    header: Header, sampling: Sampling, start: float | None, end: float | None
) -> int:
    """Return how many frames of a clip will be banked if its header is right."""
    if header.seconds is None:
        return sampling.most_frames
    span = max(0.0, min(header.seconds, math.inf if end is None else end) - (start or 0))
    wanted = sampling.most_frames
    if sampling.fps is not None:
        # 1e-6: a span of 2.0000001 s at 1 fps has two instants, not three
        wanted = min(wanted, max(1, math.ceil(span * float(Fraction(sampling.fps)) - 1e-6)))
    return wanted if header.fps is None else min(wanted, max(1, round(span * header.fps)))


def read_header(path: Path, picture_fps: str) -> Header:
    """Return a source's header; raises VideoError if it cannot be opened."""
    if holds_pictures(path):
        scan = scan_pictures(path, picture_fps)
        return Header(float(scan.duration), scan.fps, scan.height, scan.width)
    with opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        size = stream.height or None, stream.width or None
        if stream.duration:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration:
            seconds = container.duration / 1e6  # in FFmpeg's AV_TIME_BASE
        else:
            return Header(None, None, *size)
        if stream.frames and seconds > 0:
            return Header(seconds, stream.frames / seconds, *size)
        return Header(seconds, float(rate) if rate else None, *size)


def _read(request: Json, _: object) -> Iterator[Json]:
    """Answer a request in the child; the kernel kills it if the file takes too many CPU seconds."""
    # RLIMIT_CPU counts the whole life of the process, so each request moves the limit. SIGXCPU ends the
    # process inside of C code, too, which no Python handler can.
    limit = math.ceil(time.process_time()) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    header = read_header(Path(request["path"]), request["picture_fps"])
    yield {"header": header._asdict()}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a killed child must not leave core files
    serve(_read)


if __name__ == "__main__":
    main()
