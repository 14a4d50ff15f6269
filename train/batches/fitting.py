"""Fits records into token limits by leaving out whole frames, and counts what is left out."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from train.batches.lengths import REFUSED, Lengths


def fit_frames(lengths: Lengths, frames: np.ndarray, limit: int) -> np.ndarray:
    """Return the most frames of a clip with which each record has at most `limit` tokens.

    frames: int64 `(records,)`, upper bounds. Returns 0 where a single frame of each clip is too much.
    Whole frames are left out, evenly spaced ones kept: half a frame would have no place in the grid.
    """
    low, high = np.zeros_like(frames), frames.copy()
    high[lengths.total(np.ones_like(frames)) > limit] = 0
    while (low < high).any():
        # bisection of all records at once: tokens rise with frames, and each try
        # is a few sums over arrays
        middle = (low + high + 1) // 2
        fits = lengths.total(middle) <= limit
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


class Fit(NamedTuple):
    """Records fitted into token limits."""

    frames: np.ndarray
    """int64 `(records,)`: the most frames of a clip; 1 for a record that is left out."""
    kept: np.ndarray
    """int64, indices of the records that fit."""
    left_out: dict[str, np.ndarray]
    """Reason -> int64 indices of the others: too long with one frame, or refused by the template."""
    line: str
    """The number of left-out frames of kept records, in words; empty where there are none."""


def fit_records(lengths: Lengths, most_frames: int, max_tokens: int, pack_tokens: int) -> Fit:
    """Return the frames of a clip that each record's tokens leave room for.

    most_frames: of a clip. A limit of 0 is none; the smaller of the two holds.
    """
    unlimited = np.full(len(lengths.text), most_frames, np.int64)
    left_out = {REFUSED: np.flatnonzero(lengths.text < 0)}
    limits = [(max_tokens, "max_tokens"), (pack_tokens, "pack_tokens")]
    limit, name = min((each for each in limits if each[0]), default=(0, ""))
    frames = fit_frames(lengths, unlimited, limit) if limit else unlimited
    too_long = (frames == 0) & (lengths.text >= 0)
    left_out[f"longer than {name} {limit} with one frame"] = np.flatnonzero(too_long)
    # left-out records keep one frame, so that sums over all of them stay defined
    frames = np.maximum(frames, 1)
    kept = np.flatnonzero((lengths.text >= 0) & ~too_long)
    line = _frames_line(lengths, frames, unlimited, kept, limit)
    reasons = {reason: records for reason, records in left_out.items() if len(records)}
    return Fit(frames, kept, reasons, f"{name} {limit} leaves out {line}" if line else "")


def _frames_line(
    lengths: Lengths, frames: np.ndarray, unlimited: np.ndarray, kept: np.ndarray, limit: int
) -> str:
    """Return in words how many frames of the kept records a limit leaves out."""

    def count(most: np.ndarray) -> np.ndarray:
        slow, fast = lengths.taken(most)
        return lengths.per_record(slow + fast)[kept]

    wanted, used = count(unlimited), count(frames)
    if not (wanted > used).any():
        return ""
    line = (
        f"{(wanted - used).sum():,} of {wanted.sum():,} frames, in {(wanted > used).sum():,} of "
        f"{len(kept):,} records"
    )
    if lengths.written is not None:
        unwritten = count(fit_frames(replace(lengths, written=None), unlimited, limit))
        line += f"; {(unwritten - used).sum():,} of them for the times written before frames"
    if lengths.apart is not None:
        # each question in a record of its own would leave room for more frames
        shared, longest, _ = lengths.apart
        crowded = (wanted > used) & (lengths.text - shared > longest)[kept]
        if several := int(crowded.sum()):
            line += (
                f"; {several:,} records have several independent questions, which count together: "
                "records of fewer keep more frames"
            )
    return line
