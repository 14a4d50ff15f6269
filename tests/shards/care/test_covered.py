"""Banks of formats 1 and 2 say that the whole crop is covered: `repair` puts that right without encoding.

pytest tests/shards/care/test_covered.py

A bank of today is given the shards that format 2 would have had, with tarfile alone; what repair makes
of it must be the bank of today, byte for byte.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from preprocess.care.covered import patch_sizes
from preprocess.care.repair import repair
from preprocess.encode.run import EncodeOptions, encode
from shards import Bank
from shards.care.tar_scan import commit_of
from shards.care.verify import verify
from shards.errors import UserError
from shards.format.commits import index_path, read_commit, shard_path, write_commit
from shards.format.features import Sampling
from shards.format.manifest import TowerFacts, read_manifest
from shards.format.plan import read_plan
from shards.signed import canonical_json, read_signed_json, signed_json, write_atomic
from shards.write.finish import finish
from shards.write.shard import index_bytes

ROOT = Path(__file__).resolve().parents[3]
SIDE, PATCH = 60, 7
"""8x8 patches of 56 pixels; of these 60 and this grid no other patch size does."""


def make_tower(folder: Path, side: int, patch: int) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=side, patch_size=patch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def make(root: Path, toy: Path, side: int, patch: int, codec: str = "none") -> Path:
    options = EncodeOptions(
        tower=str(make_tower(root / "tower", side, patch)),
        strides=(2, 4),
        sampling=Sampling(num_frames=2),
        codec=codec,
        shard_bytes=5_000,
    )
    summary = encode([str(toy / "videos")], root / "bank", options)
    assert (summary.clips, summary.failures) == (9, [])
    assert len(list((root / "bank" / "shards").glob("*.tar"))) > 1
    return root / "bank"


@pytest.fixture(scope="module")
def banks(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns today's bank of a codec. Read it only."""
    made: dict[str, Path] = {}

    def bank(codec: str) -> Path:
        if codec not in made:
            made[codec] = make(tmp_path_factory.mktemp(codec), toy, SIDE, PATCH, codec)
        return made[codec]

    return bank


