"""What a bank will cost (`preprocess plan`): clips, frames, bytes, shards, and hours by a few clips."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.tower.faults import FeatureRangeError
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.source import SourceReader
from preprocess.encode.features import EncodeOptions, coarse_strides, encode_frames, frame_bytes
from preprocess.sources.changes import Changes
from shards.format.commits import committed
from shards.format.plan import ClipSource, Plan
from shards.format.quarantine import read_entries
from shards.text import counted, in_bytes, some

if TYPE_CHECKING:
    from model.tower.tower import Tower

LEAST_SHARE = 0.005
"""Share of a frame above which its cropping is reported: it rounds to at least 1 %."""
TRIED = 3
NAMED = 5


@dataclass(frozen=True)
class Hours:
    """Rough hours of one process on this machine."""

    decode: float
    tower: float
    clips: int
    """Clips that were measured."""


def forecast(
    bank: Path, changes: Changes, tower: "Tower", options: EncodeOptions, *, hours: bool
) -> list[str]:
    """Return the lines that `preprocess plan` prints. hours: encode a few clips to measure."""
    plan, failed = changes.plan, read_entries(bank)
    served = plan.served()
    clips = [clip for clip in plan.clips if clip.key in served]
    # encode leaves failed ones alone
    todo = [clip for clip in _todo(bank, plan) if clip.id not in failed]
    frames = sum(clip.frames or 0 for clip in clips)
    done = sum(committed(bank, unit) for unit in range(len(plan.units)))
    lines = [
        f"{bank}: {counted(len(clips), 'clip')}, {_at_most(clips)}{counted(frames, 'frame')} in "
        f"{counted(len(plan.units), 'shard')}" + (f", {done} of them finished" if done else ""),
        "  "
        + "; ".join(
            f"stride {stride}: {in_bytes(frames * nbytes)}"
            for stride, nbytes in frame_bytes(tower, options).items()
        )
        + (" before compression" if options.codec == "blosc" else ""),
        f"  new: {len(changes.new)} clips; changed: {len(changes.changed)}; "
        f"gone: {len(changes.removed)}; pruned: {len(plan.pruned)}",
        *gone(changes),
        *cut_away(clips, tower),
        *(f"  {line}" for line in coarse_strides(tower, options)),
    ]
    closed = [clip.id for clip in clips if clip.frames == 0]
    if closed:
        lines.append(f"  cannot be opened: {named(closed)}")
    if not todo:
        return [*lines, "  nothing is left to encode"]
    left = sum(clip.frames or 0 for clip in todo)
    lines.append(f"  to encode: {len(todo)} clips, {_at_most(todo)}{left} frames")
    if hours:
        lines.append(f"  {_hours_line(measure(bank, todo, tower, options))}")
    return lines


def cut_away(clips: Sequence[ClipSource], tower: "Tower") -> list[str]:
    """Return a line on the share of frames that the tower does not see, by their size, if any."""
    sizes = Counter((clip.height, clip.width) for clip in clips if clip.height and clip.width)
    shares = []
    for (height, width), count in sizes.most_common():
        share = tower.pixels.cut_away(height or 1, width or 1, tower.patch)
        if share >= LEAST_SHARE:
            shares.append(f"{share:.0%} of {width}x{height} ({counted(count, 'clip')})")
    if not shares:
        return []
    crops = tower.pixels.crop is not None
    return [
        f"  cut away of each frame: {some(shares, NAMED)}"
        + ("; --fit pad or --fit stretch keeps the whole" if crops else "")
    ]


def gone(changes: Changes) -> list[str]:
    """Return a line on the clips whose sources no longer exist, if there are any."""
    if not changes.removed:
        return []
    pruned = changes.removed[0].key in changes.plan.pruned
    now = "are no longer served" if pruned else "stay in the bank; --prune drops them"
    return [
        f"  the sources of {named([clip.id for clip in changes.removed])} no longer exist; they {now}"
    ]


def named(ids: Sequence[str]) -> str:
    """Return the number of clips and the names of the first ones."""
    return f"{counted(len(ids), 'clip')} ({some(ids, NAMED)})"


def _at_most(clips: Sequence[ClipSource]) -> str:
    # how long a member of an archive is shows only when it is decoded
    return "at most " * any(clip.offset is not None for clip in clips)


def share_of_most(tried: Iterable[tuple[ClipSource, int]]) -> float:
    """Return the frames of tried members of archives over the most that they may have; 1 without any.

    tried: clips, each with the frames that it had.
    """
    archived = [(clip.frames or 0, had) for clip, had in tried if clip.offset is not None]
    most = sum(frames for frames, _ in archived)
    return sum(had for _, had in archived) / most if most else 1.0


def expected_frames(clips: Iterable[ClipSource], share: float) -> int:
    """Return the frames of clips: of members of archives a share of the most that they may have."""
    sure = most = 0
    for clip in clips:
        if clip.offset is None:
            sure += clip.frames or 0
        else:
            most += clip.frames or 0
    return sure + round(share * most)


def _todo(bank: Path, plan: Plan) -> list[ClipSource]:
    work = enumerate(plan.work())
    return [clip for unit, clips in work if not committed(bank, unit) for clip in clips]


# -- hours


def measure(
    bank: Path, todo: Sequence[ClipSource], tower: "Tower", options: EncodeOptions
) -> Hours | None:
    """Return the hours of one process, from a few clips of typical sizes; None if none decodes."""
    good = sorted(
        (clip for clip in todo if clip.frames), key=lambda clip: (clip.size or 0, clip.key)
    )
    # the middles of thirds by size: the largest and the smallest clip stand for no other
    chosen = [good[len(good) * (2 * k + 1) // (2 * TRIED)] for k in range(TRIED)] if good else []
    decode = encode = 0.0
    nbytes, tried = 0, list[tuple[ClipSource, int]]()
    with SourceReader(DecodeChild(), bank) as reader:
        # of few clips the thirds have the same middle
        for clip in dict.fromkeys(chosen):
            request = options.request(clip, tower.pixels)
            outcome = reader.read(clip, request)
            if outcome.clip is None:
                continue
            if not tried:
                _encode(
                    tower, outcome.clip.frames, options
                )  # warm up: the first call loads kernels
                began = time.monotonic()
                reader.read(clip, request)
                decode += time.monotonic() - began
            else:
                decode += outcome.seconds
            began = time.monotonic()
            _encode(tower, outcome.clip.frames, options)
            encode += time.monotonic() - began
            nbytes += outcome.size
            tried.append((clip, len(outcome.clip.frames)))
    if not tried:
        return None
    all_bytes = sum(clip.size or 0 for clip in todo)
    all_frames = expected_frames(todo, share_of_most(tried))
    frames = sum(had for _, had in tried)
    # Decoding is extrapolated by the videos' bytes, which grow with length and resolution as its cost
    # does; the tower by frames.
    return Hours(
        decode=decode / max(1, nbytes) * all_bytes / 3600,
        tower=encode / frames * all_frames / 3600,
        clips=len(tried),
    )


def _encode(tower: "Tower", frames: np.ndarray, options: EncodeOptions) -> None:
    with suppress(FeatureRangeError):  # values out of the type's range take the same time
        encode_frames(tower, frames, options)


def _hours_line(hours: Hours | None) -> str:
    if hours is None:
        return "hours cannot be estimated: none of the clips that were tried can be decoded"
    # Decoding and tower overlap: completely at best, and not at all where one core does both.
    least, most = max(hours.decode, hours.tower), hours.decode + hours.tower
    return (
        f"roughly {_span(least)} to {_span(most)} for one process here (decoding "
        f"{_span(hours.decode)}, tower {_span(hours.tower)}; measured on {hours.clips} clips)"
    )


def _span(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    if hours >= 1 / 60:
        return counted(round(hours * 60), "minute")
    return f"{hours * 3600:.1f} seconds"
