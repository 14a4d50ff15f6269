"""Encoded conversations and banked features -> the model's batch, one conversation per row."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.batch import FAST, SLOW, Batch, FrameGroup, Transitions
from model.frames import slow_frames, uniform_indices
from model.grid import Grid
from model.mask import intervals
from model.vlm import VLMConfig
from shards.reader import ClipInfo
from train.chat import MEDIA, Encoded


class ClipFeatures(Protocol):
    """A clip's features, from a bank or fresh from a tower."""

    @property
    def info(self) -> ClipInfo: ...

    def read(self, stride: int, frames: Sequence[int]) -> np.ndarray:
        """Return `(frames, cell_rows, cell_cols, dim)`: float16, or uint16 that holds bfloat16."""
        ...


@dataclass(frozen=True)
class PlacedFrame:
    """A frame in a row: which one, as which stream, and where its tokens begin."""

    clip: int
    """Place of the clip among those of the row."""
    frame: int
    """Index into the banked frames."""
    stream: int
    grid: Grid
    first: int


@dataclass(frozen=True)
class Row:
    """One conversation laid out as tokens; the arrays have one entry per token."""

    ids: np.ndarray
    axis: np.ndarray
    coord: np.ndarray
    supervised: np.ndarray
    block: np.ndarray
    """Number of the frame that a token belongs to, -1 for text."""
    frames: list[PlacedFrame]

    def __len__(self) -> int:
        return len(self.ids)


def choose_frames(info: ClipInfo, config: VLMConfig, pool: str) -> list[tuple[int, int, Grid]]:
    """Return (banked frame, stream, grid) of each frame of a clip that the model sees, in time."""
    chosen = uniform_indices(len(info.timestamps), config.max_frames_num)
    slow = slow_frames(config.frame_sampling_strategy, config.slow_frame_ratio, len(chosen))
    rows, cols = info.patch_grid
    strides = {SLOW: config.slow_stride, FAST: config.fast_stride}
    streams = [SLOW if is_slow else FAST for is_slow in slow]
    return [
        (frame, stream, Grid(rows, cols, strides[stream], pool))
        for frame, stream in zip(chosen, streams, strict=True)
    ]


def lay_out(encoded: Encoded, infos: Sequence[ClipInfo], config: VLMConfig, pool: str) -> Row:
    """Return the row of a conversation: every medium becomes its frames' cells and closing tokens."""
    ids: list[int] = []
    axis: list[int] = []
    coord: list[float] = []
    supervised: list[bool] = []
    block: list[int] = []
    frames: list[PlacedFrame] = []
    clip = 0
    for id_, a, c, on in zip(
        encoded.ids, encoded.axis, encoded.coord, encoded.supervised, strict=True
    ):
        if id_ != MEDIA:
            ids.append(id_)
            axis.append(a)
            coord.append(c)
            supervised.append(on)
            block.append(-1)
            continue
        for frame, stream, grid in choose_frames(infos[clip], config, pool):
            tokens = grid.cells + 1
            block += [len(frames)] * tokens
            frames.append(PlacedFrame(clip, frame, stream, grid, len(ids)))
            ids += [0] * tokens
            axis += [-1] * tokens
            coord += [0.0] * tokens
            supervised += [False] * tokens
        clip += 1
    assert clip == len(infos), (clip, len(infos))
    return Row(
        ids=np.asarray(ids, np.int64),
        axis=np.asarray(axis, np.int64),
        coord=np.asarray(coord, np.float32),
        supervised=np.asarray(supervised, bool),
        block=np.asarray(block, np.int64),
        frames=frames,
    )


