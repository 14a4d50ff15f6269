"""Strides that were encoded later lie beside a bank, in banks of their own.

    bank/bank.json ...             the bank, of strides 4 and 8: no file of it is touched
    bank/beside/2/bank.json ...    a whole bank of the same clips, of stride 2 alone
    bank/beside.json               which of those may be read with the bank; written last

A side is made by what makes any bank: plan, leases, commit records, a finish of its own. So it is
verified, repaired and told of as one, and a run of it that is cut off goes on where it was. Its features
are the bank's but for the strides, and its tower is run as the bank's was: what is read of both together
is what one run with all of the strides banks, and has that bank's fingerprint.

`beside.json` says of each side what it and the bank held (`state_of`) when every description of the
bank, but for the grids of cells, was found in the side, the same to the letter. A reader takes a side
only where both still are so. After clips were added, changed or lost in one of the two its strides are
missing, by name, until the other has followed: `preprocess encode INPUT --stride 2 --out BANK`.
"""

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
    """Return what tells whether a bank serves the same samples, of the same bytes, as it did."""
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
            str(error), fix=f"`preprocess repair {files.where}` writes it anew"
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
    return sorted(set(found), key=lambda path: [*map(int, path.name.split("-"))])


def parts_of(bank: Path) -> list[Path]:
    """Return a bank and the banks beside it: each is looked after as any bank."""
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
