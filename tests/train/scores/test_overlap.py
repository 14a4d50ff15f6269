"""Overlaps against slow ones: counts of cells, frames, and average precision as it is published.

pytest tests/train/scores/test_overlap.py
"""

import random
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.scores.overlap import (
    MOMENTS,
    STRICTNESS,
    Tube,
    average_precision,
    box_iou,
    interval_iou,
    recall_at_one,
    tube_iou,
    windows_iou,
)

SIDE = 12
CASES = pytest.mark.parametrize("cases", [1_000, pytest.param(20_000, marks=pytest.mark.slow)])
SPANS = st.tuples(st.integers(0, SIDE), st.integers(0, SIDE))
BOXES = st.tuples(SPANS.map(sorted), SPANS.map(sorted))

Window = tuple[float, float]


def cells(low: int, high: int) -> set[int]:
    """Return the unit cells between two corners of a grid, none where they are inverted."""
    return set(range(low, high))


def overlap(a: set, b: set) -> float:  # type: ignore[type-arg]
    return len(a & b) / len(a | b) if a | b else 0.0


@given(a=SPANS, b=SPANS)
def test_interval_iou_is_a_count_of_shared_cells(a: tuple[int, int], b: tuple[int, int]) -> None:
    if a != b or a[0] != a[1]:
        inverted = a[0] > a[1] or b[0] > b[1]
        expected = 0.0 if inverted else overlap(cells(*a), cells(*b))
        assert interval_iou(a, b) == pytest.approx(expected)


@given(a=BOXES, b=BOXES)
def test_box_iou_is_a_count_of_shared_cells(a: list[list[int]], b: list[list[int]]) -> None:
    grids = [set(product(cells(*box[0]), cells(*box[1]))) for box in (a, b)]
    (ax, ay), (bx, by) = a, b
    found = box_iou([ax[0], ay[0], ax[1], ay[1]], [bx[0], by[0], bx[1], by[1]])
    assert found == pytest.approx(overlap(*grids) if any(grids) or a != b else 1.0)


@given(a=SPANS, b=SPANS)
def test_iou_is_one_for_equals_none_for_the_inverted_and_the_same_both_ways(
    a: tuple[int, int], b: tuple[int, int]
) -> None:
    assert interval_iou(a, a) == float(a[0] <= a[1])
    assert interval_iou(a, b) == interval_iou(b, a)


def test_a_box_turned_inside_out_covers_nothing() -> None:
    assert box_iou([0, 0, 1, 1], [1, 1, 0, 0]) == 0.0
    assert box_iou([1, 1, 0, 0], [1, 1, 0, 0]) == 0.0
    assert box_iou([0, 0, 1, 1], [1, 0, 0, 1]) == 0.0


# -- random cases, against arrays


def spans(draw: random.Random, count: int, *, grid: bool) -> list[Window]:
    """Return random windows within 10 seconds, on whole seconds or anywhere."""
    out = []
    while len(out) < count:
        a, b = (draw.randint(0, 10) if grid else draw.uniform(0, 10) for _ in range(2))
        if a != b:
            out.append((float(min(a, b)), float(max(a, b))))
    return out


def ious_of(guess: list[Window], truth: list[Window]) -> np.ndarray:
    """Return the IoU of each guess with each reference window, `(guesses, truths)`."""
    g, t = np.array(guess).reshape(-1, 1, 2), np.array(truth).reshape(1, -1, 2)
    shared = np.clip(np.minimum(g[..., 1], t[..., 1]) - np.maximum(g[..., 0], t[..., 0]), 0, None)
    return np.asarray(shared / ((g[..., 1] - g[..., 0]) + (t[..., 1] - t[..., 0]) - shared))


