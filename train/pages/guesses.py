"""What a test set gives to somebody who looks at no video: the best fixed answer of each kind.

It is found with the answers known, which no model has: of words the most frequent answer, of times and
places the median one (times as shares of the clip), of spans the one with the highest mean overlap.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from shards.signed import Json
from train.scores.kinds import Asked, asked
from train.scores.scoring import score
from train.scores.summary import constant_span

MARKS = {"point": "<x:{}><y:{}>", "box": "<x:{}><y:{}><x:{}><y:{}>"}
WORDS = ("number", "choice", "order", "text")


def asked_of(row: Json) -> Asked:
    """Return what an answer of predictions-NAME.jsonl is scored against."""
    question, task = row["question"], row["task"]
    return asked(row["reference"], row["duration"], question=question, task=task)


def fixed_guess(kind: str, metric: str, rows: Sequence[Json]) -> float | None:
    """Return the mean score of the best fixed answer to all questions of a kind; None where there is
    none to speak of (several windows, tubes, captions)."""
    about = [asked_of(row) for row in rows]
    if not about:
        return None
    if kind == "span":
        return constant_span(about) if metric == "iou" else None
    guesses = fixed_answers(kind, about)
    if not guesses:
        return None
    scores = [score(a, guess)[metric] for a, guess in zip(about, guesses, strict=True)]
    return float(np.mean(scores))


def fixed_answers(kind: str, about: Sequence[Asked]) -> list[str]:
    """Return the fixed answer as it is to each question: the same, or the same share of each clip."""
    if kind in WORDS:
        # the most frequent one is right most often: no fixed word can score more
        return [Counter(a.reference for a in about).most_common(1)[0][0]] * len(about)
    numbers = np.asarray([a.coordinates for a in about])
    if kind == "time":
        durations = np.asarray([a.duration or 1.0 for a in about])
        # of absolute errors the median is least, and clips differ in length: so it is a share of each
        share = float(np.median(numbers[:, 0] / durations))
        return [f"<t:{share * duration}>" for duration in durations]
    if kind in MARKS:
        # of each coordinate the median: the point of least mean distance has no closed form
        return [MARKS[kind].format(*np.median(numbers, axis=0))] * len(about)
    return []
