"""Probe sources for a plan, before anything is decoded: identity (a hash) and predicted frames.

clips = probe(clips, known, Sampling(fps="1", max_frames=64))

Headers are read in a child process, see `header`. Only the head and tail of a file are hashed, and a
source that the plan knows with the same size and modification time is not read a second time.
"""

import logging
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

from preprocess.decode.archive import UNREADABLE, Archive
from preprocess.decode.read_pictures import PICTURE_FPS, picture_files
from preprocess.decode.source import identity, identity_of
from preprocess.sources.header import Header, HeaderChild, predicted_frames
from shards.format.features import Sampling
from shards.format.plan import ClipSource
from shards.text import counted

log = logging.getLogger(__name__)

CHILDREN = 4
"""Header children at a time, at most."""
FILES_PER_CHILD = 50
"""Files for which another child is worth its start."""
BEYOND = 1.0
"""Seconds after its video at which a part may end: ends are rounded, and headers not exact."""


class Source(NamedTuple):
    """A file, a folder of pictures or a member of an archive: one or several clips are parts of it."""

    path: str
    offset: int | None
    nbytes: int | None
    picture_fps: str | None


class Probed(NamedTuple):
    """The current state of a source: digest is None if it cannot be read, header if not opened."""

    digest: str | None
    header: Header | None


def probe(
    clips: Sequence[ClipSource], known: Mapping[str, ClipSource], sampling: Sampling
) -> list[ClipSource]:
    """Return the clips with their identity and predicted frames.

    known: clips of an earlier plan by key, reused where size and modification time are the same.
    """
    # once per file: an archive of a hundred thousand members is one file
    stats = {path: _stat(Path(path)) for path in {clip.path for clip in clips}}
    now = []
    for clip in clips:
        size, mtime_ns = stats[clip.path]
        size = size if clip.nbytes is None else clip.nbytes
        now.append(replace(clip, size=size, mtime_ns=mtime_ns))
    unknown = [clip for clip in now if not _is_known(clip, known.get(clip.key))]
    # by source: clips that are parts of one file are probed once
    probed = _probe_sources(sorted({_source(clip) for clip in unknown}, key=repr))
    found, beyond = [], list[str]()
    for clip in now:
        facts = probed.get(_source(clip))
        if facts is None:
            old = known[clip.key]
            same = {name: getattr(old, name) for name in ("digest", "frames", "height", "width")}
            found.append(replace(clip, **same))
            continue
        header = facts.header or Header(None, None)
        clip = replace(clip, height=header.height, width=header.width)
        # a source that cannot be opened stays in the plan: the reader names the reason in the quarantine
        frames = 0
        if facts.header is not None:
            frames = predicted_frames(facts.header, sampling, clip.start, clip.end)
            # a picture has no seconds
            if clip.end and header.seconds and clip.end > header.seconds + BEYOND:
                beyond.append(f"{clip.where} to {clip.end:g} s of {header.seconds:g} s")
        found.append(replace(clip, digest=facts.digest, frames=frames))
    if beyond:
        log.warning(
            f"{counted(len(beyond), 'clip')} would end after the video does, and end with it, such as "
            f"{beyond[0]}: are these seconds, not frames or milliseconds?"
        )
    return found


def _source(clip: ClipSource) -> Source:
    return Source(clip.path, clip.offset, clip.nbytes, clip.picture_fps)


def _is_known(clip: ClipSource, old: ClipSource | None) -> bool:
    # one that could not be read is tried each time: it may have been replaced
    if old is None or old.digest is None or old.frames is None:
        return False
    return (clip.size, clip.mtime_ns) == (old.size, old.mtime_ns)


def _stat(path: Path) -> tuple[int | None, int | None]:
    """Return size (bytes) and mtime (ns) of a file; of a folder of pictures, their sum and latest."""
    try:
        stats = [file.stat() for file in picture_files(path)] if path.is_dir() else [path.stat()]
    except OSError:
        return None, None
    return sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)


def _probe_sources(sources: Sequence[Source]) -> dict[Source, Probed]:
    """Probe each source: files in parallel, members of an archive one after another."""
    plain = [source for source in sources if source.offset is None]
    archived = sorted((source for source in sources if source.offset is not None), key=_in_archive)
    found: dict[Source, Probed] = {}
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(sources), desc="probe", unit="file", delay=1, leave=False, disable=None)
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
    if not path.is_file() and not path.is_dir():  # missing, or a pipe, which could be read for ever
        return Probed(None, None)
    try:
        _, hash_ = identity(path)
    except OSError:
        return Probed(None, None)
    return Probed(hash_, child.header(path, source.picture_fps or PICTURE_FPS))


def _in_archive(source: Source) -> tuple[str, int]:
    return source.path, source.offset or 0


def _look_into(path: Path, members: Sequence[Source]) -> dict[Source, Probed]:
    """Probe members of an archive, in their order; their headers are not read, so frames are unknown."""
    digests = []
    try:
        with Archive(path) as archive:  # a compressed tar can only be read forwards
            for source in members:
                nbytes = source.nbytes or 0
                with archive.member(source.offset or 0, nbytes) as (file, begin):
                    digests.append(identity_of(file, begin, nbytes)[1])
    except UNREADABLE:
        return dict.fromkeys(members, Probed(None, None))
    unknown = Header(None, None)
    return {source: Probed(hash_, unknown) for source, hash_ in zip(members, digests, strict=True)}
