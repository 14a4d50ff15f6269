"""Encoded conversations and banked features -> the model's batch.

A row holds one conversation or, packed, several: each has positions from 0 and sees only itself, by the
row's sample and frame numbers. Positions of independent turns each go on from the end of the tokens that
they share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.batch import (
    FAST,
    SLOW,
    Batch,
    FrameGroup,
    Transitions,
    flat_places,
    joined,
    padded_rows,
    pooled,
)
from model.family.mrope import mrope_rows
from model.grid import Grid
from model.mask import intervals, other_turns, places_before
from model.slow_fast import slow_frames, uniform_indices
from model.vlm import VLMConfig
from shards.read.bank import ClipInfo
from shards.read.timeline import ClipFeatures, Medium, part_count, parts_of, place_of
from train.batches.augment import Look
from train.batches.chat import MEDIA, Encoded, Stamp
from train.batches.turns import counted_on, numbered


@dataclass(frozen=True)
class PlacedFrame:
    """A frame in a row: its clip, its stream, and the place of its tokens."""

    clip: int
    """Index of the clip among those of the row; each part of a medium counts as a clip."""
    medium: int
    """The clip that its medium begins with."""
    frame: int
    """Index into the banked frames of the clip, or of the part."""
    stream: int
    grid: Grid
    first: int
    """Place of its first token in the row."""
    tokens: int
    """Number of its cells, with the closing token where frames have one."""
    seconds: float
    """Its time on the clock of its medium."""


@dataclass(frozen=True)
class Row:
    """Conversations as tokens; the arrays have one entry per token."""

    ids: np.ndarray
    axis: np.ndarray
    coord: np.ndarray
    supervised: np.ndarray
    block: np.ndarray
    """Number of the frame in the row that a token belongs to, -1 for text."""
    sample: np.ndarray
    """Number of the conversation in the row."""
    position: np.ndarray
    """Place within the conversation."""
    frames: list[PlacedFrame]
    clips: int
    """Number of clips of all conversations together, each part of a medium counted."""
    newlines: tuple[int, ...] = ()
    """Places of the tokens that close media, where media have one."""
    turn: np.ndarray | None = None
    """Number of each token's independent turn, from 1; 0 for tokens that all turns see. None: all 0."""

    def __len__(self) -> int:
        return len(self.ids)


def choose_frames(
    info: ClipInfo,
    config: VLMConfig,
    pool: str,
    most: int | None = None,
    look: Look | None = None,
) -> list[tuple[int, int, Grid]]:
    """Return (index, stream, grid) of each frame of a medium that the model takes, in order of time.

    most: frames at most, where the record's length allows fewer than the config. look: the choice of
    frames where it is drawn, see `augment`.
    """
    total, most = len(info.timestamps), most or config.max_frames_num
    # pooling after the projector is bilinear, whatever the bank's is
    mode = "bilinear" if config.pool_after_projector else pool
    if look is None:
        chosen = uniform_indices(total, most)
        slow = slow_frames(config.frame_sampling_strategy, config.slow_frame_ratio, len(chosen))
    else:
        chosen, slow = look.choose(total, most)
    strides = {SLOW: config.slow_stride, FAST: config.fast_stride}
    frames = []
    for frame, is_slow in zip(chosen, slow, strict=True):
        stream = SLOW if is_slow else FAST
        rows, cols = place_of(info, frame)[2].patch_grid
        frames.append((frame, stream, Grid(rows, cols, strides[stream] * config.pooled, mode)))
    return frames


