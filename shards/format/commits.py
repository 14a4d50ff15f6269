"""A shard's files by name, and the commit records (`.done`) of those that are finished."""

from pathlib import Path

from shards.errors import UserError
from shards.format.plan import (
    Plan,
)
from shards.signed import Json, read_signed_json


def shard_name(unit: int) -> str:
    return f"bank-{unit:06d}.tar"


def part_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".part")


def journal_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".journal")


def index_path(shard: Path) -> Path:
    """uint64 little-endian: each sample's first header, then the end of the members."""
    return shard.with_name(shard.name + ".idx")


def done_path(shard: Path) -> Path:
    return shard.with_suffix(".done")


def refuse_missing_shards(bank: Path, plan: Plan) -> None:
    """Raise UserError naming each finished shard that is not there any more."""
    shards = [shard_path(bank, unit) for unit in range(len(plan.units)) if committed(bank, unit)]
    problems = [
        f"{shard}: was finished and is gone; restore it, or remove {done_path(shard)} and run again "
        "to encode its clips again"
        for shard in shards
        if not shard.is_file()
    ]
    if problems:
        raise UserError("\n".join(problems))


def read_commits(bank: Path, plan: Plan) -> list[Json]:
    """Return the commit records of the finished units, in the order of the plan."""
    return [
        read_signed_json(done_path(shard_path(bank, unit)))
        for unit in range(len(plan.units))
        if committed(bank, unit)
    ]


def shard_path(out: Path, unit: int) -> Path:
    return out / "shards" / shard_name(unit)


def committed(out: Path, unit: int) -> bool:
    return done_path(shard_path(out, unit)).exists()
