"""LLaVA-ST's ST-Align: conversations with slots, some about a part of a video that is given in frames.

`meta: {split: [first, last]}` names the part; its times are shares of the way from the first frame to the
last one (LLaVA-ST, inference/src/datasets.py). Frames become seconds by the video's rate.
"""

from pathlib import Path

from shards.annotations.fault import RowError, short
from shards.annotations.forms import VARIABLES, Json
from train.data.benchmarks.vidstg import Part, part_of, rates

RATES = "--rates"
"""Field of an item: the file with the frames a second of its video."""


def in_seconds(item: Json) -> Json:
    """Return an item whose part, if it has one, is `start` and `end`, and its times shares of these.

    Without `rates`, or a video, an item is returned as it is, and refused where rows are read.
    """
    meta, file = item.get("meta"), item.get(RATES)
    item = {name: value for name, value in item.items() if not name.startswith("--")}
    split = meta.get("split") if isinstance(meta, dict) else None
    if not file or split is None or "video" not in item:
        return item
    whole_numbers = isinstance(split, list) and [type(frame) for frame in split] == [int, int]
    if not whole_numbers or {"start", "end"} & item.keys():
        what = "`meta.split` is not two frames, or stands beside `start` and `end`"
        raise RowError("bad start or end", what, got=short(split))
    name = Path(str(item["video"])).stem
    if name not in rates(file):
        what = f"the rate of video {name!a}, of which `meta.split` is a part, is not in {file}"
        raise RowError("bad start or end", what)
    first, last = split
    fps, frames = rates(file)[name]
    part = part_of(first, last, fps, frames)
    item = {name: value for name, value in item.items() if name != "meta"}
    variables = item.get("variables") or {}
    return item | {"variables": variables | scaled(variables, part)} | part.bounds()


def scaled(variables: Json, part: Part) -> Json:
    """Return the times among `variables` as shares of the part, whose last frame takes time, too."""
    frames = part.last - part.first
    names = [name for (axis, _), name in VARIABLES.items() if axis == "TEMP"]
    return {
        name: [round(share * frames / (frames + 1), 6) for share in variables[name]]
        for name in names
        if name in variables
    }