def lay_out(
    encoded: Encoded,
    infos: Sequence[ClipInfo],
    config: VLMConfig,
    pool: str,
    most: int | None = None,
    stamp: Stamp | None = None,
    looks: Sequence[Look] | None = None,
) -> Row:
    """Return the row of a conversation: every medium becomes its frames' cells and closing tokens.

    stamp: the tokens of times before frames, which are not supervised. looks: of each medium.
    """
    columns: list[list[Any]] = [[], [], [], [], []]
    ids, axis, coord, supervised, block = columns
    frames, newlines, clips = list[PlacedFrame](), list[int](), 0
    talk: list[Sequence[Any]] = [encoded.ids, encoded.axis, encoded.coord, encoded.supervised]

    def add_text(begin: int, end: int | None) -> None:
        for column, own in zip(columns, [*talk, [-1] * len(encoded.ids)], strict=True):
            column.extend(own[begin:end])

    def add_unsupervised(tokens: Sequence[int], frame: int) -> None:
        ids.extend(tokens)
        for column, value in zip(columns[1:], (-1, 0.0, False, frame), strict=True):
            column.extend([value] * len(tokens))

    begin, tags = 0, [place for place, id_ in enumerate(encoded.ids) if id_ == MEDIA]
    assert len(tags) == len(infos), f"{len(infos)} media, {len(tags)} tags"
    assert stamp or not config.time_form
    for tag, info, look in zip(tags, infos, looks or repeat(None), strict=False):
        add_text(begin, tag)
        begin = tag + 1
        for frame, stream, grid in choose_frames(info, config, pool, most, look):
            seconds = float(info.timestamps[frame])
            before, behind = stamp(seconds - info.start) if stamp else ([], [])
            add_unsupervised(before, -1)
            part, own, _ = place_of(info, frame)
            tokens, at = grid.cells + config.closing_tokens, (clips + part, clips, own)
            frames.append(PlacedFrame(*at, stream, grid, len(ids), tokens, seconds))
            add_unsupervised([0] * tokens, len(frames) - 1)
            add_unsupervised(behind, -1)
        clips += part_count(info)
        newlines += [len(ids)] * config.newline_tokens
        add_unsupervised([0] * config.newline_tokens, -1)
    add_text(begin, None)
    turn, position = counted_on(len(ids), [k + len(ids) - len(encoded.ids) for k in encoded.turns])
    return Row(
        ids=np.asarray(ids, np.int64),
        axis=np.asarray(axis, np.int64),
        coord=np.asarray(coord, np.float32),
        supervised=np.asarray(supervised, bool),
        block=np.asarray(block, np.int64),
        sample=np.zeros(len(ids), np.int64),
        position=position,
        frames=frames,
        clips=clips,
        newlines=tuple(newlines),
        turn=turn,
    )


def frames_within(
    encoded: Encoded,
    infos: Sequence[ClipInfo],
    config: VLMConfig,
    pool: str,
    limit: int,
    stamp: Stamp | None = None,
) -> int:
    """Return the most frames of a clip with which a conversation has at most `limit` tokens.

    0 where one frame of each clip is too much. `fitting.fit_frames` finds the same from counts.
    """
    low, high = 0, config.max_frames_num
    while low < high:
        middle = (low + high + 1) // 2 if low else 1
        if len(lay_out(encoded, infos, config, pool, middle, stamp)) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def pack(rows: Sequence[Row]) -> Row:
    """Return one row of conversations one after the other, their clips and frames renumbered."""
    frames: list[PlacedFrame] = []
    samples, blocks, newlines = [], [], list[int]()
    turns = [np.zeros(len(row), np.int64) if row.turn is None else row.turn for row in rows]
    first = clips = 0
    for number, row in enumerate(rows):
        assert (row.sample == 0).all()
        assert not row.supervised[:1].any(), "a first token has none before it that predicts it"
        samples.append(np.full(len(row), number))
        blocks.append(np.where(row.block >= 0, row.block + len(frames), -1))
        frames += [
            replace(f, clip=f.clip + clips, medium=f.medium + clips, first=f.first + first)
            for f in row.frames
        ]
        newlines += [place + first for place in row.newlines]
        first += len(row)
        clips += row.clips
    joined = {
        name: np.concatenate([getattr(row, name) for row in rows])
        for name in ("ids", "axis", "coord", "supervised", "position")
    }
    return Row(
        **joined,
        block=np.concatenate(blocks),
        sample=np.concatenate(samples),
        frames=frames,
        clips=clips,
        newlines=tuple(newlines),
        turn=np.concatenate(turns) if any(row.turn is not None for row in rows) else None,
    )


