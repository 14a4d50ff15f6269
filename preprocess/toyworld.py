"""Draw a synthetic world whose answers are exact, with tiny models to encode and train on it.

    preprocess toyworld toy --train-clips 384 --test-clips 64 --seed 0

Each clip shows two to four coloured shapes on a muted, textured background. Every object appears,
moves along a straight or bouncing line and vanishes, and no colour occurs twice in a clip, so that
"the red circle" names one object. Written under the given folder:

    videos/{train,test}/clip-00000.mp4   h264, 64x64, 8 frames per second, 4 to 6 seconds
    train.jsonl                          one conversation of several turns per clip
    test.jsonl                           one question per record
    places/{train,test}-still.jsonl ...  questions of place alone, in five steps: see toy_places.py
    tower/  llm/                         a random SigLIP and a random Qwen2 with its tokenizer
    world.json                           the truth about every clip; written last

Frame k of a clip is shown from k / FPS. An object shown in frames a to b is visible from a / FPS to
(b + 1) / FPS. A position is the centre of the shape's box as fractions of the frame, x to the right
and y down, and shapes are drawn at exactly the (rounded) positions that the answers state.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from preprocess.toy_models import SIZE, save_llm, save_tower
from preprocess.toy_places import SLIDES, place_records, slide_records
from preprocess.world import (
    Json,
    Turn,
    bouncing,
    check_empty,
    one_each,
    places,
    seconds,
    shuffled,
    span,
    texts_of,
    together,
    write_rows,
    write_video,
)
from shards.errors import UserError

SPLITS = ("train", "test")
FPS = 8  # times k / 8 are exact in milliseconds
FRAMES = (32, 48)
OBJECTS = (2, 4)
RADIUS = (0.18, 0.26)  # half a box side, as a fraction of the frame
SPAN = (0.17, 0.4)  # visible part of a clip; the best constant answer has IoU 0.33
MAX_SPEED = 0.3  # frame sides per second, along each axis
TURNS_BEYOND_SPANS = 2

# The order is also the order in which "what is seen" lists objects.
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 200, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 230, 0),
}
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    # Signed distance to the outline, negative inside, from offsets (x, y) to the centre, in pixels.
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - r,
    # Apex up; the slanted sides run from (0, -r) to (±r, r).
    "triangle": lambda x, y, r: np.maximum((2 * abs(x) - y - r) / 5**0.5, y - r),
}


@dataclass(frozen=True)
class Thing:
    """One object of a clip."""

    colour: str
    shape: str
    radius: float
    first: int
    """Index of the first frame that shows it; `last` is that of the last one."""
    last: int
    centres: np.ndarray
    """float64 `(last - first + 1, 2)`: x and y in each of its frames, rounded to 4 decimals."""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def span(self) -> tuple[float, float]:
        return self.first / FPS, (self.last + 1) / FPS

    def shown(self, frame: int) -> bool:
        return self.first <= frame <= self.last

    def centre(self, frame: int) -> list[float]:
        return self.centres[frame - self.first].tolist()

    def box(self, frame: int) -> list[float]:
        """Return x1, y1, x2, y2, clipped to the frame."""
        x, y = self.centre(frame)
        corners = x - self.radius, y - self.radius, x + self.radius, y + self.radius
        return [round(min(max(corner, 0.0), 1.0), 4) for corner in corners]


# -- writing a world


def make_toyworld(
    out: Path, *, train_clips: int = 384, test_clips: int = 64, seed: int = 0
) -> None:
    """Write a world into the empty or new folder `out`; equal arguments give equal bytes."""
    if train_clips < 1 or test_clips < 1:
        raise UserError(
            f"a toy world needs at least one clip per split, got {train_clips} and {test_clips}"
        )
    check_empty(out)
    splits = dict(zip(SPLITS, (train_clips, test_clips), strict=True))
    for split in splits:
        (out / "videos" / split).mkdir(parents=True)
    which = [(split, index) for split, count in splits.items() for index in range(count)]
    records: dict[str, list[Json]] = {}
    truth: list[Json] = []
    # x264 and NumPy release the GIL: two threads on two cores draw nearly twice as fast as one.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        clips = pool.map(lambda these: make_clip(out, seed, *these), which)
        for made, described in tqdm(clips, "drawing", len(which), unit="clip"):
            for name, rows in made.items():
                records.setdefault(name, []).extend(rows)
            truth.append(described)
    for number, split in enumerate(SPLITS):
        drawn = [clip for clip in truth if clip["video"].startswith(f"{split}/")]
        for step in SLIDES:
            # a stream of its own, as for a clip's questions of place
            rng = np.random.default_rng([seed, number])
            slides = slide_records(rng, step, drawn, FPS, is_test=split == "test")
            records[f"places/{split}-{step}"] = list(slides)
    (out / "places").mkdir()
    for name, rows in records.items():
        write_rows(out / f"{name}.jsonl", rows)
    logging.disable_progress_bar()  # transformers shows one for each model that it saves
    save_tower(out / "tower", seed)
    save_llm(out / "llm", texts_of(records["train"]), seed)
    world = {"seed": seed, "fps": FPS, "size": SIZE, "colours": COLOURS, "clips": truth}
    (out / "world.json").write_text(json.dumps(world), encoding="utf-8")


def make_clip(out: Path, seed: int, split: str, index: int) -> tuple[dict[str, list[Json]], Json]:
    """Draw one clip; return its records by file and the truth about it.

    It depends on (seed, split, index) alone, not on the number of clips.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    video = f"{split}/clip-{index:05d}.mp4"
    frames = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    things = plan_things(rng, frames)
    write_video(out / "videos" / video, draw(rng, things, frames), FPS)
    ask = train_records if split == "train" else test_records
    records = {split: ask(rng, video, things, frames)}
    # a stream of its own: the questions of place, which came later, change no drawn pixel
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 1])
    steps = place_records(rng, video, things, frames, FPS, is_test=split == "test")
    records |= {f"places/{split}-{step}": rows for step, rows in steps.items()}
    return records, describe(video, things, frames)


