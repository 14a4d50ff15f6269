"""A medium made of parts of banked clips, joined end to end on one clock; nothing is encoded.

    {"timeline": [{"video": "a.mp4", "start": 3, "end": 7}, {"video": "b.mp4"}], ...}

Of each clip the banked frames in [start, end) are taken, in seconds of the clip; a picture, which has no
length, is shown for `end` seconds. The first part begins at 0, each other one at the end of the part
before it. Parts may differ in grids and crops: each frame keeps its own. Tower, layer, pooling and
strides are the same, as in all banks of one run.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from shards.annotations.fault import RowError
from shards.annotations.timeline import REASON, Cut
from shards.format.codec import Int8
from shards.read.bank import ClipInfo
from shards.read.banks import Place

SLACK = 0.1
"""Seconds by which a part may end after its clip: annotations are often rounded to one decimal."""

ROUNDING = 1e-6
"""Seconds by which a frame may precede the part that it belongs to: sums of floats are not exact."""


class ClipFeatures(Protocol):
    """A clip's features, from a bank or directly from a tower."""

    @property
    def info(self) -> ClipInfo: ...

    def read(self, stride: int, frames: Sequence[int]) -> np.ndarray | Int8:
        """Return `(frames, cell_rows, cell_cols, dim)`: float16, uint16 that holds bfloat16, or Int8."""
        ...


@dataclass(frozen=True)
class PartOfClip:
    """Consecutive frames of a clip, on the clock of the medium that they are a part of."""

    whole: ClipFeatures
    first: int
    """Index of the banked frame that is the part's frame 0."""
    info: ClipInfo
    """start and end are those of the medium, the frames those of the part."""

    def read(self, stride: int, frames: Sequence[int]) -> np.ndarray | Int8:
        return self.whole.read(stride, [self.first + frame for frame in frames])


@dataclass(frozen=True)
class SplicedInfo(ClipInfo):
    """The info of a medium of several parts: its clock and frames; sizes are those of the first part."""

    parts: tuple[ClipInfo, ...]

    def place(self, frame: int) -> tuple[int, int]:
        """Return (part, frame of the part) of a frame of the medium."""
        for number, part in enumerate(self.parts):
            if frame < len(part.timestamps):
                return number, frame
            frame -= len(part.timestamps)
        raise IndexError(frame)


@dataclass(frozen=True)
class SplicedClip:
    """A medium of several parts, which are read one by one."""

    parts: tuple[PartOfClip, ...]

    @cached_property
    def info(self) -> SplicedInfo:
        infos = tuple(part.info for part in self.parts)
        first = infos[0]
        return SplicedInfo(
            id=" + ".join(info.id for info in infos),
            start=first.start,
            end=first.end,
            timestamps=np.concatenate([info.timestamps for info in infos]),
            frame_index=np.concatenate([info.frame_index for info in infos]),
            # of the first part, for whoever asks about the whole; each frame is placed by its own part
            display_size=first.display_size,
            patch_grid=first.patch_grid,
            covered=first.covered,
            parts=infos,
        )


Medium = ClipFeatures | SplicedClip


class Stretch(NamedTuple):
    """Banked frames of a clip on a timeline."""

    place: Place
    first: int
    last: int
    """Frames [first, last) of the clip."""
    start: float
    end: float
    """Seconds [start, end) of the clip."""


@dataclass(frozen=True)
class Timeline:
    """A medium of several parts by its stretches of banked clips."""

    stretches: tuple[Stretch, ...]

    @property
    def duration(self) -> float:
        return float(sum(s.end - s.start for s in self.stretches))

    def clip(self) -> SplicedClip:
        clips = [stretch.place.clip() for stretch in self.stretches]
        return splice(clips, self.stretches)


