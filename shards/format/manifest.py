"""`bank.json`, written last: its existence means that a bank is there."""

from collections.abc import Sequence
from pathlib import Path

from shards.errors import UserError
from shards.format.features import FORMAT_VERSION
from shards.signed import Json, parse_signed_json
from shards.storage import Files, open_files


def shard_entries(commits: Sequence[Json]) -> list[Json]:
    """Return what a manifest tells of the shards of some commit records."""
    return [
        {"name": commit["shard"], "nbytes": commit["nbytes"], "sha256": commit["sha256"]}
        for commit in commits
    ]


def read_manifest(place: str | Path) -> Json:
    """Read and check `bank.json`, whose existence means that a bank is there."""
    return _read_manifest(open_files(place))


def _read_manifest(files: Files) -> Json:
    path = files.where
    manifest = _read_signed(files, "bank.json")
    if manifest is None:
        if _read_signed(files, "plan.json") is not None:
            raise UserError(
                f"{path}: its run is not over (plan.json is there, bank.json is not); let "
                "`preprocess encode` finish, or open what is done with allow_partial=True"
            )
        raise UserError(
            f"{path}: no bank here (bank.json is missing); make one with "
            f"`preprocess encode INPUT --stride 4,8 --out {path} --tower NAME`"
        )
    return manifest


def _read_signed(files: Files, name: str) -> Json | None:
    try:
        data = files.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    record = parse_signed_json(data, f"{files.where}/{name}")
    version = record.get("format_version", FORMAT_VERSION)
    if version > FORMAT_VERSION:
        raise UserError(
            f"{files.where}: format {version}, this framebank reads up to {FORMAT_VERSION}; "
            "update framebank"
        )
    return record
