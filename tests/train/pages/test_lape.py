"""Maps of anchors: what is in order, and what is not."""

import numpy as np
import pytest

from train.pages.lape import order, ranks, similarities


def test_anchors_on_a_line_are_in_order_and_shuffled_ones_are_not() -> None:
    angle = np.linspace(0, np.pi / 2, 30)
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert order((rows @ rows.T).round(12)) == pytest.approx(1.0)  # equal ones are equal
    mixed = rows[np.random.default_rng(0).permutation(30)]
    assert abs(order(mixed @ mixed.T)) < 0.2


def test_similarities_are_cosines_without_the_common_part() -> None:
    rows = np.asarray([[9.0, 1.0], [9.0, -1.0], [9.0, 2.0], [9.0, -2.0]])
    signs = np.asarray([1, -1, 1, -1])
    assert similarities(rows) == pytest.approx(np.outer(signs, signs))
    assert np.isfinite(similarities(np.ones((3, 2)))).all()


def test_equal_values_share_their_rank() -> None:
    assert ranks(np.asarray([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
