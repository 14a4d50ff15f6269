"""Inputs -> clips -> units, before anything is decoded.

A unit is the work that makes one shard. Units are cut from the clips in order of key, by
predicted bytes, and only ever appended: clips added later make new units, old shards never move.
Clips in archives come after the others and in the order of their archive, which is as fixed as
that of keys and lets a .tar.gz be read from its start once.

A clip whose source has changed, or that failed and is tried again, is in a second unit. The last
unit that holds a clip is the one that counts: what earlier ones banked of it is served no more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shards.errors import UserError
from shards.format.features import FORMAT_VERSION, FeatureConfig, differences
from shards.format.fields import parse
from shards.format.samples import sample_key
from shards.format.version import refuse_other_version
from shards.signed import Json, read_signed_json, signed_json, write_atomic

READER = "pyav"
"""Reads every video, on every machine."""
TOWER_THREADS = 2
"""Of the CPU: the same on every machine, since sums may round otherwise; more work takes more
processes. Four on two cores took a third longer."""


@dataclass(frozen=True)
class ClipSource:
    """A clip to encode: a video file, a folder of pictures or a member of an archive, or a part."""

    id: str
    key: str
    path: str
    """Of the file, folder or archive, on this machine."""
    relative: str
    """Of the file or folder under the root it was found in, POSIX form; or in its archive."""
    start: float | None = None
    end: float | None = None
    picture_fps: str | None = None
    """Of a folder of pictures: how many are shown a second."""
    offset: int | None = None
    """Of a member of an archive: where its bytes lie in the uncompressed tar."""
    nbytes: int | None = None
    size: int | None = None
    """Bytes of the source when it was planned: the file, a folder's pictures, or a member."""
    mtime_ns: int | None = None
    """Of the file, of a folder's newest picture, or of the archive."""
    digest: str | None = None
    """As in the sample's json; None for a source that could not be read."""
    frames: int | None = None
    """How many are predicted to be banked: none of a source that cannot be opened."""
    height: int | None = None
    width: int | None = None
    """Of its frames as they are stored, in pixels; None where its header was not read."""

    @property
    def where(self) -> str:
        """The path, and the member of an archive, for messages."""
        return self.path if self.offset is None else f"{self.path}: {self.relative}"

    @property
    def archive(self) -> str:
        """The name of the archive, of a member of one."""
        return Path(self.path).name

    @property
    def place(self) -> tuple[str, str, int, str, float, str]:
        """What units are sorted by: the parts of a file lie together, in the order of their starts."""
        start = self.start or 0.0
        if self.offset is None:
            return "", "", 0, sample_key(self.relative), start, self.key
        return self.archive, self.path, self.offset, "", start, self.key

    def to_json(self) -> Json:
        return {name: value for name, value in self.__dict__.items() if value is not None}


@dataclass(frozen=True)
class TowerSettings:
    """How the tower is run. The bytes hang on it a little, so that reruns do as the first run did."""

    batch_frames: int = 16
    """Frames that pass through the tower together."""
    threads: int = TOWER_THREADS
    name: str = ""
    """Where the tower was found: a folder, or a name on the Hub."""
    device: str | None = None
    """What computes it, as far as the last bits hang on that: the same kind for every worker."""
    reason: str | None = None
    """Why the features' `tower_dtype` is what it is, where it was chosen and not asked for."""
    files: str | None = None
    """What its files are, by name, size and time: the same say the same without a look inside."""


