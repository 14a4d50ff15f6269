"""Inputs -> clips -> units, before anything is decoded.

A unit is the work that makes one shard. Units are cut from the clips in order of key, by
predicted bytes, and only ever appended: clips added later make new units, old shards never move.
Clips in archives come after the others and in the order of their archive, which is as fixed as
that of keys and lets a .tar.gz be read from its start once.

A clip whose source has changed, or that failed and is tried again, is in a second unit. The last
unit that holds a clip is the one that counts: what earlier ones banked of it is served no more.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from model.choices import TOWER_THREADS
from preprocess.annotations import (
    ANNOTATION_SUFFIXES,
    AS_RECORDS,
    OTHER_RECORDS,
    annotated_media,
)
from preprocess.archive import archive_members, is_archive
from preprocess.pictures import PICTURE_FPS, PICTURE_SUFFIXES
from shards.schema import (
    FORMAT_VERSION,
    FeatureConfig,
    Json,
    clip_id,
    differences,
    sample_key,
)
from shards.writer import read_signed_json, signed_json, write_atomic

VIDEO_SUFFIXES = frozenset(
    [
        ".mp4",
        ".mkv",
        ".webm",
        ".avi",
        ".mov",
        ".m4v",
        ".mpg",
        ".mpeg",
        ".ts",
        ".m2ts",
        ".flv",
        ".wmv",
        ".ogv",
        ".3gp",
    ]
)
# In a folder these are clips by themselves, as videos are.
CLIP_SUFFIXES = VIDEO_SUFFIXES | {".gif", ".apng"}


@dataclass(frozen=True)
class ClipSource:
    """A clip to encode: a video file, a folder of pictures or a member of an archive, or a part."""

    id: str
    key: str
    path: str
    """Of the file, folder or archive, on this machine."""
    relative: str
    """Of the file or folder under the root it was found in, POSIX form; or in its archive."""
    start: float | None = None
    end: float | None = None
    picture_fps: str | None = None
    """Of a folder of pictures: how many are shown a second."""
    offset: int | None = None
    """Of a member of an archive: where its bytes lie in the uncompressed tar."""
    nbytes: int | None = None
    size: int | None = None
    """Bytes of the source when it was planned: the file, a folder's pictures, or a member."""
    mtime_ns: int | None = None
    """Of the file, of a folder's newest picture, or of the archive."""
    digest: str | None = None
    """As in the sample's json; None for a source that could not be read."""
    full_digest: str | None = None
    """blake2b of all its bytes, where that was asked for."""
    frames: int | None = None
    """How many are predicted to be banked: none of a source that cannot be opened."""

    @property
    def where(self) -> str:
        """The path, and the member of an archive, for messages."""
        return self.path if self.offset is None else f"{self.path}: {self.relative}"

    @property
    def archive(self) -> str:
        """The name of the archive, of a member of one."""
        return Path(self.path).name

    @property
    def place(self) -> tuple[str, str, int, str]:
        """What units are sorted by."""
        if self.offset is None:
            return "", "", 0, self.key
        return self.archive, self.path, self.offset, self.key


@dataclass(frozen=True)
class How:
    """How the tower is run. The bytes hang on it a little, so that reruns do as the first run did."""

    batch_frames: int = 16
    """Frames that pass through the tower together."""
    tower_threads: int = TOWER_THREADS
    tower: str = ""
    """Where it lay."""


@dataclass(frozen=True)
class Plan:
    """The features to make, and the units of clips to make them in."""

    features: FeatureConfig
    units: list[list[ClipSource]]
    how: How = How()
    calibration: Mapping[str, list[float]] | None = None
    """int8: per stride, as text, the scale of each channel; None until it is measured."""
    quality: Mapping[str, Mapping[str, float]] | None = None
    """Per stride, as text, what the codec loses; None until it is measured."""
    pruned: frozenset[str] = field(default=frozenset())
    """Keys of clips that are not to be served any more."""

    @property
    def clips(self) -> list[ClipSource]:
        """Each clip once, as the last unit that holds it has it."""
        return list({clip.key: clip for unit in self.units for clip in unit}.values())

    @property
    def counts(self) -> dict[str, int]:
        """By key, the unit that counts for it: the last one that holds it."""
        return {clip.key: number for number, unit in enumerate(self.units) for clip in unit}

    def served(self) -> dict[str, int]:
        """By key, the unit whose shard serves it, if it banked it; pruned clips are left out."""
        return {key: unit for key, unit in self.counts.items() if key not in self.pruned}

    def work(self) -> list[list[ClipSource]]:
        """Return, of each unit, the clips that it is to bank."""
        served = self.served()
        return [
            [clip for clip in unit if served.get(clip.key) == number]
            for number, unit in enumerate(self.units)
        ]

    def extended(
        self, clips: Sequence[ClipSource], shard_bytes: int, clip_bytes: Callable[[ClipSource], int]
    ) -> "Plan":
        """Return the plan with these clips in units of their own at its end."""
        return replace(self, units=[*self.units, *cut_units(clips, shard_bytes, clip_bytes)])


def cut_units(
    clips: Sequence[ClipSource], shard_bytes: int, clip_bytes: Callable[[ClipSource], int]
) -> list[list[ClipSource]]:
    """Return units of clips in order of place, each of at most `shard_bytes` (one clip at least).

    clip_bytes: what the features of a clip are predicted to take.
    """
    units: list[list[ClipSource]] = []
    room = 0
    for clip in sorted(clips, key=lambda clip: clip.place):
        nbytes = clip_bytes(clip)
        if not units or nbytes > room:
            units.append([])
            room = shard_bytes
        units[-1].append(clip)
        room -= nbytes
    return units


