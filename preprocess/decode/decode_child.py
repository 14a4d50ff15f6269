"""`read_clip` in a child process that can be killed: decoders hang and crash.

    with DecodeChild() as child:
        clip = child.read_clip(ReadRequest(path, Sampling(fps="1", max_frames=64)))
        for event in child.events(request, together=16): ...   # never more than 16 frames at a time

The child is this module run as a script, without torch. It answers with the scan, from which the
deadline follows, then with a block of frames for each line that the parent sends, and last with the
facts of the clip or the error. Frames are resized in the child where the request says so, and are
passed in an anonymous memory file without a copy; the file is reused when the last array over it has
been freed, and disappears with the two processes. `DecodeChild.watch` says when the child is killed:
past its deadline, deadlocked, or stalled. The deadline counts CPU seconds, so a busy machine changes no
outcome. Linux only.
"""

# Why a process and not a thread: on `missing_first_keyframe.mp4` decord loops for ever, SIGALRM, SIGINT
# and a Python handler of SIGTERM do not get through, and a thread cannot be ended; SIGKILL always works.
# Why without torch: a child with decord and NumPy starts in 0.2 s and takes 34 MiB; torch takes 3 s.
# Why shared memory: a clip of 27 MiB takes 10 ms that way, 41 ms as bytes over a pipe.

import math
import mmap
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from preprocess.decode.child_process import ChildDied, ChildProcess, serve
from preprocess.decode.clip import FileReader
from preprocess.decode.events import Begin, Clip, ClipFacts, Event, collect
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from shards.format.quarantine import Reason
from shards.signed import Json

STALL_FACTOR = 10
"""A child that has used no CPU for this many deadlines is waiting for a disk or a network mount."""
FRAME_FILES = 4
"""Arrays of frames that a caller may hold at a time before further ones are copied."""
KEPT_BYTES = 64 << 20
"""Bytes of a memory file kept between clips: faulting fresh pages in takes longer than filling them, and
on small pictures made the child take up to 1.6 times the CPU time of the decoder alone."""
TOGETHER = 16
"""Frames per block where the caller holds all of them anyway."""


class DecodeChild(ChildProcess):
    """Reads clips, one at a time."""

    program = ("-m", "preprocess.decode.decode_child")
    scan_seconds = 30.0
    """CPU seconds that a scan may take."""
    base_seconds = 10.0
    seconds_per_pixel = 100e-9
    """The deadline is `base_seconds` + this for each pixel of each packet, in CPU seconds. Decoding took
    1.6 to 7e-9 on the clips measured (1080p slides to 720p HEVC), so there is over ten times slack. A
    constant would not do: 64 frames of two minutes of 1080p take 12 s of CPU."""
    clips_per_child = 1000
    """PyAV leaks some 50 kB for every file opened, so a child is replaced after 50 MB."""

    def read_clip(self, request: ReadRequest) -> Clip:
        """Return the sampled frames of a source, as `clip.read_clip` does; raises as `events` does."""
        return collect(self.events(request, TOGETHER))

    def events(self, request: ReadRequest, together: int) -> Iterator[Event]:
        """Yield a clip's frames, uint8 `(together, height, width, 3)` or fewer, and then its facts.

        Raises VideoError, also where the child hangs or dies, and ChildBug for a bug of ours in the
        child. The child works only while the next event is being waited for.
        """
        self._path = request.path
        self.ensure_running()
        try:
            with self.exchange(request.to_json() | {"together": together}):
                answer = self._first_answer()
                while "error" not in answer and "clip" not in answer:
                    if "begin" in answer:
                        yield Begin(answer["begin"])
                    else:
                        yield self._frames.take(math.prod(answer["shape"])).reshape(answer["shape"])
                    self._moved = time.monotonic()  # the caller has had its time
                    self.send({"file": self._frames.next})
                    answer = self.receive()
        except ChildDied as death:
            raise VideoError(
                Reason.DECODER_CRASHED,
                f"the decoder died {death}",
                where=request.path,
                fix="try again, then re-encode the video or remove it",
            ) from None
        self._served += 1
        if self._served >= self.clips_per_child:
            self.close()
        if "error" in answer:
            raise VideoError(*answer["error"])
        yield _facts(answer["clip"])

    def start(self) -> None:
        self._frames = FrameFiles()
        self.callback(self._frames.close)
        self._spawn([str(file) for file in self._frames.files], self._frames.files)
        self._served = 0

    def _first_answer(self) -> Json:
        """Set the deadline by the child's scan, and return the answer after it; or the error."""
        assert self.pid
        self._began = self._seen = _cpu_seconds(self.pid)
        self._moved = time.monotonic()
        self._deadline = self.scan_seconds
        answer = self.receive()
        if "scan" not in answer:
            return answer
        scan = answer["scan"]
        # all packets, though few frames are kept: to reach the last one a decoder may pass through all
        pixels = scan["width"] * scan["height"] * scan["packets"]
        self._deadline = self.base_seconds + self.seconds_per_pixel * pixels
        self._seen, self._moved = self._began, time.monotonic()
        self.send({"file": self._frames.next})
        return self.receive()

    def watch(self) -> None:
        """Raise VideoError if the child has passed its deadline, is deadlocked, or has stalled."""
        assert self.pid
        used, now = _cpu_seconds(self.pid), time.monotonic()
        idle = now - self._moved
        # by CPU seconds: under load the same clip takes longer by the wall clock, and would be in
        # the quarantine of one run and in the bank of another
        if used - self._began > self._deadline:
            raise VideoError(
                Reason.TIMEOUT,
                f"decoding had not ended after {used - self._began:.1f} s of CPU "
                f"(deadline {self._deadline:.1f})",
                where=self._path,
                fix="re-encode the video, or remove it",
            )
        if used > self._seen:
            self._seen, self._moved = used, now
        elif idle > min(self._deadline, self.base_seconds) and _is_deadlocked(self.pid):
            # The same file makes decord either loop or deadlock, by chance; both get the same reason,
            # so that the outcome of a run is reproducible.
            raise VideoError(
                Reason.TIMEOUT,
                "the decoder's threads wait for each other",
                where=self._path,
                fix="re-encode the video, or remove it",
            )
        elif idle > STALL_FACTOR * self._deadline:
            raise VideoError(
                Reason.STALLED,
                f"the decoder has done nothing for {idle:.0f} s",
                where=self._path,
                fix="check the disk and try again",
            )


