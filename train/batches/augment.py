"""How the frames of media are seen in an epoch: which of those banked, and which of them slow.

Without `augment` they are even, by the run's pattern. With it they are drawn: by nothing but the run's
seed, the epoch, the record's number and the medium's, so that the plan and the loader, any rank and a
resumed run draw the same. Many media at once, as arrays, because a plan counts a hundred thousand.
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
"""What a number is drawn for; JITTER + k is for the k-th frame."""


@dataclass(frozen=True)
class Seen:
    """The frames that are seen of some media, one medium after the other."""

    medium: np.ndarray
    """int64, whose frame it is."""
    frame: np.ndarray
    """int64, which of its banked frames; rising within a medium."""
    slow: np.ndarray
    """bool."""


@dataclass(frozen=True)
class Looks:
    """How the media of one epoch are seen."""

    settings: AugmentSettings
    strategy: str
    ratio: Fraction
    """The run's own."""
    seed: int = 0
    epoch: int = 0

    def choose(
        self, record: np.ndarray, medium: np.ndarray, total: np.ndarray, most: np.ndarray
    ) -> Seen:
        """Return the frames that are seen of media.

        record, medium: the numbers of a medium's record in the epoch, and of the medium in the record;
        total: its banked frames; most: frames that may be seen. All int64 `(media,)`.
        """
        own = self.settings
        key = self.seed, self.epoch, record
        patterns, ratios = own.pattern or (self.strategy,), own.ratio or (self.ratio,)
        pattern = (draw(*key, 0, PATTERN) * len(patterns)).astype(np.int64)
        ratio = (draw(*key, 0, RATIO) * len(ratios)).astype(np.int64)
        least = np.floor(own.drop * total).astype(np.int64) + 1
        dropped = (draw(*key, medium, DROPPED) * least).astype(np.int64)
        dropped_at = (draw(*key, medium, DROPPED_AT) * (total - dropped + 1)).astype(np.int64)
        left = total - dropped
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
            late = frames >= dropped_at[these, None]
            frames = frames + dropped[these, None] * late
            found.append((np.repeat(these, count), frames.reshape(-1), np.tile(slow, len(these))))
        joined = [np.concatenate(parts) for parts in zip(*found, strict=True)]
        by_medium = np.argsort(joined[0], kind="stable")
        return Seen(*(part[by_medium] for part in joined))

    def _jittered(
        self, record: np.ndarray, medium: np.ndarray, banked: int, count: int
    ) -> np.ndarray:
        """Return one frame of each of `count` equal stretches of the banked ones: `(media, count)`."""
        edges = np.arange(count + 1) * banked // count
        places = draw(
            self.seed, self.epoch, record[:, None], medium[:, None], JITTER + np.arange(count)
        )
        return edges[:-1] + (places * np.diff(edges)).astype(np.int64)

    @classmethod
    def of_epoch(cls, dataset: Dataset, settings: ModelSettings, epoch: int) -> "Looks":
        """Return how a dataset's media are seen in an epoch of a run of these settings."""
        strategy, ratio = settings.frame_sampling_strategy, settings.slow_frame_ratio
        return cls(dataset.augment, strategy, exact_ratio(ratio), dataset.seed, epoch)

    def of(self, record: int, medium: int) -> "Look":
        return Look(self, record, medium)


@dataclass(frozen=True)
class Look:
    """How one medium of a record is seen."""

    looks: Looks
    record: int
    medium: int

    def choose(self, total: int, most: int) -> tuple[list[int], list[bool]]:
        """Return (banked frames that are seen, whether each is slow)."""
        one = [np.asarray([n]) for n in (self.record, self.medium, total, most)]
        seen = self.looks.choose(*one)
        return seen.frame.tolist(), seen.slow.tolist()


@lru_cache(maxsize=4096)
def _pattern(
    banked: int, count: int, strategy: str, ratio: Fraction
) -> tuple[np.ndarray, np.ndarray]:
    """Return (even frames, which of them are slow) of so many of those banked."""
    if not count:  # of a record that does not fit at all
        return np.zeros(0, np.int64), np.zeros(0, bool)
    slow: Sequence[bool] = slow_frames(strategy, ratio, count)
    return np.asarray(uniform_indices(banked, count), np.int64), np.asarray(slow, bool)
