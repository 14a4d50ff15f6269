"""P8: encoding takes hardly longer than its slowest stage: decoding runs ahead of tower and writer.

How much longer a whole run takes has no benchmark of its own yet (`make bench` measures the decoder
alone, tests/bench/decode.py). That the stages overlap, and in order, is tested here without a clock.
"""

import threading
import time
from collections.abc import Iterator

import numpy as np

from preprocess.encode.ahead import ahead

BATCHES = 12
BYTES = 1000
"""Of a batch."""


def test_the_next_batch_is_being_decoded_while_one_is_encoded() -> None:
    begun = [threading.Event() for _ in range(BATCHES)]

    def decode() -> Iterator[tuple[int, np.ndarray]]:
        for batch in range(BATCHES):
            begun[batch].set()
            yield batch, np.zeros(BYTES, np.uint8)

    found = []
    for batch, _ in ahead(decode(), 2 * BYTES):
        if batch + 1 < BATCHES:
            assert begun[batch + 1].wait(60), "it waits for this batch to be encoded"
        found.append(batch)
    assert found == list(range(BATCHES)), "and they come in order"


def test_no_more_waits_than_it_may() -> None:
    decoded: list[int] = []

    def decode() -> Iterator[tuple[int, np.ndarray]]:
        for batch in range(BATCHES):
            decoded.append(batch)
            yield batch, np.zeros(BYTES, np.uint8)

    for batch, _ in ahead(decode(), 2 * BYTES):
        time.sleep(0.01)
        # two that wait, and the one that is being decoded
        assert len(decoded) <= batch + 1 + 3
    assert decoded == list(range(BATCHES))
