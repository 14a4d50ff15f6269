"""What a plan wants to know of each source before anything is decoded: what it is, how long it is.

clips = probe(clips, known, Sampling(fps="1", max_frames=64))   # with identity and predicted frames

A file's header is read in a process that the kernel ends after a few CPU seconds: a hostile file
can neither hang nor crash the plan. Of a file only head and tail are hashed, and what the plan knows
already under the same size and time is not looked at again. Linux only.
"""

import hashlib
import json
import math
import os
import queue
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from tqdm import tqdm

from preprocess.decode.archive import BROKEN, open_tar
from preprocess.decode.read_pictures import (
    PICTURE_FPS,
    holds_pictures,
    picture_files,
    scan_pictures,
)
from preprocess.decode.scan import VideoError, opened
from preprocess.decode.source import identity, identity_of
from shards.format.features import Sampling
from shards.format.plan import ClipSource
from shards.signed import Json, digest

CPU_SECONDS = 5
STALL_SECONDS = 60.0
"""Of a disk that does not answer."""
CHILDREN = 4
FILES_PER_CHILD = 50
"""Before another one is worth its start."""
CHUNK = 1 << 20


class Header(NamedTuple):
    """What a source says of its length, None where it does not."""

    seconds: float | None
    fps: float | None


class Source(NamedTuple):
    """What clips lie in: a file, a folder of pictures or a member of an archive."""

    path: str
    offset: int | None
    nbytes: int | None
    picture_fps: str | None


class Probed(NamedTuple):
    """A source as it is now: digests are None where it cannot be read, header where not opened."""

    digest: str | None
    full_digest: str | None
    header: Header | None


def probe(
    clips: Sequence[ClipSource],
    known: Mapping[str, ClipSource],
    sampling: Sampling,
    *,
    full: bool = False,
) -> list[ClipSource]:
    """Return the clips with their identity and predicted frames.

    known: clips of an earlier plan by key, believed where size and time are the same. full: hash
    whole files, all of them.
    """
    stats = {path: _stat(Path(path)) for path in {clip.path for clip in clips}}
    now = []
    for clip in clips:
        size, mtime_ns = stats[clip.path]
        size = size if clip.nbytes is None else clip.nbytes
        now.append(replace(clip, size=size, mtime_ns=mtime_ns))
    unknown = [clip for clip in now if full or not _is_known(clip, known.get(clip.key))]
    probed = _probe_sources(sorted({_source(clip) for clip in unknown}, key=repr), full)
    found = []
    for clip in now:
        facts = probed.get(_source(clip))
        if facts is None:
            old = known[clip.key]
            facts_of_old = {
                name: getattr(old, name) for name in ("digest", "full_digest", "frames")
            }
            found.append(replace(clip, **facts_of_old))
            continue
        frames = 0
        if facts.header is not None:
            frames = predicted_frames(facts.header, sampling, clip.start, clip.end)
        found.append(
            replace(clip, digest=facts.digest, full_digest=facts.full_digest, frames=frames)
        )
    return found


def predicted_frames(
    header: Header, sampling: Sampling, start: float | None, end: float | None
) -> int:
    """Return how many frames of a clip will be banked, if its header tells the truth."""
    if header.seconds is None:
        return sampling.most_frames
    span = max(0.0, min(header.seconds, math.inf if end is None else end) - (start or 0))
    wanted = sampling.most_frames
    if sampling.fps is not None:
        wanted = min(wanted, max(1, math.ceil(span * float(Fraction(sampling.fps)) - 1e-6)))
    return wanted if header.fps is None else min(wanted, max(1, round(span * header.fps)))


def _source(clip: ClipSource) -> Source:
    return Source(clip.path, clip.offset, clip.nbytes, clip.picture_fps)


def _is_known(clip: ClipSource, old: ClipSource | None) -> bool:
    if old is None or old.digest is None or old.frames is None:
        return False
    return (clip.size, clip.mtime_ns) == (old.size, old.mtime_ns)


def _stat(path: Path) -> tuple[int | None, int | None]:
    """Return the size and time of a file, or of the pictures of a folder together."""
    try:
        stats = [file.stat() for file in picture_files(path)] if path.is_dir() else [path.stat()]
    except OSError:
        return None, None
    return sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)


def _probe_sources(sources: Sequence[Source], full: bool) -> dict[Source, Probed]:
    """Look at each source; several at a time, but for those in archives."""
    plain = [source for source in sources if source.offset is None]
    archived = sorted((source for source in sources if source.offset is not None), key=_in_archive)
    found: dict[Source, Probed] = {}
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(sources), desc="probe", unit="file", delay=1, leave=False)
        )
        idle: queue.SimpleQueue[HeaderChild] = queue.SimpleQueue()
        count = min(CHILDREN, os.cpu_count() or 1, math.ceil(len(plain) / FILES_PER_CHILD))
        for _ in range(count):
            idle.put(stack.enter_context(HeaderChild()))

        def look(source: Source) -> Probed:
            child = idle.get()
            try:
                return _look(source, child, full)
            finally:
                idle.put(child)

        if plain:
            pool = stack.enter_context(ThreadPoolExecutor(count))
            for source, probed in zip(plain, pool.map(look, plain), strict=True):
                found[source] = probed
                bar.update()
        for path, members in groupby(archived, key=lambda source: source.path):
            of_archive = _look_into(Path(path), list(members), full)
            found |= of_archive
            bar.update(len(of_archive))
    return found


