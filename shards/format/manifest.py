"""`bank.json`, written last: its existence means that a bank is there."""

import math
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from shards.errors import UserError
from shards.format.catalogue import Columns, checksums
from shards.format.commits import CommitRecord, SampleRecord
from shards.format.features import FORMAT_VERSION, FeatureConfig
from shards.format.fields import parse
from shards.format.plan import Plan
from shards.format.version import refuse_other_version
from shards.signed import Json, canonical_json, parse_signed_json
from shards.storage import Files, open_files


class NamedTower(Protocol):
    """What the manifest says of a tower beside the `FeatureConfig`."""

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class TowerFacts:
    """A tower that is not loaded."""

    name: str
    width: int
    """Channels of its features; 0 where no clip tells."""

    @classmethod
    def of(cls, plan: Plan, commits: Sequence[CommitRecord]) -> "TowerFacts":
        """Return what plan and commit records know of a bank's tower."""
        streams = (s for commit in commits for one in commit.samples for s in one.streams.values())
        first = next(streams, None)
        return cls(plan.tower.name, first.shape[-1] if first else 0)


def lying_at(name: str) -> str:
    """Return a tower's name so that it means the same in every folder: the whole path of one here."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class CodecFacts:
    """How the features are stored, and what that saves and loses."""

    name: str
    strides: Mapping[str, Mapping[str, float | None]]
    """Per stride, as text: ratio (of the plain bytes, None of no clip), and what the plan's `quality`
    says."""


@dataclass(frozen=True)
class Provenance:
    """Where the features come from; nothing here is hashed or compared."""

    tower: str
    """Where the tower was found: a folder, or a name on the Hub."""
    torch: str
    python: str
    machine: str
    underflowed: int
    """How many values the stored type rounded to zero."""
    encoded: list[Json]
    """What the shards' commit records say, each once."""


@dataclass(frozen=True)
class Manifest:
    """What a bank holds."""

    features: FeatureConfig
    fingerprint: str
    """Of the features."""
    tower_width: int
    clips: int
    frames: int
    nbytes: int
    """Of all shards."""
    shards: list[ShardEntry]
    """Column `shard` of the catalogue counts them."""
    catalogue: dict[str, int]
    """The crc32c of each column of `index.zarr`."""
    superseded: dict[str, list[str]]
    """By shard, the keys of the samples in it that are served no more."""
    codec: CodecFacts
    calibration: Mapping[str, list[float]] | None
    """int8: per stride, as text, the scale of each channel. Null otherwise, and never left out."""
    provenance: Provenance

    @classmethod
    def of(
        cls, plan: Plan, commits: Sequence[CommitRecord], columns: Columns, tower: NamedTower
    ) -> "Manifest":
        """Return the manifest of these finished shards. columns: their catalogue."""
        served = plan.served()
        banked: list[SampleRecord] = []
        superseded: dict[str, list[str]] = {}
        for commit in commits:
            for sample in commit.samples:
                if served.get(sample.key) == commit.unit:
                    banked.append(sample)
                else:
                    superseded.setdefault(commit.shard, []).append(sample.key)
        quality = plan.quality or {}
        ratios = compression(banked, plan.features.strides)
        return cls(
            features=plan.features,
            fingerprint=plan.features.fingerprint,
            tower_width=tower.width,
            clips=len(columns["shard"]),
            frames=len(columns["timestamps"]),
            nbytes=sum(commit.nbytes for commit in commits),
            shards=[
                ShardEntry(one.shard, one.nbytes, one.sha256) for one in commits if one.samples
            ],
            catalogue=checksums(columns),
            superseded=superseded,
            codec=CodecFacts(
                plan.features.codec,
                {
                    stride: {"ratio": ratio, **quality.get(stride, {})}
                    for stride, ratio in ratios.items()
                },
            ),
            calibration=plan.calibration,
            provenance=Provenance(
                tower=lying_at(tower.name),
                torch=installed("torch"),
                python=platform.python_version(),
                machine=platform.machine(),
                underflowed=sum(commit.underflowed or 0 for commit in commits),
                encoded=distinct([commit.provenance for commit in commits]),
            ),
        )

    @property
    def dead_samples(self) -> int:
        """How many samples are in the shards that the bank does not serve any more."""
        return sum(map(len, self.superseded.values()))

    def to_json(self) -> Json:
        """Return what bank.json holds."""
        features = {"features": self.features.to_json()}
        return {"format_version": FORMAT_VERSION} | asdict(self) | features

    @classmethod
    def from_json(cls, data: Json, bank: object) -> "Manifest":
        """Return the manifest that a bank's bank.json holds.

        Raises UserError for one of another format, or with a field that is unknown, missing or of
        another type.
        """
        refuse_other_version(data, bank, "bank.json")
        fields = {name: value for name, value in data.items() if name != "format_version"}
        return parse(cls, fields, f"{bank}/bank.json")


def compression(samples: Sequence[SampleRecord], strides: Sequence[int]) -> dict[str, float | None]:
    """Return stored bytes / bytes of the plain features per stride, as text; None of no samples."""
    stored: dict[int, int] = defaultdict(int)
    plain: dict[int, int] = defaultdict(int)
    for sample in samples:
        for stride, stream in sample.streams.items():
            stored[stride] += stream.nbytes + (stream.scale.nbytes if stream.scale else 0)
            plain[stride] += 2 * math.prod(stream.shape)
    return {
        str(stride): stored[stride] / plain[stride] if plain[stride] else None for stride in strides
    }


def distinct(records: Sequence[Json]) -> list[Json]:
    """Return the records that differ, in an order of their own."""
    unique = {canonical_json(record): record for record in records}
    return [unique[text] for text in sorted(unique)]


def installed(package: str) -> str:
    """Return an installed package's version; "none" where it is not, as beside a bare clone."""
    try:
        return version(package)
    except PackageNotFoundError:  # a reader needs NumPy alone
        return "none"


def read_manifest(place: str | Path | Files) -> Manifest:
    """Read and check a bank's `bank.json`; raises UserError where there is none."""
    files = open_files(place) if isinstance(place, str | Path) else place
    path = files.where
    manifest = read_small(files, "bank.json")
    if manifest is not None:
        return Manifest.from_json(manifest, path)
    plan = read_small(files, "plan.json")
    if plan is not None:
        refuse_other_version(plan, path, "plan.json")
        command = "derive" if plan.get("features", {}).get("derived") else "encode"
        raise UserError(
            f"{path}: its run is not over (plan.json is there, bank.json is not); let "
            f"`preprocess {command}` finish, or open what is done with allow_partial=True"
        )
    raise UserError(
        f"{path}: no bank here (bank.json is missing); make one with "
        f"`preprocess encode INPUT --stride 4,8 --out {path} --tower NAME`"
    )


def read_small(files: Files, name: str) -> Json | None:
    """Return what a signed json file of a bank holds, None where it is not there."""
    try:
        data = files.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_signed_json(data, f"{files.where}/{name}")
