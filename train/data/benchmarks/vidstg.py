"""VidSTG as it is published: sentences about parts of VidOR's videos, whose boxes VidOR's own files have.

Frames count from 0. `temporal_gt` ends before its end_fid, `used_segment` with its end_fid: of the 8,606
annotations of the val and test files, 4,643 have a used_segment of (0, frame_count - 1), and no
temporal_gt ends later than frame_count. A video's path and boxes are in
`annotation/{training,validation}/FOLDER/VID.json` of VidOR.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from shards.annotations.fault import RowError
from shards.annotations.forms import Json

Box = tuple[float, list[float]]
"""(seconds of the clip, [xmin, ymin, xmax, ymax] in pixels)"""


@dataclass(frozen=True)
class Part:
    """Frames [first, last] of a video, as a clip of its own where they are not all of it."""

    first: int
    last: int
    fps: float
    whole: bool

    @property
    def start(self) -> float:
        """Seconds of the video, to the millisecond at which its first frame is on the screen."""
        return 0.0 if self.whole else math.ceil(1000 * self.first / self.fps) / 1000

    @property
    def end(self) -> float:
        # down: the next frame begins at the exact time, and a part rounded up would have it, too
        return math.floor(1000 * (self.last + 1) / self.fps) / 1000

    def seconds(self, frame: int) -> float:
        """Return the seconds of the clip at which a frame of the video begins."""
        # the start is rounded up, by which the first frame would begin before 0
        return max(0.0, frame / self.fps - self.start)

    def bounds(self) -> Json:
        """Return `start` and `end` of a record about the part; nothing where it is about the whole."""
        return {} if self.whole else {"start": self.start, "end": self.end}


@dataclass(frozen=True)
class Sentence:
    """A sentence, when it holds, and where its subject is meanwhile."""

    id: str
    text: str
    video: str
    part: Part
    span: tuple[float, float]
    """Seconds of the part."""
    boxes: list[Box]
    size: tuple[float, float]
    """Width and height."""


def part_of(first: int, last: int, fps: float, frames: int | None) -> Part:
    """Return frames [first, last] of a video of so many frames, None where that is not known."""
    if not (0 <= first <= last and fps > 0):
        raise RowError("bad start or end", f"frames {first} to {last} at {fps:g} a second")
    return Part(first, last, fps, whole=first == 0 and frames is not None and last >= frames - 1)


def sentences(item: Json, vidor: str) -> Iterator[Sentence]:
    """Yield the sentences of an annotation, declarative ones first. vidor: VidOR's annotation folder."""
    there = video_of(vidor, str(item["vid"]))
    used, truth = item["used_segment"], item["temporal_gt"]
    part = part_of(used["begin_fid"], used["end_fid"], float(item["fps"]), item["frame_count"])
    first, after = truth["begin_fid"], truth["end_fid"]
    if not (part.first <= first < after <= part.last + 1):
        what = f"frames {first} to {after} are not within {part.first} to {part.last}"
        raise RowError("span outside its part", what)
    span = part.seconds(first), part.seconds(after)
    size = float(item["width"]), float(item["height"])
    of = f"{item['vid']}-{part.first}-{first}-{after}"
    relation = item["used_relation"]
    about = "-".join(str(relation[part]) for part in ("subject_tid", "predicate", "object_tid"))
    for kind in ("captions", "questions"):
        for number, said in enumerate(item[kind]):
            target = said["target_id"]
            boxes = [
                (part.seconds(frame), box)
                for frame in range(first, min(after, len(there["trajectories"])))
                if (box := box_of(there["trajectories"][frame], target))
            ]
            id_ = f"{of}-{about}-{kind}-{number}"
            yield Sentence(id_, said["description"], there["video_path"], part, span, boxes, size)


def box_of(objects: list[Json], target: int) -> list[float] | None:
    """Return the corners of an object in a frame of VidOR, None where it is not there."""
    found = next((entry["bbox"] for entry in objects if entry["tid"] == target), None)
    return found and [float(found[side]) for side in ("xmin", "ymin", "xmax", "ymax")]


def video_of(vidor: str, vid: str) -> Any:
    """Return VidOR's annotation of a video; RowError where the folder has none."""
    file = files_of(vidor).get(vid)
    if file is None:
        what = f"VidOR's annotation of video {vid} is not in {vidor or 'any folder'}"
        raise RowError("no boxes", what, fix="give its annotation folder: --vidor FOLDER")
    return read(file)


@lru_cache(maxsize=2)
def files_of(vidor: str) -> dict[str, Path]:
    """Return the file of each video in VidOR's annotation folder, by the video's name."""
    return {file.stem: file for file in Path(vidor).rglob("*.json")} if vidor else {}


@lru_cache(maxsize=32)
def read(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


@lru_cache(maxsize=4)
def rates(path: str) -> dict[str, tuple[float, int | None]]:
    """Return (frames a second, number of frames or None) of each video by its name.

    path: a file of VidSTG, or `{video: frames a second}`.
    """
    data = json.loads(Path(path).read_text("utf-8"))
    if isinstance(data, dict):
        return {Path(name).stem: (float(fps), None) for name, fps in data.items()}
    return {str(item["vid"]): (float(item["fps"]), int(item["frame_count"])) for item in data}
