"""Convert one clip for a derived bank: fewer frames, other strides, another codec."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np

from model.slow_fast import uniform_indices
from preprocess.derive.cells import pool_cells
from preprocess.derive.source import StoredClip
from preprocess.derive.target import Target
from shards.format.codec import Codec, Stored, from_float32
from shards.format.samples import SampleMeta

Shapes = dict[int, tuple[int, ...]]


def kept_frames(clip: StoredClip, most: int | None) -> list[int] | None:
    """Return the banked frames to keep, chosen as training chooses frames; None for all."""
    return None if most is None else uniform_indices(len(clip.meta.timestamps), most)


def as_stored(
    clip: StoredClip, target: Target, frames: Sequence[int] | None
) -> tuple[dict[int, Stored], Shapes]:
    """Return the streams that the target keeps, in stored form, and their features' shapes."""
    streams = {stride: _taken(clip.stored[stride], frames) for stride in target.pooled}
    count = clip.entries if frames is None else len(frames)
    return streams, {stride: (count, *clip.shapes[stride][1:]) for stride in streams}


def derive_arrays(
    clip: StoredClip, codec: Codec, target: Target, frames: Sequence[int] | None
) -> tuple[dict[int, np.ndarray], int]:
    """Return a clip's features for the target, and how many pooled values were rounded to zero.

    codec: of the source bank. Returns by stride float16, or bfloat16 as uint16,
    `(frames, rows, cols, dim)`.
    """
    banked: dict[int, np.ndarray] = {}
    # a set: several coarser strides may be pooled from one, which is decoded once
    for stride in {finer or stride for stride, finer in target.pooled.items()}:
        some, of = _taken(clip.stored[stride], frames), clip.shapes[stride][1:]
        banked[stride] = codec.decode(stride, some.data, of, some.frame_nbytes, some.scale)
    arrays, underflowed = {}, 0
    for stride, finer in target.pooled.items():
        if finer is None:
            arrays[stride] = banked[stride]
            continue
        cells = pool_cells(banked[finer], clip.meta.patch_grid, finer, stride, target.features.pool)
        arrays[stride] = from_float32(cells, codec.dtype)
        # bfloat16 has float32's range, so that nothing pooled from it becomes zero
        if codec.dtype == "float16":
            underflowed += int(((arrays[stride] == 0) & (cells != 0)).sum())
    return arrays, underflowed


def described(
    clip: StoredClip, frames: Sequence[int] | None, shapes: Mapping[int, tuple[int, ...]]
) -> SampleMeta:
    """Return a sample's json with the remaining frames and cells. shapes: of the features."""
    grids = {str(stride): (rows, cols) for stride, (_, rows, cols, _) in shapes.items()}
    meta = replace(clip.meta, cell_grids=grids)
    if frames is None:
        return meta
    # units of several frames cannot be parted: refused in refuse_no_cells
    assert meta.frames_per_unit == 1
    return replace(
        meta,
        frame_index=[meta.frame_index[frame] for frame in frames],
        timestamps=[meta.timestamps[frame] for frame in frames],
    )


def _taken(stored: Stored, frames: Sequence[int] | None) -> Stored:
    """Return some frames of a stream, in stored form."""
    if frames is None:
        return stored
    if stored.frame_nbytes is not None:
        # blosc frames have different lengths: each begins where the one before ends
        edges = list(pairwise(accumulate(stored.frame_nbytes, initial=0)))
        data = np.concatenate([stored.data[slice(*edges[frame])] for frame in frames])
        return Stored(data, frame_nbytes=[stored.frame_nbytes[frame] for frame in frames])
    scale = None if stored.scale is None else stored.scale[list(frames)]
    return Stored(stored.data[list(frames)], scale=scale)
