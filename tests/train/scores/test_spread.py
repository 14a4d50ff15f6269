"""Intervals over clips: against draws written out one by one, and against what theory gives."""

import json
from pathlib import Path

import numpy as np
import pytest

from train.scores.spread import (
    Answers,
    difference_interval,
    drawn,
    mean_interval,
    means,
    read_answers,
)

IOU = ("span", "iou")


def answers(*clips: list[float]) -> Answers:
    """Return answers with these scores, a list for each clip."""
    totals = np.array([sum(own) for own in clips]), np.array([float(len(own)) for own in clips])
    return Answers(tuple(map(str, range(len(clips)))), {IOU: totals})


def test_answers_are_summed_by_clip(tmp_path: Path) -> None:
    rows = [("a", 1.0), ("b", 0.5), ("a", 0.0), ("c", 0.25)]
    path = tmp_path / "predictions-x.jsonl"
    lines = [
        {"media": [clip], "record": "r", "kind": "span", "scores": {"iou": iou, "parsed": 1.0}}
        for clip, iou in rows
    ]
    lines.append({"media": [], "record": "words", "kind": "text", "scores": {"exact": 1.0}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_answers(path)
    assert found.clips == ("a", "b", "c", "words")
    total, count = found.totals[IOU]
    assert total.tolist() == [1.0, 0.5, 0.25, 0.0]
    assert count.tolist() == [2, 1, 1, 0]
    assert found.mean(IOU) == pytest.approx(1.75 / 4)
    assert found.mean(("text", "exact")) == 1.0


def test_a_draw_has_the_mean_of_the_answers_about_its_clips() -> None:
    lists = [[0.1, 0.9], [0.4], [1.0, 0.0, 0.3]]
    draws = drawn(3, draws=50)
    assert (draws.sum(axis=1) == 3).all()
    found = means(answers(*lists), IOU, draws)
    for draw, mean in zip(draws.astype(int), found, strict=True):
        values = [v for own, times in zip(lists, draw, strict=True) for v in own * times]
        assert mean == pytest.approx(np.mean(values))


def test_the_interval_is_that_of_the_mean_of_independent_clips() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, size=400)
    low, high = mean_interval([answers(*([v] for v in values))], IOU)
    half = 1.96 * values.std() / 20  # of a mean of 400
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)


def test_answers_about_one_clip_count_as_one() -> None:
    values = np.random.default_rng(2).uniform(size=50)
    once = mean_interval([answers(*([v] for v in values))], IOU)
    tenfold = mean_interval([answers(*([v] * 10 for v in values))], IOU)
    assert once == pytest.approx(tenfold)


def test_a_difference_is_taken_clip_by_clip() -> None:
    values = np.random.default_rng(3).uniform(size=60)
    ours, theirs = (answers(*([v + more] for v in values)) for more in (0.1, 0.0))
    assert difference_interval([ours, ours], [theirs], IOU) == pytest.approx((0.1, 0.1))
    low, high = mean_interval([theirs], IOU)
    assert high - low > 0.05
