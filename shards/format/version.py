"""Refuse banks of another format: this framebank reads `FORMAT_VERSION` only."""

from shards.errors import UserError
from shards.format.features import FORMAT_VERSION
from shards.signed import Json


class OtherVersion(UserError):
    """A bank of a format that this framebank does not read."""


def is_older(record: Json) -> bool:
    """Return whether a plan.json or bank.json is of a version that `preprocess repair` can migrate."""
    return record.get("format_version") in range(1, FORMAT_VERSION)


def refuse_other_version(record: Json, bank: object, name: str) -> None:
    """Raise OtherVersion unless a bank's plan.json or bank.json is of the current version."""
    version = record.get("format_version")
    if version == FORMAT_VERSION:
        return
    if is_older(record):
        raise OtherVersion(
            f"{bank}: format {version}, this framebank reads {FORMAT_VERSION}; run `preprocess repair "
            f"{bank}`: it rewrites the bank's metadata, keeps its features and encodes nothing"
        )
    # a newer format may mean other things by the same names: reading on would be a guess
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise OtherVersion(
            f"{bank}: format {version}, this framebank reads up to {FORMAT_VERSION}; update framebank"
        )
    raise OtherVersion(
        f"{bank}/{name}: format {version!r} is unknown; restore the file from a copy"
    )