# -- frames in shared memory


class FrameFiles:
    """Memory files that the child writes frames to; each is reused when its last array is freed."""

    def __init__(self) -> None:
        self.files = [os.memfd_create("framebank-frames") for _ in range(FRAME_FILES)]
        self._free = list(range(FRAME_FILES))

    @property
    def next(self) -> int:
        """Which of the files the next clip is written to."""
        return self._free[-1]

    def take(self, nbytes: int) -> np.ndarray:
        """Return the bytes that the child wrote: a view, or a copy where no other file is free."""
        file = self.files[self.next]
        # The last free file is copied from instead of mapped: the child needs one for its next frames.
        if len(self._free) == 1 or nbytes > KEPT_BYTES or not nbytes:
            frames = np.empty(nbytes, np.uint8)
            view = frames.data
            while view:
                view = view[os.preadv(file, [view], nbytes - len(view)) :]
            if nbytes > KEPT_BYTES:
                os.ftruncate(file, 0)  # gives its memory back
            return frames
        mapped = mmap.mmap(file, nbytes)
        weakref.finalize(mapped, self._free.insert, 0, self._free.pop())
        return np.frombuffer(mapped, np.uint8)

    def close(self) -> None:
        for file in self.files:
            os.close(file)


def _cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of all threads of a process, ended ones too (proc(5): utime, stime)."""
    # Split after the last bracket: the command name in the second field may contain spaces and brackets.
    fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _is_deadlocked(pid: int) -> bool:
    """Return whether all threads wait for a lock, except the one that listens to the parent."""
    try:
        waits = [task.joinpath("wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return False
    elsewhere = [wait for wait in waits if "futex" not in wait]
    return len(elsewhere) <= 1 and all("pipe" in wait for wait in elsewhere)


# -- the child's side


def _facts(values: Json) -> ClipFacts:
    return ClipFacts(
        display_size=tuple(values.pop("display_size")),
        timestamps=np.array(values.pop("timestamps"), dtype=np.float64),
        frame_index=np.array(values.pop("frame_index"), dtype=np.int64),
        flags=tuple(values.pop("flags")),
        **values,
    )


def _read(
    request: Json, next_line: Callable[[], Json], reader: FileReader, files: "list[_FrameFile]"
) -> Iterator[Json]:
    """Answer a request, in the child: the scan, then one block of frames for each line received."""
    together = request.pop("together")
    asked = ReadRequest.from_json(request)
    scanned = reader.scan(asked)
    yield {"scan": {name: getattr(scanned, name) for name in ("width", "height", "packets")}}
    file = files[next_line()["file"]]
    events = reader.events(asked)
    left = taken = 0
    for event in events:
        if isinstance(event, Begin):
            left, taken = event.frames, 0
            yield {"begin": event.frames}
            file = files[next_line()["file"]]
        elif isinstance(event, ClipFacts):
            yield {
                "clip": vars(event)
                | {
                    "timestamps": event.timestamps.tolist(),
                    "frame_index": event.frame_index.tolist(),
                }
            }
        else:
            many = min(together, left)
            file.array((many, *event.shape))[taken] = event
            taken += 1
            if taken == many:
                yield {"shape": [many, *event.shape]}
                left, taken = left - many, 0
                file = files[next_line()["file"]]


class _FrameFile:
    """A memory file and the child's mapping of it, which is kept so that pages are faulted in once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._view: mmap.mmap | None = None

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        nbytes = math.prod(shape)
        # grown and never shrunk here: pages that were faulted in serve the next clips
        if os.fstat(self.number).st_size < nbytes:
            os.ftruncate(self.number, nbytes)
        if self._view is None or len(self._view) < nbytes:
            self._view = mmap.mmap(self.number, nbytes)
        return np.frombuffer(self._view, np.uint8, nbytes).reshape(shape)


def main(frame_files: list[int]) -> None:
    files = [_FrameFile(number) for number in frame_files]
    # one for the life of the child: parts of one file share its scan and frames
    reader = FileReader()
    serve(lambda request, next_line: _read(request, next_line, reader, files))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
