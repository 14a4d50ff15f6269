"""Where the time of a run went, and what it says to buy.

pytest tests/preprocess/encode/test_summary.py
"""

import pytest

from preprocess.encode.pipeline.summary import Summary


def spent(decode: float, tower: float, write: float, frames: int = 10) -> Summary:
    return Summary(frames=frames, spent={"decode": decode, "tower": tower, "write": write})


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ((6, 3, 1), "the tower waited 60% of the time for decoding: more --decoders or cores"),
        ((2, 3, 5), "the tower waited 50% of the time for writing: a faster disk"),
        ((1, 8, 1), "the tower was at work 80% of the time: a faster device, or more of them"),
    ],
)
def test_what_to_buy_is_what_the_tower_waits_for(
    seconds: tuple[float, float, float], said: str
) -> None:
    assert spent(*seconds).advice == said


def test_a_run_without_a_frame_has_no_advice() -> None:
    assert Summary().advice is None
    assert spent(3, 0, 1, frames=0).advice is None


def test_several_processes_are_added_up() -> None:
    total = Summary.of([spent(6, 3, 1), spent(0, 10, 0)])
    assert total.frames == 20
    assert total.shares == {"decode": 0.3, "tower": 0.65, "write": 0.05}
