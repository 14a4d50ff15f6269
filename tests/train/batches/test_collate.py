"""Rows and batches against a slow construction, token by token, from what stock tools read."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from model.batch import FAST, SLOW, Batch
from model.vlm import VLMConfig
from shards.format.features import FeatureConfig
from shards.read.bank import ClipInfo
from shards.read.banks import Banks
from train.batches.chat import MEDIA, Chat, Encoded
from train.batches.collate import choose_frames, collate, lay_out
from train.data.records import Turn

LENGTHS = {"a.mp4": 5, "b.mp4": 1, "c.mp4": 8, "dir/d.mp4": 5}
CELLS = {2: (4, 3), 4: (2, 2)}
TALKS = [
    (("a.mp4",), ["<video>\nWhen?", "from <t:0.25> to <t:0.5>", "Where?", "<x:0.5>"]),
    ((), ["Who is there?", "nobody at all"]),
    (("b.mp4",), ["Before <image> it?", "yes"]),
    (("c.mp4", "a.mp4", "dir/d.mp4"), ["<video><video> and", "well", "<image> <t:0.1>", "no"]),
]
PATTERNS = [  # strategy, ratio, most frames, and by number of frames which are slow
    ("interleave", "0.5", 16, {1: "S", 5: "SFSFS", 8: "SFSFSFSF"}),
    ("interleave", "0.25", 16, {1: "S", 5: "SFFFS", 8: "SFFFSFFF"}),
    ("first_slow", "0.5", 16, {1: "S", 5: "SSSFF", 8: "SSSSFFFF"}),
    ("uniform", "0.4", 16, {1: "S", 5: "SFFFS", 8: "SFSFSFFS"}),
    ("interleave", "0", 16, {1: "F", 5: "FFFFF", 8: "FFFFFFFF"}),
    ("first_slow", "1", 16, {1: "S", 5: "SSSSS", 8: "SSSSSSSS"}),
    ("interleave", "0.5", 3, {1: "S", 5: "SFS", 8: "SFS"}),
]
CHOSEN = {  # most frames -> frames of a clip -> those taken
    16: {n: list(range(n)) for n in (1, 5, 8)},
    3: {1: [0], 5: [0, 2, 4], 8: [0, 3, 7]},
}


@dataclass
class World:
    banks: Banks
    stored: dict[str, dict[int, np.ndarray]]
    """Features as stock webdataset and NumPy read them."""


@pytest.fixture(scope="module")
def world(
    make_bank: Callable[..., Path],
    features: FeatureConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    rng = np.random.default_rng(0)
    arrays = {
        id_: {s: rng.normal(size=(n, *CELLS[s], 7)).astype(np.float16) for s in CELLS}
        for id_, n in LENGTHS.items()
    }
    ids = list(arrays)
    out = make_bank(
        tmp_path_factory.mktemp("packing") / "bank",
        {id_: arrays[id_] for id_ in ids[:2]},
        {id_: arrays[id_] for id_ in ids[2:]},
        config=replace(features, strides=(2, 4)),
    )
    stored = {}
    for shard in sorted((out / "shards").glob("*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            stored[json.loads(sample["json"])["id"]] = {
                stride: np.load(io.BytesIO(sample[f"stride{stride}.npy"])) for stride in CELLS
            }
    assert set(stored) == set(LENGTHS)
    return World(Banks.open([out]), stored)


@pytest.fixture(scope="module")
def chat(make_tokenizer: Callable[[], Any]) -> Chat:
    return Chat(make_tokenizer(), None)


def config_of(strategy: str, ratio: str, most: int, attention: str = "block") -> VLMConfig:
    return VLMConfig(
        slow_stride=2,
        fast_stride=4,
        frame_sampling_strategy=strategy,
        slow_frame_ratio=ratio,
        max_frames_num=most,
        frame_attention=attention,
    )


def encode(world: World, chat: Chat) -> list[Encoded]:
    return [
        chat.encode(
            [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)],
            [world.banks.clip(id_).info.duration for id_ in clips],
        )
        for clips, texts in TALKS
    ]


def make(world: World, chat: Chat, config: VLMConfig, *, with_copy: bool = True) -> Batch:
    clips = [[world.banks.clip(id_) for id_ in ids] for ids, _ in TALKS]
    rows = [
        lay_out(encoded, [clip.info for clip in own], config, "average")
        for encoded, own in zip(encode(world, chat), clips, strict=True)
    ]
    return collate(rows, clips, config, [str(k) for k in range(len(TALKS))], with_copy=with_copy)


@dataclass
class Token:
    """What the slow construction says of one place in a row."""

    id: int | None = None
    supervised: bool = False
    frame: int | None = None
    """Number of the frame in the row."""
    clip: str = ""
    place: int = -1
    """Number of the clip in the row."""
    index: int = -1
    """Banked frame."""
    cell: tuple[int, int] | None = None
    """None at a frame's closing token."""
    slow: bool = False


