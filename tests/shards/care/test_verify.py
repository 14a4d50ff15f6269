"""verify: whatever happens to a bank is found, and named by file, clip and part.

pytest tests/shards/care/test_verify.py
"""

import io
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.care.inventory import Damage
from shards.care.tar_scan import records
from shards.care.verify import verify
from shards.errors import UserError
from shards.format.catalogue import checksums, read_columns, write_columns
from shards.format.codec import Codec, channel_rms
from shards.format.commits import done_path, index_path, part_path, read_commit, shard_path
from shards.format.features import CODECS, FeatureConfig
from shards.format.manifest import TowerFacts
from shards.format.plan import ClipSource, Plan, read_plan, write_plan
from shards.format.samples import SampleMeta, sample_key
from shards.signed import read_signed_json, signed_json
from shards.storage import LocalFiles
from shards.write.finish import finish
from shards.write.shard import ShardWriter

SHARDS = ((0, 4), (4, 7))
"""Which clips are in each shard."""


def write_bank(
    out: Path, codec_name: str, features: FeatureConfig, make_meta: Callable[..., SampleMeta]
) -> Path:
    """Write a bank of seven clips of random features in two shards."""
    config = replace(features, codec=codec_name)
    draw = np.random.default_rng(0)
    clips = {
        f"clips/{k}.mp4": {
            stride: draw.normal(size=(2 + k % 3, 8 // stride, 8 // stride, 6)).astype(np.float16)
            for stride in config.strides
        }
        for k in range(7)
    }
    scales = {s: channel_rms([arrays[s] for arrays in clips.values()]) for s in config.strides}
    calibration = {str(s): scales[s].tolist() for s in scales} if codec_name == "int8" else None
    codec = Codec(codec_name, "float16", scales if codec_name == "int8" else {})
    ids = [list(clips)[first:last] for first, last in SHARDS]
    for unit, names in enumerate(ids):
        with ShardWriter(shard_path(out, unit), unit, config.fingerprint, codec) as writer:
            for id_ in names:
                meta = make_meta(id_, clips[id_], tower_width=6)
                writer.write(sample_key(id_), meta, clips[id_])
            writer.commit()
    units = [[ClipSource(id_, sample_key(id_), id_, id_) for id_ in names] for names in ids]
    plan = Plan(config, units, calibration=calibration)
    write_plan(out, plan)
    finish(out, plan, TowerFacts("tower", 6))
    return out


@pytest.fixture(scope="module")
def banks(
    features: FeatureConfig,
    make_meta: Callable[..., SampleMeta],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A bank of each codec. Read them only."""
    folder = tmp_path_factory.mktemp("banks")
    return {name: write_bank(folder / name, name, features, make_meta) for name in CODECS}


@pytest.fixture
def bank(banks: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(banks["none"], tmp_path / "bank")


@dataclass(frozen=True)
class Place:
    """A member as the standard library's tarfile sees it in the sound shard."""

    key: str
    part: str
    name: str
    begin: int
    data_end: int
    end: int


def places(tar: Path) -> list[Place]:
    with tarfile.open(tar) as opened:
        found = []
        for info in opened:
            key, part = info.name.split(".", 1)
            data_end = info.offset_data + info.size
            end = -(-data_end // 512) * 512
            name = part.removesuffix(".npy")
            found.append(Place(key, name, info.name, info.offset, data_end, end))
        return found


def keys_of(tar: Path) -> list[str]:
    return list(dict.fromkeys(place.key for place in places(tar)))


def flip(path: Path, byte: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def rewrite(tar: Path, change: Callable[[list[tuple[tarfile.TarInfo, Any]]], None]) -> None:
    """Write a shard anew with its members rearranged."""
    with tarfile.open(tar) as opened:
        members = [(info, opened.extractfile(info)) for info in opened]
        pairs = [(info, file.read()) for info, file in members if file]
    change(pairs)
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as opened:
        for info, data in pairs:
            opened.addfile(info, io.BytesIO(data))


# What is done to a bank, and what must be said of it. Each returns the file, the keys and, where
# they are certain, the parts; the truth is worked out from the sound bank.

Truth = tuple[str, set[str | None], set[str | None] | None]


def displaced(tar: Path, found: list[Place], sound: bytes) -> tuple[set[str], set[str | None]]:
    """Return the keys, and the parts, of which a byte is not where it was; no part where all are."""
    now = tar.read_bytes()
    changed: dict[str, set[str | None]] = {}
    for place in found:
        if now[place.begin : place.end] != sound[place.begin : place.end]:
            changed.setdefault(place.key, set()).add(place.part)
    parts: set[str | None] = set()
    for key, names in changed.items():
        every = {place.part for place in found if place.key == key}
        parts |= {None} if names == every else names
    return set(changed), parts


def rearrange(
    tar: Path, change: Callable[[list[tuple[tarfile.TarInfo, Any]]], None]
) -> tuple[set[str], set[str | None]]:
    """Rewrite a shard; return the keys and the parts that are not in their places any more."""
    found, sound = places(tar), tar.read_bytes()
    rewrite(tar, change)
    return displaced(tar, found, sound)


def any_tar(bank: Path, draw: random.Random) -> Path:
    return draw.choice(sorted((bank / "shards").glob("*.tar")))


def name_below(bank: Path, file: Path) -> str:
    return file.relative_to(bank).as_posix()


def flip_in_shard(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    byte = draw.randrange(tar.stat().st_size)
    hit = [place for place in places(tar) if place.begin <= byte < place.end]
    flip(tar, byte, draw.randrange(8))
    return name_below(bank, tar), {p.key for p in hit} or {None}, {p.part for p in hit} or {None}


def flip_in_header_or_padding(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    place = draw.choice(places(tar))
    zeros = range(place.data_end, place.end)
    byte = draw.choice([*range(place.begin, place.begin + 512), *zeros])
    flip(tar, byte, draw.randrange(8))
    return name_below(bank, tar), {place.key}, {place.part}


def flip_in_small_file(bank: Path, draw: random.Random) -> Truth:
    files = [*bank.glob("*.json"), *bank.glob("shards/*.done"), *bank.glob("shards/*.idx")]
    file = draw.choice(sorted(files))
    flip(file, draw.randrange(file.stat().st_size), draw.randrange(8))
    return name_below(bank, file), {None}, {None}


def flip_in_catalogue(bank: Path, draw: random.Random) -> Truth:
    files = [f for f in bank.glob("index.zarr/**/*") if f.is_file() and f.stat().st_size]
    file = draw.choice(sorted(files))
    flip(file, draw.randrange(file.stat().st_size), draw.randrange(8))
    return "index.zarr", {None}, {file.relative_to(bank / "index.zarr").parts[0]}


def cut(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    found = places(tar)
    length = draw.choice(
        [
            draw.randrange(tar.stat().st_size),
            draw.choice(found).end,
            draw.choice([p for p in found if p.part == "json"]).begin,
            found[-1].end,
        ]
    )
    with open(tar, "r+b") as file:
        file.truncate(length)
    lost: set[str | None] = {place.key for place in found if place.data_end > length}
    return name_below(bank, tar), lost or {None}, None


def delete_member(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    place = draw.choice(places(tar))
    keys, parts = rearrange(
        tar, lambda pairs: pairs.pop([i.name for i, _ in pairs].index(place.name)) and None
    )
    assert place.key in keys
    return name_below(bank, tar), {*keys}, parts


def delete_sample(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    key = draw.choice(keys_of(tar))

    def change(pairs: list[tuple[tarfile.TarInfo, Any]]) -> None:
        pairs[:] = [pair for pair in pairs if not pair[0].name.startswith(key)]

    keys, parts = rearrange(tar, change)
    assert key in keys
    return name_below(bank, tar), {*keys}, parts


def double_member(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    place, at_end = draw.choice(places(tar)), draw.random() < 0.5

    def change(pairs: list[tuple[tarfile.TarInfo, Any]]) -> None:
        at = [info.name for info, _ in pairs].index(place.name)
        pairs.insert(len(pairs) if at_end else at, pairs[at])

    keys, _ = rearrange(tar, change)
    return name_below(bank, tar), {place.key, *keys}, None


def double_sample(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    keys = keys_of(tar)
    key, other = draw.choice(keys), draw.choice(keys)

    def change(pairs: list[tuple[tarfile.TarInfo, Any]]) -> None:
        copies = [pair for pair in pairs if pair[0].name.startswith(key)]
        at = [info.name for info, _ in pairs].index(f"{other}.json")
        pairs[at:at] = copies

    keys, _ = rearrange(tar, change)
    return name_below(bank, tar), {key, *keys}, None


def swap_members(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    key = draw.choice(keys_of(tar))
    one, two = draw.sample([place for place in places(tar) if place.key == key], 2)

    def change(pairs: list[tuple[tarfile.TarInfo, Any]]) -> None:
        names = [info.name for info, _ in pairs]
        a, b = names.index(one.name), names.index(two.name)
        pairs[a], pairs[b] = pairs[b], pairs[a]

    keys, parts = rearrange(tar, change)
    assert keys == {key}
    return name_below(bank, tar), {key}, parts


def swap_samples(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    one, two = draw.sample(keys_of(tar), 2)

    def change(pairs: list[tuple[tarfile.TarInfo, Any]]) -> None:
        groups = {
            key: [pair for pair in pairs if pair[0].name.startswith(key)] for key in keys_of(tar)
        }
        swapped = {one: two, two: one}
        pairs[:] = [pair for key in groups for pair in groups[swapped.get(key, key)]]

    keys, parts = rearrange(tar, change)
    assert {one, two} <= keys
    return name_below(bank, tar), {*keys}, parts


def swap_members_of_two_samples(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    found = places(tar)
    one = draw.choice(found)
    two = draw.choice([place for place in found if place.key != one.key])

    def change(pairs: list[tuple[tarfile.TarInfo, Any]]) -> None:
        names = [info.name for info, _ in pairs]
        a, b = names.index(one.name), names.index(two.name)
        pairs[a], pairs[b] = pairs[b], pairs[a]

    keys, _ = rearrange(tar, change)
    assert {one.key, two.key} <= keys
    return name_below(bank, tar), {*keys}, None


def append(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    name = f"extra-{draw.randrange(1000)}.json"
    (bank.parent / name).write_text("{}")
    subprocess.run(["tar", "-r", "-f", tar, "-C", bank.parent, name], check=True)
    return name_below(bank, tar), {None}, {name}


def garbage_at_the_end(bank: Path, draw: random.Random) -> Truth:
    tar = any_tar(bank, draw)
    with open(tar, "ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 2000)))
    return name_below(bank, tar), {None}, {None}


def remove_file(bank: Path, draw: random.Random) -> Truth:
    files = [*bank.glob("*.json"), *bank.glob("shards/*"), *bank.glob("index.zarr/*/zarr.json")]
    file = draw.choice(sorted(files))
    keys: set[str | None] = set(keys_of(file)) if file.suffix == ".tar" else set()
    file.unlink()
    column = file.parent.name if file.name == "zarr.json" else None
    name = "index.zarr" if column else name_below(bank, file)
    return name, {*keys, None}, {column}


def remove_chunk(bank: Path, draw: random.Random) -> Truth:
    file = draw.choice(sorted(bank.glob("index.zarr/*/c/0")))
    file.unlink()
    return "index.zarr", {None}, {file.parts[-3]}


CRIMES = [
    *[flip_in_shard] * 4,
    flip_in_header_or_padding,
    flip_in_small_file,
    flip_in_catalogue,
    *[cut] * 2,
    delete_member,
    delete_sample,
    double_member,
    double_sample,
    swap_members,
    swap_samples,
    swap_members_of_two_samples,
    append,
    garbage_at_the_end,
    remove_file,
    remove_chunk,
]


def commit_crimes(banks: dict[str, Path], folder: Path, seed: int, times: int) -> None:
    for k in range(times):
        draw = random.Random(f"{seed}-{k}")
        codec, crime = CODECS[k % 3], CRIMES[k % len(CRIMES)]
        bank = shutil.copytree(banks[codec], folder / "bank")
        file, keys, parts = crime(bank, draw)
        damages = verify(bank, deep=True)
        said = f"seed {seed}-{k}, {codec}, {crime.__name__}: " + "\n".join(map(str, damages))
        assert damages, said
        assert {damage.file for damage in damages} == {file}, (said, file)
        assert {damage.key for damage in damages} == keys, (said, keys)
        named = {damage.part and damage.part.split("/")[0] for damage in damages}
        assert parts is None or named == parts, (said, parts)
        shutil.rmtree(bank)


def test_each_of_sixty_damages_is_found_and_named(banks: dict[str, Path], tmp_path: Path) -> None:
    commit_crimes(banks, tmp_path, seed=0, times=3 * len(CRIMES))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_each_of_many_damages_is_found_and_named(
    banks: dict[str, Path], tmp_path: Path, seed: int
) -> None:
    commit_crimes(banks, tmp_path, seed, times=200)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_bank_has_no_damage(banks: dict[str, Path], codec: str, deep: bool) -> None:
    assert verify(banks[codec], deep) == []


def without_commit(bank: Path, unit: int = 0) -> Path:
    tar = bank / "shards" / f"bank-{unit:06d}.tar"
    done_path(tar).unlink()
    return tar


@pytest.mark.parametrize("codec", CODECS)
def test_a_tar_alone_gives_the_records_of_its_samples(banks: dict[str, Path], codec: str) -> None:
    for path in (banks[codec] / "shards").glob("*.tar"):
        assert records(path) == read_commit(path).samples


@pytest.mark.parametrize("codec", CODECS)
def test_of_a_lost_commit_record_the_manifest_tells_whether_the_shard_is_sound(
    banks: dict[str, Path], tmp_path: Path, codec: str
) -> None:
    bank = shutil.copytree(banks[codec], tmp_path / "bank")
    tar = without_commit(bank)
    only = Damage("shards/bank-000000.done", "is missing")
    assert verify(bank) == verify(bank, deep=True) == [only]  # the tar is the one in bank.json
    hit = places(tar)[-1]
    flip(tar, hit.data_end - 1, 0)
    _, damage = verify(bank, deep=True)
    assert (damage.file, damage.key, damage.remedy) == (f"shards/{tar.name}", None, "encode")


def test_a_shard_lost_with_its_record_is_named(bank: Path) -> None:
    without_commit(bank, 1).unlink()
    assert {damage.file for damage in verify(bank)} == {
        "shards/bank-000001.tar",
        "shards/bank-000001.done",
    }


@pytest.mark.parametrize("crime", [cut, delete_member, delete_sample, swap_samples, append])
def test_what_moves_headers_is_found_without_reading_all(
    bank: Path, crime: Callable[[Path, random.Random], Truth]
) -> None:
    file, keys, _ = crime(bank, random.Random(5))
    damages = verify(bank)
    assert {damage.file for damage in damages} == {file}
    assert {damage.key for damage in damages} == keys


def test_damages_of_several_kinds_at_once_are_each_named(bank: Path) -> None:
    first, second = sorted((bank / "shards").glob("*.tar"))
    found = places(first)
    a, b = found[1], found[-1]  # nothing is behind the last one
    flip(first, a.data_end - 1, 3)
    rewrite(first, lambda pairs: pairs.pop() and None)
    gone = keys_of(second)[-1]

    def change(pairs: list[tuple[tarfile.TarInfo, Any]]) -> None:
        pairs[:] = [pair for pair in pairs if not pair[0].name.startswith(gone)]

    rewrite(second, change)
    index_path(first).write_bytes(b"")
    assert {(damage.file, damage.key, damage.part) for damage in verify(bank, deep=True)} == {
        ("shards/bank-000000.tar", a.key, a.part),
        ("shards/bank-000000.tar", b.key, b.part),
        ("shards/bank-000000.tar.idx", None, None),
        ("shards/bank-000001.tar", gone, None),
    }


def test_two_shards_that_changed_names(bank: Path) -> None:
    first, second = sorted((bank / "shards").glob("*.tar"))
    keys = {*keys_of(first), *keys_of(second)}
    first.rename(first.with_suffix(".kept"))
    second.rename(first)
    first.with_suffix(".kept").rename(second)
    assert {damage.key for damage in verify(bank) if damage.key} == keys


def test_a_catalogue_that_tells_of_other_places(bank: Path) -> None:
    manifest = read_signed_json(bank / "bank.json")
    columns = dict(read_columns(LocalFiles(bank), manifest["catalogue"]))
    columns["stride4_offset"] = columns["stride4_offset"] + np.uint64(512)
    write_columns(bank / "index.zarr", columns)
    (damage,) = verify(bank)
    assert (damage.file, damage.part) == ("index.zarr", "stride4_offset")
    (bank / "bank.json").write_bytes(signed_json(manifest | {"catalogue": checksums(columns)}))
    (damage,) = verify(bank)
    assert (damage.part, damage.what) == ("stride4_offset", "is not what the shards give")


def test_a_run_that_is_not_over_is_no_damage(bank: Path) -> None:
    (bank / "bank.json").unlink()
    shutil.rmtree(bank / "index.zarr")
    second = bank / "shards" / "bank-000001.tar"
    done_path(second).unlink()
    index_path(second).unlink()
    second.rename(part_path(second))
    assert verify(bank, deep=True) == []


def test_a_plan_that_is_ahead_of_its_shards_is_no_damage(bank: Path) -> None:
    plan = read_plan(bank)
    assert plan
    overlay, pruned = plan.units[0][:2], frozenset({plan.units[1][0].key})
    write_plan(bank, replace(plan, units=[*plan.units, overlay], pruned=pruned))
    assert verify(bank, deep=True) == []


def test_a_folder_without_a_bank_and_a_newer_format_are_refused(bank: Path) -> None:
    with pytest.raises(UserError, match="no bank here"):
        verify(bank.parent)
    manifest = read_signed_json(bank / "bank.json")
    (bank / "bank.json").write_bytes(signed_json(manifest | {"format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        verify(bank)


def test_a_quarantine_that_cannot_be_read_is_named(banks: dict[str, Path], tmp_path: Path) -> None:
    bank = shutil.copytree(banks["none"], tmp_path / "bank")
    (bank / "quarantine.jsonl").write_bytes(b"{}\n\xff\n")
    (damage,) = verify(bank)
    assert (damage.file, damage.remedy) == ("quarantine.jsonl", "restore")
    assert "quarantine.jsonl:1: not an entry" in damage.what


def test_of_a_shard_without_record_a_missing_index_is_named_too(
    banks: dict[str, Path], tmp_path: Path
) -> None:
    bank = shutil.copytree(banks["none"], tmp_path / "bank")
    for path in (index_path(shard_path(bank, 0)), done_path(shard_path(bank, 0))):
        path.unlink()
    assert {damage.file for damage in verify(bank)} == {
        "shards/bank-000000.done",
        "shards/bank-000000.tar.idx",
    }
