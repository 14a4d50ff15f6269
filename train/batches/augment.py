"""Chooses the frames of media for an epoch: which banked frames are used, and which of them are slow.

Without `augment` they are evenly spaced, by the run's pattern. With it they are drawn from the run's
seed, the epoch, the record's number and the medium's alone, so that the plan, the loader, every rank and
a resumed run draw the same. Arrays of media, because a plan counts a hundred thousand of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from model.config import ModelSettings
from model.slow_fast import exact_ratio, slow_frames, uniform_indices
from train.data.dataset import Dataset
from train.settings.drawn import AugmentSettings, draw

PATTERN, RATIO, DROPPED, DROPPED_AT, JITTER = range(5)
"""Purposes of random numbers, which enter their seed; JITTER + k is that of the k-th frame."""


@dataclass(frozen=True)
class Seen:
    """The chosen frames of media, one medium after the other."""

    medium: np.ndarray
    """int64, the number of each frame's medium."""
    frame: np.ndarray
    """int64, its index among the medium's banked frames, rising."""
    slow: np.ndarray
    """bool, whether it is in the slow stream."""


@dataclass(frozen=True)
class Looks:
    """The choice of frames in one epoch."""

    settings: AugmentSettings
    strategy: str
    ratio: Fraction
    """The run's own."""
    seed: int = 0
    epoch: int = 0

    def choose(
        self, record: np.ndarray, medium: np.ndarray, total: np.ndarray, most: np.ndarray
    ) -> Seen:
        """Return the chosen frames of media.

        record, medium: the number of a medium's record in the epoch, and of the medium in the record.
        total: its banked frames. most: frames that may be used. All int64 `(media,)`.
        """
        own = self.settings
        key = self.seed, self.epoch, record
        patterns, ratios = own.pattern or (self.strategy,), own.ratio or (self.ratio,)
        pattern = (draw(*key, 0, PATTERN) * len(patterns)).astype(np.int64)
        ratio = (draw(*key, 0, RATIO) * len(ratios)).astype(np.int64)
        # 0 to floor(drop x total) frames, all equally likely
        least = np.floor(own.drop * total).astype(np.int64) + 1
        dropped = (draw(*key, medium, DROPPED) * least).astype(np.int64)
        dropped_at = (draw(*key, medium, DROPPED_AT) * (total - dropped + 1)).astype(np.int64)
        left = total - dropped
        # media of equal counts share one pattern, which is then computed once
        groups = np.stack([left, np.minimum(left, most), pattern, ratio], axis=1)
        kinds, kind_of = np.unique(groups, axis=0, return_inverse=True)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        order = np.argsort(kind_of.reshape(-1), kind="stable")
        ends = np.cumsum(np.bincount(kind_of.reshape(-1), minlength=len(kinds)))
        for (banked, count, p, r), these in zip(
            kinds.tolist(), np.split(order, ends[:-1]), strict=True
        ):
            even, slow = _pattern(banked, count, patterns[p], ratios[r])
            frames = np.broadcast_to(even, (len(these), count))
            if own.jitter:
                frames = self._jittered(record[these], medium[these], banked, count)
            # a stretch of neighbours is dropped, as a cut in a video would be:
            # what follows it moves down
            late = frames >= dropped_at[these, None]
            frames = frames + dropped[these, None] * late
            found.append((np.repeat(these, count), frames.reshape(-1), np.tile(slow, len(these))))
        joined = [np.concatenate(parts) for parts in zip(*found, strict=True)]
        by_medium = np.argsort(joined[0], kind="stable")
        return Seen(*(part[by_medium] for part in joined))

    def _jittered(
        self, record: np.ndarray, medium: np.ndarray, banked: int, count: int
    ) -> np.ndarray:
        """Return a random frame of each of `count` equal stretches of those banked: `(media, count)`."""
        # stretches do not overlap, so frames stay in order and none is taken twice
        edges = np.arange(count + 1) * banked // count
        places = draw(
            self.seed, self.epoch, record[:, None], medium[:, None], JITTER + np.arange(count)
        )
        return edges[:-1] + (places * np.diff(edges)).astype(np.int64)

    @classmethod
    def of_epoch(cls, dataset: Dataset, settings: ModelSettings, epoch: int) -> "Looks":
        """Return the choice of frames of a dataset in one epoch of a run."""
        strategy, ratio = settings.frame_sampling_strategy, settings.slow_frame_ratio
        return cls(dataset.augment, strategy, exact_ratio(ratio), dataset.seed, epoch)

    def of(self, record: int, medium: int) -> "Look":
        """Return that for one medium of a record."""
        return Look(self, record, medium)


@dataclass(frozen=True)
class Look:
    """The choice of frames for one medium of a record."""

    looks: Looks
    record: int
    medium: int

    def choose(self, total: int, most: int) -> tuple[list[int], list[bool]]:
        """Return (indices of banked frames, whether each is slow), of `total` at most `most`."""
        one = [np.asarray([n]) for n in (self.record, self.medium, total, most)]
        seen = self.looks.choose(*one)
        return seen.frame.tolist(), seen.slow.tolist()


@lru_cache(maxsize=4096)
def _pattern(
    banked: int, count: int, strategy: str, ratio: Fraction
) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` evenly spaced frames of those banked, and whether each is slow."""
    if not count:  # a record that does not fit the token limit at all
        return np.zeros(0, np.int64), np.zeros(0, bool)
    slow: Sequence[bool] = slow_frames(strategy, ratio, count)
    return np.asarray(uniform_indices(banked, count), np.int64), np.asarray(slow, bool)
