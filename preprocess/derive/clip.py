"""One clip of a bank -> what the new bank stores of it: fewer frames, other strides, another codec."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np

from model.slow_fast import uniform_indices
from preprocess.derive.cells import pool_again
from preprocess.derive.source import StoredClip
from preprocess.derive.target import Target
from shards.format.codec import Codec, Stored, from_float32
from shards.format.samples import SampleMeta

Shapes = dict[int, tuple[int, ...]]


def kept_frames(clip: StoredClip, most: int | None) -> list[int] | None:
    """Return which banked frames are kept, by the rule by which training takes some; None for all."""
    return None if most is None else uniform_indices(len(clip.meta.timestamps), most)


def as_stored(
    clip: StoredClip, target: Target, frames: Sequence[int] | None
) -> tuple[dict[int, Stored], Shapes]:
    """Return the streams that the target keeps, as they lie in the bank, and their features' shapes."""
    streams = {stride: _taken(clip.stored[stride], frames) for stride in target.pooled}
    count = clip.entries if frames is None else len(frames)
    return streams, {stride: (count, *clip.shapes[stride][1:]) for stride in streams}


def derive_arrays(
    clip: StoredClip, codec: Codec, target: Target, frames: Sequence[int] | None
) -> tuple[dict[int, np.ndarray], int]:
    """Return a clip's features as the target has them, and how many values the stored type lost.

    codec: of the bank that the clip is of. Per stride float16, or uint16 that holds bfloat16,
    `(frames, rows, cols, dim)`; lost are values of pooled cells that it rounds to zero.
    """
    banked: dict[int, np.ndarray] = {}
    for stride in {finer or stride for stride, finer in target.pooled.items()}:
        some, of = _taken(clip.stored[stride], frames), clip.shapes[stride][1:]
        banked[stride] = codec.decode(stride, some.data, of, some.frame_nbytes, some.scale)
    arrays, underflowed = {}, 0
    for stride, finer in target.pooled.items():
        if finer is None:
            arrays[stride] = banked[stride]
            continue
        cells = pool_again(banked[finer], clip.meta.patch_grid, finer, stride, target.features.pool)
        arrays[stride] = from_float32(cells, codec.dtype)
        if codec.dtype == "float16":
            underflowed += int(((arrays[stride] == 0) & (cells != 0)).sum())
    return arrays, underflowed


def described(
    clip: StoredClip, frames: Sequence[int] | None, shapes: Mapping[int, tuple[int, ...]]
) -> SampleMeta:
    """Return a sample's json with the frames and the cells that are left. shapes: of the features."""
    grids = {str(stride): (rows, cols) for stride, (_, rows, cols, _) in shapes.items()}
    meta = replace(clip.meta, cell_grids=grids)
    if frames is None:
        return meta
    assert meta.frames_per_unit == 1
    return replace(
        meta,
        frame_index=[meta.frame_index[frame] for frame in frames],
        timestamps=[meta.timestamps[frame] for frame in frames],
    )


def _taken(stored: Stored, frames: Sequence[int] | None) -> Stored:
    """Return some frames of a stream, as they lie there."""
    if frames is None:
        return stored
    if stored.frame_nbytes is not None:
        edges = list(pairwise(accumulate(stored.frame_nbytes, initial=0)))
        data = np.concatenate([stored.data[slice(*edges[frame])] for frame in frames])
        return Stored(data, frame_nbytes=[stored.frame_nbytes[frame] for frame in frames])
    scale = None if stored.scale is None else stored.scale[list(frames)]
    return Stored(stored.data[list(frames)], scale=scale)
