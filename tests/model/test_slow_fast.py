"""Slow/fast patterns and uniform sampling, against tables and the rule of LLaVA-NeXT."""

from fractions import Fraction
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.slow_fast import STRATEGIES, draw_pattern, exact_ratio, slow_frames, uniform_indices
from shards.errors import UserError

TABLE = [
    ("interleave", 0.5, 8, "SFSFSFSF"),
    ("interleave", 0.25, 8, "SFFFSFFF"),
    ("interleave", 0.25, 6, "SFFFSF"),
    ("interleave", 0.75, 8, "SSSFSSSF"),
    ("interleave", "1/3", 7, "SFFSFFS"),
    ("interleave", 1, 3, "SSS"),
    ("interleave", 0, 3, "FFF"),
    ("interleave", 0.5, 1, "S"),
    ("first_slow", 0.5, 7, "SSSSFFF"),
    ("first_slow", 0.1, 30, "SSS" + "F" * 27),  # in binary floats 0.1 * 30 exceeds 3
    ("first_slow", 0, 2, "FF"),
    ("uniform", 0.5, 8, "SFSFSFFS"),
    ("uniform", 0.5, 2, "SF"),
    ("uniform", 0.01, 5, "SFFFF"),
    ("uniform", 1, 4, "SSSS"),
    ("uniform", 0, 4, "FFFF"),
]


@pytest.mark.parametrize(("strategy", "ratio", "frames", "pattern"), TABLE)
def test_patterns_are_the_tabled_ones(
    strategy: str, ratio: float | str, frames: int, pattern: str
) -> None:
    assert draw_pattern(slow_frames(strategy, ratio, frames)) == pattern


@given(st.integers(1, 40), st.integers(1, 200))
def test_interleaving_one_in_k_is_the_rule_of_llava_next(k: int, frames: int) -> None:
    assert slow_frames("interleave", Fraction(1, k), frames) == [i % k == 0 for i in range(frames)]


@given(st.sampled_from(STRATEGIES), st.fractions(0, 1, max_denominator=50), st.integers(1, 80))
def test_every_strategy_makes_the_ratio_rounded_up_slow(
    strategy: str, ratio: Fraction, frames: int
) -> None:
    slow = slow_frames(strategy, ratio, frames)
    assert len(slow) == frames
    assert sum(slow) == ceil(ratio * frames)


@given(st.fractions(0, 1, max_denominator=30), st.integers(1, 80))
def test_interleaving_spreads_slow_frames_evenly(ratio: Fraction, frames: int) -> None:
    slow = slow_frames("interleave", ratio, frames)
    for count in range(frames + 1):
        assert abs(sum(slow[:count]) - ratio * count) < 1


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (8, 4, [0, 2, 4, 7]),
        (10, 5, [0, 2, 4, 6, 9]),
        (5, 1, [0]),
        (1, 3, [0]),
        (3, 7, [0, 1, 2]),
        (1000, 2, [0, 999]),
    ],
)
def test_uniform_indices_are_the_tabled_ones(total: int, count: int, expected: list[int]) -> None:
    assert uniform_indices(total, count) == expected


@given(st.integers(1, 500), st.integers(2, 500))
def test_uniform_indices_reach_both_ends_and_never_repeat(total: int, count: int) -> None:
    chosen = uniform_indices(total, count)
    assert len(chosen) == min(total, count)
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, total - 1)
    steps = [b - a for a, b in pairwise(chosen)]
    assert not steps or max(steps) - min(steps) <= 1


def test_a_ratio_means_the_decimal_that_is_written() -> None:
    assert exact_ratio(0.1) == Fraction(1, 10)
    assert exact_ratio("0.3") == Fraction(3, 10)
    assert exact_ratio("1e-1") == Fraction(1, 10)


@pytest.mark.parametrize("ratio", [-0.1, 1.01, "half", "nan", float("inf"), "1/0"])
def test_a_ratio_outside_zero_to_one_is_refused(ratio: float | str) -> None:
    with pytest.raises(UserError, match="slow_frame_ratio must be"):
        slow_frames("interleave", ratio, 4)


def test_unknown_strategies_and_empty_clips_are_refused() -> None:
    with pytest.raises(UserError, match="interleave, first_slow, uniform, got 'interleaved'"):
        slow_frames("interleaved", 0.5, 4)
    with pytest.raises(UserError, match="at least one frame, got 0"):
        slow_frames("interleave", 0.5, 0)