def published_precision(truth: list[Window], guess: list[Window], least: float) -> float:
    """Return average precision as QVHighlights' description has it, point by point along recall."""
    ious = ious_of(guess[:10], truth)
    taken = np.zeros(len(truth), dtype=bool)
    true = np.zeros(len(ious))
    for number, row in enumerate(ious):
        for k in np.argsort(row, kind="stable")[::-1]:
            if row[k] >= least and not taken[k]:
                taken[k] = true[number] = 1
                break
    recall = np.concatenate([[0], np.cumsum(true) / len(truth), [1]])
    precision = np.concatenate([[0], np.cumsum(true) / np.arange(1, len(true) + 1), [0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


@CASES
def test_windows_are_as_published_in_random_cases(cases: int) -> None:
    draw = random.Random(cases)
    for number in range(cases):
        grid = number % 2 == 0
        truth = spans(draw, draw.randint(1, 5), grid=grid)
        guess = spans(draw, draw.randint(1, 12), grid=grid)
        if number % 3:  # otherwise few fit
            guess = [draw.choice([*truth, window]) for window in guess]
        ious = ious_of(guess, truth)
        assert interval_iou(guess[0], truth[0]) == pytest.approx(ious[0, 0], abs=1e-12)
        least = STRICTNESS[number % 10]
        expected = published_precision(truth, guess, least)
        assert average_precision(truth, guess, least) == pytest.approx(expected, abs=1e-12)
        assert recall_at_one(truth, guess, least) == float(ious[0].max() >= least)


@CASES
def test_boxes_are_those_of_arrays_in_random_cases(cases: int) -> None:
    corners = np.random.default_rng(cases).uniform(size=(cases, 2, 2, 2))  # case, box, corner, axis
    corners.sort(axis=2)
    shared = np.clip(corners[:, :, 1].min(1) - corners[:, :, 0].max(1), 0, None).prod(-1)
    areas = (corners[:, :, 1] - corners[:, :, 0]).prod(-1).sum(-1)
    expected = shared / (areas - shared)
    found = [box_iou(*pair) for pair in corners.reshape(cases, 2, 4).tolist()]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def tube_of(draw: random.Random) -> Tube:
    ((start, end),) = spans(draw, 1, grid=False)
    count = draw.randint(1, 6)
    times = [start + (end - start) * k / max(1, count - 1) for k in range(count)]
    numbers = [start, end]
    for time in times:
        (x1, x2), (y1, y2) = (sorted(draw.random() for _ in range(2)) for _ in range(2))
        numbers += [time, x1, y1, x2, y2]
    return Tube.of(numbers)


def frames_iou(a: Tube, b: Tube, moments: np.ndarray) -> np.ndarray:
    """Return the IoU of two tubes' boxes at some moments."""
    boxes = np.array(
        [
            [np.interp(moments, t.times, [box[c] for box in t.boxes]) for c in range(4)]
            for t in (a, b)
        ]
    )
    low, high = boxes[:, :2].max(0), boxes[:, 2:].min(0)
    shared = np.clip(high - low, 0, None).prod(0)
    return np.asarray(shared / ((boxes[:, 2:] - boxes[:, :2]).prod(1).sum(0) - shared))


@CASES
def test_tubes_are_those_of_arrays_in_random_cases(cases: int) -> None:
    draw = random.Random(cases)
    for _ in range(cases):
        a, b = tube_of(draw), tube_of(draw)
        start, end = max(a.start, b.start), min(a.end, b.end)
        if start >= end:
            assert tube_iou(a, b) == (0.0, 0.0)
            continue
        moments = start + (np.arange(MOMENTS) + 0.5) / MOMENTS * (end - start)
        mean = frames_iou(a, b, moments).mean()
        expected = mean * (end - start) / (max(a.end, b.end) - min(a.start, b.start))
        assert tube_iou(a, b) == pytest.approx((expected, mean), abs=1e-9)


def test_a_tubes_iou_is_that_of_its_frames() -> None:
    """HC-STVG's own sum: over the frames that both have, over the frames that either has."""
    draw = random.Random(2)
    for _ in range(50):
        a, b = tube_of(draw), tube_of(draw)
        frames = np.arange(0, 10, 0.002) + 0.001
        inside = [(t.start <= frames) & (frames <= t.end) for t in (a, b)]
        both, either = inside[0] & inside[1], inside[0] | inside[1]
        expected = frames_iou(a, b, frames[both]).sum() / either.sum()
        assert tube_iou(a, b)[0] == pytest.approx(expected, abs=0.005)


@given(st.lists(SPANS, min_size=1, max_size=4), st.lists(SPANS, max_size=4))
def test_lists_of_windows_overlap_where_any_of_them_do(
    truth: list[tuple[int, int]], guess: list[tuple[int, int]]
) -> None:
    sets = [set().union(*(cells(*window) for window in many)) for many in (truth, guess)]
    assert windows_iou(truth, guess) == pytest.approx(overlap(*sets))


TUBES: list[tuple[str, Callable[[list[float]], list[float]], tuple[float, float]]] = [
    ("the same", lambda n: n, (1.0, 1.0)),
    ("half as long", lambda n: [0, 2, *n[2:]], (0.5, 1.0)),
    ("at another time", lambda n: [4, 8, *n[2:]], (0.0, 0.0)),
    ("inverted in time", lambda n: [4, 0, *n[2:]], (0.0, 0.0)),
    ("inverted boxes", lambda n: [0, 4, 0, 0.5, 0.5, 0.1, 0.1, 4, 0.5, 0.5, 0.1, 0.1], (0.0, 0.0)),
    ("half as high", lambda n: [0, 4, 0, 0.1, 0.1, 0.5, 0.3, 4, 0.1, 0.1, 0.5, 0.3], (0.5, 0.5)),
    ("without its span", lambda n: n[2:], (1.0, 1.0)),
]


@pytest.mark.parametrize(("name", "change", "expected"), TUBES, ids=[name for name, *_ in TUBES])
def test_a_tube_that_is_wrong_in_one_way(
    name: str, change: Callable[[list[float]], list[float]], expected: tuple[float, float]
) -> None:
    numbers = [0, 4, 0, 0.1, 0.1, 0.5, 0.5, 4, 0.1, 0.1, 0.5, 0.5]
    assert tube_iou(Tube.of(numbers), Tube.of(change(numbers))) == pytest.approx(expected)
