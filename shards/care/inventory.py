"""Read the small files of a bank, even if some of them are lost or damaged."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from shards.errors import UserError
from shards.format.commits import CommitRecord, attempt_files, done_path, shard_name
from shards.format.features import FeatureConfig
from shards.format.manifest import Manifest, ShardEntry
from shards.format.plan import ClipSource, Plan
from shards.format.version import OtherVersion
from shards.signed import Json, read_signed_json, signed_json

Remedy = Literal["rewrite", "encode", "restore"]
"""`rewrite`: from undamaged parts of the bank, without a tower. `encode`: from the video, with the
tower. `restore`: from a copy."""
Record = TypeVar("Record")


@dataclass(frozen=True)
class Damage:
    """One difference from what was written."""

    file: str
    """Path below the bank's folder."""
    what: str
    remedy: Remedy = "rewrite"
    key: str | None = None
    """Key of the sample; None for a file as a whole."""
    part: str | None = None
    """A sample's `json`, `stride4` or `stride4_scale`; a member; a column of the catalogue."""

    def __str__(self) -> str:
        return f"{': '.join(filter(None, [self.file, self.key, self.part]))}: {self.what}"


@dataclass
class Inventory:
    """A bank's manifest, plan and commit records, as far as they can be read."""

    bank: Path
    manifest: Manifest | None = None
    """None if it is lost or damaged."""
    plan: Plan | None = None
    commits: dict[str, CommitRecord | None] = field(default_factory=dict)
    """By name of shard; None if the commit record is lost or damaged."""
    damages: list[Damage] = field(default_factory=list)

    @property
    def listed(self) -> dict[str, ShardEntry]:
        """The manifest's entries, by name of shard."""
        return {entry.name: entry for entry in self.manifest.shards} if self.manifest else {}

    @property
    def planned(self) -> dict[str, list[ClipSource]]:
        """The plan's units, by name of shard."""
        units = self.plan.units if self.plan else []
        return {shard_name(number): unit for number, unit in enumerate(units)}

    @property
    def features(self) -> FeatureConfig | None:
        return next((book.features for book in (self.plan, self.manifest) if book), None)

    def sound_commits(self) -> list[CommitRecord]:
        return [commit for _, commit in sorted(self.commits.items()) if commit]


def read_inventory(bank: Path) -> Inventory:
    """Read the manifest, the plan and the commit records, and list which of them are damaged.

    Raises UserError if there is no bank, or one of another format.
    """
    found = Inventory(bank)
    refuse_no_bank(bank)
    # a manifest alone is no plan: which clips a unit was to have is said nowhere else
    if not (bank / "plan.json").exists():
        found.damages.append(Damage("plan.json", "is missing; restore it from a copy", "restore"))
    found.plan = _read(found, "plan.json", lambda data: Plan.from_json(data, bank), "restore")
    found.manifest = _read(found, "bank.json", lambda data: Manifest.from_json(data, bank))
    _read_commits(found)
    _check_presence_of_manifest(found)
    return found


def refuse_no_bank(bank: Path) -> None:
    """Raise UserError for a folder with neither bank.json nor plan.json."""
    if not (bank / "bank.json").exists() and not (bank / "plan.json").exists():
        raise UserError(
            f"{bank}: no bank here (neither bank.json nor plan.json); make one with `preprocess "
            f"encode INPUT --out {bank} --tower NAME`"
        )


def _read_commits(found: Inventory) -> None:
    bank = found.bank
    names = {path.name for path in (bank / "shards").glob("*.tar")}
    begun = {shard.name for _, shard, kind in attempt_files(bank / "shards") if kind == "journal"}
    done = {path.with_suffix(".tar").name for path in (bank / "shards").glob("*.done")}
    # from all three: a shard is missed if any of tar, commit record and manifest entry knows of it
    for name in sorted(names | done | set(found.listed)):
        path = bank / "shards" / name
        file = f"shards/{done_path(path).name}"
        if found.plan and name not in found.planned and name not in found.listed:
            continue  # a leftover
        if name in done:
            found.commits[name] = _read(found, file, partial(CommitRecord.from_json, where=file))
        # a shard that is begun has a journal and no record yet: no damage
        elif name in found.listed or name not in begun:
            found.commits[name] = None
            found.damages.append(Damage(file, "is missing"))


def _read(
    found: Inventory, name: str, parse: Callable[[Json], Record], remedy: Remedy = "rewrite"
) -> Record | None:
    """Return the record in a signed file; None, with the damage added, if it was changed."""
    path = found.bank / name
    if not path.exists():
        return None
    record, what = None, "does not match its own hash"
    try:
        record = read_signed_json(path)
    except UserError:
        pass
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    if (
        record is not None and signed_json(record) == path.read_bytes()
    ):  # bytes too: a flipped bit may turn 1e-3 into 1E-3
        try:
            return parse(record)
        # an older format is no damage: `repair` migrates it
        except OtherVersion:
            raise
        except UserError as error:
            what = error.what
    restore = "; restore it from a copy" if remedy == "restore" else ""
    found.damages.append(Damage(name, what + restore, remedy))
    return None


def _check_presence_of_manifest(found: Inventory) -> None:
    if (found.bank / "bank.json").exists():
        return
    # only a finished run is due to have a manifest
    over = found.plan is not None and set(found.planned) <= set(found.commits)
    if over or (found.bank / "index.zarr").exists():
        found.damages.append(Damage("bank.json", "is missing"))
