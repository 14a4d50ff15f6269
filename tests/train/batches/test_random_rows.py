"""Random records of any media through plan and loader, against rows that are made by hand.

pytest tests/train/batches/test_random_rows.py
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.batch import Batch
from model.lape.tokens import LapeTokens
from model.vlm import VLMConfig
from shards.format.features import FeatureConfig
from train.batches.chat import MEDIA, Chat, Encoded
from train.batches.loader import Loader
from train.batches.plan import plan_run
from train.data.dataset import open_dataset
from train.data.records import Turn
from train.settings.config import TrainConfig
from train.start.templates import load_with_template

CELLS = {2: (4, 3), 4: (2, 2)}
CLIPS: dict[str, tuple[float, float, list[float]]] = {
    "a.mp4": (0.0, 3.6, [0.1 + 0.5 * k for k in range(7)]),
    "b.mp4#4-7": (4.0, 7.0, [4.0, 4.25, 5.5, 6.9]),
    "c.mp4": (0.0, 12.0, [float(k) for k in range(12)]),
    "d.jpg": (0.0, 0.0, [0.0]),
}
"""Start, end, and times of the banked frames."""
PARTS = (
    {"video": "a.mp4", "start": 0.5, "end": 2.0},
    {"video": "b.mp4#4-7"},
    {"video": "a.mp4", "end": 1.0},
    {"video": "d.jpg", "end": 1.5},
    {"video": "c.mp4", "start": 3, "end": 7.5},
)
RECORDS = 30
Arrays = dict[str, dict[int, np.ndarray]]
Row = dict[str, Any]


@dataclass
class Frame:
    clip: str
    index: int
    """Banked frame."""
    seconds: float
    """On the medium's clock."""
    stride: int
    share: float = 0.0
    first: int = 0
    """Place of its first token."""

    @property
    def tokens(self) -> int:
        return math.prod(CELLS[self.stride]) + 1


@dataclass
class Place:
    id: int
    """-1 at frames."""
    record: int
    turn: int
    """0 where all turns see it."""
    frame: int
    before: int
    """The place that predicts it."""
    position: int
    supervised: bool = False


@dataclass
class Made:
    """A row by hand."""

    places: list[Place]
    frames: list[Frame]
    coords: dict[int, float]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        id_: {s: rng.normal(size=(len(times), *CELLS[s], 5)).astype(np.float16) for s in CELLS}
        for id_, (_, _, times) in CLIPS.items()
    }


@pytest.fixture(scope="module")
def banks(
    make_bank: Callable[..., Path], features: FeatureConfig, arrays: Arrays, tmp_path_factory: Any
) -> list[str]:
    """A bank of each clip."""
    folder = tmp_path_factory.mktemp("random")
    config = replace(features, strides=(2, 4))
    made = []
    for k, (id_, (start, end, times)) in enumerate(CLIPS.items()):
        meta = {"start": start, "end": end, "timestamps": times, "path": id_.partition("#")[0]}
        own = {id_: arrays[id_]}
        made.append(str(make_bank(folder / str(k), own, config=config, width=5, meta=meta)))
    return made


# -- random rows


def drawn_row(rng: random.Random, number: int, *, apart: bool) -> Row:
    """Return a row of several clips, of a timeline, or of text alone."""
    row: Row = {"id": str(number)}
    kind = rng.choice(["several", "several", "timeline", "text"])
    if kind == "several":
        row["video"] = [rng.choice(list(CLIPS)) for _ in range(rng.choice([1, 1, 2, 3]))]
    elif kind == "timeline":
        row["timeline"] = [rng.choice(PARTS) for _ in range(rng.choice([1, 2, 3]))]
    media, rounds = media_of(row), rng.choice([1, 2, 3])
    texts, shown = list[str](), 0
    for k in range(rounds):
        left = len(media) - shown
        # independent turns have all media in front of the first question
        here = left if apart or k == rounds - 1 else rng.randint(0, left)
        shown += here
        tags = "".join(rng.choice(["<video>", "<video>\n", "<image> "]) for _ in range(here))
        seconds = duration_of(media[max(shown - 1, 0)]) if media else 0.0
        times = [0.0, seconds, seconds / 3, round(rng.random() * seconds, 2)]
        marks = [f"<t:{rng.choice(times):.4f}>"] if seconds else []
        marks += [f"<x:{rng.choice([0, 1, 0.25])}><y:{rng.choice([0, 1, 0.999])}>"]
        words = ["When is it", "in", "really?", *marks]
        rng.shuffle(words)
        before = "" if apart or rng.random() < 0.5 else "So "
        texts.append(f"{before}{tags}{' '.join(words)}")
        texts.append(rng.choice(["no", f"at {marks[0]}", f"{marks[-1]} yes"]))
    talk = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    system = [{"from": "system", "value": "Be brief."}] if rng.random() < 0.3 else []
    return row | {"conversations": [*system, *talk]}


