"""`bank.json`, the manifest, which `shards.write.finish` writes.

It is written last: a folder is a complete bank only if it exists.
"""

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
from shards.format.plan import Plan, absolute_name
from shards.format.version import refuse_other_version
from shards.signed import Json, canonical_json, parse_signed_json
from shards.storage import Files, open_files


class NamedTower(Protocol):
    """The facts on a tower that the manifest has and `FeatureConfig` has not."""

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class TowerFacts:
    """A tower that is not loaded."""

    name: str
    width: int
    """Channels of its features; 0 if no clip is banked."""

    @classmethod
    def of(cls, plan: Plan, commits: Sequence[CommitRecord]) -> "TowerFacts":
        """Return the facts on a bank's tower in its plan and commit records."""
        # the first stream of any sample: all have one width
        streams = (s for commit in commits for one in commit.samples for s in one.streams.values())
        first = next(streams, None)
        return cls(plan.tower.name, first.shape[-1] if first else 0)


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class CodecFacts:
    """How the features are stored, with compression ratio and errors."""

    name: str
    strides: Mapping[str, Mapping[str, float | None]]
    """By stride, as text: `ratio` (stored / plain bytes; None without clips), the plan's `quality`."""


@dataclass(frozen=True)
class Provenance:
    """How the features were made; nothing here is hashed or compared."""

    tower: str
    """Where the tower was found: a folder, or a name on the Hub."""
    torch: str
    python: str
    machine: str
    underflowed: int
    """Values that the stored type rounded to zero."""
    encoded: list[Json]
    """The distinct provenances of the shards' commit records."""


@dataclass(frozen=True)
class Manifest:
    """The contents of bank.json."""

    features: FeatureConfig
    fingerprint: str
    """Fingerprint of the features."""
    tower_width: int
    clips: int
    frames: int
    nbytes: int
    """Bytes of all shards."""
    shards: list[ShardEntry]
    """Column `shard` of the catalogue is an index into these."""
    catalogue: dict[str, int]
    """The crc32c of each column of `index.zarr`."""
    superseded: dict[str, list[str]]
    """By shard, the keys of samples in it that are no longer served."""
    codec: CodecFacts
    calibration: Mapping[str, list[float]] | None
    """int8: by stride, as text, the scale of each channel. Otherwise null, but never left out."""
    provenance: Provenance
    empty: list[str] | None = None
    """The finished shards without a sample, which have no tar: no clip of their units could be encoded.
    None if there are none."""

    @classmethod
    def of(
        cls, plan: Plan, commits: Sequence[CommitRecord], columns: Columns, tower: NamedTower
    ) -> "Manifest":
        """Return the manifest of these finished shards. columns: their catalogue."""
        banked, superseded = split_served(plan, commits)
        quality = plan.quality or {}
        ratios = compression(banked, plan.features.strides)
        return cls(
            features=plan.features,
            fingerprint=plan.features.fingerprint,
            tower_width=tower.width,
            clips=len(columns["shard"]),
            frames=len(columns["timestamps"]),
            nbytes=sum(commit.nbytes for commit in commits),
            shards=entries_of(commits),
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
                tower=absolute_name(tower.name),
                torch=installed("torch"),
                python=platform.python_version(),
                machine=platform.machine(),
                underflowed=sum(commit.underflowed or 0 for commit in commits),
                encoded=distinct([commit.provenance for commit in commits]),
            ),
            empty=[commit.shard for commit in commits if not commit.samples] or None,
        )

    def is_of(self, plan: Plan, commits: Sequence[CommitRecord]) -> bool:
        """Return whether the manifest is that of these finished shards, as served by a plan."""
        banked, superseded = split_served(plan, commits)
        # all that a finish could change; provenance may differ without any effect
        ours = self.features, self.calibration, self.clips, self.superseded, self.shards
        now = plan.features, plan.calibration, len(banked), superseded, entries_of(commits)
        return ours == now

    @property
    def dead_samples(self) -> int:
        """Number of samples in the shards that the bank no longer serves."""
        return sum(map(len, self.superseded.values()))

    def to_json(self) -> Json:
        """Return the contents of bank.json."""
        # `features` by its own rule, which leaves out unset fields: its digest is the fingerprint
        fields = asdict(self) | {"features": self.features.to_json()}
        if not self.empty:
            del fields["empty"]
        return {"format_version": FORMAT_VERSION} | fields

    @classmethod
    def from_json(cls, data: Json, bank: object) -> "Manifest":
        """Return the manifest from the contents of a bank's bank.json.

        Raises UserError for one of another format, or with a field that is unknown, missing or of
        another type.
        """
        refuse_other_version(data, bank, "bank.json")
        fields = {name: value for name, value in data.items() if name != "format_version"}
        return parse(cls, fields, f"{bank}/bank.json")


