"""Questions of place about a toy world, in three steps from easy to hard.

    still    where an object is in one banked frame, the only one shown
    clip     where it is in a clip, in the middle of the time that it is visible
    moment   where it is in a clip at a given time

Trained all at once, or on few clips, none of them is learned; `train/presets/evidence/space.yaml` trains
them in this order. A still is a medium of one frame cut from the bank, so the bank must hold the clip's
BANKED frames.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from model.slow_fast import uniform_indices
from preprocess.world import Json, Turn, one_each, places, seconds, shuffled, together

STEPS = ("still", "clip", "moment")
BANKED = 16
"""Frames that `preprocess encode --frames 16` takes of a clip."""
STILLS = 2
"""Stills per clip."""


class Placed(Protocol):
    """An object that is visible in some of a clip's frames."""

    @property
    def name(self) -> str: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...
    def shown(self, frame: int) -> bool: ...
    def centre(self, frame: int) -> list[float]: ...
    def box(self, frame: int) -> list[float]: ...


def place_records(
    rng: np.random.Generator,
    video: str,
    things: Sequence[Placed],
    frames: int,
    fps: int,
    *,
    is_test: bool,
) -> dict[str, list[Json]]:
    """Return a clip's records by step: one with all questions, or for tests one per question."""
    asked = one_each if is_test else lambda video, turns: [together(video, turns)]
    shown = [
        (frame, seen)
        for frame in uniform_indices(frames, BANKED)
        if (seen := [thing for thing in things if thing.shown(frame)])
    ]
    stills: list[Json] = []
    for frame, seen in shuffled(rng, shown)[:STILLS]:
        # the still's number becomes a folder in the id, so that ids differ
        rows = asked(f"{video.removesuffix('.mp4')}/still-{frame}", _turns(rng, seen, frame))
        cut = {"video": video, "start": frame / fps, "end": (frame + 1) / fps - 1e-3}
        stills += [{"timeline": [cut]} | _without_video(row) for row in rows]
    middles = [((thing.first + thing.last) // 2, thing) for thing in things]
    turns = [turn for frame, thing in middles for turn in _turns(rng, [thing], frame)]
    moments = [(int(rng.integers(t.first, t.last + 1)), t) for t in things for _ in range(2)]
    at = [turn for frame, thing in moments for turn in _turns(rng, [thing], frame, frame / fps)]
    return {
        "still": stills,
        "clip": asked(video, shuffled(rng, turns)),
        "moment": asked(video, shuffled(rng, at)),
    }


def _turns(
    rng: np.random.Generator, things: Sequence[Placed], frame: int, time: float | None = None
) -> list[Turn]:
    """Return questions for the centre and the box of each object in a frame, shuffled."""
    at = "" if time is None else f" at {seconds(time)}"
    turns = [
        turn
        for thing in things
        for turn in (
            Turn("point", f"Where is the {thing.name}{at}?", places(thing.centre(frame))),
            Turn("box", f"Give the box of the {thing.name}{at}.", places(thing.box(frame))),
        )
    ]
    return shuffled(rng, turns)


def _without_video(row: Json) -> Json:
    return {name: value for name, value in row.items() if name != "video"}