def media_of(row: Row) -> list[list[dict[str, Any]]]:
    """Return the media of a row, each as its parts."""
    if "timeline" in row:
        return [row["timeline"]]
    return [[{"video": id_}] for id_ in row.get("video", [])]


def bounds_of(part: dict[str, Any]) -> tuple[float, float]:
    """Return the start and end of a part, in seconds of its clip."""
    start, end, _ = CLIPS[part["video"]]
    return part.get("start", 0.0), part.get("end", end - start)


def duration_of(medium: Sequence[dict[str, Any]]) -> float:
    return sum(end - start for start, end in map(bounds_of, medium))


# -- rows by hand


def frames_of(medium: Sequence[dict[str, Any]], most: int, config: TrainConfig) -> list[Frame]:
    """Return the frames of a medium that are used."""
    line, begin = list[tuple[str, int, float]](), 0.0
    for part in medium:
        (start, end), (clip_start, clip_end, times) = bounds_of(part), CLIPS[part["video"]]
        for k, time in enumerate(times):
            since = time - clip_start
            if clip_start == clip_end or start <= since < end:
                line.append((part["video"], k, begin + since - start))
        begin += end - start
    count = min(most, len(line))
    chosen = [line[k * (len(line) - 1) // max(count - 1, 1)] for k in range(count)]
    ratio, strategy = Fraction(config.slow_frame_ratio), config.frame_sampling_strategy
    slow = math.ceil(ratio * count)
    if strategy == "interleave":
        on = {k for k in range(count) if math.ceil((k + 1) * ratio) > math.ceil(k * ratio)}
    elif strategy == "first_slow":
        on = set(range(slow))
    else:
        on = {k * (count - 1) // max(slow - 1, 1) for k in range(slow)}
    share = 1 / begin if begin else 0.0
    return [
        Frame(*own, 2 if k in on else 4, own[2] * share if begin else 0.0)
        for k, own in enumerate(chosen)
    ]


def conversations_of(row: Row, *, apart: bool) -> list[list[Turn]]:
    """Return the conversation of a row; of independent turns, that of each question alone."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    said = [Turn(roles[turn["from"]], turn["value"]) for turn in row["conversations"]]
    system = said[: said[0].role == "system"]
    rounds = said[len(system) :]
    if not apart or len(rounds) == 2:
        return [said]
    first = rounds[0].text
    end = max(first.rfind("<video>") + 7, first.rfind("<image>") + 7) if media_of(row) else 0
    end += len(first[end:]) - len(first[end:].lstrip()) if end else 0
    later = [
        [*system, Turn("user", first[:end] + rounds[k].text), rounds[k + 1]]
        for k in range(2, len(rounds), 2)
    ]
    return [[*system, *rounds[:2]], *later]


def pieces_of(
    encoded: Encoded, media: Sequence[Sequence[Frame]], stamped: Callable[[float], list[int]]
) -> Iterator[tuple[int, Frame | None, int]]:
    """Yield (id or -1, frame or None, place in the encoded conversation) of each token or frame."""
    waiting = iter(media)
    for k, id_ in enumerate(encoded.ids):
        if id_ != MEDIA:
            yield id_, None, k
            continue
        for frame in next(waiting):
            for token in stamped(frame.seconds):
                yield token, None, k
            yield -1, frame, k


def add_record(
    made: Made, row: Row, number: int, most: int, config: TrainConfig, chat: Chat
) -> None:
    """Add a record to a row."""
    apart = config.turns == "independent"
    media = [frames_of(medium, most, config) for medium in media_of(row)]
    durations = [duration_of(medium) for medium in media_of(row)]
    talks, begin = conversations_of(row, apart=apart), len(made.places)

    def stamped(seconds: float) -> list[int]:
        if config.frame_time == "none":
            return []
        text = f"{seconds:.1f}s"
        return list(chat.tokenizer(text, add_special_tokens=False).input_ids)

    for number_of_turn, talk in enumerate(talks, start=1):
        encoded = chat.encode(talk, durations)
        last = max((k for k, id_ in enumerate(encoded.ids) if id_ == MEDIA), default=-1)
        before, position = -1, 0
        for id_, frame, k in pieces_of(encoded, media, stamped):
            shared = len(talks) == 1 or k <= last
            size = frame.tokens if frame else 1
            if shared and number_of_turn > 1:  # they are there already
                position += size
                before = begin + position - 1
                continue
            if frame:
                made.frames.append(replace(frame, first=len(made.places)))
            if not frame and encoded.axis[k] >= 0 and encoded.ids[k] != MEDIA:
                made.coords[len(made.places)] = encoded.coord[k]
            for _ in range(size):
                turn, own = 0 if shared else number_of_turn, len(made.frames) - 1 if frame else -1
                on = encoded.ids[k] != MEDIA and encoded.supervised[k]
                made.places.append(Place(id_, number, turn, own, before, position, on))
                before, position = len(made.places) - 1, position + 1


# -- what the loader makes of them


def seen_by_hand(places: Sequence[Place]) -> np.ndarray:
    """Return who sees whom: bool `(queries, keys)`."""
    columns = [(p.record, p.turn, p.frame) for p in places]
    record, turn, frame = np.asarray(columns).T
    number = np.arange(len(places))
    earlier = number <= number[:, None]
    in_frame = (frame == frame[:, None]) & (frame >= 0)
    own_turn = (turn == 0) | (turn == turn[:, None])
    seen: np.ndarray = (record == record[:, None]) & (earlier | in_frame) & own_turn
    return seen


def seen_in(batch: Batch, row: int, length: int) -> np.ndarray:
    """Return who sees whom in a row of a batch."""
    keys = np.arange(length)
    bounds = [batch.mask_start, batch.mask_end, *(batch.others or ())]
    start, end, *others = (bound[row, :length, None].numpy() for bound in bounds)
    seen: np.ndarray = (keys >= start) & (keys < end)
    return seen & ((keys < others[0]) | (keys >= others[1])) if others else seen


def assert_row(batch: Batch, row: int, made: Made, arrays: Arrays) -> None:
    places, length = made.places, batch.input_ids.shape[1]
    assert int(batch.lengths[row]) == len(places)
    ids = batch.input_ids[row].tolist()
    assert all(place.id in (-1, id_) for place, id_ in zip(places, ids, strict=False))
    found = batch.position_ids[row, : len(places)].tolist()
    assert found == [place.position for place in places]
    on = np.flatnonzero(batch.axis[row].numpy() >= 0).tolist()
    assert {k: float(batch.coord[row, k]) for k in on} == pytest.approx(made.coords, abs=1e-6)
    assert np.array_equal(seen_in(batch, row, len(places)), seen_by_hand(places))
    learned = [
        (place % length, label)
        for place, label in zip(batch.predict_index.tolist(), batch.labels.tolist(), strict=True)
        if place // length == row
    ]
    assert learned == [(place.before, place.id) for place in places if place.supervised]
    # -- frames: places, features, and times for LAPE
    every = [(g, k, g.token_index[k].tolist()) for g in batch.groups for k in range(len(g.time))]
    own = sorted((one for one in every if one[2][0] // length == row), key=lambda one: one[2])
    for (group, k, cells), frame in zip(own, made.frames, strict=True):
        first = row * length + frame.first
        assert cells == list(range(first, first + frame.tokens - 1))
        assert int(group.end_index[k]) == first + frame.tokens - 1
        stored = arrays[frame.clip][frame.stride][frame.index]
        assert np.array_equal(group.features[k].numpy(), stored)
        assert float(group.time[k]) == pytest.approx(frame.share, abs=1e-6)


CASES: list[dict[str, Any]] = [
    {},
    {"frame_time": "text", "frame_sampling_strategy": "uniform", "slow_frame_ratio": "0.4"},
    {"enable_lape": False, "frame_sampling_strategy": "first_slow", "slow_frame_ratio": "0.3"},
    {"turns": "independent", "frame_time": "text", "max_frames_num": 3},
    {"turns": "independent", "pack_tokens": 700, "slow_frame_ratio": "1"},
    {"pack_tokens": 900, "max_tokens": 300, "frame_time": "text", "max_frames_num": 12},
    {"turns": "independent", "pack_tokens": 600, "max_tokens": 250, "slow_frame_ratio": "0"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_those_made_by_hand(
    toy: Path,
    banks: list[str],
    arrays: Arrays,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: dict[str, Any],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = random.Random(str(case))
    apart = case.get("turns") == "independent"
    rows = [drawn_row(rng, k, apart=apart) for k in range(RECORDS)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"stage_path": str(toy / "llm"), "bank": banks, "data_path": [str(data)]}
    sizes = {"num_temporal_tokens": 20, "num_spatial_tokens": 20, "max_frames_num": 6}
    config = TrainConfig(**{**given, **sizes, "frame_time": "none", **case})
    dataset = open_dataset(config)
    plan = plan_run(config, dataset, 4)
    names = ("frame_sampling_strategy", "slow_frame_ratio", "max_frames_num", "frame_time")
    vlm = VLMConfig(slow_stride=2, fast_stride=4, **{n: getattr(config, n) for n in names})
    tokenizer = load_with_template(config.stage_path, "")
    anchors = LapeTokens.add_to(tokenizer, 20, 20) if config.enable_lape else None
    chat = Chat(tokenizer, anchors, frames=(vlm.time_form, vlm.around_frames))
    loader = Loader(dataset, chat, vlm)
    used = []
    for step in range(plan.num_steps):
        for pack in range(int(plan.num_packs[step])):
            batch = loader.pack(plan, step, pack)
            for place, records in enumerate(plan.pack(step, pack)):
                made = Made([], [], {})
                for number, k in enumerate(records):
                    row = rows[int(dataset.record(k).id)]
                    add_record(made, row, number, int(plan.frames[k]), config, chat)
                assert_row(batch, place, made, arrays)
                used += records
    left_out = [k for own in plan.left_out.values() for k in own.tolist()]
    assert sorted([*used, *left_out]) == list(range(RECORDS))
    assert len(used) > RECORDS // 2
