"""P8: encoding takes hardly longer than its slowest stage: decoding runs ahead of tower and writer.

How much longer a whole run takes has no benchmark of its own yet (`make bench` measures the decoder
alone, tests/bench/decode.py). That the stages overlap, and in order, is tested here without a clock.
"""

import threading
import time

from preprocess.encode.unit import ahead

CLIPS = 12


def test_the_next_clip_is_being_decoded_while_one_is_encoded() -> None:
    begun = [threading.Event() for _ in range(CLIPS)]

    def decode(clip: int) -> int:
        begun[clip].set()
        return clip

    found = []
    for clip, decoded in ahead(range(CLIPS), decode):
        if clip + 1 < CLIPS:
            assert begun[clip + 1].wait(60), "it waits for this clip to be encoded"
        found.append(decoded.result())
    assert found == list(range(CLIPS)), "and they come in order"


def test_no_more_than_two_decoded_clips_wait() -> None:
    decoded: list[int] = []
    for clip, _ in ahead(range(CLIPS), decoded.append):
        time.sleep(0.01)
        assert len(decoded) <= clip + 3
    assert decoded == list(range(CLIPS))
