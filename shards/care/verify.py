"""Is a bank what it was when it was written? Every damage by file, clip and stream.

    for damage in verify(Path("bank"), deep=True):
        print(damage)

`deep` reads every byte; otherwise sizes, headers and descriptions are looked at, which finds
whatever a broken copy or another tool does, and no flipped bit among the features.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np

from shards.care.inventory import Books, Damage, Remedy, read_books
from shards.care.tar_scan import Sight, Tally, Tar, fault_of_json, layout, records
from shards.errors import UserError
from shards.format.catalogue import (
    CatalogueMismatch,
    Columns,
    build_columns,
    read_columns,
    write_columns,
)
from shards.format.commits import done_path, index_path
from shards.format.features import FeatureConfig
from shards.format.quarantine import read_quarantine
from shards.signed import Json, file_facts
from shards.storage import LocalFiles
from shards.write.shard import end_of_archive, index_bytes


def refuse_damaged_shards(shards_dir: Path, commits: Sequence[Json]) -> None:
    """Raise UserError naming each shard that is not, byte for byte, what its commit record says."""
    problems = []
    for commit in commits:
        path = shards_dir / commit["shard"]
        if not path.is_file():
            problems.append(f"{path}: is gone; restore it, or run `preprocess repair`")
        elif file_facts(path)["sha256"] != commit["sha256"]:
            problems.append(
                f"{path}: is damaged, its sha256 is not that of its commit record; run "
                "`preprocess repair`"
            )
    if problems:
        raise UserError("\n".join(problems))


THREADS = 4


def verify(
    bank: Path, deep: bool = False, seen: Callable[[int], object] = lambda nbytes: None
) -> list[Damage]:
    """Return all that is wrong with a bank, finished or not.

    seen: told of the bytes of each shard as they are done. Raises UserError where there is no bank
    or one of a newer format. Samples that are served no more count as others do.
    """
    books = read_books(bank)
    damages = list(books.damages)
    with ThreadPoolExecutor(THREADS) as pool:
        checks = pool.map(lambda name: check_shard(books, name, deep, seen), sorted(books.commits))
        for found in checks:
            damages += found
    sound = not any(
        damage.file.endswith((".tar", ".done")) or damage.file == "plan.json" for damage in damages
    )
    return damages + check_catalogue(books, sound)


def check_shard(
    books: Books, name: str, deep: bool, seen: Callable[[int], object] = lambda nbytes: None
) -> list[Damage]:
    """Return what is wrong with one shard, its index and what its commit record says."""
    path, commit = books.bank / "shards" / name, books.commits[name]
    damages = _check_commit(books, name, commit) if commit else []
    if not path.exists():
        keys = [s["key"] for s in commit["samples"]] if commit else []
        keys = keys or sorted(expected_keys(books, name))
        lost = [Damage(f"shards/{name}", "is lost with its shard", "encode", key) for key in keys]
        return [*damages, Damage(f"shards/{name}", "is missing", "encode"), *lost]
    try:
        with Tar(path) as tar:
            if commit:
                samples = commit["samples"]
                looks_sound = _is_sound(tar, commit) if deep else _is_in_shape(tar, samples)
                if tar.nbytes != commit["nbytes"] or not looks_sound:
                    found = examine(tar, samples)
                    what = "differs from its commit record"
                    damages += found or [Damage(f"shards/{name}", what)]
            else:
                found, samples = _check_without_commit(books, tar, deep)
                damages += found
            seen(tar.nbytes)
    except OSError as error:
        return [*damages, Damage(f"shards/{name}", f"cannot be read: {error}", "encode")]
    damages += _check_index(path, samples)
    return damages


def _check_commit(books: Books, name: str, commit: Json) -> list[Damage]:
    """Compare a commit record with the plan and the manifest."""
    damages = []
    file = f"shards/{done_path(Path(name)).name}"
    if commit["shard"] != name:
        damages.append(Damage(file, f"is the commit record of {commit['shard']}", "restore"))
    features = books.features
    if features and commit["fingerprint"] != FeatureConfig.from_json(features).fingerprint:
        damages.append(Damage(file, "is of a bank of other features", "restore"))
    if name in books.planned:
        keys = {clip["key"] for clip in books.planned[name]}
        damages += [
            Damage(file, "is not in the plan's unit", "restore", sample["key"])
            for sample in commit["samples"]
            if sample["key"] not in keys
        ]
    listed = books.listed.get(name)
    if listed and any(listed[fact] != commit[fact] for fact in ("nbytes", "sha256")):
        damages.append(Damage("bank.json", f"lists another {name} than was committed", part=name))
    return damages


def _is_in_shape(tar: Tar, samples: Sequence[Json]) -> bool:
    """Whether all headers stand in their places, and every json describes its clip."""
    for sample in samples:
        for part, member in layout(sample).items():
            if tar.read(member.begin, len(member.header())) != member.header():
                return False
            data = tar.read(member.data, member.nbytes) if part == "json" else b""
            if part == "json" and fault_of_json(sample["key"], data):
                return False
    end = _end(samples)
    return tar.read(end, tar.nbytes - end) == end_of_archive(end)


def _is_sound(tar: Tar, commit: Json) -> bool:
    """Whether every byte is as the commit record has it."""
    sha256 = hashlib.sha256()
    for sample in commit["samples"]:
        blob = tar.read(sample["offset"], sample["nbytes"])
        sha256.update(blob)
        if google_crc32c.value(blob) != sample["crc32c"]:
            return False
    end = _end(commit["samples"])
    sha256.update(tar.read(end, tar.nbytes - end))
    return sha256.hexdigest() == commit["sha256"]


def examine(tar: Tar, samples: Sequence[Json]) -> list[Damage]:
    """Return what is wrong with a shard of which something is, sample by sample."""
    file = f"shards/{tar.path.name}"
    tally = Tally(tar)
    damages = []
    for sample in samples:
        damages += damages_of(file, sample["key"], tally.look(sample))
    parts = {
        member.name: (sample["key"], part)
        for sample in samples
        for part, member in layout(sample).items()
    }
    for name, count in Counter(member.name for member in tally.members).items():
        key, part = parts.get(name, (None, name))
        if key is None:
            damages.append(Damage(file, "is no member that was committed", part=name))
        elif count > 1:
            damages.append(Damage(file, f"is there {count} times", key=key, part=part))
    named = {damage.key for damage in damages}
    damages += _out_of_order(file, tally, [s["key"] for s in samples if s["key"] not in named])
    end = max((member.end for member in tally.members), default=0)
    tail = tar.read(end, tar.nbytes - end)
    if not damages and tail != end_of_archive(end):
        what = f"ends with {len(tail)} bytes that are not the zeros of an archive's end"
        damages.append(Damage(file, what))
    return damages


def damages_of(file: str, key: str, sight: Sight) -> list[Damage]:
    """Return the damages of one sample; one alone, of the whole of it, if nothing is left."""
    remedy: Remedy = "encode" if sight.blob is None else "rewrite"
    if sight.lost:
        return [Damage(file, sight.faults[0][1], remedy, key)]
    return [Damage(file, what, remedy, key, part) for part, what in sight.faults]


def _out_of_order(file: str, tally: Tally, keys: Sequence[str]) -> list[Damage]:
    """Return those of some whole samples that stand where another should."""
    there = sorted(keys, key=lambda key: tally.by_name[f"{key}.json"][0].begin)
    return [
        Damage(file, "stands in the wrong place in its shard", key=key)
        for key, other in zip(there, keys, strict=True)
        if key != other
    ]


def _check_without_commit(books: Books, tar: Tar, deep: bool) -> tuple[list[Damage], list[Json]]:
    """Check a shard whose commit record is lost; return what is wrong, and its samples' records."""
    samples = records(tar)
    name = tar.path.name
    if not deep:
        return [], samples
    listed = books.listed.get(name)
    if listed and file_sha256(tar) == listed["sha256"]:
        return [], samples
    file = f"shards/{name}"
    proven = proven_samples(books, name, tar, samples)
    keys = sorted(expected_keys(books, name) | {sample["key"] for sample in samples})
    damages = [
        Damage(file, "is not proven by the catalogue, and its commit record is lost", "encode", key)
        for key in keys
        if key not in proven
    ]
    if not damages:
        damages = [Damage(file, "is not as bank.json has it, and its commit record is lost")]
    return damages, samples


