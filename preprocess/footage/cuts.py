"""Plan a clip: its scenes, and a small picture that moves over them. Pure: no pixel is read.

Times are in frames of the clip and places in pixels, both integers and so exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.footage.sources import FPS, Part, seconds_of
from preprocess.world import Json, bouncing, shuffled

SCENES = (3, 5)
SCENE = (12, 40)  # percent of a clip that a scene lasts
INSET_SIDE = (30, 40)  # percent of the frame
INSET_SPEED = 0.25  # frame sides per second, along each axis, at most


@dataclass(frozen=True)
class Cut:
    """Frames of a source, shown in frames `first` up to, and without, `first + count` of a clip."""

    source: int
    part: Part
    """The part of the source that it is taken from."""
    begins: int
    """Frame of the source that is shown first."""
    first: int
    count: int

    @property
    def span(self) -> tuple[float, float]:
        """Start and end, in seconds of the clip."""
        return seconds_of(self.first, self.count)

    @property
    def taken(self) -> tuple[float, float]:
        """Start and end, in seconds of the source."""
        return seconds_of(self.begins, self.count)


@dataclass(frozen=True)
class Inset:
    """A small picture: a square cut out of a source's frames, which moves over a clip's."""

    cut: Cut
    corner: tuple[int, int]
    """(x, y) of the square in the source's frames, in pixels."""
    side: int
    places: np.ndarray
    """int64 `(frames shown, 2)`: x and y of its upper left corner in the clip's frames, in pixels."""

    def box(self, frame: int, size: int) -> list[float]:
        """Return x1, y1, x2, y2 in a frame of the clip, as fractions."""
        x, y = self.places[frame - self.cut.first].tolist()
        return [edge / size for edge in (x, y, x + self.side, y + self.side)]


@dataclass(frozen=True)
class Clip:
    """The plan of one clip."""

    scenes: tuple[Cut, ...]
    """In order, without gaps; each from another source."""
    inset: Inset
    """From a source that is in no scene."""


def lengths(frames: int) -> tuple[int, int]:
    """Return the numbers of frames of the shortest and the longest scene allowed in a clip."""
    return -(-frames * SCENE[0] // 100), frames * SCENE[1] // 100


def cut_clip(
    rng: np.random.Generator,
    parts: Sequence[Mapping[str, Part]],
    split: str,
    frames: int,
    size: int,
) -> Clip:
    """Return the plan of a clip of `frames` frames: random sources, order and lengths."""
    shortest, longest = lengths(frames)
    # one source is left for the small picture, which must be in no scene
    count = int(rng.integers(SCENES[0], min(SCENES[1], len(parts) - 1) + 1))
    # drawn until all lengths are allowed: cuts anywhere, so that no constant answer is good
    while True:
        edges = [0, *sorted(rng.integers(1, frames, size=count - 1).tolist()), frames]
        steps = np.diff(edges)
        if shortest <= steps.min() and steps.max() <= longest:
            break
    chosen = shuffled(rng, range(len(parts)))[: count + 1]

    def cut(source: int, first: int, length: int) -> Cut:
        part = parts[source][split]
        # anywhere in its part of the source: the same scene twice is seldom the same frames
        begins = part.first + int(rng.integers(0, part.count - length + 1))
        return Cut(source, part, begins, first, length)

    scenes = [cut(*each) for each in zip(chosen, edges, steps.tolist(), strict=False)]
    return Clip(tuple(scenes), cut_inset(rng, cut, chosen[-1], frames, size))


def cut_inset(rng: np.random.Generator, cut: Any, source: int, frames: int, size: int) -> Inset:
    """Return a small picture that is shown for half to all of the longest scene's length.

    Its coordinates are even: colour has half the resolution in the video (yuv420p), so odd edges would
    be blurred and the true box not exact.
    """
    length = int(rng.integers(lengths(frames)[1] // 2, lengths(frames)[1] + 1))
    shown = cut(source, int(rng.integers(0, frames - length + 1)), length)
    # 200: per cent, and in pairs of pixels
    side = 2 * int(rng.integers(size * INSET_SIDE[0] // 200, size * INSET_SIDE[1] // 200 + 1))
    x, y = (2 * rng.integers(0, (size - side) // 2 + 1, size=2)).tolist()
    path = bouncing(rng, size - side, INSET_SPEED * size / FPS, length)
    return Inset(shown, (x, y), side, 2 * np.rint(path / 2).astype(np.int64))


def describe(clip: Clip, names: Sequence[str], size: int) -> Json:
    """Return a clip's scenes and boxes for footage.json. names: of the sources."""

    def to_json(cut: Cut) -> Json:
        return {"source": names[cut.source], "span": cut.span, "from": cut.taken}

    shown = clip.inset.cut
    boxes = [clip.inset.box(k, size) for k in range(shown.first, shown.first + shown.count)]
    square = (*clip.inset.corner, clip.inset.side)
    inset = to_json(shown) | {"square": square, "first_frame": shown.first, "boxes": boxes}
    return {"scenes": [to_json(scene) for scene in clip.scenes], "inset": inset}