def slow_rows(world: World, chat: Chat, most: int, patterns: dict[int, str]) -> list[list[Token]]:
    rows = []
    for (clips, _), encoded in zip(TALKS, encode(world, chat), strict=True):
        row: list[Token] = []
        place = number = 0
        for id_, on in zip(encoded.ids, encoded.supervised, strict=True):
            if id_ != MEDIA:
                row.append(Token(id_, on))
                continue
            clip = clips[place]
            for index, letter in zip(
                CHOSEN[most][LENGTHS[clip]], patterns[LENGTHS[clip]], strict=True
            ):
                slow = letter == "S"
                height, width = CELLS[2 if slow else 4]
                cells = [(y, x) for y in range(height) for x in range(width)]
                row += [
                    Token(None, False, number, clip, place, index, cell, slow)
                    for cell in [*cells, None]
                ]
                number += 1
            place += 1
        rows.append(row)
    return rows


@pytest.mark.parametrize(("strategy", "ratio", "most", "patterns"), PATTERNS)
def test_every_place_of_a_batch_is_what_a_slow_construction_says(
    world: World, chat: Chat, strategy: str, ratio: str, most: int, patterns: dict[int, str]
) -> None:
    batch = make(world, chat, config_of(strategy, ratio, most))
    rows = slow_rows(world, chat, most, patterns)
    length = batch.input_ids.shape[1]
    assert batch.lengths.tolist() == [len(row) for row in rows]
    assert length == max(map(len, rows))
    cells, ends = {}, {}
    for group in batch.groups:
        for k, (places, end) in enumerate(zip(group.token_index, group.end_index, strict=True)):
            ends[end.item()] = (group.stream, group.time[k].item(), group.timed[k].item())
            vectors = group.features[k].flatten(0, 1)
            for place, vector in zip(places.tolist(), vectors, strict=True):
                assert place not in cells
                cells[place] = (group.stream, vector)
    expected_cells = expected_ends = 0
    for number, row in enumerate(rows):
        for position, token in enumerate(row):
            flat = number * length + position
            if token.frame is None:
                assert batch.input_ids[number, position].item() == token.id
                assert flat not in cells
                assert flat not in ends
                continue
            stream = SLOW if token.slow else FAST
            info = world.banks.clip(token.clip).info
            if token.cell is None:
                expected_ends += 1
                # toy clips show a frame every 1/8 s and end 1/8 s after the last one
                u = np.float32(token.index / 8 / (LENGTHS[token.clip] / 8))
                assert ends[flat] == (stream, u, 1.0)
                assert info.start == 0
                continue
            expected_cells += 1
            stored = world.stored[token.clip][2 if token.slow else 4]
            assert cells[flat][0] == stream
            assert cells[flat][1].numpy().tobytes() == stored[token.index][token.cell].tobytes()
    assert (len(cells), len(ends)) == (expected_cells, expected_ends)


@pytest.mark.parametrize("attention", ["block", "token"])
def test_text_sees_what_came_before_and_frames_see_themselves(
    world: World, chat: Chat, attention: str
) -> None:
    strategy, ratio, most, patterns = PATTERNS[0]
    batch = make(world, chat, config_of(strategy, ratio, most, attention))
    for number, row in enumerate(slow_rows(world, chat, most, patterns)):
        for position, token in enumerate(row):
            last = position
            if token.frame is not None and attention == "block":
                last = max(k for k, other in enumerate(row) if other.frame == token.frame)
            seen = (batch.mask_start[number, position], batch.mask_end[number, position])
            assert (seen[0].item(), seen[1].item()) == (0, last + 1)
        assert batch.position_ids[number].tolist() == list(range(batch.input_ids.shape[1]))


