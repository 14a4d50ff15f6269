"""`preprocess derive`: of a bank another, of its bytes alone; what cannot be had is refused by name.

pytest tests/preprocess/derive/test_derive.py
"""

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from model.slow_fast import uniform_indices
from preprocess.cli.main import main
from preprocess.decode.clip import read_clip
from preprocess.decode.request import ReadRequest
from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from shards.care.verify import verify
from shards.format.codec import Codec, as_float32, channel_rms
from shards.format.commits import read_commit, shard_path
from shards.format.features import FeatureConfig, Sampling
from shards.format.manifest import TowerFacts, read_manifest
from shards.format.plan import ClipSource, Plan, TowerSettings, planned, read_plan, write_plan
from shards.format.quarantine import QuarantineEntry, Reason, read_quarantine
from shards.format.samples import SampleMeta, sample_key
from shards.read.bank import Bank
from shards.read.banks import joint
from shards.write.finish import finish
from shards.write.shard import ShardWriter

Make = Callable[..., Path]


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")


def derived(bank: Path, out: Path, *words: object) -> Bank:
    result = command("derive", bank, "--out", out, *words)
    assert result.exit_code == 0, result.output
    assert verify(out, deep=True) == []
    return Bank.open(out)


def shards(bank: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((bank / "shards").iterdir())
    }


# --- of a bank that a tower made ---


