"""P8: encoding takes hardly longer than its slowest stage: decoding runs ahead of tower and writer.

How much longer a whole run takes is measured by `make bench` (tests/bench/encoding.py). That the stages
overlap, and in order, is tested here without a clock.
"""

import random
import threading
import time
from collections.abc import Generator
from contextlib import closing

import numpy as np
import pytest

from preprocess.encode.pipeline.ahead import Ahead, Worker, bytes_of

GROUPS, ITEMS = 12, 3
BYTES = 100_000
"""Of an item."""

Made = tuple[int, int, np.ndarray]
ORDER = [(group, item) for group in range(GROUPS) for item in range(ITEMS)]


def array() -> np.ndarray:
    return np.zeros(BYTES, np.uint8)


@pytest.mark.parametrize("count", [1, 2, 4, 20])
def test_items_come_in_the_order_of_the_groups_whoever_is_fast(count: int) -> None:
    at_work: set[int] = set()

    def worker(number: int) -> Worker[int, Made]:
        rng = random.Random(number)

        def make(group: int) -> Generator[Made]:
            for item in range(ITEMS):
                time.sleep(rng.choice([0, 0, 0.003]))
                at_work.add(number)
                yield group, item, array()

        return make

    found = Ahead(range(GROUPS), [worker(n) for n in range(count)], 4 * BYTES)
    assert [(group, item) for group, item, _ in found] == ORDER
    assert len(at_work) <= min(count, GROUPS)


@pytest.mark.parametrize("count", [1, 3])
def test_the_next_groups_are_begun_while_one_is_taken(count: int) -> None:
    begun = [threading.Event() for _ in range(GROUPS)]

    def make(group: int) -> Generator[Made]:
        begun[group].set()
        yield group, 0, array()

    found = []
    for group, _, _ in Ahead(range(GROUPS), [make] * count, 4 * BYTES):
        if group + 1 < GROUPS:
            assert begun[group + 1].wait(60), "it waits for this one to be taken"
        found.append(group)
    assert found == list(range(GROUPS))


@pytest.mark.parametrize("count", [1, 4])
def test_no_more_waits_than_it_may_and_a_slow_first_group_is_not_locked_out(count: int) -> None:
    made, lock = [], threading.Lock()

    def make(group: int) -> Generator[Made]:
        if group == 0:
            time.sleep(0.2)  # the others fill all the room there is
        for item in range(ITEMS):
            with lock:
                made.append((group, item))
            yield group, item, array()

    most = 3 * bytes_of((0, 0, array()))
    for taken, _ in enumerate(Ahead(range(GROUPS), [make] * count, most), 1):
        # what waits, one of the first group beside it, and what each worker holds in its hands
        assert len(made) <= taken + 3 + 1 + count
        time.sleep(0.001)
    assert sorted(made) == ORDER


@pytest.mark.parametrize("count", [1, 4])
def test_an_error_is_raised_in_its_place_and_nobody_is_left(count: int) -> None:
    def make(group: int) -> Generator[Made]:
        yield group, 0, array()
        if group == 5:
            raise OSError("the disk")

    before, found = threading.active_count(), []

    def take() -> None:
        for group, _, _ in Ahead(range(GROUPS), [make] * count, BYTES):
            found.append(group)

    with pytest.raises(OSError, match="the disk"):
        take()
    assert found == list(range(6))
    assert threading.active_count() == before


def test_who_leaves_early_ends_workers_that_wait_for_something_else() -> None:
    over, before = threading.Event(), threading.active_count()

    def make(group: int) -> Generator[Made]:
        yield group, 0, array()
        over.wait()
        yield group, 1, array()

    began = time.monotonic()
    with closing(Ahead(range(GROUPS), [make] * 3, 9 * BYTES, over.set)) as items:
        assert next(items)[:2] == (0, 0)
    assert threading.active_count() == before
    assert time.monotonic() - began < 30
