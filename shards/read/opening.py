"""What is read when a bank is opened: manifest, catalogue, the sizes of its shards."""

import json
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards.errors import UserError
from shards.format.catalogue import (
    CatalogueMismatch,
    Columns,
    build_columns,
    checksums,
    read_columns,
)
from shards.format.commits import done_path, shard_name
from shards.format.features import FORMAT_VERSION, FeatureConfig
from shards.format.manifest import _read_manifest, _read_signed, shard_entries
from shards.format.plan import served_units
from shards.signed import Json
from shards.storage import Files

TRIES = 5
PAUSE = 0.25
STATTERS = 8


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
                raise UserError(_diagnosis(files, manifest, error, written)) from None
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
    """Raise UserError naming the shards that are not there or are of another size."""
    with ThreadPoolExecutor(STATTERS) as pool:
        sizes = list(pool.map(files.size, (f"shards/{shard['name']}" for shard in shards)))
    problems = [
        f"{shard['name']} " + ("is missing" if got < 0 else f"has {got} of {shard['nbytes']} bytes")
        for shard, got in zip(shards, sizes, strict=True)
        if got != shard["nbytes"]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{files.where}/shards/{', '.join(problems[:3])}{more}: the bank was copied in part, or "
            f"a shard was changed; copy it again, or run `preprocess repair {files.where}`"
        )
