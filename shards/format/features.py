"""`FeatureConfig`: everything that changes a stored feature, and its fingerprint.

The fingerprint is a blake2b digest of the config. Worker counts, shard sizes, library versions and
hardware are provenance and never part of it: changing them must not invalidate a bank.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise

from shards.errors import UserError
from shards.format.fields import parse
from shards.signed import Json, canonical_json, digest

# 2: every field must be present, see `fields`. 3: `covered` counts whole patches only, `flags` are one
# text, and a unit without samples has no tar. `care.migrate` converts older banks.
FORMAT_VERSION = 3
"""Version of a bank's files; increased by any change of their layout or of a field's meaning."""

POOL_MODES = ("average", "average_floor", "max", "bilinear")
MERGED = "merged"
MERGED_LAYER = re.compile(r"([0-9]+,)*merged")
"""Values of `layer` that are not numbers: merged tokens, after those of earlier layers (Qwen3-VL's)."""
DTYPES = ("float16", "bfloat16")
CODECS = ("none", "blosc", "int8")
FRAMES_LIKE = ("qwen2_vl", "qwen3_vl", "llava")
"""Whose video processor chooses frames; Qwen2.5-VL's does it as Qwen2-VL's."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are banked.

    `num_frames` takes that many, uniformly. Otherwise `fps` takes, for each time k / fps from the
    clip's start, the last frame at or before it; a clip that gives more than `max_frames` is
    sampled uniformly with `max_frames` instead. A clip is never padded with repeats. With `like`, they
    are those that this processor of transformers takes at such settings.
    """

    num_frames: int | None = None
    fps: str | None = None
    """An exact decimal or ratio, frames per second: "1", "0.5", "30000/1001"."""
    max_frames: int | None = None
    kept: int | None = None
    """Of the frames so sampled, keep this many, uniformly: for a bank derived with fewer frames."""
    like: str | None = None
    """One of `FRAMES_LIKE`: whose processor chooses the frames."""

    def __post_init__(self) -> None:
        # both or neither: each alone decides the number of frames
        if (self.num_frames is None) == (self.fps is None):
            raise UserError("sampling takes either --frames N or --fps F --max-frames N, not both")
        if self.like not in (None, *FRAMES_LIKE):
            known = ", ".join(FRAMES_LIKE)
            raise UserError(f"frames can be taken like one of {known}", got=repr(self.like))
        for name in ("num_frames", "max_frames", "kept"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be a positive integer, got {value}")
        if self.fps is not None:
            try:
                positive = Fraction(self.fps) > 0
            except (ValueError, ZeroDivisionError):
                positive = False
            if not positive:
                raise UserError(
                    f"fps must be a positive number such as 1, 0.5 or 30000/1001, got {self.fps!r}"
                )

    @property
    def most_frames(self) -> int:
        """The largest number of frames that one clip can give."""
        limit = self.num_frames or self.max_frames
        assert limit is not None
        return limit if self.kept is None else min(limit, self.kept)


@dataclass(frozen=True)
class Derived:
    """The bank whose stored features these were pooled from."""

    fingerprint: str
    """Fingerprint of that bank's features."""
    strides: tuple[int, ...]
    codec: str


@dataclass(frozen=True)
class FeatureConfig:
    """Everything that the stored bytes depend on."""

    tower_type: str
    """transformers' model type of the vision tower, such as `siglip_vision_model`."""
    tower_digest: str
    """blake2b of the tower's configuration and weights, independent of their path."""
    layer: int | str
    """Index into the tower's hidden states, -1 the last, -2 the one before it; or `merged`: the output
    of the tower's merger, the input of its LLM. `5,11,17,merged`: a cell's channels are the outputs of
    those layers' own mergers and then the merged tokens, concatenated."""
    processor: Json
    """The tower's resolved image-processor values: sizes, filter, mean, std, crop."""
    dtype: str
    """dtype of the stored features: `float16`, or `bfloat16` (stored as uint16)."""
    tower_dtype: str
    """dtype of the tower's arithmetic: `float32`, `bfloat16` or `float16`."""
    attention: str
    """The tower's attention implementation in transformers: `sdpa` or `eager`."""
    sampling: Sampling
    strides: tuple[int, ...]
    """Patches per cell side, strictly increasing: finest (slow) first."""
    pool: str
    codec: str = "none"
    """How features are stored: `none`, `blosc` or `int8`."""
    format_version: int = FORMAT_VERSION
    derived: Derived | None = None
    """The source of derived features; None for features that come from the tower."""

    def __post_init__(self) -> None:
        check_strides(self.strides)
        if isinstance(self.layer, str) and not MERGED_LAYER.fullmatch(self.layer):
            raise UserError(f"layer must be an integer or {MERGED}, got {self.layer!r}")
        if isinstance(self.layer, str) and self.strides[0] != 1:
            raise UserError(
                f"layer {self.layer}: merged tokens are banked as they come, with coarser strides beside "
                "them",
                got=f"a finest stride of {self.strides[0]}",
                fix=f"use --stride {','.join(map(str, (1, *self.strides)))}, or --stride 1",
            )
        if self.pool not in POOL_MODES:
            raise UserError(f"pool must be one of {', '.join(POOL_MODES)}, got {self.pool!r}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.codec not in CODECS:
            raise UserError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")

    def to_json(self) -> Json:
        """Return the fields as json, without those that only a derived bank has, unless this is one."""
        data = asdict(self) | {"strides": list(self.strides)}
        # absent unless set: banks from before these fields keep their fingerprint
        for name in ("kept", "like"):
            if data["sampling"][name] is None:
                del data["sampling"][name]
        if self.derived is None:
            del data["derived"]
        else:
            data["derived"]["strides"] = list(self.derived.strides)
        return data

    @classmethod
    def from_json(cls, data: Json) -> "FeatureConfig":
        """Return the config; raises UserError naming a field that this version does not know."""
        return parse(cls, data, "feature config")

    @property
    def fingerprint(self) -> str:
        return digest(canonical_json(self.to_json()))


def check_strides(strides: Sequence[int]) -> None:
    """Raise UserError unless strides are one or more strictly increasing positive integers."""
    rising = all(a < b for a, b in pairwise(strides))
    if not strides or strides[0] < 1 or not rising:
        shown = ",".join(map(str, strides))
        raise UserError(
            f"stride must be strictly increasing positive integers such as 4,8, got {shown!r}"
        )


def differences(ours: Json, theirs: Json, prefix: str = "") -> list[str]:
    """Return one line for each field in which two configs differ, nested fields by dotted name."""
    lines = []
    for name in sorted(set(ours) | set(theirs)):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a!r} here, {b!r} there")
    return lines