@dataclass(frozen=True)
class Plan:
    """The features to make, and the units of clips to make them in."""

    features: FeatureConfig
    units: list[list[ClipSource]]
    tower: TowerSettings = TowerSettings()
    calibration: Mapping[str, list[float]] | None = None
    """int8: per stride, as text, the scale of each channel; None until it is measured."""
    quality: Mapping[str, Mapping[str, float]] | None = None
    """Per stride, as text, what the codec loses; None until it is measured."""
    pruned: frozenset[str] = frozenset()
    """Keys of clips that are not to be served any more."""
    decoder: str | None = None
    """Which reads every video, by the rule of when the bank was begun."""
    allow_truncated: bool | None = None
    """Whether what comes of truncated or damaged videos is banked, by every worker alike."""

    def to_json(self) -> Json:
        """Return what plan.json holds."""
        return {
            "format_version": FORMAT_VERSION,
            "features": self.features.to_json(),
            "calibration": self.calibration,
            "quality": self.quality,
            "tower": {k: v for k, v in asdict(self.tower).items() if v is not None},
            "decoder": self.decoder,
            "pruned": sorted(self.pruned),
            "units": [[clip.to_json() for clip in unit] for unit in self.units],
        } | ({"allow_truncated": True} if self.allow_truncated else {})

    @classmethod
    def from_json(cls, data: Json, bank: object) -> "Plan":
        """Return the plan that a bank's plan.json holds.

        Raises UserError for one of another format, or with a field that is unknown, missing or of
        another type.
        """
        refuse_other_version(data, bank, "plan.json")
        fields = {name: value for name, value in data.items() if name != "format_version"}
        return parse(cls, fields, f"{bank}/plan.json")

    @property
    def clips(self) -> list[ClipSource]:
        """Each clip once, as the last unit that holds it has it."""
        return list({clip.key: clip for unit in self.units for clip in unit}.values())

    @property
    def counts(self) -> dict[str, int]:
        """By key, the unit that counts for it: the last one that holds it."""
        return {clip.key: number for number, unit in enumerate(self.units) for clip in unit}

    def served(self) -> dict[str, int]:
        """By key, the unit whose shard serves it, if it banked it; pruned clips are left out."""
        return {key: unit for key, unit in self.counts.items() if key not in self.pruned}

    def work(self) -> list[list[ClipSource]]:
        """Return, of each unit, the clips that it is to bank."""
        served = self.served()
        return [
            [clip for clip in unit if served.get(clip.key) == number]
            for number, unit in enumerate(self.units)
        ]

    def extended(
        self, clips: Sequence[ClipSource], shard_bytes: int, clip_bytes: Callable[[ClipSource], int]
    ) -> "Plan":
        """Return the plan with these clips in units of their own at its end."""
        return replace(self, units=[*self.units, *cut_units(clips, shard_bytes, clip_bytes)])


def cut_units(
    clips: Sequence[ClipSource], shard_bytes: int, clip_bytes: Callable[[ClipSource], int]
) -> list[list[ClipSource]]:
    """Return units of clips in order of place, each of at most `shard_bytes` (one clip at least).

    clip_bytes: what the features of a clip are predicted to take.
    """
    units: list[list[ClipSource]] = []
    room = 0
    for clip in sorted(clips, key=lambda clip: clip.place):
        nbytes = clip_bytes(clip)
        if not units or nbytes > room:
            units.append([])
            room = shard_bytes
        units[-1].append(clip)
        room -= nbytes
    return units


def read_plan(bank: Path) -> Plan | None:
    """Return a bank's plan, None where there is none yet."""
    path = bank / "plan.json"
    if not path.exists():
        return None
    return Plan.from_json(read_signed_json(path), bank)


@dataclass(frozen=True)
class PlanAsRead:
    """A bank's plan, and which file it was read from: of 100,000 clips that takes seconds."""

    plan: Plan | None
    stamp: tuple[int, ...] | None


def plan_as_read(
    bank: Path, before: PlanAsRead | None = None, first: Plan | None = None
) -> PlanAsRead:
    """Return a bank's plan, read again only where its file is another than `before`.

    first: the plan where there is none yet.
    """
    try:
        stat = (bank / "plan.json").stat()
        stamp = stat.st_ino, stat.st_size, stat.st_mtime_ns
    except FileNotFoundError:
        stamp = None
    if before is not None and before.stamp == stamp:
        return before
    return PlanAsRead(read_plan(bank) or first, stamp)


def planned(bank: Path, missing: str = "no plan here") -> Plan:
    """Return a bank's plan; raises UserError where there is none, which is `missing` then."""
    plan = read_plan(bank)
    if plan is None:
        raise UserError(
            f"{missing} (plan.json is missing)",
            where=bank,
            fix=f"make one with `preprocess plan INPUT --out {bank} --tower NAME`, or a bank with "
            "`preprocess encode`",
        )
    return plan


def write_plan(bank: Path, plan: Plan) -> None:
    write_atomic(bank / "plan.json", signed_json(plan.to_json()))


def refuse_derived(
    bank: Path, features: FeatureConfig, first: str = "encode or retry in that bank"
) -> None:
    """Raise UserError for a bank that was derived: videos and tower would give it other values.

    first: what a person does before the same derivation, which brings the bank up to date.
    """
    if features.derived:
        raise UserError(
            "was derived from another bank, and holds what was stored there",
            where=bank,
            fix=f"{first}, then run the same `preprocess derive` again",
        )


def refuse_other_features(bank: Path, asked: FeatureConfig, banked: FeatureConfig) -> None:
    """Raise UserError naming each field in which a bank differs from what is asked of it."""
    if not asked.derived:
        refuse_derived(bank, banked)
    lines = differences(asked.to_json(), banked.to_json())
    if lines:
        nests = all(any(s % finer == 0 for finer in banked.strides) for s in asked.strides)
        strides = ",".join(map(str, asked.strides))
        raise UserError(
            f"{bank}: holds other features; write to another folder, or ask for the same. "
            f"Asked here, banked there: {'; '.join(lines)}",
            fix=f"`preprocess derive {bank} --stride {strides} --out NEW` needs no tower"
            if nests and [line.partition(":")[0] for line in lines] == ["strides"]
            else None,
        )
