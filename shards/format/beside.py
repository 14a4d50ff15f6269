"""Strides that were encoded later: a bank of their own each, in a folder of the first one.

    bank/bank.json ...             the bank, of strides 4 and 8: none of its files is changed
    bank/beside/2/bank.json ...    a side: a whole bank of the same clips, of stride 2 alone
    bank/beside.json               which sides may be read with the bank; written last

A side is made as any bank is: plan, leases, commit records, a finish of its own. So it is verified,
repaired and reported as one, and a run of it that was cut off continues. Its features are the bank's but
for the strides, and its tower runs as the bank's did: both read together give what one run with all of
the strides would have banked, under that bank's fingerprint.

`beside.json` records, for each side, the state of side and bank (`state_of`) at the time when each sample
of the bank was found in the side with the same json, apart from the grids of cells. A reader uses a side
only while both states are unchanged. After clips were added, changed or lost in one of the two, the
side's strides are refused by name until `preprocess encode INPUT --stride 2 --out BANK` has run again.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shards.errors import UserError
from shards.format.features import FORMAT_VERSION, FeatureConfig
from shards.format.fields import parse
from shards.format.manifest import CodecFacts, Manifest, read_small
from shards.format.version import refuse_other_version
from shards.signed import canonical_json, digest, signed_json, write_atomic
from shards.storage import Files

FOLDER, NAME = "beside", "beside.json"


@dataclass(frozen=True)
class Side:
    """A bank beside another one, of the very same clips."""

    folder: str
    """Below the other one's."""
    strides: tuple[int, ...]
    bank: str
    """The state of the other one when the two were compared."""
    side: str
    """Its own."""


@dataclass(frozen=True)
class Sides:
    """What `beside.json` holds."""

    sides: tuple[Side, ...] = ()


def state_of(manifest: Manifest) -> str:
    """Return a digest that changes when a bank serves other samples, or other bytes of them."""
    shards = [[shard.name, shard.sha256] for shard in manifest.shards]
    # hashes, not times: a copy of a bank has the same state
    held = {"of": manifest.fingerprint, "shards": shards, "superseded": manifest.superseded}
    return digest(canonical_json(held))


def read_sides(files: Files) -> tuple[Side, ...]:
    """Return the sides of a bank that may be read with it, if both are still as they were."""
    try:
        data = read_small(files, NAME)
        if data is None:
            return ()
        refuse_other_version(data, files.where, NAME)
        data = {name: value for name, value in data.items() if name != "format_version"}
        return parse(Sides, data, f"{files.where}/{NAME}").sides
    except UserError as error:
        raise UserError(
            str(error), fix=f"`preprocess repair {files.where}` writes it again"
        ) from None


def write_sides(bank: Path, sides: Sequence[Side]) -> None:
    facts = {"format_version": FORMAT_VERSION, "sides": [asdict(side) for side in sides]}
    write_atomic(bank / NAME, signed_json(facts))


def side_path(bank: Path, strides: Sequence[int]) -> Path:
    return bank / FOLDER / "-".join(map(str, strides))


def sides_of(bank: Path) -> list[Path]:
    """Return the folders of the banks beside a bank, finished or begun, the finest first."""
    found = [path.parent for path in bank.glob(f"{FOLDER}/*/plan.json")]
    found += [path.parent for path in bank.glob(f"{FOLDER}/*/bank.json")]
    # what is called otherwise is not ours: a copy that somebody put aside
    named = {path for path in found if re.fullmatch(r"[0-9]+(-[0-9]+)*", path.name)}
    return sorted(named, key=lambda path: [*map(int, path.name.split("-"))])


def banks_of(bank: Path) -> list[Path]:
    """Return a bank and its sides: commands that maintain a bank do so with each."""
    return [bank, *sides_of(bank)]


def together(features: FeatureConfig, sides: Sequence[FeatureConfig]) -> FeatureConfig:
    """Return the features of a bank and its sides as those of one bank."""
    strides = sorted({*features.strides, *(s for side in sides for s in side.strides)})
    return replace(features, strides=tuple(strides))


def joined(manifest: Manifest, sides: Sequence[Manifest]) -> Manifest:
    """Return what a bank and its sides hold together. Its `shards` are the bank's own."""
    features = together(manifest.features, [side.features for side in sides])
    scales, facts = dict(manifest.calibration or {}), dict(manifest.codec.strides)
    for side in sides:
        scales |= side.calibration or {}
        facts |= side.codec.strides
    return replace(
        manifest,
        features=features,
        fingerprint=features.fingerprint,
        nbytes=manifest.nbytes + sum(side.nbytes for side in sides),
        codec=CodecFacts(manifest.codec.name, facts),
        calibration=scales or None,
    )
