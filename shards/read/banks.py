"""Several banks read as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.format.features import FeatureConfig, differences
from shards.format.manifest import Manifest
from shards.format.quarantine import read_quarantine
from shards.read.bank import Bank, ClipInfo
from shards.signed import Json


class Banks:
    """Several banks read as one: a clip is found by its id in whichever bank holds it."""

    def __init__(self, banks: Sequence[Bank]) -> None:
        """Raises UserError unless tower, processor, layer, pooling and strides agree."""
        assert banks
        self.banks = list(banks)
        first = self.banks[0]
        for number, other in enumerate(self.banks[1:], 1):
            lines = differences(joint(first.config), joint(other.config))
            if lines:
                raise UserError(
                    f"{first.where} and {other.where} cannot be joined: {'; '.join(lines)}"
                )
            for earlier in self.banks[:number]:
                _refuse_common_clips(earlier, other)

    @classmethod
    def open(cls, paths: Sequence[str | Path]) -> "Banks":
        return cls([Bank.open(path) for path in paths])

    @property
    def config(self) -> FeatureConfig:
        return self.banks[0].config

    @property
    def manifest(self) -> Manifest:
        return self.banks[0].manifest

    def __contains__(self, id_: str) -> bool:
        return any(id_ in bank for bank in self.banks)

    def clip(self, id_: str) -> "BankedClip":
        """Return a clip; KeyError for one that no bank holds."""
        for bank in self.banks:
            row = bank.find(id_)
            if row is not None:
                return BankedClip(bank, row, bank.clip(row))
        raise KeyError(id_)

    def quarantined(self) -> set[str]:
        """Return the ids of clips that could not be encoded."""
        return {entry.id for bank in self.banks for entry in read_quarantine(bank.where)}


def _refuse_common_clips(one: Bank, other: Bank) -> None:
    common = np.intersect1d(one.columns["key_hash"], other.columns["key_hash"])
    for row in np.flatnonzero(np.isin(other.columns["key_hash"], common)):
        if other.ids[row] in one:
            raise UserError(
                f"clip {other.ids[row]!r} is in {one.where} and in {other.where}; leave one of the "
                "two banks out"
            )


@dataclass(frozen=True)
class BankedClip:
    """One clip of a bank: what is known of it, and its features on demand."""

    bank: Bank
    row: int
    info: ClipInfo

    def read(self, stride: int, frames: Sequence[int]) -> np.ndarray:
        """Return features as `Bank.read` does; raises DamagedSample."""
        return self.bank.read(self.row, stride, frames)


def joint(config: FeatureConfig) -> Json:
    """What banks joined in one run must share; sampling and codec may differ."""
    own = ("sampling", "codec", "dtype", "format_version")
    return {name: value for name, value in config.to_json().items() if name not in own}
