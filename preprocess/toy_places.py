"""Questions of place about a toy world, in steps from easy to hard.

    still    where an object is in one banked frame, the only one shown
    pair     where it is at a given time, in two such frames of different clips, one after the other
    slides   the same in two to eight
    clip     where it is in a clip, in the middle of the time that it is visible
    moment   where it is in a clip at a given time; to train on, beside the questions of `clip`

Trained all at once, or on few clips, none of them is learned; `train/presets/evidence/space.yaml` trains
them step by step. Slides teach to look at the time: every slide shows the object, elsewhere in each, so
that an answer without the time is far off. In a clip it moves so little that such an answer is nearly
right, and a model that has learned that does not get past it. Questions without a time teach to look for
the name: with times alone, a model that looks at the right frame answers with another object that is
there. Stills and slides are frames cut from the bank, so the bank must hold the clip's BANKED frames.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from model.slow_fast import uniform_indices
from preprocess.world import Json, Turn, one_each, places, seconds, shuffled, together

STEPS = ("still", "pair", "slides", "clip", "moment")
BANKED = 16
"""Frames that `preprocess encode --frames 16` takes of a clip."""
STILLS = 2
"""Stills per clip."""
SLIDES = {"pair": (2, 2), "slides": (2, 8)}
"""Fewest and most slides of a record."""


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
    """Return a clip's records, without slides: one with all questions, or for tests one per question."""
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
        stills += [_cut_from_bank(row, [_cut(video, frame, fps)]) for row in rows]
    middles = [((thing.first + thing.last) // 2, thing) for thing in things]
    turns = [turn for frame, thing in middles for turn in _turns(rng, [thing], frame)]
    moments = [(int(rng.integers(t.first, t.last + 1)), t) for t in things for _ in range(2)]
    at = [turn for frame, thing in moments for turn in _turns(rng, [thing], frame, frame / fps)]
    turns, at = shuffled(rng, turns), shuffled(rng, at)
    return {
        "still": stills,
        "clip": asked(video, turns),
        "moment": asked(video, at if is_test else [*at, *turns]),
    }


def slide_records(
    rng: np.random.Generator, step: str, clips: Sequence[Json], fps: int, *, is_test: bool
) -> Iterator[Json]:
    """Yield records of as many media as there are clips: slides of objects of one name.

    In a world of few clips they are of one clip. step: of `SLIDES`. clips: as `world.json` has them.
    """
    shown: dict[str, list[tuple[str, int, Json]]] = defaultdict(list)
    for clip in clips:
        banked = uniform_indices(clip["frames"], BANKED)
        for thing in clip["objects"]:
            first, last = thing["frames"]
            shown[thing["name"]] += [
                (clip["video"], k, thing) for k in banked if first <= k <= last
            ]
    for clip in clips:
        name = rng.choice([thing["name"] for thing in clip["objects"]])
        least, most = SLIDES[step]
        count = min(int(rng.integers(least, most + 1)), len(shown[name]))
        slides = [shown[name][i] for i in rng.choice(len(shown[name]), count, replace=False)]
        cuts = [_cut(video, frame, fps) for video, frame, _ in slides]
        edges = np.cumsum([0.0, *(cut["end"] - cut["start"] for cut in cuts)])
        turns = []
        for (_, frame, thing), (start, end) in zip(slides, pairwise(edges), strict=True):
            # in the first half: a slide's time is its start, and later ones are nearer to the next
            at = f" at {seconds(start + rng.uniform(0.1, 0.5) * (end - start))}"
            index = frame - thing["frames"][0]
            turns.append(
                _ask_point(name, at, thing["centres"][index])
                if rng.random() < 0.5
                else _ask_box(name, at, thing["boxes"][index])
            )
        id_ = f"{clip['video'].removesuffix('.mp4')}/{step}"
        turns = shuffled(rng, turns)
        rows = one_each(id_, turns) if is_test else [together(id_, turns)]
        yield from (_cut_from_bank(row, cuts) for row in rows)


def _turns(
    rng: np.random.Generator, things: Sequence[Placed], frame: int, time: float | None = None
) -> list[Turn]:
    """Return questions for the centre and the box of each object in a frame, shuffled."""
    at = "" if time is None else f" at {seconds(time)}"
    turns = [
        turn
        for thing in things
        for turn in (
            _ask_point(thing.name, at, thing.centre(frame)),
            _ask_box(thing.name, at, thing.box(frame)),
        )
    ]
    return shuffled(rng, turns)


def _ask_point(name: str, at: str, centre: Sequence[float]) -> Turn:
    return Turn("point", f"Where is the {name}{at}?", places(centre))


def _ask_box(name: str, at: str, box: Sequence[float]) -> Turn:
    return Turn("box", f"Give the box of the {name}{at}.", places(box))


def _cut(video: str, frame: int, fps: int) -> Json:
    return {"video": video, "start": frame / fps, "end": (frame + 1) / fps - 1e-3}


def _cut_from_bank(row: Json, timeline: list[Json]) -> Json:
    return {"timeline": timeline} | {name: value for name, value in row.items() if name != "video"}