@pytest.fixture(scope="module")
def encoded(
    toy: Path, toy_options: EncodeOptions, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "bank"
    encode([str(toy / "videos" / "test")], out, replace(toy_options, strides=(1, 3, 4)))
    return out


def test_coarser_cells_are_those_that_the_tower_gives_within_rounding(
    encoded: Path, tmp_path: Path
) -> None:
    whole = Bank.open(encoded)
    fine = derived(encoded, tmp_path / "fine", "--stride", 1)
    assert fine.config.strides == (1,)
    coarse = derived(tmp_path / "fine", tmp_path / "coarse", "--stride", "3,4")
    assert len({bank.config.fingerprint for bank in (whole, fine, coarse)}) == 3
    rows = whole.clip(0).patch_grid[0]
    assert rows % 3, "some cells are at the border"
    for row, id_ in enumerate(whole.ids):
        np.testing.assert_array_equal(fine.read(fine.row(id_), 1), whole.read(row, 1))
        size = np.abs(as_float32(whole.read(row, 1))).max()
        for stride in (3, 4):
            ours, theirs = coarse.read(coarse.row(id_), stride), whole.read(row, stride)
            wrong = np.abs(as_float32(ours) - as_float32(theirs))
            assert wrong.max() <= 2 * size * 2.0**-11, "rounded twice, not once"


def test_the_frames_kept_are_what_the_features_say_of_a_video(
    encoded: Path, toy: Path, tmp_path: Path
) -> None:
    """`ask` reads a raw video by the sampling that stands in the features."""
    few = derived(encoded, tmp_path / "few", "--frames", 3)
    assert few.config.sampling == Sampling(num_frames=8, kept=3)
    for row, id_ in enumerate(few.ids):
        clip = read_clip(ReadRequest(toy / "videos" / "test" / id_, few.config.sampling))
        assert clip.frame_index.tolist() == few.clip(row).frame_index.tolist()
    assert "of these 3, uniformly" in command("show", tmp_path / "few").stdout
    assert f"derived      from {encoded}" in command("show", tmp_path / "few").stdout


def test_a_derived_bank_is_neither_encoded_into_nor_retried(
    encoded: Path, toy: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "few"
    derived(encoded, bank, "--frames", 3)
    flags = ["--stride", "1,3,4", "--frames", 8, "--tower", toy / "tower", "--device", "cpu"]
    for words in (
        ["encode", toy / "videos" / "train", "--out", bank, *flags],
        ["work", bank],
        ["retry", bank],
    ):
        result = command(*words)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert "was derived from another bank" in line
        assert "`preprocess derive`" in line
    part = shard_path(bank, 0)
    raw = bytearray(part.read_bytes())
    raw[3000] ^= 1
    part.write_bytes(raw)
    result = command("repair", bank, "--device", "cpu")
    assert result.exit_code == 2
    assert "remove damaged shards, each with its .done" in result.stderr
    sound = derived(encoded, tmp_path / "again", "--frames", 3)
    for path in (part, part.with_suffix(".done")):
        path.unlink()
    derived(encoded, bank, "--frames", 3)
    assert shards(bank) == shards(sound.path)


# --- of banks of given arrays ---

SIZES = {4: (3, 4), 8: (2, 2)}
"""Cells of 11 x 13 patches."""


def arrays(id_: str, frames: int = 6) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(int(sample_key(id_)[-8:], 16))
    sizes = [0.5, 3, 1, 2, 8]  # of channels
    return {
        stride: (rng.normal(size=(frames, *cells, 5)) * sizes).astype(np.float16)
        for stride, cells in SIZES.items()
    }


@pytest.fixture
def bank(features: FeatureConfig, make_meta: Callable[..., SampleMeta]) -> Make:
    """A function that writes a bank of units of clips; those called bad have failed."""

    def make(out: Path, *units: str, **config: object) -> Path:
        made = replace(features, **config)  # type: ignore[arg-type]
        ids = [id_ for unit in units for id_ in unit.split() if not id_.startswith("bad")]
        scales = {}
        if made.codec == "int8":
            scales = {s: channel_rms(arrays(id_)[s] for id_ in ids) for s in made.strides}
        plan = Plan(
            made,
            [
                [
                    ClipSource(id_, sample_key(id_), id_, id_, digest="ab" * 16)
                    for id_ in unit.split()
                ]
                for unit in units
            ],
            TowerSettings(name="unnamed"),
            calibration={str(s): scale.tolist() for s, scale in scales.items()} or None,
            quality={str(s): {"cosine_mean": 0.5} for s in made.strides},
        )
        out.mkdir(parents=True, exist_ok=True)
        write_plan(out, plan)
        codec = Codec(made.codec, made.dtype, scales)
        for number, unit in enumerate(plan.units):
            if (out / "shards" / f"bank-{number:06d}.done").exists():
                continue
            path = shard_path(out, number)
            with ShardWriter(path, number, made.fingerprint, codec) as writer:
                for clip in unit:
                    if clip.id.startswith("bad"):
                        writer.fail(failure(clip.id))
                        continue
                    values = {s: arrays(clip.id)[s] for s in made.strides}
                    meta = make_meta(clip.id, values, patch_grid=(11, 13))
                    writer.write(clip.key, meta, values)
                writer.commit({"machine": "x"})
        finish(out, plan, TowerFacts("unnamed", 5))
        return out

    return make


def failure(id_: str) -> QuarantineEntry:
    return QuarantineEntry(id_, sample_key(id_), id_, "decode", Reason.DAMAGED, "damaged", 1, 0.5)


@pytest.mark.parametrize("codec", ["none", "blosc"])
@pytest.mark.parametrize("other", ["none", "blosc"])
def test_banked_strides_frames_and_lossless_codecs_are_exact(
    bank: Make, tmp_path: Path, codec: str, other: str
) -> None:
    source = bank(tmp_path / "bank", "a b", "c", codec=codec)
    new = derived(source, tmp_path / "new", "--stride", 8, "--frames", 4, "--codec", other)
    kept = uniform_indices(6, 4)
    old = Bank.open(source)
    for row, id_ in enumerate(new.ids):
        np.testing.assert_array_equal(new.read(row, 8), arrays(id_)[8][kept])
        ours, theirs = new.clip(row), old.clip(old.row(id_))
        assert ours.timestamps.tolist() == theirs.timestamps[kept].tolist()
        assert (ours.start, ours.end, ours.covered) == (theirs.start, theirs.end, theirs.covered)
    facts = read_manifest(tmp_path / "new")
    assert facts.features.derived
    assert facts.features.derived.fingerprint == old.config.fingerprint
    assert (facts.features.derived.strides, facts.features.derived.codec) == ((4, 8), codec)
    assert [one["derived_from"] for one in facts.provenance.encoded] == [str(source)]
    assert (facts.provenance.tower, facts.tower_width) == ("unnamed", 5)
    whole = derived(
        source, tmp_path / "whole", "--codec", {"none": "blosc", "blosc": "none"}[codec]
    )
    assert joint(whole.config) == joint(old.config), "a run may read both"
    assert [whole.shape(0, s) for s in (4, 8)] == [(6, 3, 4, 5), (6, 2, 2, 5)]


def test_int8_is_calibrated_on_the_bank_and_its_losses_are_measured(
    bank: Make, tmp_path: Path
) -> None:
    ids = list("abcdefg")
    source = bank(tmp_path / "bank", " ".join(ids))
    new = derived(source, tmp_path / "new", "--codec", "int8")
    drawn = sorted(ids, key=lambda id_: sample_key(id_)[-16:])
    plan, few = planned(tmp_path / "new"), uniform_indices(6, 8)
    assert plan.calibration
    for stride in (4, 8):
        scale = channel_rms(arrays(id_)[stride][few] for id_ in drawn[::2])
        np.testing.assert_array_equal(np.float32(plan.calibration[str(stride)]), scale)
        for row, id_ in enumerate(new.ids):
            exact, rough = as_float32(arrays(id_)[stride]), as_float32(new.read(row, stride))
            assert np.abs(exact - rough).max() < 0.02 * np.abs(exact).max()
    facts = read_manifest(tmp_path / "new").codec.strides["8"]
    assert 0.9999 < (facts["cosine_mean"] or 0) < 1
    # and of int8 come the same bytes, not rounded a second time
    less = derived(tmp_path / "new", tmp_path / "less", "--stride", 8, "--frames", 2)
    for row, id_ in enumerate(less.ids):
        np.testing.assert_array_equal(less.read(row, 8), new.read(new.row(id_), 8, [0, 5]))
    assert less.manifest.codec.strides["8"] == facts


@pytest.mark.parametrize(
    ("config", "words", "told"),
    [
        ({}, ["--stride", "6"], "not made of whole cells of the bank"),
        ({}, ["--stride", "2,8"], "`preprocess encode INPUT --stride 2 --out NEW` makes it"),
        ({"pool": "bilinear"}, ["--stride", "16"], "pool bilinear interpolates patches"),
        ({"pool": "max"}, ["--stride", "16"], "leaves no cell of a 11x13 patch grid"),
        ({"codec": "int8"}, ["--stride", "16"], "its features are already rounded to int8"),
        ({"codec": "int8"}, ["--codec", "none"], "its features are already rounded to int8"),
        ({}, ["--frames", "8"], "leaves nothing out"),
        ({}, [], "has exactly what is asked for"),
        ({}, ["--stride", "4,8", "--codec", "none"], "has exactly what is asked for"),
        ({"sampling": Sampling(num_frames=8, kept=4)}, ["--frames", "2"], "was derived from"),
    ],
)
def test_what_cannot_be_derived_is_refused_in_a_line_and_leaves_no_folder(
    bank: Make, tmp_path: Path, config: dict[str, object], words: list[str], told: str
) -> None:
    source = bank(tmp_path / "bank", "a", **config)
    result = command("derive", source, "--out", tmp_path / "new", *words)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert told in line
    assert not (tmp_path / "new").exists()


def test_frames_that_the_tower_saw_together_are_not_parted(
    bank: Make, make_bank: Make, tmp_path: Path
) -> None:
    source = make_bank(tmp_path / "bank", {"a": arrays("a")}, meta={"frames_per_unit": 2}, width=5)
    manifest = read_manifest(source)
    clip = ClipSource("a", sample_key("a"), "a", "a")
    write_plan(source, Plan(manifest.features, [[clip]]))
    result = command("derive", source, "--out", tmp_path / "new", "--frames", 4)
    assert result.exit_code == 2
    assert "saw 2 frames as one" in result.stderr
    new = derived(source, tmp_path / "new", "--stride", 8)
    np.testing.assert_array_equal(new.read(0, 8), arrays("a")[8])


def test_another_bank_at_the_place_and_the_bank_itself_are_refused(
    bank: Make, tmp_path: Path
) -> None:
    source = bank(tmp_path / "bank", "a")
    other = bank(tmp_path / "other", "a", strides=(8,))
    for out, told in ((other, "derived"), (source, "is the bank itself")):
        before = shards(out)
        result = command("derive", source, "--out", out, "--stride", 8)
        assert result.exit_code == 2
        assert told in result.stderr
        assert shards(out) == before
    result = command("derive", tmp_path / "none", "--out", tmp_path / "new", "--stride", 8)
    assert result.exit_code == 2
    assert "no bank here" in result.stderr


def test_a_damaged_clip_is_named_and_nothing_is_made_of_it(bank: Make, tmp_path: Path) -> None:
    source = bank(tmp_path / "bank", "a b")
    path = shard_path(source, 0)
    raw = bytearray(path.read_bytes())
    raw[read_commit(path).samples[1].offset + 2500] ^= 4
    path.write_bytes(raw)
    result = command("derive", source, "--out", tmp_path / "new", "--stride", 8)
    assert result.exit_code == 2
    assert "checksum does not match; `preprocess repair" in result.stderr
    assert not (tmp_path / "new" / "bank.json").exists()
    assert "`preprocess derive` again to continue" in command("status", tmp_path / "new").stdout


def test_quarantine_and_growth_follow(bank: Make, tmp_path: Path) -> None:
    source, new = bank(tmp_path / "bank", "a bad-b"), tmp_path / "new"
    words = ["derive", source, "--out", new, "--stride", 8]
    result = command(*words)
    assert result.exit_code == 1
    assert "bad-b: damaged: damaged" in result.stdout
    first = shards(new)
    assert command(*words).exit_code == 1
    assert shards(new) == first, "nothing was to be done"
    assert [entry.id for entry in read_quarantine(new)] == ["bad-b"]

    bank(source, "a bad-b", "c")
    assert command(*words).exit_code == 1
    assert list(Bank.open(new).ids) == ["a", "c"]
    assert {name: shards(new)[name] for name in first} == first, "old shards stay"

    values = retried(source)
    unfinished = {name: (new / name).read_bytes() for name in ("bank.json", "quarantine.jsonl")}
    assert command(*words).exit_code == 0
    assert read_quarantine(new) == []
    grown = shards(new)
    for name, data in unfinished.items():
        (new / name).write_bytes(data)  # as if killed after its shard
    assert command(*words).exit_code == 0
    assert shards(new) == grown, "it was banked already"
    assert read_quarantine(new) == []
    np.testing.assert_array_equal(Bank.open(new).read(Bank.open(new).row("bad-b"), 8), values[8])

    write_plan(source, replace(planned(source), pruned=frozenset({sample_key("a")})))
    finish(source, planned(source), TowerFacts("unnamed", 5))
    assert command(*words).exit_code == 0
    assert sorted(Bank.open(new).ids) == ["bad-b", "c"]
    assert len(planned(new).units) == 3


def retried(source: Path) -> dict[int, np.ndarray]:
    """As a retry: bank the clip bad-b in a unit of its own."""
    plan = planned(source)
    again, values = plan.units[0][1], arrays("bad-b")
    write_plan(source, replace(plan, units=[*plan.units, [again]]))
    unit = len(plan.units)
    with ShardWriter(shard_path(source, unit), unit, plan.features.fingerprint) as writer:
        writer.write(again.key, _meta(source, again.id, values), values)
        writer.commit({})
    finish(source, planned(source), TowerFacts("unnamed", 5))
    return values


@pytest.mark.parametrize("words", [["--stride", 8], ["--frames", 4]], ids=["stride", "frames"])
@pytest.mark.parametrize(("codec", "follows"), [("int8", False), ("none", True)])
def test_int8_of_a_source_that_was_calibrated_anew_is_not_mixed(
    bank: Make, tmp_path: Path, words: list[object], codec: str, follows: bool
) -> None:
    source, new = tmp_path / "bank", tmp_path / "new"
    bank(source, "a", codec=codec)
    derived(source, new, *words, "--codec", "int8")
    before = shards(new)
    shutil.rmtree(source)
    bank(source, "a b", codec=codec)  # of the same fingerprint, with scales of both clips
    result = command("derive", source, "--out", new, *words, "--codec", "int8")
    assert result.exit_code == (0 if follows else 2)
    if not follows:
        (line,) = result.stderr.splitlines()
        assert "other scales of int8" in line
        assert "derive into another folder" in line
        assert shards(new) == before
        return
    made = Bank.open(new)
    exact = as_float32(arrays("b")[8][range(6) if "--stride" in words else uniform_indices(6, 4)])
    assert np.abs(as_float32(made.read(made.row("b"), 8)) - exact).max() < 0.02 * exact.max()


def test_shards_without_a_plan_are_not_taken_for_new_ones(bank: Make, tmp_path: Path) -> None:
    one, two = bank(tmp_path / "one", "a"), bank(tmp_path / "two", "b")
    new = derived(one, tmp_path / "new", "--stride", 8).path
    for name in ("plan.json", "bank.json"):
        (new / name).unlink()
    before = shards(new)
    result = command("derive", two, "--out", new, "--stride", 8)
    assert result.exit_code == 2
    assert "has shards and no plan.json" in result.stderr
    assert shards(new) == before


def test_a_source_with_a_clip_that_is_planned_again_is_derived_once_it_is_made(
    bank: Make, tmp_path: Path
) -> None:
    source, new = bank(tmp_path / "bank", "a b"), tmp_path / "new"
    plan = planned(source)
    changed = replace(plan.units[0][0], digest="cd" * 16)
    write_plan(source, replace(plan, units=[*plan.units, [changed]]))
    assert list(Bank.open(source).ids) == ["a", "b"]
    result = command("derive", source, "--out", new, "--stride", 8)
    assert result.exit_code == 2, "else it would lack a clip that the source serves"
    (line,) = result.stderr.splitlines()
    assert "its run is not finished" in line
    assert not new.exists()
    bank(source, "a b", "a")
    assert sorted(derived(source, new, "--stride", 8).ids) == ["a", "b"]


def _meta(source: Path, id_: str, values: dict[int, np.ndarray]) -> SampleMeta:
    meta = Bank.open(source).meta(0)
    return replace(meta, id=id_, path=id_)


# --- kill -9 ---


@pytest.fixture
def killed() -> Iterator[Callable[..., int]]:
    """A function that derives in a process of its own, which kills itself before its n-th write."""
    from shards.write import shard

    true_write = shard.write_synced

    def run(number: int, *words: object) -> int:
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = [number]

        def write(file: object, data: bytes) -> None:
            left[0] -= 1
            if not left[0]:
                file.write(data[: len(data) // 2])  # type: ignore[attr-defined]  # a part of it
                os.kill(os.getpid(), signal.SIGKILL)
            true_write(file, data)  # type: ignore[arg-type]

        shard.write_synced = write
        code = command(*words).exit_code
        os._exit(code)

    yield run
    assert shard.write_synced is true_write


@pytest.mark.slow
def test_killed_at_any_write_it_ends_with_the_same_bytes(
    bank: Make, tmp_path: Path, killed: Callable[..., int]
) -> None:
    source = bank(tmp_path / "bank", "a bad-b c", "d e", "f")
    how = ["--stride", "8,16", "--frames", 4]
    assert command("derive", source, "--out", tmp_path / "whole", *how).exit_code == 1
    whole, kills, number = shards(tmp_path / "whole"), 0, 0
    while True:
        number += 2
        new = tmp_path / f"new{number}"
        words = ["derive", source, "--out", new, *how]
        code = killed(number, *words)
        if code == 1:  # it had no such write any more
            break
        assert code == -signal.SIGKILL
        kills += 1
        assert not (new / "bank.json").exists()
        assert command(*words).exit_code == 1
        assert shards(new) == whole
        assert read_plan(new) == read_plan(tmp_path / "whole")
        assert verify(new, deep=True) == []
        shutil.rmtree(new)
    assert kills >= 6