def test_each_supervised_token_is_predicted_from_the_place_before_it(
    world: World, chat: Chat
) -> None:
    strategy, ratio, most, patterns = PATTERNS[0]
    batch = make(world, chat, config_of(strategy, ratio, most))
    length = batch.input_ids.shape[1]
    expected = [
        (number * length + position - 1, token.id)
        for number, row in enumerate(slow_rows(world, chat, most, patterns))
        for position, token in enumerate(row)
        if token.supervised
    ]
    found = list(zip(batch.predict_index.tolist(), batch.labels.tolist(), strict=True))
    assert found == expected
    assert len(set(batch.lengths.tolist())) > 1, "some rows are padded"
    for place, _ in found:
        assert place % length + 1 < batch.lengths[place // length], "padding is never supervised"


def test_coordinates_keep_their_axis_and_value_as_labels(
    world: World, make_tokenizer: Callable[[], Any]
) -> None:
    from model.lape.tokens import LapeTokens

    tokenizer = make_tokenizer()
    tokens = LapeTokens.add_to(tokenizer, 20, 30)
    batch = make(world, Chat(tokenizer, tokens), config_of("interleave", "0.5", 16))
    on = batch.label_axis >= 0
    assert batch.label_axis[on].tolist() == [0, 0, 2]
    # a.mp4 has 5 frames of 1/8 s
    assert batch.label_coord[on].tolist() == pytest.approx([0.25 / 0.625, 0.5 / 0.625, 0.5])
    ids = [tokens.token_id(a, c) for a, c in ((0, 0.4), (0, 0.8), (2, 0.5))]
    assert batch.labels[on].tolist() == ids
    assert not batch.label_coord[~on].any()
    # <t:0.1> of the third medium of the last row, dir/d.mp4, is no label
    assert batch.axis[3].max() == 0
    (place,) = torch.nonzero(batch.axis[3] == 0)
    assert batch.coord[3, place].item() == pytest.approx(0.1 / 0.625)


@pytest.mark.parametrize(("strategy", "ratio", "most", "patterns"), PATTERNS)
def test_transitions_join_neighbours_of_one_clip_and_copies_are_the_source_on_the_targets_grid(
    world: World, chat: Chat, strategy: str, ratio: str, most: int, patterns: dict[int, str]
) -> None:
    batch = make(world, chat, config_of(strategy, ratio, most))
    length = batch.input_ids.shape[1]
    expected = set()
    frames = {}
    for number, row in enumerate(slow_rows(world, chat, most, patterns)):
        closing = [(k, token) for k, token in enumerate(row) if token.frame is not None]
        closing = [(k, token) for k, token in closing if token.cell is None]
        frames |= {number * length + k: token for k, token in closing}
        for (a, source), (b, target) in pairwise(closing):
            if source.place == target.place:
                expected.add((number * length + a, number * length + b))
    found = []
    for pairs in batch.transitions:
        source, target = batch.groups[pairs.source], batch.groups[pairs.target]
        starts = source.end_index[pairs.source_frame].tolist()
        ends = target.end_index[pairs.target_frame].tolist()
        found += list(zip(starts, ends, strict=True))
        assert pairs.copy is not None
        for start, copied in zip(starts, pairs.copy, strict=True):
            stride = 2 if target.stream == SLOW else 4
            stored = world.stored[frames[start].clip][stride][frames[start].index]
            assert copied.numpy().tobytes() == stored.tobytes()
    assert len(found) == len(set(found)) == batch.num_transitions
    assert set(found) == expected


def test_without_copy_the_other_stream_is_not_read(world: World, chat: Chat) -> None:
    batch = make(world, chat, config_of("interleave", "0.5", 16), with_copy=False)
    assert batch.transitions
    assert all(pairs.copy is None for pairs in batch.transitions)


def test_a_clip_without_duration_has_no_time(make_clip: Callable[..., Any], chat: Chat) -> None:
    clip = make_clip(frames=1)
    still = replace(clip, info=replace(clip.info, end=0.0))
    encoded = chat.encode([Turn("user", "<image>"), Turn("assistant", "x")], [0.0])
    config = config_of("interleave", "0.5", 16)
    row = lay_out(encoded, [still.info], config, "average")
    (group,) = collate([row], [[still]], config, ["r"]).groups
    assert (group.time.tolist(), group.timed.tolist()) == ([0.0], [0.0])


def test_times_of_a_part_count_from_its_own_start(
    make_clip: Callable[..., Any], chat: Chat
) -> None:
    clip = make_clip(frames=4)
    times = np.asarray([10.0, 10.5, 12.0, 13.9])
    part = replace(clip, info=replace(clip.info, start=10.0, end=14.0, timestamps=times))
    encoded = chat.encode([Turn("user", "<video>"), Turn("assistant", "x")], [4.0])
    config = config_of("first_slow", "1", 16)
    row = lay_out(encoded, [part.info], config, "average")
    (group,) = collate([row], [[part]], config, ["r"]).groups
    assert group.time.tolist() == pytest.approx([0.0, 0.125, 0.5, 0.975])


@given(total=st.integers(1, 200), most=st.integers(1, 64))
def test_fewer_frames_are_taken_evenly_from_first_to_last(total: int, most: int) -> None:
    info = ClipInfo(
        id="a",
        start=0.0,
        end=float(total),
        timestamps=np.arange(total, dtype=np.float64),
        frame_index=np.arange(total),
        display_size=(48, 64),
        patch_grid=(8, 6),
        covered=(0.0, 0.0, 1.0, 1.0),
    )
    chosen = [k for k, _, _ in choose_frames(info, config_of("interleave", "0.5", most), "average")]
    count = min(total, most)
    assert len(chosen) == count
    # each is the frame at or just before its even place
    places = [k * (total - 1) / (count - 1) if count > 1 else 0 for k in range(count)]
    assert all(
        frame <= place + 1e-9 < frame + 1 + 1e-6
        for frame, place in zip(chosen, places, strict=True)
    )
    assert chosen[0] == 0
    assert count == 1 or chosen[-1] == total - 1
