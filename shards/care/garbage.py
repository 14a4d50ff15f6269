"""`preprocess gc`: what lies in a bank's folder and nothing refers to.

for piece in rubbish(Path("bank")):
    print(piece.path, piece.nbytes, piece.why)

Whatever `bank.json` lists or the plan may still need is never among it.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.care.inventory import Books, read_books
from shards.errors import UserError
from shards.format.commits import journal_path, part_path
from shards.signed import Json
from shards.write.lock import BankLock

TEMPORARY = ("*.tmp", "index.zarr.old", "shards/*.tmp", "shards/.repair")
SHARD = re.compile(r"(.+\.tar)(\.idx|\.part|\.journal)?|(.+)\.done")


@dataclass(frozen=True)
class Rubbish:
    """A file or a folder that nothing refers to."""

    path: Path
    nbytes: int
    why: str


def collect(bank: Path) -> list[Rubbish]:
    """Remove the rubbish of a bank that nobody writes to; return what it was."""
    with BankLock(bank, "preprocess gc"):
        found = rubbish(bank)
        for piece in found:
            if piece.path.is_dir():
                shutil.rmtree(piece.path)
            else:
                piece.path.unlink()
        return found


def rubbish(bank: Path) -> list[Rubbish]:
    """Return what a bank's folder holds that nothing refers to. Changes nothing.

    Raises UserError where plan.json or bank.json cannot tell what is needed.
    """
    books = read_books(bank)
    lost = [damage for damage in books.damages if damage.file in ("plan.json", "bank.json")]
    if lost:
        raise UserError(
            f"{bank}: {lost[0]}: what is needed cannot be told; `preprocess repair {bank}` first"
        )
    found = [Rubbish(path, disk_size(path), why) for path, why in _leftovers(books)]
    return sorted(found, key=lambda piece: piece.path)


def _leftovers(books: Books) -> Iterator[tuple[Path, str]]:
    bank = books.bank
    for pattern in TEMPORARY:
        for path in bank.glob(pattern):
            yield path, "left by a write that was cut off"
    needed = {*books.planned, *books.listed}
    for path in bank.glob("shards/*"):
        match = SHARD.fullmatch(path.name)
        if not match or path.name.endswith(".tmp"):
            continue
        shard = bank / "shards" / (match[1] or f"{match[3]}.tar")
        if shard.name not in needed:
            yield path, "of no unit of the plan"
        elif path in (part_path(shard), journal_path(shard)) and _is_finished(books, shard):
            yield path, "of a shard that is finished"


def _is_finished(books: Books, shard: Path) -> bool:
    return books.commits.get(shard.name) is not None and shard.exists()


def dead_samples(books: Books) -> dict[str, list[Json]]:
    """Return, by name of shard, the records of samples that are served no more."""
    if not books.plan:
        return {}
    served = books.served()
    dead = {
        commit["shard"]: [s for s in commit["samples"] if served.get(s["key"]) != commit["unit"]]
        for commit in books.sound_commits()
    }
    return {name: samples for name, samples in dead.items() if samples}


def dead_shards(books: Books) -> list[str]:
    """Return the shards of which no sample is served. They stay: `bank.json` lists them."""
    whole = {commit["shard"]: len(commit["samples"]) for commit in books.sound_commits()}
    return [name for name, dead in dead_samples(books).items() if len(dead) == whole[name]]


def disk_size(path: Path) -> int:
    """Return the bytes of a file, or of the files below a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(
        (Path(folder) / name).stat().st_size for folder, _, names in os.walk(path) for name in names
    )
