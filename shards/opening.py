"""What is read when a bank is opened: manifest, catalogue, the sizes of its shards."""

import json
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards.catalogue import CatalogueMismatch, Columns, build_columns, checksums, read_columns
from shards.files import Files, open_files
from shards.schema import (
    FORMAT_VERSION,
    FeatureConfig,
    Json,
    served_units,
    shard_entries,
    shard_name,
)
from shards.writer import done_path, parse_signed_json

TRIES = 5
PAUSE = 0.25
STATTERS = 8


def read_manifest(place: str | Path) -> Json:
    """Read and check `bank.json`, whose existence means that a bank is there."""
    return _read_manifest(open_files(place))


def _read_manifest(files: Files) -> Json:
    path = files.where
    manifest = _read_signed(files, "bank.json")
    if manifest is None:
        if _read_signed(files, "plan.json") is not None:
            raise ValueError(
                f"{path}: its run is not over (plan.json is there, bank.json is not); let "
                "`preprocess encode` finish, or open what is done with allow_partial=True"
            )
        raise ValueError(
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
        raise ValueError(
            f"{files.where}: format {version}, this framebank reads up to {FORMAT_VERSION}; "
            "update framebank"
        )
    return record


def load(files: Files) -> tuple[Json, Columns]:
    """Return the manifest and the catalogue that belongs to it.

    A writer replaces the one a moment after the other, so both are read again where they disagree.
    """
    seen = []
    for left in reversed(range(TRIES)):
        manifest = _read_manifest(files)
        seen.append(manifest)
        try:
            return manifest, read_columns(files, manifest["catalogue"])
        except CatalogueMismatch as error:
            if not left:
                written = any(other != manifest for other in seen)
                raise ValueError(_diagnosis(files, manifest, error, written)) from None
            time.sleep(PAUSE)
    raise AssertionError


def _diagnosis(files: Files, manifest: Json, error: CatalogueMismatch, written: bool) -> str:
    """Return what most likely is wrong with a catalogue that its manifest does not describe."""
    writer = _writer(files)
    if writer or written:
        return (
            f"{files.where}: is being written{f' by {writer}' if writer else ''}, its catalogue and "
            "bank.json change; open it again when that is over"
        )
    rebuild = f"run `preprocess index {files.where} --rebuild`"
    gone = [name for name, what in error.wrong.items() if what != "has another checksum"]
    if error.rows is not None and (error.rows != manifest["clips"] or len(error.wrong) > 2):
        return (
            f"{files.where}: the catalogue lists {error.rows} clips, bank.json "
            f"{manifest['clips']}, and they do not belong together: a writer was stopped between "
            f"the two, or parts of two copies were mixed; {rebuild}, or copy the bank again"
        )
    if gone:
        return f"{error}: the bank was copied in part, or lost files; copy it again, or {rebuild}"
    return f"{error}: it was damaged or edited; {rebuild}"


def _writer(files: Files) -> str | None:
    """Return who writes the bank now, as its lock tells, None where nobody does."""
    try:
        lock = json.loads(files.read(".lock"))
        shown = f"`{lock['command']}` (process {lock['pid']} on {lock['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if lock["host"] == socket.gethostname():
        try:
            os.kill(int(lock["pid"]), 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
    return shown


def load_partial(files: Files) -> tuple[Json, Columns]:
    """Return a manifest and a catalogue of the shards that are finished now, from their records.

    Where the run is over they are those of the bank.
    """
    plan = _read_signed(files, "plan.json")
    if plan is None:
        return load(files)
    commits = []
    for unit in range(len(plan["units"])):
        commit = _read_signed(files, f"shards/{done_path(Path(shard_name(unit)))}")
        if commit is not None:
            commits.append(commit)
    finished = _read_signed(files, "bank.json")
    if finished and len(finished["shards"]) == len(commits):
        return load(files)
    features = FeatureConfig.from_json(plan["features"])
    serving = served_units(plan)
    columns = build_columns(f"{files.where}/shards", commits, features.strides, serving)
    manifest = {
        "format_version": FORMAT_VERSION,
        "features": plan["features"],
        "fingerprint": features.fingerprint,
        "clips": len(columns["shard"]),
        "frames": len(columns["timestamps"]),
        "nbytes": sum(commit["nbytes"] for commit in commits),
        "shards": shard_entries(commits),
        "catalogue": checksums(columns),
        "calibration": plan["calibration"],
        "provenance": {},
    }
    return manifest, columns


def refuse_missing_shards(files: Files, shards: Sequence[Json]) -> None:
    """Raise ValueError naming the shards that are not there or are of another size."""
    with ThreadPoolExecutor(STATTERS) as pool:
        sizes = list(pool.map(files.size, (f"shards/{shard['name']}" for shard in shards)))
    problems = [
        f"{shard['name']} " + ("is missing" if got < 0 else f"has {got} of {shard['nbytes']} bytes")
        for shard, got in zip(shards, sizes, strict=True)
        if got != shard["nbytes"]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{files.where}/shards/{', '.join(problems[:3])}{more}: the bank was copied in part, or "
            f"a shard was changed; copy it again, or run `preprocess repair {files.where}`"
        )


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
            raise ValueError(
                f"{files.where}/quarantine.jsonl:{number}: not an entry of a quarantine; remove the "
                "line, its clip is encoded again by `preprocess encode` into another bank"
            ) from None
    return list(entries.values())
