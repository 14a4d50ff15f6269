"""What a plan wants to know of each source before anything is decoded: what it is, how long it is.

clips = probe(clips, known, Sampling(fps="1", max_frames=64))   # with identity and predicted frames

A file's header is read in a process of its own, see `header`. Of a file only head and tail are
hashed, and what the plan knows already under the same size and time is not looked at again.
"""

import math
import os
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from preprocess.decode.archive import BROKEN, Archive
from preprocess.decode.read_pictures import PICTURE_FPS, picture_files
from preprocess.decode.source import identity, identity_of
from preprocess.sources.header import Header, HeaderChild, predicted_frames
from shards.format.features import Sampling
from shards.format.plan import ClipSource

CHILDREN = 4
FILES_PER_CHILD = 50
"""Before another one is worth its start."""


class Source(NamedTuple):
    """What clips lie in: a file, a folder of pictures or a member of an archive."""

    path: str
    offset: int | None
    nbytes: int | None
    picture_fps: str | None


class Probed(NamedTuple):
    """A source as it is now: digest is None where it cannot be read, header where not opened."""

    digest: str | None
    header: Header | None


def probe(
    clips: Sequence[ClipSource], known: Mapping[str, ClipSource], sampling: Sampling
) -> list[ClipSource]:
    """Return the clips with their identity and predicted frames.

    known: clips of an earlier plan by key, believed where size and time are the same.
    """
    stats = {path: _stat(Path(path)) for path in {clip.path for clip in clips}}
    now = []
    for clip in clips:
        size, mtime_ns = stats[clip.path]
        size = size if clip.nbytes is None else clip.nbytes
        now.append(replace(clip, size=size, mtime_ns=mtime_ns))
    unknown = [clip for clip in now if not _is_known(clip, known.get(clip.key))]
    probed = _probe_sources(sorted({_source(clip) for clip in unknown}, key=repr))
    found = []
    for clip in now:
        facts = probed.get(_source(clip))
        if facts is None:
            old = known[clip.key]
            same = {name: getattr(old, name) for name in ("digest", "frames", "height", "width")}
            found.append(replace(clip, **same))
            continue
        header = facts.header or Header(None, None)
        clip = replace(clip, height=header.height, width=header.width)
        frames = 0
        if facts.header is not None:
            frames = predicted_frames(facts.header, sampling, clip.start, clip.end)
        found.append(replace(clip, digest=facts.digest, frames=frames))
    return found


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


def _probe_sources(sources: Sequence[Source]) -> dict[Source, Probed]:
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
                return _look(source, child)
            finally:
                idle.put(child)

        if plain:
            pool = stack.enter_context(ThreadPoolExecutor(count))
            for source, probed in zip(plain, pool.map(look, plain), strict=True):
                found[source] = probed
                bar.update()
        for path, members in groupby(archived, key=lambda source: source.path):
            of_archive = _look_into(Path(path), list(members))
            found |= of_archive
            bar.update(len(of_archive))
    return found


def _look(source: Source, child: HeaderChild) -> Probed:
    path = Path(source.path)
    if not path.is_file() and not path.is_dir():  # gone, or a pipe, which could be read for ever
        return Probed(None, None)
    try:
        _, hash_ = identity(path)
    except OSError:
        return Probed(None, None)
    return Probed(hash_, child.header(path, source.picture_fps or PICTURE_FPS))


def _in_archive(source: Source) -> tuple[str, int]:
    return source.path, source.offset or 0


def _look_into(path: Path, members: Sequence[Source]) -> dict[Source, Probed]:
    """Look at members of an archive, in their order; how long they are is left open."""
    digests = []
    try:
        with Archive(path) as archive:  # a compressed tar is fast only forwards
            for source in members:
                nbytes = source.nbytes or 0
                with archive.member(source.offset or 0, nbytes) as (file, begin):
                    digests.append(identity_of(file, begin, nbytes)[1])
    except BROKEN:
        return dict.fromkeys(members, Probed(None, None))
    unknown = Header(None, None)
    return {source: Probed(hash_, unknown) for source, hash_ in zip(members, digests, strict=True)}
