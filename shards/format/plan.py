"""Inputs -> clips -> units, before anything is decoded.

A unit is the work that makes one shard. Units are cut from the clips in order of key, by
predicted bytes, never by the number of workers: so the shards are the same for any number of them.
Units are only ever appended: clips added later are in new units, and old shards never change.
Clips in archives come after the others, in the order of their archive, which is as fixed as that of
keys and allows a .tar.gz to be read once from its start.

A clip whose source has changed, or that failed and is tried again, is put into a second unit. The
last unit of a clip is the one that is served; what earlier units banked of it is superseded.
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
"""The reader of videos in new banks, on every machine."""
TOWER_THREADS = 2
"""CPU threads of the tower. Fixed, because sums may round differently with another number, and the bytes
must be equal on every machine; use more processes for more speed. Four threads on two cores took a
third longer."""


@dataclass(frozen=True)
class ClipSource:
    """A clip to encode: a video file, a folder of pictures or a member of an archive, or a part."""

    id: str
    key: str
    path: str
    """Path of the file, folder or archive, on this machine."""
    relative: str
    """Path relative to the root it was found under, in POSIX form; or its name in the archive."""
    start: float | None = None
    end: float | None = None
    picture_fps: str | None = None
    """Frames per second of a folder of pictures; None for others."""
    offset: int | None = None
    """Of a member of an archive: offset of its data in the uncompressed tar, or of its zip header."""
    nbytes: int | None = None
    size: int | None = None
    """Bytes of the source when it was planned: the file, a folder's pictures, or a member."""
    mtime_ns: int | None = None
    """Modification time of the file, of a folder's newest picture, or of the archive."""
    digest: str | None = None
    """As in the sample's json; None for a source that could not be read."""
    frames: int | None = None
    """Predicted number of banked frames; 0 for a source that cannot be opened."""
    height: int | None = None
    width: int | None = None
    """Of its coded frames, in pixels; None if its header was not read."""

    @property
    def where(self) -> str:
        """The path, and the name of an archive's member, for messages."""
        return self.path if self.offset is None else f"{self.path}: {self.relative}"

    @property
    def archive(self) -> str:
        """The file name of the archive that a member is in."""
        return Path(self.path).name

    @property
    def place(self) -> tuple[str, str, int, str, float, str]:
        """Sort key of units: parts of a file are adjacent, in the order of their starts."""
        start = self.start or 0.0
        # empty texts sort before names of archives: files come first
        if self.offset is None:
            return "", "", 0, sample_key(self.relative), start, self.key
        return self.archive, self.path, self.offset, "", start, self.key

    def to_json(self) -> Json:
        return {name: value for name, value in self.__dict__.items() if value is not None}


def absolute_name(name: str) -> str:
    """Return a tower's name, a local folder as an absolute path: workers run in other directories."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


@dataclass(frozen=True)
class TowerSettings:
    """How the tower is run. The last bits may depend on it, so reruns use the first run's settings."""

    batch_frames: int = 16
    """Frames per forward pass, at most."""
    threads: int = TOWER_THREADS
    name: str = ""
    """Where the tower was found: the absolute path of a folder, or a name on the Hub."""
    device: str | None = None
    """Kind of device, as far as the last bits depend on it: the same for every worker."""
    reason: str | None = None
    """Why `tower_dtype` was chosen; None if the user chose it."""
    files: str | None = None
    """Names, sizes and times of its files: if they are unchanged, its digest need not be recomputed."""