# -- what moves in a clip, and its pixels


def plan_things(rng: np.random.Generator, frames: int) -> list[Thing]:
    """Return the objects of a clip in drawing order; none is ever hidden by those drawn over it."""
    count = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
    # no colour twice: a name is one object's
    colours = rng.permutation(list(COLOURS))[:count].tolist()
    things: list[Thing] = []
    # rejection: an object that would hide another is drawn once more
    while len(things) < count:
        thing = plan_thing(rng, colours[len(things)], frames)
        if all(apart(thing, other) for other in things):
            things.append(thing)
    return things


def plan_thing(rng: np.random.Generator, colour: str, frames: int) -> Thing:
    length = round(float(rng.uniform(*SPAN)) * frames)
    first = int(rng.integers(0, frames - length + 1))
    radius = round(float(rng.uniform(*RADIUS)), 4)
    room = 1 - 2 * radius
    path = bouncing(rng, room, MAX_SPEED / FPS, length)
    shape = str(rng.choice(list(SHAPES)))
    return Thing(colour, shape, radius, first, first + length - 1, np.round(path + radius, 4))


def apart(a: Thing, b: Thing) -> bool:
    """Return whether two objects overlap so little that both stay visible.

    Centres kept 1.1 larger radii apart leave both visible, though they still cross at the sides.
    """
    first, last = max(a.first, b.first), min(a.last, b.last)
    if first > last:
        return True
    offset = a.centres[first - a.first : last - a.first + 1]
    offset = offset - b.centres[first - b.first : last - b.first + 1]
    return bool(np.hypot(*offset.T).min() > 1.1 * max(a.radius, b.radius))


def draw(rng: np.random.Generator, things: Sequence[Thing], frames: int) -> np.ndarray:
    """Return the clip, uint8 `(frames, height, width, 3)`; later objects cover earlier ones."""
    tint = rng.uniform(118, 138) + rng.uniform(-6, 6, size=3)
    coarse = Image.fromarray(rng.integers(0, 256, size=(8, 8), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float64)
    grain = rng.normal(0, 4, size=(SIZE, SIZE, 1))
    # grey, textured and noisy: colours of shapes stay clear, and no frame is flat
    ground = tint + (smooth[..., None] / 255 - 0.5) * 50 + grain
    clip = np.repeat(ground[None], frames, axis=0)
    pixel = np.arange(SIZE) + 0.5
    for thing in things:
        x, y = np.moveaxis(thing.centres * SIZE, 1, 0)[..., None, None]  # (frames shown, 1, 1)
        distance = SHAPES[thing.shape](pixel - x, pixel[:, None] - y, thing.radius * SIZE)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]  # (frames shown, height, width, 1)
        part = clip[thing.first : thing.last + 1]
        # antialiased: half a pixel of the outline on either side is blended
        part += cover * (np.array(COLOURS[thing.colour], dtype=np.float64) - part)
    return np.clip(np.rint(clip), 0, 255).astype(np.uint8)


