"""Verify a bank: list every difference from what was written, by file, clip and stream.

    for damage in verify(Path("bank"), deep=True):
        print(damage)

`deep` reads every byte. Otherwise only sizes, headers and json members are checked, which finds the
damage of a broken copy or another tool, but not a flipped bit among the features. A process that reads a
bank compares the checksum of a clip's stream by itself, the first time it reads from it (`Bank.read`).
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np

from shards.care.inventory import Damage, Inventory, read_inventory
from shards.care.tar_scan import ShardScan, Tar, fault_of_json, layout
from shards.errors import UserError, disk_errors
from shards.format.catalogue import (
    CatalogueMismatch,
    Columns,
    build_columns,
    read_columns,
    write_columns,
)
from shards.format.commits import CommitRecord, SampleRecord, done_path, end_of, index_path
from shards.format.manifest import Manifest
from shards.format.quarantine import read_quarantine
from shards.signed import file_sha256
from shards.storage import LocalFiles
from shards.write.shard import end_of_archive, index_bytes

THREADS = 4


def verify(
    bank: Path, deep: bool = False, seen: Callable[[int], object] = lambda nbytes: None
) -> list[Damage]:
    """Return all damages of a bank, finished or not.

    seen: called with the bytes of each shard when it is done. Raises UserError if there is no bank, or
    one of another format. Samples that are no longer served are checked, too.
    """
    inventory = read_inventory(bank)
    damages = list(inventory.damages)
    with ThreadPoolExecutor(THREADS) as pool:
        names = sorted(inventory.commits)
        # threads: hashing and reading release the lock
        for found in pool.map(lambda name: check_shard(inventory, name, deep, seen), names):
            damages += found
    # the catalogue is compared with the records only where these can be trusted
    sound = not any(
        damage.file.endswith((".tar", ".done")) or damage.file == "plan.json" for damage in damages
    )
    return damages + _check_quarantine(bank) + check_catalogue(inventory, sound)


# -- shards


def check_shard(
    inventory: Inventory, name: str, deep: bool, seen: Callable[[int], object] = lambda nbytes: None
) -> list[Damage]:
    """Return the damages of one shard, its index and its commit record."""
    path, commit = inventory.bank / "shards" / name, inventory.commits[name]
    file = f"shards/{name}"
    damages = _check_commit(inventory, name, commit) if commit else []
    if commit and not commit.samples:
        return damages + [Damage(file, "is of a unit without samples")] * path.exists()
    if not path.exists():
        keys = [sample.key for sample in commit.samples] if commit else []
        lost = [Damage(file, "is lost with its shard", "encode", key) for key in keys]
        return [*damages, Damage(file, "is missing", "encode"), *lost]
    try:
        if commit:
            damages += _check_samples(path, commit, deep)
            damages += _check_index(path, commit.samples)
        else:
            if not index_path(path).exists():
                damages.append(Damage(f"shards/{index_path(path).name}", "is missing"))
            # without a record the manifest's sha256 alone can tell, and that takes reading every byte
            if deep and not is_as_listed(inventory, name):
                what = "is not as bank.json has it, and its commit record is lost"
                damages.append(Damage(file, what, "encode"))
        seen(path.stat().st_size)
    except OSError as error:
        return [*damages, Damage(file, f"cannot be read: {error}", "encode")]
    return damages


def is_as_listed(inventory: Inventory, name: str) -> bool:
    """Return whether a shard has the sha256 in bank.json, which proves it without a commit record."""
    listed, path = inventory.listed.get(name), inventory.bank / "shards" / name
    return listed is not None and path.exists() and file_sha256(path) == listed.sha256


def _check_commit(inventory: Inventory, name: str, commit: CommitRecord) -> list[Damage]:
    """Compare a commit record with the plan and the manifest."""
    damages = []
    file = f"shards/{done_path(Path(name)).name}"
    if commit.shard != name:
        damages.append(Damage(file, f"is the commit record of {commit.shard}", "restore"))
    if inventory.features and commit.fingerprint != inventory.features.fingerprint:
        damages.append(Damage(file, "is of a bank of other features", "restore"))
    if name in inventory.planned:
        keys = {clip.key for clip in inventory.planned[name]}
        damages += [
            Damage(file, "is not in the plan's unit", "restore", sample.key)
            for sample in commit.samples
            if sample.key not in keys
        ]
    listed = inventory.listed.get(name)
    if listed and (listed.nbytes, listed.sha256) != (commit.nbytes, commit.sha256):
        damages.append(Damage("bank.json", f"lists another {name} than was committed", part=name))
    return damages


def _check_samples(path: Path, commit: CommitRecord, deep: bool) -> list[Damage]:
    with Tar(path) as tar:
        # One pass recognises an undamaged shard; only others are examined member by member.
        sound = _is_sound(tar, commit) if deep else _is_in_shape(tar, commit.samples)
        if sound and tar.nbytes == commit.nbytes:
            return []
        damages = examine(tar, commit.samples)
        return damages or [Damage(f"shards/{path.name}", "differs from its commit record")]


def _is_in_shape(tar: Tar, samples: Sequence[SampleRecord]) -> bool:
    """Return whether all headers are at their offsets, and every json describes its clip."""
    for sample in samples:
        for part, member in layout(sample).items():
            if tar.read(member.begin, len(member.header())) != member.header():
                return False
            data = tar.read(member.data, member.nbytes) if part == "json" else b""
            if part == "json" and fault_of_json(sample.key, data):
                return False
    return _is_tail_sound(tar, samples)


def _is_sound(tar: Tar, commit: CommitRecord) -> bool:
    """Return whether every byte matches the commit record's checksums."""
    sha256 = hashlib.sha256()
    for sample in commit.samples:
        blob = tar.read(sample.offset, sample.nbytes)
        sha256.update(blob)
        if google_crc32c.value(blob) != sample.crc32c:
            return False
    # the zeros at the end belong to the file's sha256 too
    end = end_of(commit.samples)
    sha256.update(tar.read(end, tar.nbytes - end))
    return sha256.hexdigest() == commit.sha256


