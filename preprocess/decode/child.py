"""`read_clip` in a process of its own, which can be killed: decoders loop for ever and crash.

    with DecodeChild() as child:
        clip = child.read_clip(path, Sampling(fps="1", max_frames=64))

The child is this module run as a script, without torch. A request is one JSON line on its stdin.
It answers on its stdout with the scan, from which the deadline follows, then with the clip or the
error; the frames, resized there where `pixels` is given, lie in an anonymous memory file, gone with
the two processes, and are not copied: the file serves another clip when the last array over it is
gone. The deadline counts the child's CPU seconds, so a busy machine changes no
outcome. Linux only.
"""

import json
import math
import mmap
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np

from model.tower.pixels import Pixels
from preprocess.decode.canvas import Canvas
from preprocess.decode.clip import DECODERS, Clip, read_scanned, scan_source
from preprocess.decode.read_pictures import PICTURE_FPS
from preprocess.decode.scan import VideoError
from shards.format.features import Sampling
from shards.signed import Json

SCAN_SECONDS = 30.0
BASE_SECONDS = 10.0
SECONDS_PER_PIXEL = 100e-9  # decoding costs 1.6 to 7e-9 on the clips measured
STALL_FACTOR = 10
"""A child that used no CPU for this many deadlines waits for a disk or the like."""
CLIPS_PER_CHILD = 1000
"""PyAV keeps some 50 kB of every file opened."""
FRAME_FILES = 4
"""Clips that a caller may hold at a time without a copy being made of each."""
KEPT_BYTES = 64 << 20
"""Of a memory file, kept between clips: faulting fresh pages in takes longer than filling them."""
POLL_SECONDS = 0.05


class DecodeChild:
    """One child process, started at the first clip and again after each that had to be killed."""

    def __init__(
        self,
        base_seconds: float = BASE_SECONDS,
        seconds_per_pixel: float = SECONDS_PER_PIXEL,
        clips_per_child: int = CLIPS_PER_CHILD,
    ):
        self.base_seconds = base_seconds
        self.seconds_per_pixel = seconds_per_pixel
        self.clips_per_child = clips_per_child
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "DecodeChild":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def read_clip(
        self,
        path: Path,
        sampling: Sampling,
        *,
        start: float | None = None,
        end: float | None = None,
        decoder: str = "auto",
        allow_truncated: bool = False,
        pixels: Pixels | None = None,
        picture_fps: str = PICTURE_FPS,
    ) -> Clip:
        """Do what `video.read_clip` does; a child that hangs or dies is a `VideoError` too."""
        assert decoder in DECODERS, decoder
        if self._process and self._process.poll() is not None:
            self._end()  # died while idle: no clip's fault
        if not self._process:
            self._start()
        request = {
            "path": str(path.absolute()),
            "sampling": asdict(sampling),
            "start": start,
            "end": end,
            "decoder": decoder,
            "allow_truncated": allow_truncated,
            "pixels": pixels.to_json() if pixels else None,
            "picture_fps": picture_fps,
            "file": self._free[-1],
        }
        finished = False
        try:
            reply = self._ask(path, request)
            frames = self._take(reply["bytes"]) if "clip" in reply else None
            finished = True
        finally:
            if not finished:  # also on Ctrl-C: a half-read answer must not meet the next request
                self._end(kill=True)
        self._served += 1
        self._forget()
        if self._served >= self.clips_per_child:
            self._end()
        if frames is None:
            raise VideoError(*reply["error"])
        clip = reply["clip"]
        return Clip(
            frames=frames.reshape(clip.pop("shape")),
            display_size=tuple(clip.pop("display_size")),
            timestamps=np.array(clip.pop("timestamps"), dtype=np.float64),
            frame_index=np.array(clip.pop("frame_index"), dtype=np.int64),
            flags=tuple(clip.pop("flags")),
            **clip,
        )

    def _start(self) -> None:
        self._files = [os.memfd_create("framebank-frames") for _ in range(FRAME_FILES)]
        self._free = list(range(FRAME_FILES))
        self._stderr = os.memfd_create("framebank-stderr")
        root = str(Path(__file__).resolve().parents[2])
        inherited = os.environ.get("PYTHONPATH")
        self._process = subprocess.Popen(
            # -P: a folder called `shards` where the user stands must not be imported
            [sys.executable, "-P", "-m", "preprocess.decode.child", *map(str, self._files)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            pass_fds=self._files,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])},
            start_new_session=True,  # Ctrl-C is the parent's
        )
        self._unread = b""
        self._served = 0

    def _end(self, kill: bool = False) -> None:
        if not self._process:
            return
        process, self._process = self._process, None
        assert process.stdin
        assert process.stdout
        process.stdin.close()  # the child leaves at once
        try:
            if not kill:
                process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            for file in [*self._files, self._stderr]:
                os.close(file)

    def _take(self, nbytes: int) -> np.ndarray:
        """Return the bytes that the child wrote: a view, or a copy where no other file is free."""
        file = self._files[self._free[-1]]
        if len(self._free) == 1 or nbytes > KEPT_BYTES or not nbytes:
            frames = np.empty(nbytes, np.uint8)
            view = frames.data
            while view:
                view = view[os.preadv(file, [view], nbytes - len(view)) :]
            if nbytes > KEPT_BYTES:
                os.ftruncate(file, 0)
            return frames
        mapped = mmap.mmap(file, nbytes)
        weakref.finalize(mapped, self._free.insert, 0, self._free.pop())
        return np.frombuffer(mapped, np.uint8)

    def _forget(self) -> None:
        os.lseek(self._stderr, 0, os.SEEK_SET)  # the child's position too
        os.ftruncate(self._stderr, 0)

    def _ask(self, path: Path, request: Json) -> Json:
        """Return the last answer to a request: `clip` or `error`."""
        assert self._process
        assert self._process.stdin
        before = _cpu_seconds(self._process.pid)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._crash(path) from None
        reply = self._reply(path, before, SCAN_SECONDS)
        if "scan" in reply:
            pixels = reply["scan"]["width"] * reply["scan"]["height"] * reply["scan"]["packets"]
            deadline = self.base_seconds + self.seconds_per_pixel * pixels
            reply = self._reply(path, before, deadline)
        return reply

    def _reply(self, path: Path, before: float, deadline: float) -> Json:
        """Return the child's next line; its CPU clock stood at `before` when it was asked."""
        assert self._process
        assert self._process.stdout
        seen, moved = before, time.monotonic()
        while b"\n" not in self._unread:
            if select.select([self._process.stdout], [], [], POLL_SECONDS)[0]:
                received = os.read(self._process.stdout.fileno(), 1 << 20)
                if not received:
                    raise self._crash(path)
                self._unread += received
                continue
            used, now = _cpu_seconds(self._process.pid), time.monotonic()
            if used - before > deadline:
                raise VideoError(
                    "timeout",
                    f"{path}: decoding had not ended after {used - before:.1f} s of CPU "
                    f"(deadline {deadline:.1f}); encode the file again or remove it",
                )
            if used > seen:
                seen, moved = used, now
            elif now - moved > min(deadline, self.base_seconds) and _waits_for_itself(
                self._process.pid
            ):
                raise VideoError(  # which of the two a file meets in decord is chance
                    "timeout",
                    f"{path}: the decoder's threads wait for each other; encode the file again or "
                    "remove it",
                )
            elif now - moved > STALL_FACTOR * deadline:
                raise VideoError(
                    "stalled",
                    f"{path}: the decoder has done nothing for {now - moved:.0f} s; "
                    "check the disk and try again",
                )
        line, self._unread = self._unread.split(b"\n", 1)
        reply: Json = json.loads(line)
        return reply

    def _crash(self, path: Path) -> VideoError:
        assert self._process
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:  # it closed its stdout and lives on
            code = 0
        how = signal.Signals(-code).name if code < 0 else f"exit {code}"
        size = os.fstat(self._stderr).st_size
        said = os.pread(self._stderr, 2000, max(0, size - 2000)).decode(errors="replace")
        last = " | ".join(said.split("\n")[-4:]).strip(" |") or "nothing"
        return VideoError(
            "decoder-crashed",
            f"{path}: the decoder died ({how}); its last words: {last}; "
            "try again, then encode the file again or remove it",
        )


