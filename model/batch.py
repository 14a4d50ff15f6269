"""The model's input: rows of tokens, and the frames whose tokens are in them.

A row is one packed sequence of records, `length` tokens with its padding. Frames are grouped by stream,
grid and covered part, so that each group is one tensor. All indices are flat: row * length + position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from model.config import POOLED
from model.grid import Grid, pool
from shards.errors import UserError

SLOW, FAST = 0, 1
VALUES_AT_ONCE = 1 << 17
"""int8 values decoded at a time on a CPU: 512 KiB in fp32, which a core's second-level cache holds."""
STREAMS = "SF"


@dataclass(frozen=True)
class FrameGroup:
    """Frames of one stream and one grid, with the places of their tokens."""

    stream: int
    grid: Grid
    covered: tuple[float, float, float, float]
    features: Tensor
    """As banked, `(frames, cell_rows, cell_cols, dim)`. Those of an int8 bank are a `Quantised` until
    `to_device`, here and in `finer` and `Transitions.copy`."""
    token_index: Tensor
    """int64 `(frames, cells)`: the flat place of each cell's token, row-major."""
    end_index: Tensor
    """int64 `(frames,)`: the flat place of the frame's closing token; empty where frames have none."""
    time: Tensor
    """fp32 `(frames,)`, 0 at the clip's start and 1 at its end."""
    timed: Tensor
    """fp32 `(frames,)`, 0 where the clip has no duration and so no time."""
    finer: Tensor | None = None
    """As banked at the finer stride, where the projector, or pooling after it, joins its cells."""

    @property
    def projected(self) -> Tensor:
        """The features that the projector takes."""
        return self.features if self.finer is None else self.finer

    def __post_init__(self) -> None:
        shape = tuple(self.features.shape)
        expected = (len(self.time), self.grid.rows, self.grid.cols)
        if shape[:3] != expected:
            raise UserError(f"features {shape} do not fit {expected} frames and cells")
        assert self.token_index.shape == (len(self.time), self.grid.cells)


@dataclass(frozen=True)
class Transitions:
    """Pairs of consecutive frames of a medium: the source's hidden states predict the target."""

    source: int
    """Index of the source frames' group in the batch."""
    target: int
    """Likewise of the target frames."""
    source_frame: Tensor
    """int64 `(pairs,)` into the source group."""
    target_frame: Tensor
    """int64 `(pairs,)` into the target group."""
    gap: Tensor
    """fp32 `(pairs,)`, seconds from the source frame to the target frame."""
    copy: Tensor | None = None
    """The source frames' features on the target's grid, for the copy baseline; None on other steps."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, right-padded. Without labels it is a prompt."""

    input_ids: Tensor
    """int64 `(rows, length)`; any id at the places of frames, whose embeddings are overwritten."""
    axis: Tensor
    """int64 `(rows, length)`: 0 time, 1 height, 2 width at coordinate tokens, -1 elsewhere."""
    coord: Tensor
    """fp32 `(rows, length)`, the coordinate at those places."""
    position_ids: Tensor
    """int64 `(rows, length)`: each token's position in its record."""
    mask_start: Tensor
    mask_end: Tensor
    """int32 `(rows, length)`: token q sees the keys [start, end) of its row."""
    predict_index: Tensor
    """int64 `(supervised,)`: flat places whose hidden state predicts a supervised token."""
    labels: Tensor
    """int64 `(supervised,)`, the predicted token ids."""
    label_axis: Tensor
    """int64 `(supervised,)`, as `axis`."""
    label_coord: Tensor
    """fp32 `(supervised,)`, as `coord`."""
    lengths: Tensor
    """int64 `(rows,)`, tokens of each row without padding."""
    groups: tuple[FrameGroup, ...]
    transitions: tuple[Transitions, ...]
    record_ids: tuple[str, ...]
    label_task: Tensor | None = None
    """int64 `(supervised,)`: the task of each label's answer, by which its loss is logged."""
    rope: Tensor | None = None
    """int64 `(3, rows, length)`: rotary positions in time, row and column, with M-RoPE."""
    newline_index: Tensor | None = None
    """int64 `(media,)`: the flat place of the token that closes each medium, where one does."""
    causal: bool = False
    """Whether each row's mask is plain causal attention: one record a row, `frame_attention: token`."""
    others_start: Tensor | None = None
    others_end: Tensor | None = None
    """int32 `(rows, length)`: token q does not see the keys [start, end), those of other turns of its
    record. None where no record has turns that do not see each other."""

    @property
    def others(self) -> tuple[Tensor, Tensor] | None:
        """The keys of other turns, from `model.mask.other_turns`."""
        if self.others_start is None or self.others_end is None:
            return None
        return self.others_start, self.others_end

    @property
    def num_transitions(self) -> int:
        """Transitions of the batch, what the frame-causal loss counts."""
        return sum(len(pairs.source_frame) for pairs in self.transitions)


T = TypeVar("T", bound="FrameGroup | Transitions | Batch | Quantised")


def to_device(item: T, device: torch.device) -> T:
    """Return a copy with every tensor on a device, int8 features decoded to floats there."""
    return _moved(item, lambda tensor: tensor.to(device, non_blocking=True), floats=True)


def pinned(item: T) -> T:
    """Return a copy in page-locked memory: copies from it to a CUDA device overlap with kernels."""
    return _moved(item, lambda tensor: tensor.pin_memory())


