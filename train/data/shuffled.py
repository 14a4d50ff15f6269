"""A control of a test set: each clip has the features of another one, on its own clock.

A model that answers as well has not looked: it knows what is asked, and how answers are spread.
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
class ForeignClip(BankedClip):
    """What is known of a clip, and another one's features: those of as early a frame."""

    theirs: int
    """Frames that the other clip has; `info` is of the clip that it stands for."""

    def read(self, stride: int, frames: Sequence[int]) -> np.ndarray | Int8:
        own = len(self.info.timestamps)
        return super().read(stride, [frame * self.theirs // own for frame in frames])


@dataclass(frozen=True)
class ShuffledDataset(Dataset):
    """A dataset whose held-out records are given other clips' features."""

    others: Mapping[Place, Place] = field(default_factory=dict)
    """Each clip's place -> where its features are read from."""

    @classmethod
    def of(cls, dataset: Dataset, seed: int = 0) -> "ShuffledDataset":
        """Give every clip of the held-out records another one of them; UserError where there is none."""
        groups: dict[tuple[int, int], list[Place]] = defaultdict(list)
        media = [medium for record in dataset.held_out for medium in record.places]
        for place in dict.fromkeys(place for medium in media for place in places_of(medium)):
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
            for one, other in zip(order, order[1:] + order[:1], strict=True):  # a ring
                others[places[one]] = places[other]
        same = {f.name: getattr(dataset, f.name) for f in fields(dataset)}
        return cls(**same, others=others)

    def clips(self, record: Record) -> list[BankedClip | SplicedClip]:
        found: list[BankedClip | SplicedClip] = []
        for medium in record.places:
            clips = [foreign(place, self.others[place]) for place in places_of(medium)]
            if isinstance(medium, Timeline):
                found.append(splice(clips, medium.stretches))
            else:
                found += clips
        return found


def foreign(place: Place, other: Place) -> ForeignClip:
    """Return a clip with the features of another one."""
    info = place.clip().info
    return ForeignClip(other.bank, other.row, info, len(other.clip().info.timestamps))
