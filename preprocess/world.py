"""Parts shared by worlds with exact answers: questions as records, videos as files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError

Json = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    task: str
    question: str
    answer: str


def check_empty(out: Path) -> None:
    """Raise UserError for a path that exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: remove it or name another")


def record(id_: str, video: str, turns: Iterable[Turn]) -> Json:
    conversation = [
        {"from": speaker, "value": value}
        for turn in turns
        for speaker, value in (("human", turn.question), ("gpt", turn.answer))
    ]
    # once: later turns are about the same video
    conversation[0]["value"] = "<video>\n" + conversation[0]["value"]
    return {"id": id_, "video": video, "conversations": conversation}


def one_each(video: str, turns: Sequence[Turn]) -> list[Json]:
    """Return one record per question, for tests."""
    stem = video.removesuffix(".mp4")
    return [
        record(f"{stem}/{index}-{turn.task}", video, [turn]) | {"task": turn.task}
        for index, turn in enumerate(turns)
    ]


def together(video: str, turns: Sequence[Turn]) -> Json:
    """Return one record with all questions, for training."""
    tasks = [turn.task for turn in turns]
    return record(video.removesuffix(".mp4"), video, turns) | {"tasks": tasks}


def write_rows(path: Path, rows: Iterable[Json]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def texts_of(records: Iterable[Json]) -> list[str]:
    """Return every question and every answer."""
    return [turn["value"] for record in records for turn in record["conversations"]]


def span(start: float, end: float) -> str:
    return f"from {seconds(start)} to {seconds(end)}"


def seconds(value: float) -> str:
    return f"<t:{value:.3f}>"


def places(values: Iterable[float]) -> str:
    """Return markup for x, y (, x, y) as fractions of the frame."""
    return "".join(f"<{'xy'[i % 2]}:{value:.4f}>" for i, value in enumerate(values))


def shuffled(rng: np.random.Generator, items: Sequence[Any]) -> list[Any]:
    return [items[i] for i in rng.permutation(len(items))]


def bouncing(rng: np.random.Generator, room: float, most: float, steps: int) -> np.ndarray:
    """Return float64 `(steps, 2)`: x and y along a straight line, reflected at 0 and `room`.

    most: largest distance per step, along each axis.
    """
    start = rng.uniform(0, room, size=2)
    step = rng.uniform(-most, most, size=2)
    path = start + step * np.arange(steps)[:, None]
    # a triangle wave: the straight path folded at both walls
    return np.asarray(room - abs(path % (2 * room) - room))


def write_video(path: Path, clip: np.ndarray, fps: int, crf: int = 12) -> None:
    """Encode a clip with one thread, without which bytes may differ between runs.

    clip: uint8 `(frames, height, width, 3)`, height and width even; frame k is shown from k / fps.
    """
    import av

    # no B-frames, a keyframe every 12: any frame is a short seek away
    options = {"preset": "veryfast", "crf": str(crf), "bf": "0", "g": "12"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = clip.shape[1:3]
        # what every player and decoder reads; colours have half the resolution
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for index, image in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        # the frames that the encoder still holds
        container.mux(stream.encode())
