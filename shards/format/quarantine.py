"""`quarantine.jsonl`: the clips of a bank that could not be encoded, one json object a line.

A line: `id key path stage reason message attempts seconds`. Lines are appended as clips fail, by
several processes; the file is rewritten, whole or not at all, when clips leave it.
"""

import fcntl
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import UserError
from shards.signed import Json, write_atomic
from shards.storage import open_files


def read_quarantine(place: str | Path) -> list[Json]:
    """Return the last entry of each clip in a bank's `quarantine.jsonl`; none where it is not there.

    A last line cut off by a power loss is no entry.
    """
    files = open_files(place)
    try:
        lines = files.read("quarantine.jsonl").split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    entries = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            entries[entry["id"]] = entry
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                f"{files.where}/quarantine.jsonl:{number}: not an entry of a quarantine; remove the "
                "line, its clip is encoded again by `preprocess encode` into another bank"
            ) from None
    return list(entries.values())


def quarantine_path(bank: Path) -> Path:
    return bank / "quarantine.jsonl"


def read_entries(bank: Path) -> dict[str, Json]:
    """Return the last entry of each clip, by id."""
    return {entry["id"]: entry for entry in read_quarantine(bank)}


def append_entry(bank: Path, entry: Json) -> None:
    """Add a line and see it on the disk."""
    path = quarantine_path(bank)
    with _alone(bank):
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            _rewrite(bank, set())
        with open(path, "ab") as file:
            file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def settle(bank: Path, banked: Collection[str]) -> None:
    """Keep the last entry of each clip, and none of the clips whose keys are banked."""
    if quarantine_path(bank).exists():
        with _alone(bank):
            _rewrite(bank, set(banked))


def _rewrite(bank: Path, gone: set[str]) -> None:
    path = quarantine_path(bank)
    kept = [entry for entry in read_entries(bank).values() if entry.get("key") not in gone]
    data = b"".join(json.dumps(entry, sort_keys=True).encode() + b"\n" for entry in kept)
    if not kept:
        path.unlink()
    elif data != path.read_bytes():
        write_atomic(path, data)


@contextmanager
def _alone(bank: Path) -> Iterator[None]:
    """Wait until no other process changes the file; the folder is locked, for the file is replaced."""
    folder = os.open(bank, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
