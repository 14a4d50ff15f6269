"""Which frames of a clip are taken: the rule of `--fps`, `--frames` and `--max-frames`.

sample_indices(times, end=4.0, rate=25.0, sampling=Sampling(fps="1", max_frames=64))    # [0, 25, 50, 75]
"""

from dataclasses import replace
from fractions import Fraction

import numpy as np

from model.slow_fast import uniform_indices
from model.tower.frames import processor_frames
from shards.format.features import Sampling


def sample_indices(times: np.ndarray, end: float, rate: float, sampling: Sampling) -> list[int]:
    """Return the places of the sampled frames, ascending.

    times: float64 `(shown frames,)`, sorted seconds from the clip's start; end: its length in seconds;
    rate: the source's mean frames a second. At `fps` F the frame on screen at each of 0, 1/F, 2/F ... is
    taken, once. A time before the first frame takes the first, so that no clip is empty.
    """
    if sampling.kept is not None:
        taken = sample_indices(times, end, rate, replace(sampling, kept=None))
        return [taken[k] for k in uniform_indices(len(taken), sampling.kept)]
    if sampling.like is not None:
        fps = None if sampling.fps is None else float(Fraction(sampling.fps))
        asked = sampling.num_frames, fps, sampling.max_frames
        return processor_frames(sampling.like, len(times), rate, *asked)
    if sampling.num_frames is not None:
        return uniform_indices(len(times), sampling.num_frames)
    assert sampling.fps is not None
    wanted = Fraction(sampling.fps)
    # A frame is taken if an instant falls between its time and the next frame's. Instants are counted per
    # frame and not listed: one far timestamp would make a list of any length.
    until = np.minimum(np.append(times[1:], end), end)
    instants = _instants_before(until, wanted)
    earlier = np.append(0, np.maximum.accumulate(_instants_before(times[1:], wanted)))
    taken = np.flatnonzero(instants > earlier).tolist() or [0]
    if sampling.max_frames is not None and len(taken) > sampling.max_frames:
        # as LLaVA-Video samples: 1 fps up to the limit, beyond it uniformly over the whole clip
        return uniform_indices(len(times), sampling.max_frames)
    return taken


def _instants_before(times: np.ndarray, rate: Fraction) -> np.ndarray:
    """Return how many of the instants 0, 1 / rate, 2 / rate ... are before each of the times.

    An instant is rounded once, as the times are, so equal times stay equal.
    """
    count = np.maximum(np.ceil(times * rate.numerator / rate.denominator), 0)
    for _ in range(2):  # the product above may be off by its rounding
        count += count * rate.denominator / rate.numerator < times
        count -= (count > 0) & ((count - 1) * rate.denominator / rate.numerator >= times)
    return count
