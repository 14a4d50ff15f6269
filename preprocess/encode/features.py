"""Frames -> features: what to make, the tower that makes it, and how large it will be."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.grid import Grid
from model.tower.pixels import Pixels
from model.tower.pooling import Pooling
from model.tower.tower import Tower
from preprocess.decode.frames import ClipFacts
from preprocess.decode.read_pictures import PICTURE_FPS
from preprocess.decode.request import ReadRequest
from preprocess.decode.source import Outcome
from preprocess.sources.find import FindOptions
from shards.errors import UserError
from shards.format.codec import Codec
from shards.format.features import FeatureConfig, Sampling
from shards.format.plan import (
    TOWER_THREADS,
    ClipSource,
    Plan,
)
from shards.format.samples import SampleMeta
from shards.hub import absent
from shards.signed import Json


@dataclass(frozen=True)
class EncodeOptions:
    """What to make of each clip, and how to go about it."""

    tower: str
    strides: tuple[int, ...]
    sampling: Sampling
    layer: int | str = -2
    pool: str = "average"
    dtype: str = "float16"
    codec: str = "none"
    tower_dtype: str = "float32"
    device: str = "cpu"
    batch_frames: int = 16
    tower_threads: int = TOWER_THREADS
    """While the tower runs: sums in another number of threads may round otherwise."""
    fit: str | None = None
    """How frames get the tower's size (`FITS`), if not as its image processor does it."""
    processor: Json | None = None
    """Of a bank's fingerprint: frames are to get the tower's size as there, where `fit` does not say."""
    allow_truncated: bool = False
    """Take what comes of a truncated or damaged video; its flags say so."""
    find: FindOptions = FindOptions()
    """How inputs are looked through."""
    shard_bytes: int = 512 * 1024**2

    @classmethod
    def of_plan(cls, plan: Plan, **how: Any) -> "EncodeOptions":
        """Return the options that made a bank. how: fields that are to be others."""
        features, tower = plan.features, plan.tower
        same: Json = {
            "tower": tower.name,
            "batch_frames": tower.batch_frames,
            "tower_threads": tower.threads,
            "allow_truncated": bool(plan.allow_truncated),
            "processor": features.processor,
        }
        for name in ("strides", "sampling", "layer", "pool", "dtype", "codec", "tower_dtype"):
            same[name] = getattr(features, name)
        return cls(**same | how)

    def request(self, source: ClipSource, pixels: Pixels | None) -> ReadRequest:
        """Return what to read of a clip. pixels: of the tower."""
        return ReadRequest(
            Path(source.path),
            self.sampling,
            start=source.start,
            end=source.end,
            pixels=pixels,
            allow_truncated=self.allow_truncated,
            picture_fps=source.picture_fps or PICTURE_FPS,
        )


def load_tower(options: EncodeOptions) -> Tower:
    if why := absent(options.tower):
        raise UserError(why, where=f"tower {options.tower}")
    tower = Tower.load(
        options.tower, layer=options.layer, dtype=options.tower_dtype, device=options.device
    )
    if options.fit:
        tower.fit(options.fit)
    elif options.processor:
        tower.fit_like(options.processor)
    return tower


def plan_codec(plan: Plan) -> Codec:
    scales = plan.calibration or {}
    return Codec(
        plan.features.codec,
        plan.features.dtype,
        {int(stride): np.asarray(scale, np.float32) for stride, scale in scales.items()},
    )


def feature_config(tower: Tower, options: EncodeOptions) -> FeatureConfig:
    """Return all that the bytes of the bank will depend on."""
    return FeatureConfig(
        tower_type=tower.model_type,
        tower_digest=tower.digest,
        layer=options.layer,
        processor=tower.pixels.to_json(),
        dtype=options.dtype,
        tower_dtype=options.tower_dtype,
        attention=tower.attention,
        sampling=options.sampling,
        strides=options.strides,
        pool=options.pool,
        codec=options.codec,
    )


PREDICTED_SIZE = 720, 1280
"""(height, width) that frames are taken to have, where the grid follows it: no plan has seen them."""


def frame_bytes(tower: Tower, options: EncodeOptions) -> dict[int, int]:
    """Return the bytes of a frame per stride; of blosc, what it takes before it is compressed."""
    each = tower.width + 4 if options.codec == "int8" else 2 * tower.width
    patches = tower.grid_of(*PREDICTED_SIZE)
    grids = [Grid(*patches, stride, options.pool) for stride in options.strides]
    return {grid.stride: grid.cells * each // tower.frames_per_unit for grid in grids}


def predicted_bytes(tower: Tower, options: EncodeOptions) -> Callable[[ClipSource], int]:
    """Return what tells how many bytes the features of a clip will take, headers left out."""
    frame = sum(frame_bytes(tower, options).values())
    most = options.sampling.most_frames
    return lambda clip: frame * (most if clip.frames is None else clip.frames)


def pooling_of(tower: Tower, frames: int, options: EncodeOptions) -> Pooling:
    """Return what takes the frames of a clip, of which there are so many, batch by batch."""
    return Pooling(
        tower,
        frames,
        options.strides,
        pool_mode=options.pool,
        dtype=options.dtype,
        batch_frames=options.batch_frames,
        threads=options.tower_threads,
    )


def encode_frames(
    tower: Tower, frames: np.ndarray, options: EncodeOptions
) -> tuple[dict[int, np.ndarray], int]:
    """Return `Tower.features` of frames at the tower's size, as the options ask."""
    return pooling_of(tower, len(frames), options).add_all(frames)


def provenance(tower: Tower, options: EncodeOptions) -> Json:
    """Return what, beside the `FeatureConfig`, the last bits of features may depend on."""
    import torch
    import transformers

    cuda = tower.device.type == "cuda"
    return {
        "batch_frames": options.batch_frames,
        "tower_threads": options.tower_threads,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "machine": torch.cuda.get_device_name(tower.device) if cuda else platform.machine(),
    }


def describe(
    source: ClipSource,
    outcome: Outcome[ClipFacts],
    clip: ClipFacts,
    tower: Tower,
    arrays: dict[int, np.ndarray],
) -> SampleMeta:
    """Return the json of a sample."""
    height, width = clip.display_size
    return SampleMeta(
        id=source.id,
        path=source.relative,
        size=outcome.size,
        digest=outcome.digest,
        start=clip.start,
        end=clip.end,
        fps=clip.fps,
        frame_count=clip.frame_count,
        frame_index=clip.frame_index.tolist(),
        timestamps=clip.timestamps.tolist(),
        display_size=(height, width),
        covered=tower.covered(height, width),
        patch_grid=tower.grid_of(height, width),
        cell_grids={str(stride): array.shape[1:3] for stride, array in arrays.items()},
        tower_width=tower.width,
        frames_per_unit=tower.frames_per_unit,
        decoder=clip.decoder,
        flags=list(clip.flags),
    )