def clips_under(clips: Sequence[ClipSource], roots: Sequence[str]) -> list[ClipSource]:
    """Return the clips; those whose path is gone with that of the same name under a root."""
    return [clip if Path(clip.path).exists() else _under(clip, roots) for clip in clips]


def _under(clip: ClipSource, roots: Sequence[str]) -> ClipSource:
    name = clip.relative if clip.offset is None else clip.archive
    paths = [Path(root) / name for root in roots]
    found = next((path for path in paths if path.exists()), None)
    return replace(clip, path=str(found.absolute())) if found else clip


def find_clips(
    inputs: Sequence[str],
    video_roots: Sequence[str],
    picture_fps: str = PICTURE_FPS,
    *,
    allow_outside: bool = False,
) -> list[ClipSource]:
    """Return the clips of files, folders, archives and annotation files, each once.

    A folder gives its videos and animations (.gif), at any depth, and one clip for each folder in
    which there is nothing but pictures. Archives are read where they are named themselves.
    Raises ValueError that lists every input which cannot be found and every pair of different
    files with one id. allow_outside: annotation files may name videos outside of their roots.
    """
    found: dict[str, ClipSource] = {}
    problems: list[str] = []
    for root in video_roots:
        if not Path(root).is_dir():
            problems.append(f"--video-root {root}: no such folder")
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            sources = _in_folder(path)
            if not sources:
                problems.append(f"{path}: no video files in this folder")
        elif not path.exists():
            problems.append(f"{path}: no such file or folder")
            continue
        elif path.suffix.lower() in ANNOTATION_SUFFIXES:
            named = annotated_media(path, video_roots, problems, allow_outside)
            sources = [_source(*media) for media in named]
        elif path.suffix.lower() in OTHER_RECORDS:
            problems.append(f"{path}: {AS_RECORDS.format(path)}")
            continue
        elif is_archive(path):
            sources = _archived(path, problems)
        else:
            sources = [_source(path, path.name)]
        for source in sources:
            if Path(source.path).is_dir():
                source = replace(source, picture_fps=picture_fps)
            other = found.setdefault(source.id, source)
            same_file = os.path.realpath(other.path) == os.path.realpath(source.path)
            if not same_file or other.offset != source.offset:
                problems.append(
                    f"{source.where}: has the id {source.id!r}, as {other.where} has; encode them "
                    "from a common folder, or into two banks"
                )
    if problems:
        raise ValueError("\n".join(problems))
    return list(found.values())


def _in_folder(root: Path) -> list[ClipSource]:
    sources = []
    for folder, names, files in os.walk(root):
        names.sort()
        here = Path(folder)
        clips = [name for name in sorted(files) if Path(name).suffix.lower() in CLIP_SUFFIXES]
        sources += [_source(here / n, (here / n).relative_to(root).as_posix()) for n in clips]
        seen = [name for name in files if not name.startswith(".")]
        if seen and not names and all(Path(n).suffix.lower() in PICTURE_SUFFIXES for n in seen):
            # The folder given is named from its own folder, as a file is.
            own = os.path.basename(os.path.abspath(root))
            sources.append(
                _source(here, own if here == root else here.relative_to(root).as_posix())
            )
    return sources


def _archived(path: Path, problems: list[str]) -> list[ClipSource]:
    """Return the videos in an archive: their ids are their paths in it."""
    try:
        members = archive_members(path, CLIP_SUFFIXES)
    except ValueError as error:
        problems.append(str(error))
        return []
    if not members:
        problems.append(f"{path}: no video files in this archive")
    return [
        replace(_source(path, member.name), offset=member.offset, nbytes=member.nbytes)
        for member in members
    ]


def _source(
    file: Path, relative: str, start: float | None = None, end: float | None = None
) -> ClipSource:
    id_ = clip_id(relative, start, end)
    try:
        key = sample_key(id_)
    except UnicodeEncodeError:
        raise ValueError(f"{str(file)!a}: its name is not UTF-8; rename it") from None
    return ClipSource(id_, key, str(file.absolute()), relative, start, end)


def read_plan(bank: Path) -> Plan | None:
    """Return a bank's plan, None where there is none yet."""
    path = bank / "plan.json"
    if not path.exists():
        return None
    data = read_signed_json(path)
    if data["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{path}: written by a newer framebank; update it")
    units = [[ClipSource(**clip) for clip in unit] for unit in data["units"]]
    return Plan(
        FeatureConfig.from_json(data["features"]),
        units,
        How(**data["how"]),
        data["calibration"],
        data["quality"],
        frozenset(data["pruned"]),
    )


def write_plan(bank: Path, plan: Plan) -> None:
    data = {
        "format_version": FORMAT_VERSION,
        "features": plan.features.to_json(),
        "calibration": plan.calibration,
        "quality": plan.quality,
        "how": asdict(plan.how),
        "pruned": sorted(plan.pruned),
        "units": [[_clip_json(clip) for clip in unit] for unit in plan.units],
    }
    write_atomic(bank / "plan.json", signed_json(data))


def _clip_json(clip: ClipSource) -> Json:
    return {name: value for name, value in asdict(clip).items() if value is not None}


def refuse_other_features(bank: Path, asked: FeatureConfig, banked: FeatureConfig) -> None:
    """Raise ValueError naming each field in which a bank differs from what is asked of it."""
    lines = differences(asked.to_json(), banked.to_json())
    if lines:
        raise ValueError(
            f"{bank}: holds other features; write to another folder, or ask for the same. "
            f"Asked here, banked there: {'; '.join(lines)}"
        )
