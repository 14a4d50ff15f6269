"""What the bytes of a bank depend on, and the names inside it.

`FeatureConfig` is everything that changes a stored feature; its blake2b digest is the bank's
fingerprint. Worker counts, shard sizes, library versions and hardware are provenance and never
enter it. `SampleMeta` is the json beside each clip's arrays.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

FORMAT_VERSION = 1
POOL_MODES = ("average", "average_floor", "max", "bilinear")
DTYPES = ("float16", "bfloat16")
CODECS = ("none", "blosc", "int8")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")

Json = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are banked.

    `num_frames` takes that many, uniformly. Otherwise `fps` takes, for each time k / fps from the
    clip's start, the last frame at or before it; a clip that gives more than `max_frames` is
    sampled uniformly with `max_frames` instead. A clip is never padded with repeats.
    """

    num_frames: int | None = None
    fps: str | None = None
    """An exact decimal or ratio, frames per second: "1", "0.5", "30000/1001"."""
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError("sampling takes either --frames N or --fps F --max-frames N, not both")
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if self.fps is not None:
            try:
                positive = Fraction(self.fps) > 0
            except (ValueError, ZeroDivisionError):
                positive = False
            if not positive:
                raise ValueError(
                    f"fps must be a positive number such as 1, 0.5 or 30000/1001, got {self.fps!r}"
                )

    @property
    def most_frames(self) -> int:
        """The largest number of frames that one clip can give."""
        limit = self.num_frames or self.max_frames
        assert limit is not None
        return limit


@dataclass(frozen=True)
class FeatureConfig:
    """All that the stored bytes depend on."""

    tower_type: str
    """transformers' model type of the vision tower, such as `siglip_vision_model`."""
    tower_digest: str
    """blake2b of the tower's configuration and weights, independent of where they lie."""
    layer: int
    """Index into the tower's hidden states, -1 the last, -2 the one before it."""
    processor: Json
    """The tower's resolved image-processor values: sizes, filter, mean, std, crop."""
    dtype: str
    """Of the stored features: `float16`, or `bfloat16` (kept as uint16 and marked)."""
    tower_dtype: str
    """Of the tower's arithmetic: `float32`, `bfloat16` or `float16`."""
    attention: str
    """The tower's attention implementation in transformers: `sdpa` or `eager`."""
    sampling: Sampling
    strides: tuple[int, ...]
    """Patches per cell side, strictly increasing: finest (slow) first."""
    pool: str
    codec: str = "none"
    """How features are stored: `none`, `blosc` or `int8`."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_strides(self.strides)
        if self.pool not in POOL_MODES:
            raise ValueError(f"pool must be one of {', '.join(POOL_MODES)}, got {self.pool!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")

    def to_json(self) -> Json:
        return asdict(self) | {"strides": list(self.strides)}

    @classmethod
    def from_json(cls, data: Json) -> "FeatureConfig":
        """Rebuild a config; a key this version does not know is refused by name."""
        unknown = sorted(set(data) - {one.name for one in fields(cls)})
        sampling = {one.name for one in fields(Sampling)}
        unknown += sorted(f"sampling.{name}" for name in set(data["sampling"]) - sampling)
        if unknown:
            raise ValueError(
                f"feature config has unknown fields {unknown}: made by a newer framebank; update it"
            )
        known = dict(data)
        known["sampling"] = Sampling(**data["sampling"])
        known["strides"] = tuple(data["strides"])
        return cls(**known)

    @property
    def fingerprint(self) -> str:
        return digest(canonical_json(self.to_json()))


@dataclass(frozen=True)
class SampleMeta:
    """The json member of a sample: where a clip came from and how its grids lie on the picture."""

    id: str
    """The clip's path relative to its root, plus `#start-end` for a part."""
    path: str
    """The video's path relative to the root it was found under."""
    size: int
    """Bytes of the video file."""
    digest: str
    """Hash of the file's size, first and last 64 KiB."""
    start: float
    """Seconds from the file's first shown frame at which the clip begins."""
    end: float
    """Seconds at which its last frame stops being shown."""
    fps: float
    """Mean frame rate of the source."""
    frame_count: int
    """Frames that the source shows within the clip."""
    frame_index: list[int]
    """Of each banked frame, its place among the frames shown by the file."""
    timestamps: list[float]
    """Of each banked frame, seconds from the file's first shown frame."""
    display_size: tuple[int, int]
    """(height, width) of a frame as displayed, in pixels."""
    covered: tuple[float, float, float, float]
    """The part of the frame that the patch grid covers: y0, x0, y1, x1 as fractions of it."""
    patch_grid: tuple[int, int]
    """(rows, columns) of the tower's output."""
    cell_grids: dict[str, tuple[int, int]]
    """Per stride, as text, the (rows, columns) of its cells."""
    tower_width: int
    frames_per_unit: int
    """Frames behind one entry of axis 0 (1; 2 for towers that pair frames)."""
    decoder: str
    """Which reader gave the frames: `decord`, `pyav-seek`, `pyav-scan`."""
    flags: list[str]
    """What the packet scan found unusual about the file."""
    frame_nbytes: dict[str, list[int]] = field(default_factory=dict)
    """Per stride, as text, the compressed bytes of each frame; not in the json where none are."""

    def to_json(self) -> Json:
        data = asdict(self)
        if not self.frame_nbytes:
            del data["frame_nbytes"]
        return data

    @classmethod
    def from_json(cls, data: Json) -> "SampleMeta":
        pairs = {name: tuple(data[name]) for name in ("display_size", "covered", "patch_grid")}
        grids = {stride: tuple(grid) for stride, grid in data["cell_grids"].items()}
        return cls(**{**data, **pairs, "cell_grids": grids})


