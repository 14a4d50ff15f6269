"""A new stride of the same tower, beside the shards of a bank that are not touched, and read with them.

pytest tests/preprocess/encode/test_beside.py
pytest tests/preprocess/encode/test_beside.py -m slow     killed on the way, other codecs, merged
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from model.config import VLMConfig
from preprocess.cli.main import main
from preprocess.encode.beside import strides_beside
from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from shards.care.verify import verify
from shards.errors import UserError
from shards.format.beside import banks_of, sides_of
from shards.format.plan import planned
from shards.read.bank import Bank
from shards.read.banks import Banks
from train.ask import with_strides
from train.data.dataset import choose_strides

ROOT = Path(__file__).resolve().parents[3]


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")


def contents(bank: Path) -> dict[str, bytes]:
    """Return every file of a bank but for what lies beside it."""
    return {
        path.relative_to(bank).as_posix(): path.read_bytes()
        for path in bank.rglob("*")
        if path.is_file() and not path.relative_to(bank).parts[0].startswith("beside")
    }


def assert_one(bank: Path, whole: Path) -> None:
    """The bank, with what lies beside it, is read as the one that was encoded at once."""
    ours, theirs = Bank.open(bank), Bank.open(whole)
    assert ours.strides == theirs.strides == theirs.config.strides
    assert ours.whole.features == theirs.whole.features
    assert ours.whole.fingerprint == theirs.manifest.fingerprint
    assert ours.whole.calibration == theirs.manifest.calibration
    assert not ours.missing
    assert sorted(ours.ids) == sorted(theirs.ids)
    for id_ in ours.ids:
        mine, other = ours.row(id_), theirs.row(id_)
        np.testing.assert_equal(vars(ours.clip(mine)), vars(theirs.clip(other)))
        for stride in theirs.config.strides:
            assert ours.shape(mine, stride) == theirs.shape(other, stride)
            np.testing.assert_array_equal(ours.read(mine, stride), theirs.read(other, stride))
            last = [ours.shape(mine, stride)[0] - 1]
            np.testing.assert_array_equal(
                ours.read(mine, stride, last), theirs.read(other, stride, last)
            )


@pytest.fixture(scope="module")
def whole(toy: Path, toy_options: EncodeOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bank of strides 2, 4 and 8, encoded at once. Read it only."""
    out = tmp_path_factory.mktemp("whole") / "bank"
    encode([str(toy / "videos")], out, replace(toy_options, strides=(2, 4, 8)))
    return out