def _cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, ended ones too."""
    # The name in the second field may hold spaces and brackets.
    fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _waits_for_itself(pid: int) -> bool:
    """Whether all threads wait for a lock, but for the one that listens to the parent."""
    try:
        waits = [task.joinpath("wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return False
    elsewhere = [wait for wait in waits if "futex" not in wait]
    return len(elsewhere) <= 1 and all("pipe" in wait for wait in elsewhere)


def _serve(frame_files: list[int]) -> None:
    """Answer requests until stdin closes."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    files = [_FrameFile(number) for number in frame_files]
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        request = json.loads(requests.get())
        path, file = Path(request.pop("path")), request.pop("file")
        sampling = Sampling(**request.pop("sampling"))
        pixels = request.pop("pixels")
        try:
            scanned = scan_source(path, request.pop("picture_fps"))
            size = {name: getattr(scanned, name) for name in ("width", "height", "packets")}
            print(json.dumps({"scan": size}), file=replies)
            clip = read_scanned(
                scanned,
                sampling,
                pixels=Pixels.from_json(pixels) if pixels else None,
                canvas=Canvas(allocate=files[file].array),
                **request,
            )
        except VideoError as error:
            print(json.dumps({"error": error.args}), file=replies)
            continue
        fields = {name: value for name, value in vars(clip).items() if name != "frames"}
        fields["shape"] = clip.frames.shape
        fields["timestamps"] = clip.timestamps.tolist()
        fields["frame_index"] = clip.frame_index.tolist()
        print(json.dumps({"clip": fields, "bytes": clip.frames.nbytes}), file=replies)
        del clip


class _FrameFile:
    """A memory file and the child's view of it, which stays: its pages are faulted in once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._view: mmap.mmap | None = None

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        nbytes = math.prod(shape)
        if os.fstat(self.number).st_size < nbytes:
            os.ftruncate(self.number, nbytes)
        if self._view is None or len(self._view) < nbytes:
            self._view = mmap.mmap(self.number, nbytes)
        return np.frombuffer(self._view, np.uint8, nbytes).reshape(shape)


def _listen(requests: queue.SimpleQueue[str]) -> None:
    """Leave the moment the parent does, even from an endless loop in decord."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    _serve([int(word) for word in sys.argv[1:]])