def collate(
    rows: Sequence[Row],
    clips: Sequence[Sequence[ClipFeatures]],
    config: VLMConfig,
    record_ids: Sequence[str],
    *,
    with_copy: bool = False,
) -> Batch:
    """Return the batch of some rows, right-padded to the longest.

    clips: the clips of each row. `with_copy` also reads, for each transition, the source frame on
    the target's grid, which the copy baseline needs.
    """
    length = max(len(row) for row in rows)

    def padded(name: str, fill: float, dtype: type[np.generic]) -> np.ndarray:
        out = np.full((len(rows), length), fill, dtype)
        for number, row in enumerate(rows):
            out[number, : len(row)] = getattr(row, name)
        return out

    block = padded("block", -1, np.int64)
    lengths = np.asarray([len(row) for row in rows])
    sample = np.where(np.arange(length)[None] < lengths[:, None], 0, -1)
    bounds = [
        intervals(sample[number], block[number], config.frame_attention)
        for number in range(len(rows))
    ]
    input_ids, axis = padded("ids", 0, np.int64), padded("axis", -1, np.int64)
    coord = padded("coord", 0.0, np.float32)
    # the hidden state before a token predicts it; a row's first token has none before it
    predicted = np.flatnonzero(padded("supervised", False, np.bool_))
    assert not (predicted % length == 0).any()
    groups, transitions = group_frames(rows, clips, length, config, with_copy)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        axis=torch.from_numpy(axis),
        coord=torch.from_numpy(coord),
        position_ids=torch.arange(length).expand(len(rows), length).contiguous(),
        mask_start=torch.from_numpy(np.stack([start for start, _ in bounds])),
        mask_end=torch.from_numpy(np.stack([end for _, end in bounds])),
        predict_index=torch.from_numpy(predicted - 1),
        labels=torch.from_numpy(input_ids.reshape(-1)[predicted]),
        label_axis=torch.from_numpy(axis.reshape(-1)[predicted]),
        label_coord=torch.from_numpy(coord.reshape(-1)[predicted]),
        lengths=torch.from_numpy(lengths),
        groups=groups,
        transitions=transitions,
        record_ids=tuple(record_ids),
    )


GroupKey = tuple[int, Grid, tuple[float, float, float, float]]


def group_frames(
    rows: Sequence[Row],
    clips: Sequence[Sequence[ClipFeatures]],
    length: int,
    config: VLMConfig,
    with_copy: bool,
) -> tuple[tuple[FrameGroup, ...], tuple[Transitions, ...]]:
    """Return all frames of a batch grouped by stream and grid, and the steps from frame to frame."""
    members: dict[GroupKey, list[tuple[int, PlacedFrame]]] = {}
    steps: dict[tuple[GroupKey, GroupKey], list[tuple[int, int, ClipFeatures, int]]] = {}
    for number, row in enumerate(rows):
        previous: tuple[GroupKey, int, PlacedFrame] | None = None
        for frame in row.frames:
            source = clips[number][frame.clip]
            key = (frame.stream, frame.grid, source.info.covered)
            group = members.setdefault(key, [])
            if previous is not None and previous[2].clip == frame.clip:
                step = (previous[1], len(group), source, previous[2].frame)
                steps.setdefault((previous[0], key), []).append(step)
            previous = (key, len(group), frame)
            group.append((number, frame))
    order = {key: place for place, key in enumerate(members)}
    groups = tuple(_group(key, frames, clips, length) for key, frames in members.items())
    transitions = tuple(
        Transitions(
            source=order[source],
            target=order[target],
            source_frame=torch.tensor([pair[0] for pair in pairs]),
            target_frame=torch.tensor([pair[1] for pair in pairs]),
            copy=_copy(target[1].stride, pairs) if with_copy else None,
        )
        for (source, target), pairs in steps.items()
    )
    return groups, transitions


def _group(
    key: GroupKey,
    frames: Sequence[tuple[int, PlacedFrame]],
    clips: Sequence[Sequence[ClipFeatures]],
    length: int,
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
    features = [clips[number][clip].read(grid.stride, ks) for (number, clip), ks in wanted.items()]
    first = torch.tensor([number * length + frame.first for number, frame in frames])
    return FrameGroup(
        stream=stream,
        grid=grid,
        covered=covered,
        features=as_tensor(np.concatenate(features)),
        token_index=first[:, None] + torch.arange(grid.cells),
        end_index=first + grid.cells,
        time=torch.tensor(times, dtype=torch.float32),
        timed=torch.tensor(timed, dtype=torch.float32),
    )


def _copy(stride: int, pairs: Sequence[tuple[int, int, ClipFeatures, int]]) -> Tensor:
    # the pairs of one clip are consecutive, so that one read serves them
    runs = groupby(pairs, key=lambda pair: id(pair[2]))
    reads = []
    for _, run in runs:
        members = list(run)
        reads.append(members[0][2].read(stride, [frame for _, _, _, frame in members]))
    return as_tensor(np.concatenate(reads))


def as_tensor(features: np.ndarray) -> Tensor:
    """Return stored features as floats: uint16 is how a bank holds bfloat16."""
    tensor = torch.from_numpy(features)
    return tensor.view(torch.bfloat16) if features.dtype == np.uint16 else tensor
