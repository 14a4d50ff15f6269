"""Inputs -> clips -> units, before anything is decoded.

A unit is the work that makes one shard. Units are cut from the clips in order of key, by
predicted bytes, and only ever appended: clips added later make new units, old shards never move.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.schema import FORMAT_VERSION, FeatureConfig, Json, clip_id, differences, sample_key
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
ANNOTATION_SUFFIXES = frozenset((".json", ".jsonl"))


@dataclass(frozen=True)
class ClipSource:
    """A clip to encode: a video file, or a part of one."""

    id: str
    key: str
    path: str
    """Of the file, on this machine."""
    relative: str
    """Of the file under the root it was found in, POSIX form."""
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Plan:
    """The features to make, and the units of clips to make them in."""

    features: FeatureConfig
    units: list[list[ClipSource]]

    @property
    def clips(self) -> list[ClipSource]:
        return [clip for unit in self.units for clip in unit]

    def extended(self, clips: Sequence[ClipSource], shard_bytes: int, clip_bytes: int) -> "Plan":
        """Return the plan with units for the clips that it does not hold yet."""
        known = {clip.key for clip in self.clips}
        new = [clip for clip in clips if clip.key not in known]
        return Plan(self.features, [*self.units, *cut_units(new, shard_bytes, clip_bytes)])


def cut_units(
    clips: Sequence[ClipSource], shard_bytes: int, clip_bytes: int
) -> list[list[ClipSource]]:
    """Return units of clips in order of key, each of at most `shard_bytes` (one clip at least)."""
    ordered = sorted(clips, key=lambda clip: clip.key)
    size = max(1, shard_bytes // max(1, clip_bytes))
    return [ordered[k : k + size] for k in range(0, len(ordered), size)]


def find_clips(inputs: Sequence[str], video_roots: Sequence[str]) -> list[ClipSource]:
    """Return the clips of video files, folders (recursive) and annotation files, each once.

    Raises ValueError that lists every input which cannot be found and every pair of different
    files with one id.
    """
    found: dict[str, ClipSource] = {}
    problems: list[str] = []
    for root in video_roots:
        if not Path(root).is_dir():
            problems.append(f"--video-root {root}: no such folder")
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in VIDEO_SUFFIXES and not file.is_dir()
            )
            if not files:
                problems.append(f"{path}: no video files in this folder")
            sources = [_source(file, file.relative_to(path).as_posix()) for file in files]
        elif not path.exists():
            problems.append(f"{path}: no such file or folder")
            continue
        elif path.suffix.lower() in ANNOTATION_SUFFIXES:
            sources = _annotated(path, video_roots, problems)
        else:
            sources = [_source(path, path.name)]
        for source in sources:
            other = found.setdefault(source.id, source)
            if os.path.realpath(other.path) != os.path.realpath(source.path):
                problems.append(
                    f"{source.path}: has the id {source.id!r}, as {other.path} has; encode them from "
                    "a common folder, or into two banks"
                )
    if problems:
        raise ValueError("\n".join(problems))
    return list(found.values())


def _source(
    file: Path, relative: str, start: float | None = None, end: float | None = None
) -> ClipSource:
    id_ = clip_id(relative, start, end)
    try:
        key = sample_key(id_)
    except UnicodeEncodeError:
        raise ValueError(f"{str(file)!a}: its name is not UTF-8; rename it") from None
    return ClipSource(id_, key, str(file.absolute()), relative, start, end)


def _annotated(path: Path, roots: Sequence[str], problems: list[str]) -> list[ClipSource]:
    """Return the clips that an annotation file names, resolved against the roots."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".jsonl":
            items = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            items = json.loads(text)
        named: set[tuple[str, float | None, float | None]] = {
            (str(video), item.get("start"), item.get("end"))
            for item in items
            for video in _videos(item)
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        problems.append(f"{path}: not readable as records: {error}")
        return []
    sources, missing = [], []
    for video, start, end in sorted(named, key=str):
        candidates = [root / video for root in [*map(Path, roots), path.parent]]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if not _is_part(start, end):
            problems.append(
                f"{path}: {video}: start {start!r} and end {end!r} bound no part; write seconds, "
                "start before end"
            )
        elif file is None:
            missing.append(video)
        else:
            sources.append(_source(file, Path(video).as_posix(), start, end))
    if missing:
        looked = ", ".join([*map(str, roots), str(path.parent)])
        problems.append(
            f"{path}: {len(missing)} of {len(named)} videos not found, first {missing[0]!r} "
            f"(looked under {looked}); name their folder with --video-root"
        )
    return sources


def _is_part(start: object, end: object) -> bool:
    times = [time for time in (start, end) if time is not None]
    numbers = [time for time in times if isinstance(time, int | float) and 0 <= time < math.inf]
    return len(numbers) == len(times) and sorted(set(numbers)) == numbers


def _videos(item: Json) -> list[str]:
    video = item.get("video")
    return [] if video is None else video if isinstance(video, list) else [video]


def read_plan(bank: Path) -> Plan | None:
    """Return a bank's plan, None where there is none yet."""
    path = bank / "plan.json"
    if not path.exists():
        return None
    data = read_signed_json(path)
    if data["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{path}: written by a newer framebank; update it")
    units = [[ClipSource(**clip) for clip in unit] for unit in data["units"]]
    return Plan(FeatureConfig.from_json(data["features"]), units)


def write_plan(bank: Path, plan: Plan) -> None:
    data = {
        "format_version": FORMAT_VERSION,
        "features": plan.features.to_json(),
        "units": [[asdict(clip) for clip in unit] for unit in plan.units],
    }
    write_atomic(bank / "plan.json", signed_json(data))


def refuse_other_features(bank: Path, asked: FeatureConfig, banked: FeatureConfig) -> None:
    """Raise ValueError naming each field in which a bank differs from what is asked of it."""
    lines = differences(asked.to_json(), banked.to_json())
    if lines:
        raise ValueError(
            f"{bank}: holds other features; write to another folder, or ask for the same. "
            f"Asked here, banked there: {'; '.join(lines)}"
        )