def check_strides(strides: Sequence[int]) -> None:
    """Refuse strides that are not one or more strictly increasing positive integers."""
    rising = all(a < b for a, b in pairwise(strides))
    if not strides or strides[0] < 1 or not rising:
        shown = ",".join(map(str, strides))
        raise ValueError(
            f"stride must be strictly increasing positive integers such as 4,8, got {shown!r}"
        )


def clip_id(path: str, start: float | None = None, end: float | None = None) -> str:
    """Return the id of a clip: its POSIX path, plus `#start-end` in seconds when it is a part.

    Seconds are written to the millisecond without trailing zeros; an open end is left empty.
    `./a.mp4` and `a.mp4` are one clip.
    """
    path = PurePosixPath(path).as_posix()
    if start is None and end is None:
        return path
    return f"{path}#{_seconds(start or 0.0)}-{'' if end is None else _seconds(end)}"


def leads_outside(path: str) -> bool:
    """Tell whether a path that should lie under a root may lie elsewhere: absolute, or with `..`.

    Links are not followed: those under a root are of whoever made the root, not of who wrote a path.
    """
    return path.startswith("/") or ".." in path.split("/")


def _seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def sample_key(id_: str) -> str:
    """Return a clip's WebDataset key: a readable slug (at most 60) and 16 hex digits of its id.

    No dot and no slash: stock readers cut a member's name at its first dot.
    """
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", id_)[-60:].strip("-")
    return f"{slug}-{digest(id_.encode(), size=8)}".lstrip("-")


def shard_name(unit: int) -> str:
    return f"bank-{unit:06d}.tar"


def shard_entries(commits: Sequence[Json]) -> list[Json]:
    """Return what a manifest tells of the shards of some commit records."""
    return [
        {"name": commit["shard"], "nbytes": commit["nbytes"], "sha256": commit["sha256"]}
        for commit in commits
    ]


def served_units(plan: Json) -> dict[str, int]:
    """Return, by key, the unit of a plan.json that serves it: the last that holds it, unless pruned."""
    pruned = set(plan["pruned"])
    return {
        clip["key"]: number
        for number, unit in enumerate(plan["units"])
        for clip in unit
        if clip["key"] not in pruned
    }


def member_name(key: str, stride: int) -> str:
    return f"{key}.stride{stride}.npy"


def scale_name(key: str, stride: int) -> str:
    return f"{key}.stride{stride}_scale.npy"


def canonical_json(data: Json) -> bytes:
    """Return the one spelling of `data` that hashes and shard members use."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(data: bytes, size: int = 16) -> str:
    return hashlib.blake2b(data, digest_size=size).hexdigest()


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
