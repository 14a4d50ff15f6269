"""The packets of one stream of an open file, read without decoding more than its first frame."""

from dataclasses import dataclass, field
from typing import Any

from preprocess.decode.stream.choice import decoder_of
from preprocess.decode.stream.clock import (
    Jumps,
    PacketTimes,
    find_jumps,
    is_bridged,
    straightened,
)

# Their clock may restart in the middle, and their packets carry no durations.
RESTARTING_CONTAINERS = ("mpegts", "mpeg", "ogg")


@dataclass
class Packets:
    """The packets of one stream, in the order of the file."""

    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)
    """Whether the frame is not shown: an edit list hides it, or its packet is corrupt."""
    durations: list[int] = field(default_factory=list)
    """0 where the file gives none."""
    keys: list[int] = field(default_factory=list)
    """Places of the keyframes."""
    furthest: dict[int, int] = field(default_factory=dict)
    """By stream of the file: the end of its last packet, in ticks."""
    corrupt: bool = False
    discard: bool = False
    bridged: set[int] = field(default_factory=set)
    """Places of packets that end a long gap in which other streams went on."""
    first_frame: Any = None
    """The first frame that could be decoded; None if none could."""

    def clock(self, container: Any, stream: Any, step: int) -> tuple[list[int], Jumps, bool]:
        """Return the times of the frames, the jumps in them, and whether there are odd gaps.

        If any packet has no pts, frame k gets the time k * `step`.
        """
        known = [value for value in self.pts if value is not None]
        if len(known) < len(self.pts):
            return [k * step for k in range(len(self.pts))], (), False
        hidden = {number for number, is_hidden in enumerate(self.hidden) if is_hidden}
        times = PacketTimes(known, self.dts, self.durations, set(self.keys), self.bridged, hidden)
        may_restart = container.format.name in RESTARTING_CONTAINERS
        jumps, odd = find_jumps(times, float(1 / stream.time_base), step, may_restart)
        return straightened(known, jumps), jumps, odd

    def begins_late(self, place: int) -> bool:
        """Return whether the frame of the packet shown first is lost, though the first is a keyframe.

        So it is where a recording was cut within an open group of pictures, or within a refresh without
        keyframes: the file begins later than its packets say.
        """
        if self.first_frame is None or self.keys[:1] != [0]:
            return False
        return bool(self.first_frame.pts != self.pts[place])


def read_packets(container: Any, stream: Any) -> Packets:
    """Return the stream's packets of a file, all read; decodes up to the stream's first frame."""
    import av

    found = Packets()
    decoder = decoder_of(stream)
    # of all streams: those beside the video tell a real pause from a jump of its clock
    packets = container.demux()
    others: list[float] = []  # times of other streams since the last packet of this one
    latest = None
    while True:
        try:
            packet = next(packets, None)
        except (av.error.FFmpegError, IndexError):  # IndexError: a stream that appears mid-file
            found.corrupt = True
            break
        if packet is None:
            break
        if packet.pts is not None:
            reach = packet.pts + (packet.duration or 0)
            before = found.furthest.get(packet.stream_index, reach)
            found.furthest[packet.stream_index] = max(reach, before)
        seconds = None if packet.pts is None else float(packet.pts * packet.time_base)
        if packet.stream_index != stream.index or not packet.size:
            if packet.stream_index != stream.index and seconds is not None:
                others.append(seconds)
            continue
        if seconds is not None:
            if latest is not None and is_bridged(latest, others, seconds):
                found.bridged.add(len(found.pts))
            latest = seconds if latest is None else max(latest, seconds)
        others.clear()
        if packet.is_keyframe:
            found.keys.append(len(found.pts))
        found.pts.append(packet.pts)
        found.dts.append(packet.dts)
        found.hidden.append(packet.is_discard or packet.is_corrupt)
        found.durations.append(packet.duration or 0)
        found.discard |= packet.is_discard
        found.corrupt |= packet.is_corrupt
        # One frame is decoded for its display matrix and its true size, which headers may lack.
        if found.first_frame is None:
            found.first_frame = _first_frame(decoder, packet)
    if found.first_frame is None and not all(found.hidden):
        found.first_frame = _first_frame(decoder, None)
    return found


def matrix_of(frame: Any) -> bytes:
    """Return a frame's display matrix, zeros where it has none."""
    found = (
        [bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
        if frame
        else []
    )
    return found[0] if found else bytes(36)


def _first_frame(decoder: Any, packet: Any) -> Any:
    import av

    try:
        return next(iter(decoder.decode(packet)), None)
    except av.error.FFmpegError:
        return None
