"""Overlap of spans, boxes, lists of windows and tubes: each a number from 0 to 1.

A span or box that ends before it begins has no extent and overlaps nothing.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

Pair = tuple[float, float]
STRICTNESS = tuple((50 + 5 * k) / 100 for k in range(10))
"""IoU thresholds over which average precision is averaged: 0.5, 0.55 to 0.95."""
MOMENTS = 100
"""Number of moments, in the time that two tubes share, at which their boxes are compared."""
MOST_WINDOWS = 10
"""Windows of an answer that count for average precision, as in QVHighlights."""


def interval_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the overlap of two intervals over their union; 1 for the same moment without length."""
    if a[0] > a[1] or b[0] > b[1]:
        return 0.0
    # a moment has no extent: without this its own reference would score 0
    if a[0] == a[1] and tuple(a) == tuple(b):
        return 1.0
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return shared / union if union > 0 else 0.0


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the overlap of two boxes x1 y1 x2 y2 over their union."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    if not all(areas):
        return float(tuple(a) == tuple(b) and a[0] <= a[2] and a[1] <= a[3])
    return width * height / (sum(areas) - width * height)


def windows_iou(truth: Sequence[Pair], guess: Sequence[Pair]) -> float:
    """Return the overlap of the time in any window of two lists over the time in either."""
    # windows that overlap count their time once
    own, other = _merged(truth), _merged(guess)
    shared = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in own for b in other)
    union = sum(end - start for start, end in [*own, *other]) - shared
    return shared / union if union > 0 else 0.0


def average_precision(truth: Sequence[Pair], guess: Sequence[Pair], least: float) -> float:
    """Return the average precision of windows, ranked as listed, at an IoU of `least`.

    That of QVHighlights (Lei et al. 2021, its standalone evaluation): each window in turn takes the
    best free reference window that overlaps enough, the last of equal ones; precision is made
    non-increasing along recall, and summed over recall.
    """
    free = set(range(len(truth)))
    precisions, hits = [], []
    for rank, window in enumerate(guess[:MOST_WINDOWS], start=1):
        fits = {k: interval_iou(window, truth[k]) for k in free}
        best = max(fits, key=lambda k: (fits[k], k), default=None)
        hit = best is not None and fits[best] >= least
        free -= {best} if hit else set()
        hits.append(hit)
        precisions.append(sum(hits) / rank)
    falling = [max(precisions[k:]) for k in range(len(precisions))]
    return sum(p for p, hit in zip(falling, hits, strict=True) if hit) / len(truth)


def recall_at_one(truth: Sequence[Pair], guess: Sequence[Pair], least: float) -> float:
    """Return 1 if the first window overlaps any reference window enough (QVHighlights), else 0."""
    return float(bool(guess) and max(interval_iou(guess[0], own) for own in truth) >= least)


@dataclass(frozen=True)
class Tube:
    """Boxes over time, interpolated linearly in between, constant before the first and after the last."""

    start: float
    end: float
    times: tuple[float, ...]
    boxes: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Tube":
        """Return a tube of start and end, or neither, and then t x1 y1 x2 y2 for each box."""
        skip = len(numbers) % 5
        rows = sorted(tuple(numbers[k : k + 5]) for k in range(skip, len(numbers), 5))
        start, end = numbers[:2] if skip else (rows[0][0], rows[-1][0])
        return cls(start, end, tuple(r[0] for r in rows), tuple(r[1:] for r in rows))

    def at(self, time: float) -> tuple[float, ...]:
        """Return the box at a time."""
        after = bisect_right(self.times, time)
        if after in (0, len(self.times)):
            return self.boxes[min(after, len(self.times) - 1)]
        before = after - 1
        share = (time - self.times[before]) / (self.times[after] - self.times[before])
        pairs = zip(self.boxes[before], self.boxes[after], strict=True)
        return tuple(a + share * (b - a) for a, b in pairs)


def tube_iou(truth: Tube, guess: Tube) -> tuple[float, float]:
    """Return (vIoU, sIoU) of two tubes: the mean IoU of their boxes over the time in either, in both.

    vIoU is that of HC-STVG (Tang et al. 2020): box IoUs summed over the frames that both have, over
    the frames that either has; here over `MOMENTS` even moments of the shared time.
    """
    start, end = max(truth.start, guess.start), min(truth.end, guess.end)
    if start >= end or guess.start > guess.end:
        return 0.0, 0.0
    moments = [start + (k + 0.5) / MOMENTS * (end - start) for k in range(MOMENTS)]
    mean = sum(box_iou(truth.at(t), guess.at(t)) for t in moments) / MOMENTS
    return mean * interval_iou((truth.start, truth.end), (guess.start, guess.end)), mean


def _merged(windows: Sequence[Pair]) -> list[Pair]:
    """Return windows that overlap as one; those that end before they begin are left out."""
    out: list[Pair] = []
    for start, end in sorted(w for w in windows if w[0] < w[1]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