def _is_tail_sound(tar: Tar, samples: Sequence[SampleRecord]) -> bool:
    end = end_of(samples)
    return tar.read(end, tar.nbytes - end) == end_of_archive(end)


def examine(tar: Tar, samples: Sequence[SampleRecord]) -> list[Damage]:
    """Return the damages of a damaged shard: by sample, then by member."""
    file, scan = f"shards/{tar.path.name}", ShardScan(tar)
    damages = []
    for sample in samples:
        state = scan.state(sample)
        if state.displaced:
            damages.append(Damage(file, state.faults[0][1], "encode", sample.key))
        else:
            damages += [Damage(file, what, "encode", sample.key, p) for p, what in state.faults]
    committed = {
        member.name: (sample.key, part)
        for sample in samples
        for part, member in layout(sample).items()
    }
    for name, count in scan.names.items():
        key, part = committed.get(name, (None, name))
        if key is None:
            damages.append(Damage(file, "is no member that was committed", part=name))
        elif count > 1:
            damages.append(Damage(file, f"is there {count} times", key=key, part=part))
    # only where nothing else is wrong: a lost sample moves the end, too
    if not damages and not _is_tail_sound(tar, samples):
        nbytes = max(tar.nbytes - end_of(samples), 0)
        what = f"ends with {nbytes} bytes that are not the zeros of an archive's end"
        damages.append(Damage(file, what))
    return damages


def _check_index(path: Path, samples: Sequence[SampleRecord]) -> list[Damage]:
    file = index_path(path)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return [Damage(f"shards/{file.name}", "is missing")]
    except OSError as error:
        return [Damage(f"shards/{file.name}", f"cannot be read: {error}")]
    if content != index_bytes(samples):
        return [Damage(f"shards/{file.name}", "is not the index of its shard")]
    return []


