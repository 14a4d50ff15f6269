"""The clock of a stream, straightened: what its packets say of time, where time starts again or leaps.

    jumps, held = find_jumps(times, may_restart=True)
    ticks = straightened(pts, jumps)

Streams that were appended to each other (`cat a.ts b.ts`), and those of a recorder that was started
again, have a clock that jumps. The packets between two jumps are laid end to end, a frame apart, so
that every frame keeps its place in the order shown and time only ever rises.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LONG_GAP = 10
"""Seconds. FFmpeg takes what is longer for a clock that jumped, in containers where one may."""
LONGEST_HOLD = 3600
"""Seconds that a packet may say its picture is held without being marked for it."""
REORDERED = 16
"""Packets by which decoding order may differ from the order shown, in H.264 and HEVC."""
LONGEST_GAP = 30 * 3600
"""Seconds. FFmpeg takes what is longer for an error in any container."""

Jumps = tuple[tuple[int, int], ...]
"""Per jump: the first packet of the stream after it (by number), and the ticks to add from there on."""


@dataclass
class PacketTimes:
    """Times of one stream's packets in the order of the file, in ticks."""

    pts: list[int] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    keys: set[int] = field(default_factory=set)
    """Numbers of the keyframes."""
    bridged: set[int] = field(default_factory=set)
    """Numbers of packets up to which other streams went on, so that a gap before one is true."""


def find_jumps(
    times: PacketTimes, second: float, step: int, may_restart: bool
) -> tuple[Jumps, bool]:
    """Return where the clock jumps, and whether there are gaps left that no packet explains.

    second: in ticks; step: ticks of a frame whose packet gives no duration. may_restart: whether the
    container is one of those whose clock may start anew (MPEG-TS and PS, Ogg), in which a gap that
    nothing explains is a jump forwards.
    """
    starts, odd = _starts(times, second, may_restart)
    jumps: list[tuple[int, int]] = []
    end = None
    for first, stop in pairwise([0, *starts, len(times.pts)]):
        inside = times.pts[first:stop]
        shift = 0
        if end is not None:
            shift = end - min(inside)
            jumps.append((first, shift))
        last = max(range(first, stop), key=times.pts.__getitem__)
        hold = times.durations[last]
        end = times.pts[last] + shift + (hold if 0 < hold <= LONG_GAP * second else step)
    return tuple(jumps), odd


def _starts(times: PacketTimes, second: float, may_restart: bool) -> tuple[list[int], bool]:
    """Return the packets at which the clock jumps, and whether other long gaps are unexplained."""
    starts, odd = [], False
    furthest = decoded = None  # pts and dts of the packets since the last jump
    for number, (pts, dts) in enumerate(zip(times.pts, times.dts, strict=True)):
        if furthest is not None:
            gap = pts - furthest
            # Whatever comes before a keyframe in the file is shown before it.
            back = number in times.keys and gap < 0
            back = back and (dts is None or decoded is None or dts <= decoded)
            back |= gap < -LONG_GAP * second
            is_long = gap > LONG_GAP * second and number not in times.bridged
            # A packet's duration is by decode order: with B-frames the gap is another one's.
            near = times.durations[max(0, number - REORDERED) : number + REORDERED]
            hold = max(near)
            is_long &= not (hold <= LONGEST_HOLD * second and gap - hold <= LONG_GAP * second)
            leap = gap > LONGEST_GAP * second or (is_long and may_restart)
            if back or leap:
                starts.append(number)
                furthest = decoded = None
            else:
                odd |= is_long
        if furthest is None or pts >= furthest:
            furthest = pts
        decoded = dts if decoded is None or dts is None else max(decoded, dts)
    return starts, odd


def is_bridged(before: float, others: Sequence[float], after: float) -> bool:
    """Whether there is a long gap, and packets of other streams fill it. All in seconds."""
    if after - before <= LONG_GAP:
        return False
    inside = sorted(time for time in others if before < time < after)
    return all(b - a <= LONG_GAP for a, b in pairwise([before, *inside, after]))


def shift_of(number: int, jumps: Jumps) -> int:
    """Return the ticks to add to the times of a packet, given by number."""
    passed = bisect_right(jumps, number, key=lambda jump: jump[0])
    return jumps[passed - 1][1] if passed else 0


def straightened(ticks: Sequence[int], jumps: Jumps) -> list[int]:
    """Return the times of all packets by one clock that never jumps."""
    return [tick + shift_of(number, jumps) for number, tick in enumerate(ticks)]
