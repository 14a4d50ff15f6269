"""One sample of a shard: its json (`SampleMeta`), its id and key, the names of its members."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

from shards.signed import Json, digest

# At most 80 characters: a ustar header has 100 bytes for a name, of which `.stride16_scale.npy` needs 19.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass(frozen=True)
class SampleMeta:
    """The json member of a sample: the clip's source, its frames' times, and where its cells are."""

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
        """Return the json: `flags` as one text, because readers such as Arrow infer a field's type from
        its first values, and an empty list has none.
        """
        data = asdict(self) | {"flags": " ".join(self.flags)}
        if not self.frame_nbytes:
            del data["frame_nbytes"]
        return data

    @classmethod
    def from_json(cls, data: Json) -> "SampleMeta":
        pairs = {name: tuple(data[name]) for name in ("display_size", "covered", "patch_grid")}
        grids = {stride: tuple(grid) for stride, grid in data["cell_grids"].items()}
        flags = data["flags"]
        flags = flags.split() if isinstance(flags, str) else flags  # formats 1 and 2: a list
        return cls(**{**data, **pairs, "cell_grids": grids, "flags": flags})


def clip_id(path: str, start: float | None = None, end: float | None = None) -> str:
    """Return the id of a clip: its POSIX path, plus `#start-end` in seconds when it is a part.

    Seconds are written to the millisecond without trailing zeros; an open end is left empty.
    `./a.mp4` and `a.mp4` are one clip.
    """
    # skip PurePosixPath where it would change nothing: it is slow, and annotation files have many rows
    if path[:1] in ("", ".") or path[-1:] == "/" or "/." in path or "//" in path:
        path = PurePosixPath(path).as_posix()
    if start is None and end is None:
        return path
    return f"{path}#{_seconds(start or 0.0)}-{'' if end is None else _seconds(end)}"


def _seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def sample_key(id_: str) -> str:
    """Return a clip's WebDataset key: a readable slug (at most 60) and 16 hex digits of its id.

    Without dots and slashes: webdataset splits a member's name into key and field at its first dot.
    """
    # the end of the id, which names the file; what the slug loses, the hash keeps apart
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", id_)[-60:].strip("-")
    return f"{slug}-{digest(id_.encode(), size=8)}".lstrip("-")


def member_name(key: str, stride: int) -> str:
    return f"{key}.stride{stride}.npy"


def scale_name(key: str, stride: int) -> str:
    return f"{key}.stride{stride}_scale.npy"
