"""Several banks read as one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.errors import UserError
from shards.format.codec import Int8
from shards.format.features import FeatureConfig, differences
from shards.format.manifest import Manifest
from shards.format.quarantine import read_quarantine
from shards.read.bank import Bank, ClipInfo
from shards.read.near import NearIds
from shards.signed import Json


class Place(NamedTuple):
    """Where a clip is: a bank and a row of it."""

    bank: Bank
    row: int

    def clip(self) -> "BankedClip":
        return BankedClip(self.bank, self.row, self.bank.clip(self.row))

    @property
    def duration(self) -> float:
        """Seconds of the clip, as its `ClipInfo` has them."""
        start, end = (self.bank.columns[name][self.row] for name in ("start", "end"))
        return float(end) - float(start)


class Banks:
    """Several banks read as one: a clip is found by its id in whichever bank holds it."""

    def __init__(self, banks: Sequence[Bank], *, apart: bool = False) -> None:
        """Raises UserError unless tower, processor, layer, pooling and strides agree.

        apart: several banks may have a clip of the same id, because clips are only searched for in some
        of them (`among`).
        """
        assert banks
        self.banks = list(banks)
        self.beside: list[Bank] = []
        """Banks of the run that are not searched here."""
        first = self.banks[0]
        for number, other in enumerate(self.banks[1:], 1):
            lines = conflicts(first.config, other.config)
            if lines:
                raise UserError(
                    f"{first.where} and {other.where} cannot be joined: {'; '.join(lines)}",
                    fix="encode one of them again as the other was, or name one",
                )
            # each pair: which bank a clip is read from must not depend on their order
            for earlier in [] if apart else self.banks[:number]:
                _refuse_common_clips(earlier, other)

    @classmethod
    def open(cls, paths: Sequence[str | Path], *, apart: bool = False) -> "Banks":
        return cls([Bank.open(path) for path in paths], apart=apart)

    def among(self, numbers: Sequence[int]) -> "Banks":
        """Return some of the banks, by index; raises UserError if two of them share a clip."""
        chosen = Banks([self.banks[k] for k in numbers])
        # kept for messages: a clip that is not found here may be in one of them
        chosen.beside = [bank for k, bank in enumerate(self.banks) if k not in numbers]
        return chosen

    @property
    def config(self) -> FeatureConfig:
        return self.banks[0].config

    @property
    def strides(self) -> tuple[int, ...]:
        """Those that all of the banks can read, beside their own ones, too."""
        every = [set(bank.strides) for bank in self.banks]
        return tuple(sorted(set.intersection(*every)))

    @property
    def manifest(self) -> Manifest:
        return self.banks[0].manifest

    def __contains__(self, id_: str) -> bool:
        return self.find(id_) is not None

    def find(self, id_: str) -> Place | None:
        """Return where a clip is; None if no bank has it."""
        for bank in self.banks:
            row = bank.find(id_)
            if row is not None:
                return Place(bank, row)
        return None

    def clip(self, id_: str) -> "BankedClip":
        """Return a clip; raises KeyError if no bank has it."""
        place = self.find(id_)
        if place is None:
            raise KeyError(id_)
        return place.clip()

    @cached_property
    def near(self) -> NearIds:
        """The index of similar ids, for hints in messages."""
        return NearIds(self.banks)

    def quarantined(self) -> frozenset[str]:
        """Return the ids of clips that could not be encoded, read once."""
        return self._quarantined

    @cached_property
    def _quarantined(self) -> frozenset[str]:
        return frozenset(entry.id for bank in self.banks for entry in read_quarantine(bank.where))


def _refuse_common_clips(one: Bank, other: Bank) -> None:
    # hashes first: ids of millions of clips are decoded only where two may be equal
    common = np.intersect1d(one.columns["key_hash"], other.columns["key_hash"])
    for row in np.flatnonzero(np.isin(other.columns["key_hash"], common)):
        if other.ids[row] in one:
            raise UserError(
                f"clip {other.ids[row]!r} is in {one.where} and in {other.where}; leave one of the "
                "two banks out, or bind records to theirs by the `banks` of a data_config entry"
            )


@dataclass(frozen=True)
class BankedClip:
    """One clip of a bank: its catalogue row, and its features on demand."""

    bank: Bank
    row: int
    info: ClipInfo

    def read(self, stride: int, frames: Sequence[int]) -> np.ndarray | Int8:
        """Return features as `Bank.read` does; of an int8 bank in stored form. Raises DamagedSample."""
        if self.bank.codec.name == "int8":
            return self.bank.read_int8(self.row, stride, frames)
        return self.bank.read(self.row, stride, frames)


def joint(config: FeatureConfig) -> Json:
    """Return the settings that banks of one run must share; sampling, codec and dtype may differ."""
    # none of these changes what a feature is: reads bring frames, and floats of one kind or the other
    own = ("sampling", "codec", "dtype", "format_version", "derived")
    return {name: value for name, value in config.to_json().items() if name not in own}


def conflicts(ours: FeatureConfig, theirs: FeatureConfig) -> list[str]:
    """Return a line for each setting by which features cannot serve one model.

    The type of the tower's arithmetic is none: `--tower-dtype auto` takes it by the time of a frame, so
    that two banks of one machine may differ in it, and it changes features less than int8 does.
    """
    one, other = (joint(replace(config, tower_dtype="")) for config in (ours, theirs))
    return differences(one, other)


def arithmetic_note(banks: Banks, type_: str = "") -> list[str]:
    """Return a line unless the tower computed in one type for all banks, and for a model of that type."""
    types = {bank.config.tower_dtype for bank in banks.banks} | ({type_} if type_ else set())
    if len(types) == 1:
        return []
    made = ", ".join(f"{bank.config.tower_dtype} for {bank.where}" for bank in banks.banks)
    model = f", {type_} for the model's training" if type_ else ""
    return [f"features: the tower computed in {made}{model}: they differ by rounding"]
