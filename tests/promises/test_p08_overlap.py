"""P8: encoding takes hardly longer than its slowest stage: decoding runs ahead of tower and writer.

How much longer a whole run takes has no benchmark of its own yet (`make bench` measures the decoder
alone, tests/bench/decode.py). What the stages share is tested here, with sleep in place of work.
"""

import time

from preprocess.encode.unit import ahead

CLIPS, SECONDS = 12, 0.05


def test_the_next_clips_are_decoded_while_one_is_encoded() -> None:
    def decode(clip: int) -> int:
        time.sleep(SECONDS)
        return clip

    began, found = time.monotonic(), []
    for clip, decoded in ahead(range(CLIPS), decode):
        time.sleep(SECONDS)
        assert decoded.result() == clip
        found.append(clip)
    stage = CLIPS * SECONDS
    assert found == list(range(CLIPS)), "and they come in order"
    assert stage < time.monotonic() - began < 1.5 * stage


def test_no_more_than_two_decoded_clips_wait() -> None:
    decoded: list[int] = []
    for clip, _ in ahead(range(CLIPS), decoded.append):
        time.sleep(0.01)
        assert len(decoded) <= clip + 3
    assert decoded == list(range(CLIPS))