def describe(video: str, things: Sequence[Thing], frames: int) -> Json:
    """Return the whole truth about a clip, objects in drawing order."""
    objects = [
        {
            "name": thing.name,
            "frames": [thing.first, thing.last],
            "span": thing.span,
            "centres": thing.centres.tolist(),
            "boxes": [thing.box(frame) for frame in range(thing.first, thing.last + 1)],
        }
        for thing in things
    ]
    return {"video": video, "frames": frames, "duration": frames / FPS, "objects": objects}


# -- questions with exact answers


def train_records(
    rng: np.random.Generator, video: str, things: Sequence[Thing], frames: int
) -> list[Json]:
    """Return the clip's one record: the span of every object and some other questions, shuffled.

    Shuffled, because a model does not answer a kind of question as the first turn (as in tests) if it
    never saw it as one.
    """
    spans = [ask_span(thing) for thing in things]
    others = [ask_place(rng, thing, task) for thing in things for task in ("point", "box")]
    others += [ask_seen(rng, things, frames) for _ in range(2)]
    others += [*ask_first(rng, things), ask_count(things)]
    turns = shuffled(rng, spans + shuffled(rng, others)[:TURNS_BEYOND_SPANS])
    return [together(video, turns)]


def test_records(
    rng: np.random.Generator, video: str, things: Sequence[Thing], frames: int
) -> list[Json]:
    """Return one record per question: the span of every object, and one question of other kinds."""
    turns = [ask_span(thing) for thing in shuffled(rng, things)]
    turns += [ask_place(rng, shuffled(rng, things)[0], task) for task in ("point", "box")]
    turns += [ask_seen(rng, things, frames), *ask_first(rng, things), ask_count(things)]
    return one_each(video, turns)


def ask_span(thing: Thing) -> Turn:
    return Turn("span", f"When is the {thing.name} visible?", span(*thing.span))


def ask_place(rng: np.random.Generator, thing: Thing, task: str) -> Turn:
    frame = int(rng.integers(thing.first, thing.last + 1))
    when = seconds(frame / FPS)
    if task == "point":
        return Turn(task, f"Where is the {thing.name} at {when}?", places(thing.centre(frame)))
    return Turn(task, f"Give the box of the {thing.name} at {when}.", places(thing.box(frame)))


def ask_seen(rng: np.random.Generator, things: Sequence[Thing], frames: int) -> Turn:
    """Ask at a frame away from all changes; no, one and several visible objects are equally likely."""
    edges = [edge for thing in things for edge in (thing.first, thing.last + 1)]
    shown = [sum(thing.shown(k) for thing in things) for k in range(frames)]
    # At most 8 edges rule out at most 24 of at least 32 frames.
    clear = [k for k in range(frames) if min(abs(k - edge) for edge in edges) > 1]
    # the number first, then a frame: by frame most answers would be of one number
    number = rng.choice(sorted({shown[k] for k in clear}))
    frame = int(rng.choice([k for k in clear if shown[k] == number]))
    in_order = sorted(things, key=lambda thing: list(COLOURS).index(thing.colour))
    names = [thing.name for thing in in_order if thing.shown(frame)]
    return Turn("seen", f"What is seen at {seconds(frame / FPS)}?", ", ".join(names) or "nothing")


def ask_first(rng: np.random.Generator, things: Sequence[Thing]) -> list[Turn]:
    """Return one question, or none where no two objects appear half a second apart."""
    for a in shuffled(rng, things):
        for b in shuffled(rng, things):
            if abs(a.first - b.first) >= FPS // 2:
                question = f"Which comes first, the {a.name} or the {b.name}?"
                return [Turn("first", question, min(a, b, key=lambda thing: thing.first).name)]
    return []


def ask_count(things: Sequence[Thing]) -> Turn:
    return Turn("count", "How many objects are there?", str(len(things)))
