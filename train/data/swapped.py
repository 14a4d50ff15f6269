"""The control `evaluate --shuffle_features`: each clip has the features of another one, on its own clock.

A model that scores as well with these does not use the features: it answers from the questions and from
the distribution of answers.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from shards.errors import UserError
from shards.format.codec import Int8
from shards.read.banks import BankedClip, Place
from shards.read.timeline import SplicedClip, Timeline, places_of, splice
from train.data.dataset import Dataset
from train.data.records import Record


@dataclass(frozen=True)
class SwappedClip(BankedClip):
    """The facts of one clip with the features of another, each frame's from the same share of the way."""

    theirs: int
    """Number of frames of the other clip; `info` is of the clip that it replaces."""

    def read(self, stride: int, frames: Sequence[int]) -> np.ndarray | Int8:
        """Return the other clip's features of frames of this one, see `BankedClip.read`."""
        own = len(self.info.timestamps)
        return super().read(stride, [frame * self.theirs // own for frame in frames])


@dataclass(frozen=True)
class SwappedDataset(Dataset):
    """A dataset whose held-out records have other clips' features."""

    others: Mapping[Place, Place] = field(default_factory=dict)
    """Each clip's place -> the place from which its features are read."""

    @classmethod
    def of(cls, dataset: Dataset, seed: int = 0) -> "SwappedDataset":
        """Give each clip of the held-out records the features of another; UserError if there is none."""
        groups: dict[tuple[int, int], list[Place]] = defaultdict(list)
        media = [medium for record in dataset.held_out for medium in record.places]
        for place in dict.fromkeys(place for medium in media for place in places_of(medium)):
            # within one grid: features of another shape would not fit the record's row
            groups[place.clip().info.patch_grid].append(place)
        others = {}
        for grid, places in groups.items():
            if len(places) < 2:
                raise UserError(
                    f"--shuffle_features: no other clip has the grid of {places[0].clip().info.id}",
                    got="x".join(map(str, grid)),
                    fix="name a test set of more clips, or leave it out",
                )
            order = np.random.default_rng(seed).permutation(len(places)).tolist()
            # a ring: each clip gets another one's features, and each one's features are used once
            for one, other in zip(order, order[1:] + order[:1], strict=True):
                others[places[one]] = places[other]
        same = {f.name: getattr(dataset, f.name) for f in fields(dataset)}
        return cls(**same, others=others)

    def clips(self, record: Record) -> list[BankedClip | SplicedClip]:
        """Return the media of a record, with other clips' features."""
        found: list[BankedClip | SplicedClip] = []
        for medium in record.places:
            clips = [swapped(place, self.others[place]) for place in places_of(medium)]
            if isinstance(medium, Timeline):
                found.append(splice(clips, medium.stretches))
            else:
                found += clips
        return found


def swapped(place: Place, other: Place) -> SwappedClip:
    """Return a clip with the features of another one."""
    info = place.clip().info
    return SwappedClip(other.bank, other.row, info, len(other.clip().info.timestamps))