def collate(
    rows: Sequence[Row],
    clips: Sequence[Sequence[Medium]],
    config: VLMConfig,
    record_ids: Sequence[str],
    *,
    with_copy: bool = False,
    length: int = 0,
    tasks: Sequence[int] | None = None,
) -> Batch:
    """Return the batch of rows, right-padded to the longest, or to `length` where that is more.

    clips: the media of each row, those of its conversations one after the other. `with_copy` also
    reads, for each transition, the source frame on the target's grid, which the copy baseline needs.
    tasks: the task of each record's answer, or each independent turn's, for the losses by task.
    """
    length = max(length, *(len(row) for row in rows))
    packed = any(row.sample[-1] > 0 for row in rows)

    def padded(name: str, fill: float, dtype: type[np.generic]) -> np.ndarray:
        return padded_rows([getattr(row, name) for row in rows], length, fill, dtype)

    block, sample = padded("block", -1, np.int64), padded("sample", -1, np.int64)
    position = padded("position", -1, np.int64)
    # positions go on in the padding of a single conversation, as in a plain causal row
    position = np.where(position >= 0, position, 0 if packed else np.arange(length))
    attention = config.frame_attention
    bounds = [intervals(*row, attention) for row in zip(sample, block, strict=True)]
    input_ids, axis = padded("ids", 0, np.int64), padded("axis", -1, np.int64)
    coord, turn = padded("coord", 0.0, np.float32), padded("turn", 0, np.int64)
    # the hidden state before a token predicts it; a conversation's first token has none before it
    predicted = np.flatnonzero(padded("supervised", False, np.bool_))
    assert position.reshape(-1)[predicted].all()
    others = None
    if turn.any():
        others = [np.stack(bound) for bound in zip(*map(other_turns, sample, turn), strict=True)]
    parts = [parts_of(own) for own in clips]
    groups, transitions = group_frames(rows, parts, length, config, with_copy)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        axis=torch.from_numpy(axis),
        coord=torch.from_numpy(coord),
        position_ids=torch.from_numpy(position),
        mask_start=torch.from_numpy(np.stack([start for start, _ in bounds])),
        mask_end=torch.from_numpy(np.stack([end for _, end in bounds])),
        predict_index=torch.from_numpy(places_before(predicted, others, length)),
        labels=torch.from_numpy(input_ids.reshape(-1)[predicted]),
        label_axis=torch.from_numpy(axis.reshape(-1)[predicted]),
        label_coord=torch.from_numpy(coord.reshape(-1)[predicted]),
        lengths=torch.tensor([len(row) for row in rows]),
        groups=groups,
        transitions=transitions,
        record_ids=tuple(record_ids),
        rope=mrope_rows([row.frames for row in rows], position, sample, config),
        newline_index=flat_places([row.newlines for row in rows], length),
        label_task=None if tasks is None else label_tasks(rows, tasks, predicted, length),
        causal=attention == "token" and not packed and others is None,
        others_start=None if others is None else torch.from_numpy(others[0]),
        others_end=None if others is None else torch.from_numpy(others[1]),
    )


def label_tasks(
    rows: Sequence[Row], tasks: Sequence[int], predicted: np.ndarray, length: int
) -> Tensor:
    """Return int64 `(labels,)`: the task of the record, or independent turn, of each predicted token.

    tasks: of each of those. predicted: flat places in rows of `length` tokens.
    """
    task, first, known = np.zeros((len(rows), length), np.int64), 0, np.asarray(tasks, np.int64)
    for number, row in enumerate(rows):
        talk = first + numbered(row.sample, row.turn)
        task[number, : len(row)] = known[talk]
        first = talk[-1] + 1
    return torch.from_numpy(task.reshape(-1)[predicted])