def _look(source: Source, child: "HeaderChild", full: bool) -> Probed:
    path = Path(source.path)
    if not path.is_file() and not path.is_dir():  # gone, or a pipe, which could be read for ever
        return Probed(None, None, None)
    try:
        _, hash_ = identity(path)
        whole = full_digest(path) if full else None
    except OSError:
        return Probed(None, None, None)
    return Probed(hash_, whole, child.header(path, source.picture_fps or PICTURE_FPS))


def full_digest(path: Path) -> str:
    """Return the blake2b of all bytes of a file; of a folder, of its pictures' names and hashes."""
    if path.is_dir():
        parts = [(file.name, full_digest(file)) for file in picture_files(path)]
        return digest(repr(parts).encode())
    with open(path, "rb") as file:
        return _hash_at(file, 0, path.stat().st_size)


def _hash_at(file: IO[bytes], offset: int, nbytes: int) -> str:
    hash_ = hashlib.blake2b(digest_size=16)
    file.seek(offset)
    while nbytes > 0 and (data := file.read(min(CHUNK, nbytes))):
        hash_.update(data)
        nbytes -= len(data)
    return hash_.hexdigest()


def _in_archive(source: Source) -> tuple[str, int]:
    return source.path, source.offset or 0


def _look_into(path: Path, members: Sequence[Source], full: bool) -> dict[Source, Probed]:
    """Look at members of an archive, in their order; how long they are is left open."""
    places = [(source.offset or 0, source.nbytes or 0) for source in members]
    wholes: list[str | None] = [None] * len(members)
    try:
        with open_tar(path) as file:  # a .gz is fast only forwards
            digests = [identity_of(file, *place)[1] for place in places]
            if full:
                wholes = [_hash_at(file, *place) for place in places]
    except BROKEN:
        return dict.fromkeys(members, Probed(None, None, None))
    unknown = Header(None, None)
    return {
        source: Probed(hash_, whole, unknown)
        for source, hash_, whole in zip(members, digests, wholes, strict=True)
    }


class HeaderChild:
    """A process that opens files, started at the first one and again after each that ended it."""

    program: tuple[str, ...] = ("-m", "preprocess.sources.probe")

    def __init__(self, stall_seconds: float = STALL_SECONDS) -> None:
        self.stall_seconds = stall_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "HeaderChild":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._end()

    def header(self, path: Path, picture_fps: str) -> Header | None:
        """Return a source's header, None if it cannot be opened, or not in time."""
        if not self._process or self._process.poll() is not None:
            self._end()
            self._start()
        assert self._process
        assert self._process.stdin
        assert self._process.stdout
        request = json.dumps({"path": str(path.absolute()), "picture_fps": picture_fps})
        answer = b""
        try:
            self._process.stdin.write(request.encode() + b"\n")
            deadline = time.monotonic() + self.stall_seconds
            while not answer.endswith(b"\n"):
                left = max(0.0, deadline - time.monotonic())
                if not select.select([self._process.stdout], [], [], left)[0]:
                    break
                received = os.read(self._process.stdout.fileno(), 1 << 16)
                if not received:
                    break
                answer += received
        except BrokenPipeError:
            pass
        if not answer.endswith(b"\n"):
            self._end()
            return None
        reply: Json = json.loads(answer)
        return Header(**reply["header"]) if "header" in reply else None

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        inherited = os.environ.get("PYTHONPATH")
        self._process = subprocess.Popen(
            [sys.executable, "-P", *self.program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])},
            start_new_session=True,  # Ctrl-C is the parent's
        )

    def _end(self) -> None:
        if not self._process:
            return
        process, self._process = self._process, None
        assert process.stdin
        assert process.stdout
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


def read_header(path: Path, picture_fps: str) -> Header:
    """Return what a source says of its length; raises VideoError if it cannot be opened."""
    if holds_pictures(path):
        scan = scan_pictures(path, picture_fps)
        return Header(float(scan.duration), scan.fps)
    with opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        if stream.duration:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration:
            seconds = container.duration / 1e6  # in FFmpeg's AV_TIME_BASE
        else:
            return Header(None, None)
        if stream.frames and seconds > 0:
            return Header(seconds, stream.frames / seconds)
        return Header(seconds, float(rate) if rate else None)


def _serve() -> None:
    """Answer requests until stdin closes, or until a file has taken too many CPU seconds."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        request = json.loads(requests.get())
        limit = math.ceil(time.process_time()) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            header = read_header(Path(request["path"]), request["picture_fps"])
            answer: Json = {"header": header._asdict()}
        except VideoError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=replies)


def _listen(requests: queue.SimpleQueue[str]) -> None:
    """Leave the moment the parent does, even from an endless loop in FFmpeg."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    _serve()