def _moved(item: T, place: Callable[[Tensor], Tensor], *, floats: bool = False) -> T:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return place(value)
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        # decoded after the copy: half the bytes cross to the device
        if isinstance(value, Quantised):
            moved = _moved(value, place)
            return moved.floats() if floats else moved
        nested = isinstance(value, FrameGroup | Transitions)
        return _moved(value, place, floats=floats) if nested else value

    return replace(item, **{f.name: move(getattr(item, f.name)) for f in fields(item)})


class Int8(Protocol):
    """Features as an int8 bank stores them, in NumPy arrays; the fields are those of `Quantised`."""

    @property
    def values(self) -> np.ndarray: ...
    @property
    def token_scale(self) -> np.ndarray: ...
    @property
    def channel_scale(self) -> np.ndarray: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Quantised:
    """Features of an int8 bank on their way to a device: half the bytes of the floats."""

    values: Tensor
    """int8 `(frames, cell_rows, cell_cols, dim)`."""
    token_scale: Tensor
    """fp32 `(frames, cell_rows, cell_cols)`."""
    channel_scale: Tensor
    """fp32 `(dim,)`."""
    dtype: torch.dtype
    """Of the decoded floats."""

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @classmethod
    def of(cls, reads: Sequence[Int8]) -> "Quantised":
        """Join features of one bank and stride, that is of one `channel_scale`."""
        one = len(reads) == 1  # a single read is not copied
        values = reads[0].values if one else np.concatenate([r.values for r in reads])
        scales = reads[0].token_scale if one else np.concatenate([r.token_scale for r in reads])
        return cls(
            torch.from_numpy(values),
            torch.from_numpy(scales),
            torch.from_numpy(reads[0].channel_scale),
            getattr(torch, reads[0].dtype),
        )

    def floats(self) -> Tensor:
        """Return the features `(frames, cell_rows, cell_cols, dim)`, bit for bit as the codec decodes.

        On a CPU in pieces that its caches hold, which is four times as fast.
        """
        tokens, scale = self.values.flatten(0, -2), self.token_scale.reshape(-1, 1)
        most, on_cpu = torch.finfo(self.dtype).max, tokens.device.type == "cpu"
        out = torch.empty(tokens.shape, dtype=self.dtype, device=tokens.device)
        # clamping is another pass over the values: left out where no product can leave the dtype's range
        fits = on_cpu and len(tokens) and 127 * scale.max() * self.channel_scale.max() <= most
        # a GPU takes all at once: its kernels want many values, and nothing is gained by a cache
        at_once = max(1, VALUES_AT_ONCE // tokens.shape[1]) if on_cpu else max(1, len(tokens))
        # one for all pieces: fresh memory would have to be mapped and brought into the cache again
        floats = torch.empty((min(at_once, len(tokens)), tokens.shape[1]), device=tokens.device)
        pieces = zip(tokens.split(at_once), scale.split(at_once), out.split(at_once), strict=True)
        for values, scales, place in pieces:
            some = floats[: len(values)].copy_(values)
            # channel, then token, in fp32: `shards.format.codec` multiplies in this
            # order, and so rounds alike
            some.mul_(self.channel_scale).mul_(scales)
            place.copy_(some if fits else some.clamp_(-most, most))
        return out.view(self.shape)


def joined(reads: Sequence[np.ndarray | Int8]) -> Tensor:
    """Return stored features joined along the frames; fp32 where their float dtypes differ.

    Those of one int8 bank become a `Quantised`, which only `to_device` turns into a tensor.
    """
    arrays = [read for read in reads if isinstance(read, np.ndarray)]
    if not arrays:
        stored: list[Int8] = list(reads)  # type: ignore[arg-type]
        # by identity: reads of one bank and stride hold the same array, and
        # comparing values costs each step
        scales = {(id(read.channel_scale), read.dtype) for read in stored}
        if len(scales) == 1:
            return cast(Tensor, Quantised.of(stored))
    elif len(arrays) == len(reads) and len({array.dtype for array in arrays}) == 1:
        return as_tensor(np.concatenate(arrays))
    # float16 and bfloat16 hold different numbers: only fp32 holds both
    floats = [as_tensor(read) for read in reads]
    same = len({one.dtype for one in floats}) == 1
    return torch.cat(floats if same else [one.float() for one in floats])


def as_tensor(features: np.ndarray | Int8) -> Tensor:
    """Return stored features as floats. NumPy has no bfloat16: a bank stores its bits as uint16."""
    if not isinstance(features, np.ndarray):
        return Quantised.of([features]).floats()
    tensor = torch.from_numpy(features)
    return tensor.view(torch.bfloat16) if features.dtype == np.uint16 else tensor


def pooled(finer: Tensor | None) -> Tensor:
    """Return banked features on the grid of the tokens that are pooled after the projector."""
    assert finer is not None
    if isinstance(finer, Quantised):
        finer = finer.floats()
    return pool(finer, POOLED, "bilinear").to(finer.dtype)


def padded_rows(
    values: Sequence[np.ndarray | None], length: int, fill: float, dtype: type[np.generic]
) -> np.ndarray:
    """Return rows padded to a length: `(rows, length)`; None is a row of padding alone."""
    out = np.full((len(values), length), fill, dtype)
    for number, own in enumerate(values):
        if own is not None:
            out[number, : len(own)] = own
    return out


def flat_places(places: Sequence[Sequence[int]], length: int) -> Tensor | None:
    """Return the flat places of tokens, given by their places in each row: int64; None if none are."""
    flat = [k * length + place for k, row in enumerate(places) for place in row]
    return torch.tensor(flat) if flat else None
