"""How many frames of its clips a record's tokens leave room for, and what that leaves out."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from train.batches.lengths import REFUSED, Lengths


def fit_frames(lengths: Lengths, frames: np.ndarray, limit: int) -> np.ndarray:
    """Return the most frames of a clip with which each record has at most `limit` tokens.

    frames: int64 `(records,)`, the most there may be. 0 where a single frame of each clip is too much.
    Whole frames are left out, evenly; none is cut.
    """
    low, high = np.zeros_like(frames), frames.copy()
    high[lengths.total(np.ones_like(frames)) > limit] = 0
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = lengths.total(middle) <= limit
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


class Fit(NamedTuple):
    """What token limits make of records."""

    frames: np.ndarray
    """int64 `(records,)`: the most frames of a clip, 1 of a record that is left out."""
    kept: np.ndarray
    """int64, the records that are not."""
    left_out: dict[str, np.ndarray]
    """int64, the others, by reason: too long with one frame, or not to be encoded."""
    line: str
    """How many frames of the kept records are left out; empty where none is."""


def fit_records(lengths: Lengths, most_frames: int, max_tokens: int, pack_tokens: int) -> Fit:
    """Return the frames of a clip that each record's tokens leave room for.

    most_frames: of a clip. Limits of 0 are none; of two the smaller counts.
    """
    unlimited = np.full(len(lengths.text), most_frames, np.int64)
    left_out = {REFUSED: np.flatnonzero(lengths.text < 0)}
    limits = [(max_tokens, "max_tokens"), (pack_tokens, "pack_tokens")]
    limit, name = min((each for each in limits if each[0]), default=(0, ""))
    frames = fit_frames(lengths, unlimited, limit) if limit else unlimited
    too_long = (frames == 0) & (lengths.text >= 0)
    left_out[f"longer than {name} {limit} with one frame"] = np.flatnonzero(too_long)
    frames = np.maximum(frames, 1)
    kept = np.flatnonzero((lengths.text >= 0) & ~too_long)
    line = _frames_line(lengths, frames, unlimited, kept, limit)
    reasons = {reason: records for reason, records in left_out.items() if len(records)}
    return Fit(frames, kept, reasons, f"{name} {limit} leaves out {line}" if line else "")


def _frames_line(
    lengths: Lengths, frames: np.ndarray, unlimited: np.ndarray, kept: np.ndarray, limit: int
) -> str:
    """Return how many of the frames that some records would have a limit leaves out."""

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
    return line
