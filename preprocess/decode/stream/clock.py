"""Correct the clock of a stream whose times restart or jump in the middle of the file.

    jumps, held = find_jumps(times, may_restart=True)
    ticks = straightened(pts, jumps)

Streams that were appended to each other (`cat a.ts b.ts`), and those of a recorder that was restarted,
have a clock that jumps. The stretches between jumps are joined end to end, a frame apart, so that every
frame keeps its place in display order and time only increases.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LONG_GAP = 10
"""Seconds. FFmpeg treats a longer gap as a jump of the clock, in containers where it may restart (default
of its option -dts_delta_threshold)."""
LONGEST_HOLD = 3600
"""Seconds. A packet whose duration explains a gap is believed up to this duration."""
REORDERED = 16
"""Packets by which decode order may differ from display order: the largest number of pictures that a
decoder of H.264 or HEVC keeps."""
LONGEST_GAP = 30 * 3600
"""Seconds. FFmpeg treats a longer gap as an error in any container (default of -dts_error_threshold)."""

Jumps = tuple[tuple[int, int], ...]
"""Per jump: the number of the first packet after it, and the ticks to add from there on."""


@dataclass
class PacketTimes:
    """Times of one stream's packets in the order of the file, in ticks."""

    pts: list[int] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    keys: set[int] = field(default_factory=set)
    """Numbers of the keyframes."""
    bridged: set[int] = field(default_factory=set)
    """Numbers of packets before which other streams have no gap, so that a gap of this one is real."""
    hidden: set[int] = field(default_factory=set)
    """Numbers of packets that are not shown, whose times mean nothing: at least one is shown."""


def find_jumps(
    times: PacketTimes, second: float, step: int, may_restart: bool
) -> tuple[Jumps, bool]:
    """Return the jumps of the clock, and whether there are other long gaps that no packet explains.

    second: in ticks; step: ticks of a frame whose packet gives no duration. may_restart: whether the
    container is one whose clock may restart (MPEG-TS and PS, Ogg), in which an unexplained gap is a
    jump forwards.
    """
    starts, odd = _starts(times, second, may_restart)
    jumps: list[tuple[int, int]] = []
    end = None
    for first, stop in pairwise([0, *starts, len(times.pts)]):
        inside = [number for number in range(first, stop) if number not in times.hidden]
        shift = 0
        if end is not None:
            shift = end - min(times.pts[number] for number in inside)
            jumps.append((first, shift))
        last = max(inside, key=times.pts.__getitem__)
        hold = times.durations[last]
        # a packet's own duration where it is believable: a damaged one would open a gap of hours
        end = times.pts[last] + shift + (hold if 0 < hold <= LONG_GAP * second else step)
    return tuple(jumps), odd


def _starts(times: PacketTimes, second: float, may_restart: bool) -> tuple[list[int], bool]:
    """Return the packets at which the clock jumps, and whether other long gaps are unexplained."""
    starts, odd = [], False
    furthest = decoded = None  # pts and dts of the packets since the last jump
    for number, (pts, dts) in enumerate(zip(times.pts, times.dts, strict=True)):
        if number in times.hidden:
            continue
        if furthest is not None:
            gap = pts - furthest
            # All that precedes a keyframe in the file is shown before it: going back there is a restart.
            back = number in times.keys and gap < 0
            back = back and (dts is None or decoded is None or dts <= decoded)
            back |= gap < -LONG_GAP * second
            is_long = gap > LONG_GAP * second and number not in times.bridged
            # Durations are in decode order: with B-frames the one that explains the gap is a neighbour's.
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
    """Return whether there is a long gap that packets of other streams fill. All in seconds."""
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