def in_old_words(shard: Path) -> bytes:
    """Return a shard whose samples say that all is covered, and flags as a list; else as it is."""
    out = io.BytesIO()
    ustar = tarfile.USTAR_FORMAT
    with (
        tarfile.open(shard) as old,
        tarfile.open(fileobj=out, mode="w", format=ustar) as new,
    ):
        for member in old:
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".json"):
                meta = json.loads(data)
                meta |= {"covered": [0.0, 0.0, 1.0, 1.0], "flags": meta["flags"].split()}
                data = canonical_json(meta)
            info = tarfile.TarInfo(member.name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    return out.getvalue()


def make_old(bank: Path, version: int = 2) -> None:
    """Give a fresh bank what it would have had when every sample was said to be covered whole."""
    plan = read_plan(bank)
    assert plan
    for unit in range(len(plan.units)):
        shard = shard_path(bank, unit)
        old = read_commit(shard)
        shard.write_bytes(in_old_words(shard))
        commit = commit_of(shard, unit, old.fingerprint, old.underflowed, old.provenance)
        write_commit(shard, commit)
        write_atomic(index_path(shard), index_bytes(commit.samples))
    manifest = read_manifest(bank)
    finish(bank, plan, TowerFacts(manifest.provenance.tower, manifest.tower_width))
    assert verify(bank, deep=True) == []
    features = replace(plan.features, format_version=version)
    for path in (bank / "shards").glob("*.done"):
        record = read_signed_json(path)
        write_atomic(path, signed_json(record | {"fingerprint": features.fingerprint}))
    for name in ("plan.json", "bank.json"):
        record = read_signed_json(bank / name)
        record |= {"format_version": version, "features": features.to_json()}
        if "fingerprint" in record:
            record["fingerprint"] = features.fingerprint
        write_atomic(bank / name, signed_json(record))


def contents(bank: Path) -> dict[str, Any]:
    """Return what each file holds; of the plan not what no older plan says of its tower."""
    found: dict[str, Any] = {
        path.relative_to(bank).as_posix(): path.read_bytes()
        for path in bank.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    plan = json.loads(found["plan.json"])
    tower = {k: v for k, v in plan["tower"].items() if k not in ("device", "files")}
    found["plan.json"] = plan | {"tower": tower, "self_hash": None}
    return found


def old_copy(bank: Path, to: Path, version: int = 2) -> Path:
    shutil.copytree(bank, to)
    make_old(to, version)
    assert contents(to) != contents(bank)
    return to


@pytest.mark.parametrize("version", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("codec", ["none", "int8", "blosc"])
def test_repair_makes_the_bank_of_today_and_encodes_nothing(
    banks: Callable[[str], Path], tmp_path: Path, codec: str, version: int
) -> None:
    bank = old_copy(banks(codec), tmp_path / "bank", version)
    done = repair(bank, tower="nowhere")
    assert (done.encoded, done.remaining, done.lost, done.damages) == ([], [], [], [])
    assert contents(bank) == contents(banks(codec))
    whole = Bank.open(bank)
    assert {whole.clip(row).covered for row in range(len(whole))} == {(0.0, 0.0, 56 / 60, 56 / 60)}
    assert repair(bank, tower="nowhere").files == []


def test_a_damaged_clip_is_encoded_again_to_the_old_bytes_and_nothing_else(
    banks: Callable[[str], Path], tmp_path: Path
) -> None:
    bank = old_copy(banks("none"), tmp_path / "bank")
    sample = read_commit(shard_path(bank, 0)).samples[1]
    raw = bytearray(shard_path(bank, 0).read_bytes())
    raw[sample.streams[2].offset + 3] ^= 1
    shard_path(bank, 0).write_bytes(raw)
    done = repair(bank)
    assert (done.encoded, done.remaining) == ([sample.key], [])
    assert not any("cannot be proven" in note for note in done.notes)
    ours, todays = contents(bank), contents(banks("none"))
    assert {name for name in ours if ours[name] != todays[name]} <= {"bank.json"}


@pytest.mark.parametrize("place", [-1, 3], ids=["no json", "another number"])
def test_a_damaged_description_is_named_and_encoded_again(
    banks: Callable[[str], Path], tmp_path: Path, place: int
) -> None:
    bank = old_copy(banks("none"), tmp_path / "bank")
    shard = shard_path(bank, 0)
    sample = read_commit(shard).samples[1]
    raw = bytearray(shard.read_bytes())
    offset, nbytes = sample.json
    at = raw.index(b'"fps":', offset) + 6 if place > 0 else offset + nbytes - 1
    raw[at] ^= 1
    shard.write_bytes(raw)
    assert not verify(banks("none"), deep=True)
    done = repair(bank)
    assert (done.encoded, done.remaining) == ([sample.key], [])
    names = {path.name for path in (bank / "shards").glob("*.tar")}
    for name in names:
        theirs = banks("none") / "shards" / name
        assert (bank / "shards" / name).read_bytes() == theirs.read_bytes()


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from preprocess.care.repair import repair
old, work = Path(sys.argv[1]), Path(sys.argv[2])

def die_at(number):
    count = [0]
    def watch(event, facts):
        changes = event in ("os.rename", "os.mkdir", "shutil.rmtree") or (
            event == "open" and isinstance(facts[1], str) and set(facts[1]) & set("wxa"))
        if changes and str(facts[0]).startswith((f"{work}/shards", f"{work}/plan")):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

number, alive = 0, False
while not alive:
    number += int(sys.argv[3])
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(old, work)
    for life in (number, number // 2 + 1, None):  # killed twice, then let through
        child = os.fork()
        if child == 0:
            if life:
                die_at(life)
            done = repair(work, tower="nowhere")
            os._exit(0 if (done.encoded, done.remaining, done.lost) == ([], [], []) else 9)
        code = os.waitstatus_to_exitcode(os.wait()[1])
        assert code in (0, -signal.SIGKILL), (number, life, code)
        alive |= life == number and code == 0
    assert code == 0
    # the bank as it is now, for the test to look at
    print(number, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_who_is_killed_at_any_moment_goes_on(
    banks: Callable[[str], Path], tmp_path: Path, step: int
) -> None:
    old, work = old_copy(banks("none"), tmp_path / "old"), tmp_path / "work"
    expected = contents(banks("none"))
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(old), str(work), str(step)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin
        assert process.stdout
        moments = 0
        for line in process.stdout:
            moments = int(line)
            assert contents(work) == expected, moments
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert moments > 20  # of a change to a file: the shards, then the plan


def test_where_the_grid_leaves_the_patch_size_open_the_tower_is_asked(
    toy: Path, tmp_path: Path
) -> None:
    today = make(tmp_path, toy, 40, 7)
    assert patch_sizes((40, 40), (5, 5)) == [7, 8]
    bank = old_copy(today, tmp_path / "old")
    before = contents(bank)
    with pytest.raises(UserError, match=r"patches of 7, 8 pixels give its 5x5 patches") as caught:
        repair(bank, tower=str(tmp_path / "nowhere"))
    assert "--tower FOLDER" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(bank) == before
    other = make_tower(tmp_path / "other", 40, 8)
    with pytest.raises(UserError, match="holds other features"):
        repair(bank, tower=str(other))
    assert contents(bank) == before
    assert repair(bank).encoded == []  # the tower lies where it lay
    assert contents(bank) == contents(today)


def test_patch_sizes_are_those_that_make_the_grid() -> None:
    for patch in range(1, 33):
        for height, width in ((384, 384), (224, 224), (65, 40)):
            if min(height, width) >= patch:
                grid = height // patch, width // patch
                found = patch_sizes((height, width), grid)
                assert patch in found
                assert all((height // p, width // p) == grid for p in found)
    assert patch_sizes((384, 384), (27, 27)) == [14]
    assert patch_sizes((224, 224), (16, 16)) == [14]
    assert patch_sizes((10, 10), (3, 7)) == []