def _check_quarantine(bank: Path) -> list[Damage]:
    try:
        read_quarantine(bank)
    except UserError as error:  # every run would end with it
        return [Damage("quarantine.jsonl", f"{error.where}: {error.what}", "restore")]
    except OSError as error:
        return [Damage("quarantine.jsonl", f"cannot be read: {error.strerror}", "restore")]
    return []


# -- catalogue


def check_catalogue(inventory: Inventory, shards_are_sound: bool) -> list[Damage]:
    """Compare the catalogue with the manifest's checksums, and with columns built from the shards."""
    manifest, path = inventory.manifest, inventory.bank / "index.zarr"
    if manifest is None and not path.exists():
        return []
    damages: list[Damage] = []
    columns: Columns | None = None
    if manifest is not None:
        try:
            columns = read_columns(LocalFiles(inventory.bank), manifest.catalogue)
        except CatalogueMismatch as mismatch:
            return [Damage("index.zarr", what, part=name) for name, what in mismatch.wrong.items()]
        damages += _check_counts(manifest, columns)
    # from damaged shards other columns would be built, and undamaged ones reported
    if not shards_are_sound or not inventory.plan:
        return damages
    fresh = _fresh_columns(inventory)
    if columns is None or all(
        name in columns and np.array_equal(fresh[name], columns[name]) for name in fresh
    ):
        return damages + _check_files(path, fresh)
    wrong = [n for n in fresh if n not in columns or not np.array_equal(fresh[n], columns[n])]
    return damages + [Damage("index.zarr", "is not what the shards give", part=n) for n in wrong]


def _check_counts(manifest: Manifest, columns: Columns) -> list[Damage]:
    counts = {
        "clips": (manifest.clips, len(columns["shard"])),
        "frames": (manifest.frames, len(columns["timestamps"])),
    }
    return [
        Damage("bank.json", f"has {said} {name}, the catalogue {count}")
        for name, (said, count) in counts.items()
        if said != count
    ]


def _fresh_columns(inventory: Inventory) -> Columns:
    """Return columns built from the shards that the manifest lists, or from all finished ones.

    The plan may be newer than the manifest, so the served samples are those of the manifest.
    """
    commits, plan, manifest = inventory.sound_commits(), inventory.plan, inventory.manifest
    assert plan
    serving = plan.served()
    if manifest:
        commits = [commit for commit in commits if commit.shard in inventory.listed]
        serving = {
            key: commit.unit
            for commit in commits
            for key in commit.keys.difference(manifest.superseded.get(commit.shard, ()))
        }
    return build_columns(inventory.bank / "shards", commits, plan.features.strides, serving)


def _check_files(path: Path, columns: Columns) -> list[Damage]:
    """Compare the catalogue's files, byte for byte, with those written from these columns.

    Another version of zarr may write other metadata for the same columns: then all of the zarr.json
    files differ, and are not reported as long as they are json.
    """
    # written once more by the zarr that is installed here: whatever else is in the folder was changed
    with disk_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory() as folder:
        fresh_path = Path(folder) / "index.zarr"
        write_columns(fresh_path, columns)
        fresh, there = _contents(fresh_path), _contents(path)
    metadata = [name for name in fresh if name.endswith("zarr.json")]
    same_writer = any(fresh[name] == there.get(name) for name in metadata)
    return [
        Damage("index.zarr", "is not as it was written", part=name)
        for name in sorted(fresh.keys() | there.keys())
        if fresh.get(name) != there.get(name)
        and (name not in metadata or same_writer or not _is_json(there.get(name)))
    ]


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str((Path(at) / name).relative_to(folder)): (Path(at) / name).read_bytes()
        for at, _, names in os.walk(folder)
        for name in names
    }


def _is_json(data: bytes | None) -> bool:
    try:
        json.loads(data or b"")
    except ValueError:
        return False
    return True
