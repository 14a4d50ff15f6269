"""What the banked frames say by themselves: spans that are read off them, with no model in between.

    python -m train.probe --bank bank --scenes train-scenes.jsonl --data_path test.jsonl --model runs/a

The scenes are rows as those of `splice`: what a stretch of a clip shows. The frames of each meaning
have a mean, and a frame shows that whose mean is nearest (Euclid, cells averaged, at the model's
fast stride). A question about a span that names one of the phrases is answered by the longest run of its
frames. Scores are those of `train/evaluate.py`, filed as a control beside the model's: where a model
stays far below them, it does not use what the tower saw; where both are low, the tower is the limit.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from model.batch import as_tensor
from shards.errors import UserError
from shards.read.timeline import Medium, SplicedClip
from shards.signed import Json
from train.data.dataset import open_dataset, open_records
from train.data.records import Record
from train.data.sources import Source
from train.evaluate import strides_of, write
from train.scores.predictions import Prediction, report_of
from train.scores.results import CONTROLS, results_of
from train.settings.config import TrainConfig
from train.settings.exits import command

Phrases = tuple[str, ...]
"""All of one meaning."""


@command
def main(argv: list[str]) -> None:
    """Read the spans that test sets ask for off the frames, and score them."""
    args = arguments(argv)
    strides = strides_of(args.model)
    results = results_of(args.model, args.data_path, None, control="probe")
    # a splice of one part each: its reader finds banked stretches and their phrases, nothing is spliced
    scenes = TrainConfig(bank=args.bank, splice_path=args.scenes, splice=["parts=1"])
    scenes = replace(scenes, slow_frame_ratio="1")  # which frames are slow is not asked
    sources = [source for splice in open_dataset(scenes).splices for source in splice.sources]
    # the coarser of the two grids: cells are averaged anyway, and there are fewer to read
    probe = Probe(sources, strides[1])
    for place, path in zip(results, args.data_path, strict=True):
        dataset = open_records(args.bank, [path], *strides)
        said, hits = [], []
        for record in dataset.held_out:
            clips = dataset.clips(record)
            # of several clips it is not known which one the span is of
            if len(clips) == 1 and (found := probe.answer(record, clips[0])):
                said.append(found[0])
                hits.append(found[1])
        if not said:
            raise UserError(
                "no question about a span names one phrase of the scenes",
                got=f"{len(dataset.held_out)} records",
                where=path,
                fix="name the rows that the test set's phrases are from",
            )
        # over frames, not over questions: how often a frame shows its meaning
        named = float(np.concatenate(hits).mean())
        report: Json = {"test_set": place.name, "data_path": place.data_path}
        report |= {name: name == "probe" for name in CONTROLS} | {"records": len(said)}
        write(place, dataset, report | report_of(said) | {"frames_named": named}, said, keep=True)
        print(f"{named:.1%} of the frames in these spans are named right")  # noqa: T201


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--bank", nargs="+", required=True, help="bank folders")
    parser.add_argument("--scenes", nargs="+", required=True, help="rows as those of splice_path")
    parser.add_argument("--data_path", nargs="+", required=True, help="records: the test sets")
    parser.add_argument(
        "--model", type=Path, required=True, help="the run beside whose scores it is filed"
    )
    return parser.parse_args(argv)


class Probe:
    """The means of the frames of each meaning."""

    def __init__(self, sources: Sequence[Source], stride: int) -> None:
        self.stride = stride
        frames: dict[Phrases, list[np.ndarray]] = {}
        for source in sources:
            _, first, last, _, _ = source.stretch
            clip = source.stretch.place.clip()
            frames.setdefault(source.phrases, []).append(means(clip, stride, first, last))
        self.meanings = list(frames)
        self.centres = np.stack([np.concatenate(own).mean(axis=0) for own in frames.values()])
        """float32 `(meanings, dim)`."""

    def meaning(self, question: str) -> int | None:
        """Return which one a question asks about, by the longest phrase in it."""
        named = [
            (len(phrase), k)
            for k, phrases in enumerate(self.meanings)
            for phrase in phrases
            if phrase in question
        ]
        # the longest: "a cat" stands in "a cat on a roof" as well, whose meaning is another
        return max(named)[1] if named else None

    def answer(self, record: Record, clip: Medium) -> tuple[Prediction, np.ndarray] | None:
        """Return the answer to a record's one question, and of each frame in the span whether it is
        named right; None where it is no question about the span of a phrase."""
        # one question and its answer: later turns would be about what was said before
        if len(record.turns) != 2:
            return None
        asked, reference = (turn.text for turn in record.turns)
        info, meaning = clip.info, self.meaning(asked)
        blank = Prediction(
            record.id, record.clips, 1, record.task, asked, reference, info.duration, "", cut=False
        )
        if meaning is None or blank.asked.kind != "span":
            return None
        times = info.timestamps - info.start
        seen = means(clip, self.stride, 0, len(times))
        # `(frames, meanings)`
        distances = ((seen[:, None] - self.centres) ** 2).sum(axis=-1)
        named = distances.argmin(axis=1) == meaning
        start, end = longest_run(named, distances[:, meaning], times, info.duration)
        # whether frames are named right is asked of the true span, not of the one that was found
        begins, ends = blank.asked.coordinates
        inside = (times >= begins) & (times < ends)
        return replace(blank, answer=f"from {start:.3f} to {end:.3f}"), named[inside]


def means(clip: Medium, stride: int, first: int, last: int) -> np.ndarray:
    """Return the mean of each frame's cells, float32 `(frames, dim)`."""
    frames = range(first, last)
    # part by part: the parts of a spliced clip may have grids of different sizes
    if isinstance(clip, SplicedClip):
        whole = [means(part, stride, 0, len(part.info.timestamps)) for part in clip.parts]
        return np.concatenate(whole)[first:last]
    # as_tensor: NumPy has no bfloat16, banks hold it as uint16
    cells = as_tensor(clip.read(stride, frames)).float().flatten(1, 2)
    return cells.mean(dim=1).numpy()


def longest_run(
    named: np.ndarray, distances: np.ndarray, times: np.ndarray, duration: float
) -> tuple[float, float]:
    """Return the seconds of the longest run of named frames; of the nearest frame, where there is none.

    A frame is seen from half way to the one before it until half way to the next.
    """
    edges = np.concatenate([[0.0], (times[1:] + times[:-1]) / 2, [duration]])
    # a False at both ends: runs that touch an end have edges too
    steps = np.diff(np.concatenate([[0], named.astype(int), [0]]))
    begins, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    if not len(begins):
        nearest = int(distances.argmin())
        return float(edges[nearest]), float(edges[nearest + 1])
    longest = int((ends - begins).argmax())
    return float(edges[begins[longest]]), float(edges[ends[longest]])


if __name__ == "__main__":
    main(sys.argv[1:])
