"""What passes from a reader to whoever takes its frames: one event after the other.

`Begin`, then pictures as many as it says, then `ClipFacts`. A reader that turns out to be wrong in
the middle is followed by another `Begin`, and what came before is void.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Shape = Callable[[np.ndarray], np.ndarray]
"""What is done to each picture as it comes: uint8 `(height, width, 3)`."""


@dataclass(frozen=True)
class Begin:
    """Frames follow, from the first one; those before are void."""

    frames: int


@dataclass(frozen=True)
class ClipFacts:
    """What there is to know of the sampled frames of a video or of a part of it, without them."""

    display_size: tuple[int, int]
    """(height, width) of a frame as displayed, in pixels, before any resizing."""
    timestamps: np.ndarray
    """float64 `(frames,)`, seconds from the file's first shown pts. A frame that is on the screen
    already when a part starts has the part's start."""
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
            frames, taken, count = None, 0, event.frames
        elif isinstance(event, ClipFacts):
            assert frames is not None
            assert taken == count
            return Clip(frames=frames, **vars(event))
        else:
            several = event if event.ndim == 4 else event[None]
            if frames is None:
                frames = np.empty((count, *several.shape[1:]), np.uint8)
            frames[taken : taken + len(several)] = several
            taken += len(several)
    raise NoFacts


class NoFacts(Exception):
    """The events ended before the clip was whole."""


class Distrust(Exception):
    """This reader may be wrong about this file: take the next."""


def over_white(picture: np.ndarray) -> np.ndarray:
    """Lay transparent pixels over white: uint8 `(height, width, 4)` -> `(height, width, 3)`.

    The processors of transformers that lay pictures over a colour at all take white.
    """
    colour, opaque = picture[..., :3], picture[..., 3:]
    if opaque.min(initial=255) == 255:
        return np.ascontiguousarray(colour)
    shown = colour * opaque.astype(np.uint16) + 255 * (255 - opaque.astype(np.uint16))
    return ((shown + 127) // 255).astype(np.uint8)