GroupKey = tuple[int, Grid, tuple[float, float, float, float]]
FramePair = tuple[int, int, ClipFeatures, int, float]
"""A transition: indices of two frames in their groups, their clip, the first one's banked frame, seconds
between."""


def group_frames(
    rows: Sequence[Row],
    clips: Sequence[Sequence[ClipFeatures]],
    length: int,
    config: VLMConfig,
    with_copy: bool,
) -> tuple[tuple[FrameGroup, ...], tuple[Transitions, ...]]:
    """Return a batch's frames grouped by stream, grid and covered part, and their transitions."""
    members: dict[GroupKey, list[tuple[int, PlacedFrame]]] = {}
    found: dict[tuple[GroupKey, GroupKey], list[FramePair]] = {}
    for number, row in enumerate(rows):
        previous: tuple[GroupKey, int, PlacedFrame] | None = None
        for frame in row.frames:
            source = clips[number][frame.clip]
            key = (frame.stream, frame.grid, source.info.covered)
            group = members.setdefault(key, [])
            # none from one medium, or part of one, to the next: nothing in it foretells the other
            if previous is not None and previous[2].clip == frame.clip:
                last, times = previous[2].frame, source.info.timestamps
                gap = float(times[frame.frame] - times[last])
                pair = previous[1], len(group), source, last, gap
                found.setdefault((previous[0], key), []).append(pair)
            previous = (key, len(group), frame)
            group.append((number, frame))
    order = {key: place for place, key in enumerate(members)}
    groups = tuple(_group(key, frames, clips, length, config) for key, frames in members.items())
    transitions = tuple(
        Transitions(
            source=order[source],
            target=order[target],
            source_frame=torch.tensor([pair[0] for pair in pairs]),
            target_frame=torch.tensor([pair[1] for pair in pairs]),
            gap=torch.tensor([pair[4] for pair in pairs], dtype=torch.float32),
            copy=_copy(target[1].stride, pairs, config) if with_copy else None,
        )
        for (source, target), pairs in found.items()
    )
    return groups, transitions


def _group(
    key: GroupKey,
    frames: Sequence[tuple[int, PlacedFrame]],
    clips: Sequence[Sequence[ClipFeatures]],
    length: int,
    config: VLMConfig,
) -> FrameGroup:
    stream, grid, covered = key
    wanted: dict[tuple[int, int], list[int]] = {}
    times, timed = [], []
    for number, frame in frames:
        info = clips[number][frame.clip].info
        wanted.setdefault((number, frame.clip), []).append(frame.frame)
        timed.append(float(info.duration > 0))
        since = float(info.timestamps[frame.frame]) - info.start
        times.append(since / info.duration if info.duration > 0 else 0.0)

    def read(stride: int) -> Tensor:
        return joined(
            [clips[number][clip].read(stride, ks) for (number, clip), ks in wanted.items()]
        )

    finer = read(grid.stride // config.finer) if config.finer > 1 else None
    first = torch.tensor([number * length + frame.first for number, frame in frames])
    ends = first + grid.cells
    return FrameGroup(
        stream=stream,
        grid=grid,
        covered=covered,
        features=pooled(finer) if config.pool_after_projector else read(grid.stride),
        token_index=first[:, None] + grid.order(by_columns=config.by_columns),
        end_index=ends if config.closing_tokens else ends[:0],
        time=torch.tensor(times, dtype=torch.float32),
        timed=torch.tensor(timed, dtype=torch.float32),
        finer=finer,
    )


def _copy(stride: int, pairs: Sequence[FramePair], config: VLMConfig) -> Tensor:
    reads, banked = [], stride // config.finer if config.pool_after_projector else stride
    # the pairs of one clip are consecutive: one read for all of them
    for _, run in groupby(pairs, key=lambda pair: id(pair[2])):
        members = list(run)
        reads.append(members[0][2].read(banked, [step[3] for step in members]))
    return pooled(joined(reads)) if config.pool_after_projector else joined(reads)