# -- parts of a manifest


def entries_of(commits: Sequence[CommitRecord]) -> list[ShardEntry]:
    """Return the entries of the shards; a unit without samples has none."""
    return [ShardEntry(one.shard, one.nbytes, one.sha256) for one in commits if one.samples]


def split_served(
    plan: Plan, commits: Sequence[CommitRecord]
) -> tuple[list[SampleRecord], dict[str, list[str]]]:
    """Return the samples that a plan serves; and by shard, the keys of the others."""
    served = plan.served()
    banked: list[SampleRecord] = []
    superseded: dict[str, list[str]] = {}
    for commit in commits:
        for sample in commit.samples:
            if served.get(sample.key) == commit.unit:
                banked.append(sample)
            else:
                superseded.setdefault(commit.shard, []).append(sample.key)
    return banked, superseded


def compression(samples: Sequence[SampleRecord], strides: Sequence[int]) -> dict[str, float | None]:
    """Return stored bytes / plain bytes by stride, as text; None without samples."""
    stored: dict[int, int] = defaultdict(int)
    plain: dict[int, int] = defaultdict(int)
    for sample in samples:
        for stride, stream in sample.streams.items():
            stored[stride] += stream.nbytes + (stream.scale.nbytes if stream.scale else 0)
            # 2 bytes a value: float16, and bfloat16 too
            plain[stride] += 2 * math.prod(stream.shape)
    return {
        str(stride): stored[stride] / plain[stride] if plain[stride] else None for stride in strides
    }


def distinct(records: Sequence[Json]) -> list[Json]:
    """Return the records without duplicates, in the order of their canonical json."""
    unique = {canonical_json(record): record for record in records}
    return [unique[text] for text in sorted(unique)]


def installed(package: str) -> str:
    """Return an installed package's version; "none" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:  # reading a bank needs only NumPy
        return "none"


# -- reading


def refuse_listed(shard: Path) -> None:
    """Raise UserError for a shard that bank.json lists, where its commit record is missing.

    For whoever would make it again, in its place: its video may not be there any more.
    """
    bank = shard.parents[1]
    try:
        listed = {entry.name: entry.nbytes for entry in read_manifest(bank).shards}
    except UserError:  # of a run that is not finished, or damaged
        return
    if listed.get(shard.name) == shard.stat().st_size:
        raise UserError(
            "was finished, and its commit record (.done) is missing; it is not made again",
            where=shard,
            fix=f"`preprocess repair {bank}` writes the record from the shard; to encode its clips "
            "again remove the shard",
        )


def read_manifest(place: str | Path | Files) -> Manifest:
    """Return a bank's manifest, checked; raises UserError if there is no bank.json."""
    files = open_files(place) if isinstance(place, str | Path) else place
    path = files.where
    manifest = read_small(files, "bank.json")
    if manifest is not None:
        return Manifest.from_json(manifest, path)
    plan = read_small(files, "plan.json")
    # a plan without a manifest is a run that was stopped, and not a broken bank
    if plan is not None:
        refuse_other_version(plan, path, "plan.json")
        made = f"run `preprocess encode` again, or `preprocess work {path}` and `finish {path}`"
        if plan.get("features", {}).get("derived"):
            made = "run `preprocess derive` again"
        raise UserError(
            "its run is not finished (it has plan.json and no bank.json)",
            where=path,
            fix=f"{made}; from Python, Bank.open(..., allow_partial=True) reads what is done",
        )
    raise UserError(
        f"{path}: no bank here (bank.json is missing); make one with "
        f"`preprocess encode INPUT --stride 4,8 --out {path} --tower NAME`"
    )


def read_small(files: Files, name: str) -> Json | None:
    """Return the record in a signed json file of a bank; None if there is no such file."""
    try:
        data = files.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_signed_json(data, f"{files.where}/{name}")
