"""The events that a reader yields for a clip: `Begin`, its pictures, then `ClipFacts`.

A reader that turns out to be wrong half-way is followed by another `Begin`; the pictures before it are
discarded.
"""

# Events rather than one array: a clip of any length can then be encoded with the memory of one block.

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]
"""Applied to each picture as soon as it is decoded: uint8 `(height, width, 3)` in and out."""


@dataclass(frozen=True)
class Begin:
    """The clip's frames follow, from the first one; discard any that came before."""

    frames: int


@dataclass(frozen=True)
class ClipFacts:
    """Times and provenance of the sampled frames of a video or of a part of it, without the pixels."""

    display_size: tuple[int, int]
    """(height, width) of a frame as displayed, in pixels, before any resizing."""
    timestamps: np.ndarray
    """float64 `(frames,)`, seconds from the file's first shown pts. A frame that is already on screen
    when a part starts has the part's start. Of pts, never index / mean rate: that was off by up to
    0.5 s on a file of variable frame rate and 5 s on one with a gap."""
    frame_index: np.ndarray
    """int64 `(frames,)`, place among the frames that the file shows."""
    start: float
    end: float
    """Seconds at which the clip's last frame stops being shown, or the part ends."""
    fps: float
    """Mean frame rate of the source."""
    frame_count: int
    """Frames that the source shows within the clip."""
    decoder: str
    """`decord`, `pyav-seek`, `pyav-scan` or `pillow`."""
    flags: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.frame_index)
        assert 1 <= count <= self.frame_count
        assert self.timestamps.dtype == np.float64
        assert self.frame_index.dtype == np.int64
        assert self.timestamps.shape == self.frame_index.shape == (count,)
        assert (np.diff(self.frame_index) > 0).all(), "a frame is never repeated"
        assert self.start <= self.timestamps[0]
        assert self.timestamps[-1] <= self.end


@dataclass(frozen=True)
class Clip(ClipFacts):
    """Sampled frames of a video or of a part of it."""

    frames: np.ndarray
    """uint8 `(frames, height, width, 3)`, RGB, turned as displayed; or at a tower's size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.frames.dtype == np.uint8
        assert self.frames.ndim == 4
        assert self.frames.shape[3] == 3
        assert len(self.frames) == len(self.frame_index)


Event = Begin | np.ndarray | ClipFacts
"""Pictures come alone, `(height, width, 3)`, or several together, `(frames, height, width, 3)`."""


def collect(events: Iterator[Event]) -> Clip:
    """Return the clip that events make, all of its frames held together; NoFacts where none do."""
    frames, taken, count = None, 0, 0
    for event in events:
        if isinstance(event, Begin):
            # whatever came before belongs to a reader that turned out to be wrong
            frames, taken, count = None, 0, event.frames
        elif isinstance(event, ClipFacts):
            assert frames is not None
            assert taken == count
            return Clip(frames=frames, **vars(event))
        else:
            several = event if event.ndim == 4 else event[None]
            # made with the first picture: only it tells the size
            if frames is None:
                frames = np.empty((count, *several.shape[1:]), np.uint8)
            frames[taken : taken + len(several)] = several
            taken += len(several)
    raise NoFacts


class NoFacts(Exception):
    """The events ended before `ClipFacts`."""


class Distrust(Exception):
    """This reader may return wrong frames of this file: use the next reader."""


def over_white(picture: np.ndarray) -> np.ndarray:
    """Blend transparent pixels with white: uint8 `(height, width, 4)` -> `(height, width, 3)`.

    White, because the image processors of transformers that blend with a colour at all use white.
    """
    colour, opaque = picture[..., :3], picture[..., 3:]
    if opaque.min(initial=255) == 255:
        return np.ascontiguousarray(colour)
    shown = colour * opaque.astype(np.uint16) + 255 * (255 - opaque.astype(np.uint16))
    # + 127: rounded to the nearest, in integers
    return ((shown + 127) // 255).astype(np.uint8)
