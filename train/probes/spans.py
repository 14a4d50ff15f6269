"""Spans of what a phrase names: the frames whose nearest mean is that of its meaning."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from model.batch import as_tensor
from shards.read.timeline import Medium, SplicedClip
from train.data.records import Record
from train.data.sources import Source
from train.scores.predictions import Prediction

Phrases = tuple[str, ...]
"""All of one meaning."""


class Spans:
    """The means of the frames of each meaning."""

    none = "no question about a span names one phrase of the scenes"

    def __init__(self, sources: Sequence[Source], stride: int, counts: Sequence[int]) -> None:
        """counts: anchors of each axis, by which those named in answers are read."""
        self.stride, self.counts = stride, counts
        frames: dict[Phrases, list[np.ndarray]] = {}
        for source in sources:
            _, first, last, _, _ = source.stretch
            clip = source.stretch.place.clip()
            frames.setdefault(source.phrases, []).append(means(clip, stride, first, last))
        self.meanings = list(frames)
        self.centres = np.stack([np.concatenate(own).mean(axis=0) for own in frames.values()])
        """float32 `(meanings, dim)`."""

    def answer(
        self, record: Record, turn: int, clip: Medium
    ) -> tuple[Prediction, np.ndarray] | None:
        """Return the answer to a record's question, and of each frame in the span whether it is named
        right; None where it is no question about the span of a phrase.

        turn: the answer's.
        """
        info = clip.info
        blank = Prediction.blank(record, turn, info.duration, self.counts)
        meaning = meaning_of(blank.question, self.meanings)
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


def meaning_of(question: str, meanings: Sequence[Phrases]) -> int | None:
    """Return which meaning a question asks about, by the longest phrase in it."""
    named = [
        (len(phrase), k)
        for k, phrases in enumerate(meanings)
        for phrase in phrases
        # whole words, in languages that put blanks between them: "a catalogue" names no cat
        if re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", question, re.ASCII)
    ]
    # the longest: "a cat" stands in "a cat on a roof" as well, whose meaning is another
    return max(named)[1] if named else None


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
