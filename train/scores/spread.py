"""Confidence intervals of mean scores: a bootstrap over the clips of a test set (Efron, 1979).

Answers about one clip are correlated, so clips are drawn with replacement, not answers, which would give
intervals that are too narrow. Several runs on one test set use the same draws, so that their differences
are paired.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from train.scores.results import lines_of

DRAWS = 2000
PERCENT = 2.5, 97.5
"""Percentiles that enclose 95 % of the draws."""

Metric = tuple[str, str]
"""(kind of answer, score), as `("span", "iou")`."""
Totals = dict[Metric, tuple[np.ndarray, np.ndarray]]
"""Sum and count of a score over the answers about each clip: float64 `(clips,)` each."""


@dataclass(frozen=True)
class Answers:
    """The scores of a test set by clip."""

    clips: tuple[str, ...]
    totals: Totals

    def mean(self, metric: Metric) -> float:
        """Return the mean score over all answers."""
        total, count = self.totals[metric]
        return float(total.sum() / count.sum())


def read_answers(path: Path) -> Answers:
    """Read the scores of a `predictions-NAME.jsonl`."""
    rows = [json.loads(line) for _, line in lines_of(path)]
    names = [" ".join(row["media"]) or row["record"] for row in rows]
    clips = tuple(dict.fromkeys(names))
    place = {name: k for k, name in enumerate(clips)}
    totals: Totals = defaultdict(lambda: (np.zeros(len(clips)), np.zeros(len(clips))))
    for name, row in zip(names, rows, strict=True):
        for score, value in row["scores"].items():
            total, count = totals[row["kind"], score]
            total[place[name]] += value
            count[place[name]] += 1
    return Answers(clips, dict(totals))


@lru_cache(maxsize=4)  # every score of a test set is drawn alike
def drawn(clips: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Return how often each clip is in each draw, float64 `(draws, clips)`; not to be written to."""
    rng = np.random.default_rng(seed)
    # n clips out of n with replacement: how often each is drawn is multinomial
    found = rng.multinomial(clips, np.full(clips, 1 / clips), size=draws).astype(float)
    found.flags.writeable = False
    return found


def means(answers: Answers, metric: Metric, draws: np.ndarray) -> np.ndarray:
    """Return the mean score in each draw, float64 `(draws,)`; NaN where a draw has no such answer."""
    total, count = answers.totals[metric]
    with np.errstate(invalid="ignore"):
        # a ratio of sums, since clips have different numbers of answers
        return np.asarray((draws @ total) / (draws @ count))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the interval that holds 95 % of the values."""
    low, high = np.nanpercentile(values, PERCENT)
    return float(low), float(high)


def mean_interval(runs: Sequence[Answers], metric: Metric) -> tuple[float, float]:
    """Return the interval of the mean over runs on the same clips."""
    draws = drawn(len(runs[0].clips))
    return interval(np.mean([means(run, metric, draws) for run in runs], axis=0))


def difference_interval(
    runs: Sequence[Answers], others: Sequence[Answers], metric: Metric
) -> tuple[float, float]:
    """Return the interval of the mean over runs less that over others, on the same clips."""
    draws = drawn(len(runs[0].clips))
    ours, theirs = (
        np.mean([means(run, metric, draws) for run in own], axis=0) for own in (runs, others)
    )
    return interval(ours - theirs)
