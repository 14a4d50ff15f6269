"""`preprocess gc`: find and remove files in a bank's folder that nothing refers to.

for piece in leftovers(read_inventory(Path("bank"))):
    print(piece.path, piece.nbytes, piece.why)

Files that `bank.json` lists or the plan may still need are never leftovers. `status` and `verify` count
the same leftovers.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.care.inventory import Inventory, read_inventory
from shards.care.revise import is_being_moved
from shards.errors import UserError, disk_errors
from shards.format.commits import ATTEMPT_FILE, SampleRecord
from shards.text import some
from shards.write.lease import holders
from shards.write.lock import folder_lock

TEMPORARY = ("*.tmp", "index.zarr.old", "shards/*.tmp", "shards/.repair")
SHARD = re.compile(r"(.+\.tar)(?:\.idx)?|(.+)\.done")


@dataclass(frozen=True)
class Leftover:
    """A file or a folder that nothing refers to."""

    path: Path
    nbytes: int
    why: str


def collect(bank: Path) -> list[Leftover]:
    """Remove the leftovers of a bank and return them; raises UserError if it is being written."""
    # Workers hold leases and not this lock, so both are checked.
    with disk_errors(bank), folder_lock(bank, "preprocess gc"):
        if workers := holders(bank):
            raise UserError(
                f"{some(list(workers.values()))} may be at work here",
                where=bank,
                fix=f"wait for its end; if it has died elsewhere, run `preprocess work {bank}`",
            )
        found = leftovers(read_inventory(bank))
        for piece in found:
            if piece.path.is_dir():
                shutil.rmtree(piece.path)
            else:
                # a worker that has just made a unit removes its own
                piece.path.unlink(missing_ok=True)
        return found


def leftovers(inventory: Inventory) -> list[Leftover]:
    """Return the files and folders of a bank that nothing refers to. Changes nothing.

    Raises UserError if plan.json or bank.json is damaged, since they list what is needed.
    """
    lost = [damage for damage in inventory.damages if damage.file in ("plan.json", "bank.json")]
    if lost:
        can_repair = all(damage.remedy == "rewrite" for damage in lost)
        raise UserError(
            f"{lost[0]}; without it the needed files are not known",
            where=inventory.bank,
            fix=f"run `preprocess repair {inventory.bank}` first" if can_repair else None,
        )
    found = [Leftover(path, disk_size(path), why) for path, why in _unreferenced(inventory)]
    return sorted(found, key=lambda piece: piece.path)


def _unreferenced(inventory: Inventory) -> Iterator[tuple[Path, str]]:
    bank = inventory.bank
    # both: a plan may be newer than the manifest, and a manifest may be all that is left
    needed = {*inventory.planned, *inventory.listed}
    for pattern in TEMPORARY:
        for path in bank.glob(pattern):
            if is_being_moved(path):
                continue  # half of a shard: `repair` completes it
            begun = ATTEMPT_FILE.fullmatch(path.name)
            if begun and begun[1] in needed and inventory.commits.get(begun[1]) is None:
                continue  # of an unfinished unit: a worker may have taken it since `holders` looked
            yield path, "left by a write that was cut off"
    for path in bank.glob("shards/*"):
        attempt = ATTEMPT_FILE.fullmatch(path.name)
        match = attempt or SHARD.fullmatch(path.name)
        # temporary files were found above; what has no name of ours is not ours to remove
        if path.name.endswith(".tmp") or not match:
            continue
        shard = bank / "shards" / (match[1] or f"{match[2]}.tar")
        if shard.name not in needed:
            yield path, "of no unit of the plan"
        # attempts of an unfinished unit stay: they are what the next run continues from
        elif attempt and inventory.commits.get(shard.name) is not None:
            yield path, "of a shard that is finished"


def dead_samples(inventory: Inventory) -> dict[str, list[SampleRecord]]:
    """Return, by name of shard, the samples that are no longer served."""
    if not inventory.plan:
        return {}
    served = inventory.plan.served()
    dead = {
        commit.shard: [one for one in commit.samples if served.get(one.key) != commit.unit]
        for commit in inventory.sound_commits()
    }
    return {name: samples for name, samples in dead.items() if samples}


def dead_shards(inventory: Inventory) -> list[str]:
    """Return the shards of which no sample is served. They are kept: `bank.json` lists them."""
    whole = {commit.shard: len(commit.samples) for commit in inventory.sound_commits()}
    return [name for name, dead in dead_samples(inventory).items() if len(dead) == whole[name]]


def disk_size(path: Path) -> int:
    """Return the bytes of a file, or of the files below a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(
        (Path(folder) / name).stat().st_size for folder, _, names in os.walk(path) for name in names
    )