@dataclass(frozen=True)
class Plan:
    """The features to make, and the units of clips to make them in."""

    features: FeatureConfig
    units: list[list[ClipSource]]
    tower: TowerSettings = TowerSettings()
    calibration: Mapping[str, list[float]] | None = None
    """int8: by stride, as text, the scale of each channel; None until it is measured."""
    quality: Mapping[str, Mapping[str, float]] | None = None
    """By stride, as text, the errors of the codec; None until they are measured."""
    pruned: frozenset[str] = frozenset()
    """Keys of clips that are no longer served."""
    decoder: str | None = None
    """The reader of every video, by the rule in force when the bank was begun."""
    allow_truncated: bool | None = None
    """Whether workers bank the readable part of truncated or damaged videos."""

    def to_json(self) -> Json:
        """Return the contents of plan.json."""
        return {
            "format_version": FORMAT_VERSION,
            "features": self.features.to_json(),
            "calibration": self.calibration,
            "quality": self.quality,
            "tower": {k: v for k, v in asdict(self.tower).items() if v is not None},
            "decoder": self.decoder,
            # sorted: a set's order differs from process to process, and the file is signed
            "pruned": sorted(self.pruned),
            "units": [[clip.to_json() for clip in unit] for unit in self.units],
        } | ({"allow_truncated": True} if self.allow_truncated else {})

    @classmethod
    def from_json(cls, data: Json, bank: object) -> "Plan":
        """Return the plan from the contents of a bank's plan.json.

        Raises UserError for one of another format, or with a field that is unknown, missing or of
        another type.
        """
        refuse_other_version(data, bank, "plan.json")
        fields = {name: value for name, value in data.items() if name != "format_version"}
        return parse(cls, fields, f"{bank}/plan.json")

    @property
    def clips(self) -> list[ClipSource]:
        """Each clip once, as in the last unit that contains it."""
        # a later unit's entry replaces an earlier one's in the dict
        return list({clip.key: clip for unit in self.units for clip in unit}.values())

    @property
    def counts(self) -> dict[str, int]:
        """By key, the last unit that contains the clip."""
        return {clip.key: number for number, unit in enumerate(self.units) for clip in unit}

    def served(self) -> dict[str, int]:
        """By key, the unit whose sample is served (if it was banked), without pruned clips."""
        return {key: unit for key, unit in self.counts.items() if key not in self.pruned}

    def work(self) -> list[list[ClipSource]]:
        """Return by unit the clips that it must bank."""
        served = self.served()
        return [
            [clip for clip in unit if served.get(clip.key) == number]
            for number, unit in enumerate(self.units)
        ]

    def extended(
        self, clips: Sequence[ClipSource], shard_bytes: int, clip_bytes: Callable[[ClipSource], int]
    ) -> "Plan":
        """Return the plan with these clips appended, in new units."""
        return replace(self, units=[*self.units, *cut_units(clips, shard_bytes, clip_bytes)])


# -- cutting units


def cut_units(
    clips: Sequence[ClipSource], shard_bytes: int, clip_bytes: Callable[[ClipSource], int]
) -> list[list[ClipSource]]:
    """Return units of clips in order of place, each of at most `shard_bytes` (one clip at least).

    clip_bytes: returns the predicted bytes of a clip's features.
    """
    # By order and predicted bytes alone, not by arrival: the same inputs give the same shards anywhere.
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


# -- plan.json


def read_plan(bank: Path) -> Plan | None:
    """Return a bank's plan; None if there is none yet."""
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
    bank: Path, before: PlanAsRead | None = None, empty: Plan | None = None
) -> PlanAsRead:
    """Return a bank's plan, read again only where its file is another than `before`.

    empty: the plan where there is none yet.
    """
    try:
        stat = (bank / "plan.json").stat()
        # the inode too: an atomic write gives a new file, even of equal size
        # within one tick of the clock
        stamp = stat.st_ino, stat.st_size, stat.st_mtime_ns
    except FileNotFoundError:
        stamp = None
    if before is not None and before.stamp == stamp:
        return before
    return PlanAsRead(read_plan(bank) or empty, stamp)


def planned(bank: Path, missing: str = "no plan here") -> Plan:
    """Return a bank's plan; raises UserError with the text `missing` if there is none."""
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


# -- refusals


def refuse_derived(
    bank: Path, features: FeatureConfig, first: str = "encode or retry in that bank"
) -> None:
    """Raise UserError for a derived bank: features encoded from videos would not match its own.

    first: what to do before deriving again, in the message.
    """
    if features.derived:
        raise UserError(
            "was derived from another bank, and holds what was stored there",
            where=bank,
            fix=f"{first}, then run the same `preprocess derive` again",
        )


def refuse_other_reader(bank: Path, plan: Plan) -> None:
    """Raise UserError for a bank whose videos another reader reads than this version's."""
    if plan.decoder not in (None, READER):
        raise UserError(
            f"{bank}: its videos are read by {plan.decoder}, which this version cannot; encode with the "
            "version that began the bank, or into another folder"
        )


def refuse_other_features(bank: Path, asked: FeatureConfig, banked: FeatureConfig) -> None:
    """Raise UserError naming each field in which a bank's features differ from those asked for."""
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