@pytest.fixture(scope="module")
def paired(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`toy_bank` with stride 2 beside it. Read it only."""
    out = shutil.copytree(toy_bank, tmp_path_factory.mktemp("paired") / "bank")
    summary = encode([str(toy / "videos")], out, replace(toy_options, strides=(2,)))
    assert (summary.clips, summary.failures) == (9, [])
    return out


def test_a_stride_beside_is_read_as_if_all_had_been_encoded_at_once(
    toy_bank: Path, paired: Path, whole: Path
) -> None:
    assert contents(paired) == contents(toy_bank)
    assert_one(paired, whole)
    elsewhere = Bank.open(f"file://{paired}")
    np.testing.assert_array_equal(elsewhere.read(3, 2), Bank.open(paired).read(3, 2))
    assert [verify(one, deep=True) for one in banks_of(paired)] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("codec", [pytest.param("blosc", marks=pytest.mark.slow), "int8"])
def test_of_every_codec(toy: Path, toy_options: EncodeOptions, tmp_path: Path, codec: str) -> None:
    videos, options = [str(toy / "videos" / "test")], replace(toy_options, codec=codec)
    bank, whole = tmp_path / "bank", tmp_path / "whole"
    encode(videos, whole, replace(options, strides=(1, 2, 4)))
    encode(videos, bank, replace(options, strides=(2,)))
    before = contents(bank)
    encode(videos, bank, replace(options, strides=(1, 2, 4)))
    assert contents(bank) == before
    assert [one.name for one in banks_of(bank)] == ["bank", "1-4"]
    assert_one(bank, whole)


def test_a_rerun_makes_nothing_and_writes_nothing(
    toy: Path, paired: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    bank = shutil.copytree(paired, tmp_path / "bank")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in bank.rglob("*.json")}
    summary = encode([str(toy / "videos")], bank, replace(toy_options, strides=(2, 4, 8)))
    assert (summary.clips, summary.skipped) == (0, 9)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in bank.rglob("*.json")}
    assert after == before


@pytest.mark.slow
def test_several_sides_are_one_bank(
    toy: Path, paired: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    bank, whole = shutil.copytree(paired, tmp_path / "bank"), tmp_path / "whole"
    videos = [str(toy / "videos")]
    encode(videos, bank, replace(toy_options, strides=(1, 4)))
    encode(videos, whole, replace(toy_options, strides=(1, 2, 4, 8)))
    assert [one.name for one in banks_of(bank)] == ["bank", "1", "2"]
    assert_one(bank, whole)


@pytest.mark.slow
def test_killed_in_between_it_goes_on_and_until_then_the_bank_is_as_it_was(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    bank, whole, videos = tmp_path / "bank", tmp_path / "whole", str(toy / "videos")
    flags = ["--frames", "40", "--device", "cpu", "--shard-size", "1", "--decoders", "1"]
    flags += ["--tower", str(toy / "tower"), "--tower-threads", "1"]
    assert command("encode", videos, "--stride", 2, "--out", bank, *flags).exit_code == 0
    before = contents(bank)
    words = ["encode", videos, "--stride", "1", "--out", str(bank), *flags]
    done = bank / "beside" / "1" / "shards"
    process = subprocess.Popen(
        [sys.executable, "-m", "preprocess", *words],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    while not list(done.glob("*.done")):
        assert process.poll() is None, "it came to its end"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert contents(bank) == before
    opened = Bank.open(bank)
    assert opened.strides == (2,)
    with pytest.raises(UserError, match="holds the strides 2, and no 1"):
        opened.read(0, 1)
    made = {path: path.stat().st_mtime_ns for path in done.glob("*.done")}
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what was made is kept"
    assert command("encode", videos, "--stride", "1,2", "--out", whole, *flags).exit_code == 0
    assert_one(bank, whole)


def test_half_the_clips_are_refused_in_words_until_the_others_have_followed(
    toy: Path, toy_bank: Path, whole: Path, tmp_path: Path
) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    half = tmp_path / "half"  # with the ids of all
    (half / "videos").mkdir(parents=True)
    shutil.copytree(toy / "videos" / "test", half / "videos" / "test")
    flags = ["--out", bank, "--frames", 8, "--device", "cpu", "--tower", toy / "tower"]
    result = command("encode", half / "videos", "--stride", 2, *flags)
    assert result.exit_code == 0, result.output
    assert "stride 2 is not read with the bank yet: it lacks 6 clips (train-clip-0" in result.output
    opened = Bank.open(bank)
    assert opened.strides == (4, 8)
    with pytest.raises(UserError, match="holds the strides 4, 8, and no 2"):
        opened.read(opened.row("test/clip-00000.mp4"), 2)
    result = command("encode", toy / "videos", "--stride", 2, *flags)
    assert result.exit_code == 0, result.output
    assert "not read" not in result.output
    assert "6 clips, " in result.output
    assert_one(bank, whole)


@pytest.fixture
def own(toy: Path, toy_options: EncodeOptions, tmp_path: Path) -> tuple[Path, Path]:
    """Three videos that may be changed, and their bank of strides 4 and 8, with 2 beside it."""
    videos, bank = shutil.copytree(toy / "videos" / "test", tmp_path / "videos"), tmp_path / "bank"
    encode([str(videos)], bank, toy_options)
    encode([str(videos)], bank, replace(toy_options, strides=(2,)))
    return videos, bank


@pytest.mark.slow
def test_what_was_added_or_changed_in_the_bank_alone_is_not_mixed_with_what_lies_beside(
    own: tuple[Path, Path], toy_options: EncodeOptions, tmp_path: Path
) -> None:
    videos, bank = own
    shutil.copy(videos / "clip-00001.mp4", videos / "clip-00000.mp4")
    encode([str(videos)], bank, toy_options)
    opened = Bank.open(bank)
    assert opened.strides == (4, 8)
    with pytest.raises(UserError, match=r"--stride 2 --out .* brings it up to date"):
        opened.shape(opened.row("clip-00001.mp4"), 2)
    shutil.copy(videos / "clip-00002.mp4", videos / "new.mp4")
    encode([str(videos)], bank, replace(toy_options, strides=(2, 8)))
    encode([str(videos)], tmp_path / "whole", replace(toy_options, strides=(2, 4, 8)))
    assert_one(bank, tmp_path / "whole")


@pytest.mark.slow
def test_a_side_that_holds_another_video_is_never_paired(
    own: tuple[Path, Path], toy_options: EncodeOptions
) -> None:
    videos, bank = own
    shutil.copy(videos / "clip-00001.mp4", videos / "clip-00000.mp4")
    side = replace(toy_options, strides=(2,))
    encode([str(videos)], bank / "beside" / "2", side)  # as nobody should
    assert Bank.open(bank).strides == (4, 8)
    result = command("finish", bank)
    assert result.exit_code == 0, result.output
    assert "has other frames of clip-00000-mp4-" in result.output
    assert Bank.open(bank).strides == (4, 8)


@pytest.mark.slow
def test_the_tower_is_run_as_it_was(toy: Path, toy_options: EncodeOptions, tmp_path: Path) -> None:
    videos, bank = [str(toy / "videos" / "test")], tmp_path / "bank"
    encode(videos, bank, replace(toy_options, tower_dtype="bfloat16", batch_frames=4))
    encode(videos, bank, replace(toy_options, tower_dtype="auto", strides=(2,)))
    assert Bank.open(bank).strides == (2, 4, 8)
    assert planned(bank / "beside" / "2").tower == planned(bank).tower


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strides": (4,)}, "strides: [4] here, [4, 8] there"),
        ({"strides": (2,), "layer": -1}, "layer: -1 here, -2 there"),
        ({"strides": (2, 4), "codec": "int8"}, "codec: 'int8' here, 'none' there"),
        ({"strides": (2,), "pool": "max"}, "pool: 'max' here, 'average' there"),
    ],
)
def test_fewer_strides_and_other_features_are_refused_and_nothing_changes(
    toy: Path,
    toy_bank: Path,
    toy_options: EncodeOptions,
    tmp_path: Path,
    changes: dict[str, object],
    named: str,
) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    before = contents(bank)
    with pytest.raises(UserError, match="holds other features") as caught:
        encode([str(toy / "videos")], bank, replace(toy_options, **changes))  # type: ignore[arg-type]
    assert named in str(caught.value)
    assert contents(bank) == before
    assert banks_of(bank) == [bank]


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((4, 8), []),
        ((8,), []),
        ((2,), [(2,)]),
        ((1, 2, 4), [(2,), (1,)]),
        ((1, 16), [(1, 16)]),
    ],
)
def test_which_sides_are_asked_for(
    paired: Path, asked: Sequence[int], made: list[tuple[int, ...]]
) -> None:
    assert strides_beside(paired, planned(paired), asked) == made


def test_a_run_takes_the_banks_own_strides_where_no_other_is_asked_for(
    paired: Path, toy_bank: Path
) -> None:
    problems: list[str] = []
    banks = Banks.open([paired])
    assert banks.config == Banks.open([toy_bank]).config, "runs on it go on"
    assert choose_strides(banks, 0, 0, "0.5", problems) == (4, 8)
    assert choose_strides(banks, 2, 0, "0.5", problems) == (2, 8)
    assert not problems
    choose_strides(banks, 1, 0, "0.5", problems)
    assert "holds the strides 2, 4, 8; ask for one of them, or encode with" in problems[0]
    assert Banks([Bank.open(paired), Bank.open(toy_bank)], apart=True).strides == (4, 8)


def test_a_model_of_a_stride_beside_its_bank_has_it_made_of_a_video(paired: Path) -> None:
    features = Bank.open(paired).config
    asked = with_strides(features, VLMConfig(slow_stride=2, fast_stride=8))
    assert asked.strides == (2, 4, 8)
    assert replace(asked, strides=features.strides) == features
    joined = VLMConfig(slow_stride=4, fast_stride=8, mm_projector_type="mlp_downsample_2x2_fix")
    assert with_strides(features, joined).strides == (2, 4, 8)


def test_merged_tokens_are_derived(toy_bank: Path) -> None:
    plan = planned(toy_bank)
    merged = replace(plan, features=replace(plan.features, layer="merged", strides=(1,)))
    with pytest.raises(UserError, match=r"derive .* --stride 2,4 --out NEW"):
        strides_beside(toy_bank, merged, (1, 2, 4))


# --- every other command sees all strides ---


def test_plan_work_and_finish_make_it_too(
    toy: Path, toy_bank: Path, whole: Path, tmp_path: Path
) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    flags = ["--out", bank, "--frames", 8, "--device", "cpu", "--tower", toy / "tower"]
    result = command("plan", toy / "videos", "--stride", "2,4,8", "--no-estimate", *flags)
    assert result.exit_code == 0, result.output
    assert "nothing is left to encode" in result.output
    assert "to encode: 9 clips" in result.output
    assert "0 finished, 0 begun, 1 to do" in command("status", bank).output
    result = command("work", bank, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "all 2 units are made" in result.output
    result = command("finish", bank)
    assert result.exit_code == 0, result.output
    assert f"{bank / 'beside' / '2'}: 9 clips" in result.output
    assert_one(bank, whole)


def test_damage_beside_is_found_and_repaired(
    toy: Path, paired: Path, whole: Path, tmp_path: Path
) -> None:
    bank = shutil.copytree(paired, tmp_path / "bank")
    (shard,) = (bank / "beside" / "2" / "shards").glob("*.tar")
    whole_bytes = shard.read_bytes()
    shard.write_bytes(whole_bytes[:5000] + b"?" + whole_bytes[5001:])
    (bank / "beside.json").write_text("{}")
    result = command("verify", bank, "--deep")
    assert result.exit_code == 1
    assert f"{bank}: sound, every byte" in result.output
    assert f"{bank / 'beside' / '2'}: " in result.output
    assert "repair" in result.output
    with pytest.raises(UserError, match=r"repair .* writes it again"):
        Bank.open(bank)
    result = command("repair", bank, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert shard.read_bytes() == whole_bytes
    assert command("verify", bank, "--deep").exit_code == 0
    assert_one(bank, whole)
    shutil.rmtree(bank / "beside" / "2")  # lost: the bank's own strides are read as ever
    opened = Bank.open(bank)
    assert opened.strides == (4, 8)
    with pytest.raises(UserError, match="no bank here"):
        opened.read(0, 2)


def test_gc_diff_export_and_show_see_what_lies_beside(
    paired: Path, whole: Path, toy_bank: Path, tmp_path: Path
) -> None:
    bank = shutil.copytree(paired, tmp_path / "bank")
    (bank / "beside" / "2" / "bank.json.tmp").write_text("?")
    assert "beside" not in command("gc", bank, "--dry-run").output.split("bank.json.tmp")[0]
    assert command("gc", bank).output.count("removed, ") == 2
    assert not list(bank.rglob("*.tmp"))
    assert command("diff", bank, whole).exit_code == 0
    result = command("diff", bank, toy_bank)
    assert result.exit_code == 1
    assert "strides" in result.output
    assert command("export", "wids", bank).exit_code == 0
    assert (bank / "wids.json").exists()
    assert (bank / "beside" / "2" / "wids.json").exists()
    shown = command("show", bank).output
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("stride ")] == list(
        "248"
    )


def test_a_bank_is_derived_of_all_its_strides(paired: Path, whole: Path, tmp_path: Path) -> None:
    for bank, out in ((paired, "ours"), (whole, "theirs")):
        words = ["--stride", "2,8,16", "--codec", "int8", "--frames", 5]
        result = command("derive", bank, "--out", tmp_path / out, *words)
        assert result.exit_code == 0, result.output
    assert_one(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.slow
def test_banks_are_merged_with_what_lies_beside_them(
    toy: Path, toy_options: EncodeOptions, whole: Path, tmp_path: Path
) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    for bank, name in zip(parts, ("train", "test"), strict=True):
        videos = tmp_path / name / "videos"
        shutil.copytree(toy / "videos" / name, videos / name)
        encode([str(videos)], bank, toy_options)
        if name == "test":
            result = command("merge", *parts, "--out", tmp_path / "both")
            assert result.exit_code == 2
            assert "b: has no stride 2 beside it" in result.output
        encode([str(videos)], bank, replace(toy_options, strides=(2,)))
    result = command("merge", *parts, "--out", tmp_path / "both")
    assert result.exit_code == 0, result.output
    assert_one(tmp_path / "both", whole)


def test_a_folder_beside_that_is_not_named_by_strides_is_left_alone(tmp_path: Path) -> None:
    for name in ("16", "2", "2-6", "2.old", "2 (copy)", "abc", "-2"):
        (tmp_path / "beside" / name).mkdir(parents=True)
        (tmp_path / "beside" / name / "plan.json").write_text("{}")
    assert [path.name for path in sides_of(tmp_path)] == ["2", "2-6", "16"]