def expected_keys(books: Books, name: str) -> set[str]:
    """Return the clips that a shard should hold whose commit record is lost."""
    if name in books.listed and (known := _catalogued(books, name)):
        return {*known, *books.listed_dead(name)}
    failed = {entry.key for entry in read_quarantine(books.bank)}
    return {clip["key"] for clip in books.planned.get(name, ())} - failed


def proven_samples(books: Books, name: str, tar: Tar, samples: Iterable[Json]) -> dict[str, Json]:
    """Return, of records read off a tar, those that the catalogue bears out, by key."""
    known = _catalogued(books, name)
    proven = {}
    for sample in samples:
        sums = _sums(sample)
        data = tar.read(*sample["json"])
        if known.get(sample["key"]) == sums and not fault_of_json(sample["key"], data):
            proven[sample["key"]] = sample
    return proven


def _sums(sample: Json) -> dict[str, int]:
    """Return the checksums of a sample's streams and scales, by the names of their columns."""
    sums = {}
    for stride, entry in sample["streams"].items():
        sums[f"stride{stride}_crc32c"] = entry["crc32c"]
        if "scale" in entry:
            sums[f"stride{stride}_scale_crc32c"] = entry["scale"]["crc32c"]
    return sums


def _catalogued(books: Books, name: str) -> dict[str, dict[str, int]]:
    """Return, by key, the checksums that the catalogue has of the samples of one shard."""
    names = list(books.listed)
    if not books.manifest or name not in names:
        return {}
    try:
        columns = read_columns(LocalFiles(books.bank), books.manifest["catalogue"])
    except CatalogueMismatch:
        return {}
    blob, edges = columns["key"].tobytes(), columns["key_offsets"].tolist()
    sums = [column for column in columns if column.endswith("_crc32c")]
    return {
        blob[edges[row] : edges[row + 1]].decode(): {n: int(columns[n][row]) for n in sums}
        for row in np.flatnonzero(columns["shard"] == names.index(name)).tolist()
    }


