"""The clock of a stream: what is not shown has no say in the times of what is.

pytest tests/preprocess/decode/test_clock.py
"""

from hypothesis import given
from hypothesis import strategies as st

from preprocess.decode.stream.clock import PacketTimes, find_jumps, straightened

SECOND, STEP = 90_000, 3_600


@given(
    gaps=st.lists(
        st.sampled_from([STEP, STEP, STEP, 20 * SECOND, -40 * SECOND, 10**10]), max_size=20
    ),
    hidden=st.lists(st.tuples(st.integers(0, 20), st.integers(-(2**33), 2**33)), max_size=4),
    may_restart=st.booleans(),
)
def test_packets_that_are_not_shown_move_no_frame(
    gaps: list[int], hidden: list[tuple[int, int]], *, may_restart: bool
) -> None:
    shown = [0]
    for gap in gaps:
        shown.append(shown[-1] + gap)
    alone = PacketTimes(shown, [*shown], [STEP] * len(shown), {0})
    jumps, odd = find_jumps(alone, SECOND, STEP, may_restart)
    expected = straightened(shown, jumps)

    packets = [(pts, False) for pts in shown]
    for place, pts in hidden:
        packets.insert(place, (pts, True))
    pts = [one for one, _ in packets]
    unseen = {number for number, (_, is_hidden) in enumerate(packets) if is_hidden}
    first = next(number for number in range(len(packets)) if number not in unseen)
    times = PacketTimes(pts, [*pts], [STEP] * len(pts), {first}, hidden=unseen)
    jumps, odd_too = find_jumps(times, SECOND, STEP, may_restart)
    found = straightened(pts, jumps)
    assert [tick for number, tick in enumerate(found) if number not in unseen] == expected
    assert odd_too == odd