def splice(clips: Sequence[ClipFeatures], stretches: Sequence[Stretch]) -> SplicedClip:
    """Return stretches of clips as one medium, on a clock that begins at 0."""
    total = float(sum(s.end - s.start for s in stretches))
    parts, begins = [], 0.0
    for clip, stretch in zip(clips, stretches, strict=True):
        info, own = clip.info, slice(stretch.first, stretch.last)
        on_clock = ClipInfo(
            id=info.id,
            start=0.0,
            end=total,
            # from the clip's clock to the medium's: seconds since the cut, after all that precedes it
            timestamps=begins + (info.timestamps[own] - info.start - stretch.start),
            frame_index=info.frame_index[own],
            display_size=info.display_size,
            patch_grid=info.patch_grid,
            covered=info.covered,
        )
        parts.append(PartOfClip(clip, stretch.first, on_clock))
        begins += stretch.end - stretch.start
    return SplicedClip(tuple(parts))


# -- from annotations to stretches


def timeline_of(places: Sequence[Place], cuts: Sequence[Cut]) -> Timeline:
    """Return the timeline of cuts of banked clips; raises RowError for a cut beyond its clip."""
    infos = [place.clip().info for place in places]
    return Timeline(
        tuple(
            Stretch(place, *frames_of(info, cut, number))
            for number, (place, info, cut) in enumerate(zip(places, infos, cuts, strict=True), 1)
        )
    )


def frames_of(info: ClipInfo, cut: Cut, number: int) -> tuple[int, int, float, float]:
    """Return (first frame, one after the last, start, end) of a cut of a clip.

    number: of the part, for messages. Raises RowError.
    """
    where = f"part {number} of `timeline`, {cut.video}"
    start = cut.start or 0.0
    if not info.duration:  # a picture
        if cut.end is None or start:
            what = f"{where}: a picture, which has no length"
            raise RowError(REASON, what, expected="`end` alone: the seconds for which it is shown")
        return 0, len(info.timestamps), 0.0, cut.end
    end = info.duration if cut.end is None else cut.end
    if end > info.duration + SLACK:
        what = f"{where}: ends at {end:g} s, after its clip"
        raise RowError(REASON, what, expected=f"at most {info.duration:.3f}")
    # within SLACK: the part ends with its clip
    end = min(end, info.duration)
    times = info.timestamps - info.start
    first, last = frames_between(times.tolist(), start, end)
    if first >= last:
        near = times[np.argsort(np.abs(times - (start + end) / 2))[:2]]
        shown = " and ".join(f"{time:.3f}" for time in sorted(near.tolist()))
        raise RowError(
            REASON,
            f"{where}: no banked frame from {start:g} to {end:g} s",
            expected=f"frames, of which the nearest are at {shown}",
            fix="take a longer part, or encode with a higher --fps",
        )
    return first, last, start, end


# -- parts of any medium


def places_of(medium: Place | Timeline) -> list[Place]:
    """Return the places of a medium's clips, in the order of its parts."""
    return [s.place for s in medium.stretches] if isinstance(medium, Timeline) else [medium]


def frames_between(times: Sequence[float], start: float, end: float) -> tuple[int, int]:
    """Return (first, one after the last) of the frames in [start, end). times: ascending seconds."""
    # half-open, so that two parts that meet at a time share no frame
    return bisect_left(times, start - ROUNDING), bisect_left(times, end - ROUNDING)


def parts_of(clips: Sequence[Medium]) -> list[ClipFeatures]:
    """Return the clips, each that has parts replaced by its parts."""
    return [
        part for clip in clips for part in (clip.parts if isinstance(clip, SplicedClip) else [clip])
    ]


def place_of(info: ClipInfo, frame: int) -> tuple[int, int, ClipInfo]:
    """Return (index of the part, frame of the part, the part's info) of a medium's frame."""
    if not isinstance(info, SplicedInfo):
        return 0, frame, info
    number, own = info.place(frame)
    return number, own, info.parts[number]


def part_count(info: ClipInfo) -> int:
    return len(info.parts) if isinstance(info, SplicedInfo) else 1
