"""Frames -> features: the options, the tower, the feature config, and predicted sizes."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.tower.pixels import Pixels
from preprocess.decode.events import ClipFacts
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

if TYPE_CHECKING:  # both import torch, which a run without anything to encode does not need
    from model.tower.pooling import Pooling
    from model.tower.tower import Tower


@dataclass(frozen=True)
class EncodeOptions:
    """Which features to make of each clip, and how."""

    tower: str
    strides: tuple[int, ...]
    sampling: Sampling
    layer: int | str = -2
    pool: str = "average"
    dtype: str = "float16"
    codec: str = "none"
    tower_dtype: str = "float32"
    dtype_reason: str | None = None
    """Why `tower_dtype` is what it is, where `auto` was asked for."""
    device: str = "cpu"
    devices: tuple[str, ...] = ()
    """Devices with a process each, `device` the first of them; `auto` for all GPUs; none: `device`."""
    batch_frames: int = 16
    tower_threads: int = TOWER_THREADS
    """CPU threads of the tower, each with a part of a batch: other parts may round differently."""
    fit: str | None = None
    """How frames are fitted to the tower's size (`FITS`); None as its image processor does."""
    processor: Json | None = None
    """The processor of an existing bank: frames are fitted as there, unless `fit` is given."""
    allow_truncated: bool = False
    """Bank the readable part of a truncated or damaged video; its flags record it."""
    find: FindOptions = FindOptions()
    """How to search the inputs."""
    shard_bytes: int = 512 * 1024**2

    @classmethod
    def of_plan(cls, plan: Plan, **how: Any) -> "EncodeOptions":
        """Return the options that made a bank. how: fields to replace."""
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
        """Return the request to read a clip. pixels: the tower's resizing."""
        return ReadRequest(
            Path(source.path),
            self.sampling,
            start=source.start,
            end=source.end,
            pixels=pixels,
            allow_truncated=self.allow_truncated,
            picture_fps=source.picture_fps or PICTURE_FPS,
        )


# -- the tower


def load_tower(options: EncodeOptions) -> "Tower":
    """Load a tower; in float32 if its dtype has yet to be chosen by measuring."""
    # before torch is imported
    if why := absent(options.tower):
        raise UserError(
            why,
            where=f"tower {options.tower}",
            fix="a tower is a folder with config.json, preprocessor_config.json and weights, or a model "
            "of the Hub",
        )
    from model.tower.tower import Tower

    dtype = "float32" if options.tower_dtype == "auto" else options.tower_dtype
    tower = Tower.load(options.tower, layer=options.layer, dtype=dtype, device=options.device)
    if options.fit:
        tower.fit(options.fit)
    # as a bank was made: without --fit its own way is meant, not the processor's default
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


def feature_config(tower: "Tower", options: EncodeOptions) -> FeatureConfig:
    """Return everything that the bytes of the bank will depend on."""
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


# -- predicted sizes


PREDICTED_SIZE = 720, 1280
"""(height, width) assumed for frames if the patch grid depends on it: a plan does not decode them."""


def frame_bytes(tower: "Tower", options: EncodeOptions) -> dict[int, int]:
    """Return the bytes per frame, by stride; for blosc before compression."""
    from model.grid import Grid

    # int8: a byte per value and a float32 scale per cell; otherwise two bytes per value.
    each = tower.width + 4 if options.codec == "int8" else 2 * tower.width
    patches = tower.grid_of(*PREDICTED_SIZE)
    grids = [Grid(*patches, stride, options.pool) for stride in options.strides]
    return {grid.stride: grid.cells * each // tower.frames_per_unit for grid in grids}


def coarse_strides(tower: "Tower", options: EncodeOptions) -> list[str]:
    """Return a line on strides that make the same cells, and on one that goes beyond the frame."""
    from model.grid import Grid

    patches = tower.grid_of(*PREDICTED_SIZE)
    of_grid: dict[tuple[int, int], list[int]] = {}
    for grid in (Grid(*patches, stride, options.pool) for stride in options.strides):
        of_grid.setdefault((grid.rows, grid.cols), []).append(grid.stride)
    shown = "x".join(map(str, patches))
    lines = []
    for (rows, cols), strides in of_grid.items():
        if len(strides) > 1:
            lines.append(
                f"strides {', '.join(map(str, strides))} make the same {rows}x{cols} cells of {shown} "
                "patches: each stores them, and slow and fast frames are alike in them"
            )
        elif strides[0] > max(patches):
            lines.append(
                f"stride {strides[0]} is larger than the {shown} patches of a frame: all of it is one "
                f"cell, as with stride {max(patches)}"
            )
    return lines


def predicted_bytes(tower: "Tower", options: EncodeOptions) -> Callable[[ClipSource], int]:
    """Return a function of a clip: the predicted bytes of its features, without headers."""
    frame = sum(frame_bytes(tower, options).values())
    most = options.sampling.most_frames
    # unknown (in an archive, whose headers are not read): as many as sampling allows
    return lambda clip: frame * (most if clip.frames is None else clip.frames)


# -- features of one clip, and what is recorded with them


def pooling_of(tower: "Tower", frames: int, options: EncodeOptions) -> "Pooling":
    """Return the object that encodes and pools a clip of `frames` frames batch by batch."""
    from model.tower.pooling import Pooling

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
    tower: "Tower", frames: np.ndarray, options: EncodeOptions
) -> tuple[dict[int, np.ndarray], int]:
    """Return features by stride `(frames, rows, cols, dim)`, and how many values were rounded to zero."""
    return pooling_of(tower, len(frames), options).add_all(frames)


def provenance(tower: "Tower", options: EncodeOptions) -> Json:
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
    tower: "Tower",
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