def _check_index(path: Path, samples: Sequence[Json]) -> list[Damage]:
    file = index_path(path)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return [Damage(f"shards/{file.name}", "is missing")]
    except OSError as error:
        return [Damage(f"shards/{file.name}", f"cannot be read: {error}")]
    if content != index_bytes(list(samples), _end(samples)):
        return [Damage(f"shards/{file.name}", "is not the index of its shard")]
    return []


def check_catalogue(books: Books, shards_are_sound: bool) -> list[Damage]:
    """Compare the catalogue with the manifest's checksums, and with what the shards give."""
    manifest = books.manifest
    if manifest is None and not (books.bank / "index.zarr").exists():
        return []
    damages: list[Damage] = []
    columns: Columns | None = None
    if manifest is not None:
        try:
            columns = read_columns(LocalFiles(books.bank), manifest["catalogue"])
        except CatalogueMismatch as mismatch:
            return [Damage("index.zarr", what, part=name) for name, what in mismatch.wrong.items()]
        damages += _check_counts(manifest, columns)
    if not shards_are_sound or not books.plan:
        return damages
    fresh = _fresh_columns(books)
    if columns is None or all(
        name in columns and np.array_equal(fresh[name], columns[name]) for name in fresh
    ):
        return damages + _check_files(books.bank / "index.zarr", fresh)
    wrong = [n for n in fresh if n not in columns or not np.array_equal(fresh[n], columns[n])]
    return damages + [Damage("index.zarr", "is not what the shards give", part=n) for n in wrong]


def _check_counts(manifest: Json, columns: Columns) -> list[Damage]:
    counts = {"clips": len(columns["shard"]), "frames": len(columns["timestamps"])}
    return [
        Damage("bank.json", f"has {manifest[name]} {name}, the catalogue {count}")
        for name, count in counts.items()
        if manifest[name] != count
    ]


def _fresh_columns(books: Books) -> Columns:
    """Return the columns of the shards that the manifest lists, or of all that are finished.

    The plan may be ahead of the manifest: it is the manifest that tells what was served then.
    """
    commits, features = books.sound_commits(), books.features
    assert features
    serving = books.served()
    if books.manifest:
        commits = [commit for commit in commits if commit["shard"] in books.listed]
        serving = {
            sample["key"]: commit["unit"]
            for commit in commits
            for sample in commit["samples"]
            if sample["key"] not in books.listed_dead(commit["shard"])
        }
    return build_columns(books.bank / "shards", commits, features["strides"], serving)


def _check_files(path: Path, columns: Columns) -> list[Damage]:
    """Compare the catalogue's files with those that these columns make, byte for byte.

    Another version of zarr may write the same columns in other words: files differ then which have
    nothing but words in them, all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        fresh_path = Path(folder) / "index.zarr"
        write_columns(fresh_path, columns)
        fresh, there = _contents(fresh_path), _contents(path)
    words = [name for name in fresh if name.endswith("zarr.json")]
    same_writer = any(fresh[name] == there.get(name) for name in words)
    return [
        Damage("index.zarr", "is not as it was written", part=name)
        for name in sorted(fresh.keys() | there.keys())
        if fresh.get(name) != there.get(name)
        and (name not in words or same_writer or not _is_json(there.get(name)))
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


def file_sha256(tar: Tar) -> str:
    sha256 = hashlib.sha256()
    for at in range(0, tar.nbytes, 1 << 22):
        sha256.update(tar.read(at, 1 << 22))
    return sha256.hexdigest()


def _end(samples: Sequence[Json]) -> int:
    return int(samples[-1]["offset"] + samples[-1]["nbytes"]) if samples else 0
