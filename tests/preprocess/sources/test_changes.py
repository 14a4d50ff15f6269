"""Adding, changing, moving or removing k videos encodes exactly k again, and moves no old shard.

pytest tests/preprocess/sources/test_changes.py
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from preprocess.care.retry import retry
from preprocess.cli.main import main
from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from preprocess.sources.find import clips_under
from shards.format.plan import ClipSource, Plan, read_plan
from shards.format.quarantine import read_entries
from shards.format.samples import sample_key
from shards.read.bank import Bank
from tests.params import few


@pytest.fixture
def videos(toy: Path, tmp_path: Path) -> Path:
    """Six videos that a test may change."""
    return Path(shutil.copytree(toy / "videos" / "train", tmp_path / "videos"))


@pytest.fixture
def run(videos: Path, toy_options: EncodeOptions, tmp_path: Path) -> Callable[..., int]:
    """A function that encodes the videos and returns how many clips were encoded."""
    options = replace(toy_options, shard_bytes=3 * 8 * 5 * 64 * 2)  # three clips

    def run(folder: Path = videos, **how: bool) -> int:
        return encode([str(folder)], tmp_path / "bank", options, **how).clips

    return run


@pytest.fixture
def bank(run: Callable[..., int], tmp_path: Path) -> Path:
    assert run() == 6
    return tmp_path / "bank"


def plan_of(bank: Path) -> Plan:
    plan = read_plan(bank)
    assert plan
    return plan


def shards(bank: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (bank / "shards").iterdir()}


def features(bank: Path) -> dict[str, np.ndarray]:
    opened = Bank.open(bank)
    return {id_: opened.read(row, 4) for row, id_ in enumerate(opened.ids)}


def manifest(bank: Path) -> dict[str, object]:
    return dict(json.loads((bank / "bank.json").read_bytes()))


def touch(file: Path) -> None:
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**9))


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")


def test_a_plan_tells_what_each_source_was(bank: Path, videos: Path) -> None:
    assert [len(unit) for unit in plan_of(bank).units] == [3, 3]
    for clip in plan_of(bank).clips:
        stat = Path(clip.path).stat()
        assert (clip.size, clip.mtime_ns, clip.frames) == (stat.st_size, stat.st_mtime_ns, 8)
        assert clip.digest


@pytest.mark.parametrize("count", few([1, 3], 2))
def test_changed_videos_are_encoded_again_into_an_overlay(
    bank: Path, videos: Path, toy: Path, run: Callable[..., int], count: int
) -> None:
    old, before = features(bank), shards(bank)
    names = [f"clip-0000{k}.mp4" for k in range(count)]
    for k, name in enumerate(names):
        shutil.copy(toy / "videos" / "test" / f"clip-0000{k}.mp4", videos / name)
    assert run() == count
    after = shards(bank)
    assert {name: after[name] for name in before} == before, "an old shard was touched"
    assert [[clip.id for clip in unit] for unit in plan_of(bank).units[2:]] == [
        sorted(names, key=sample_key)
    ]
    new = features(bank)
    assert set(new) == set(old)
    for id_ in new:
        assert (new[id_] == old[id_]).all() == (id_ not in names)
    dead = manifest(bank)["superseded"]
    assert isinstance(dead, dict)
    assert sorted(key for keys in dead.values() for key in keys) == sorted(map(sample_key, names))
    assert manifest(bank)["clips"] == 6
    plan = (bank / "plan.json").read_bytes()
    assert run() == 0
    assert shards(bank) == after
    assert (bank / "plan.json").read_bytes() == plan, "the old video is in its old unit"


@pytest.mark.slow
def test_a_video_that_changed_into_a_bad_one_is_not_served_any_more(
    bank: Path, videos: Path, toy: Path, run: Callable[..., int]
) -> None:
    (videos / "clip-00004.mp4").write_bytes(b"no video any more")
    assert run() == 0
    assert "clip-00004.mp4" not in Bank.open(bank).ids
    assert list(read_entries(bank)) == ["clip-00004.mp4"]
    assert run() == 0
    shutil.copy(toy / "videos" / "train" / "clip-00004.mp4", videos)
    assert run() == 1, "a mended video is a changed one"
    assert "clip-00004.mp4" in Bank.open(bank).ids
    assert read_entries(bank) == {}
    assert retry(bank).clips == 0


def test_a_touched_video_is_not_encoded_again_and_a_copied_folder_is_the_same(
    bank: Path, videos: Path, run: Callable[..., int], tmp_path: Path
) -> None:
    before = shards(bank)
    for file in videos.iterdir():
        touch(file)
    assert run() == 0
    for clip in plan_of(bank).clips:
        assert clip.mtime_ns == Path(clip.path).stat().st_mtime_ns
    moved = videos.rename(tmp_path / "elsewhere")
    assert run(moved) == 0
    assert {Path(clip.path).parent for clip in plan_of(bank).clips} == {moved}
    assert shards(bank) == before


@pytest.mark.slow
def test_added_videos_make_new_units(
    bank: Path, videos: Path, toy: Path, run: Callable[..., int]
) -> None:
    before = shards(bank)
    for k in range(2):
        shutil.copy(toy / "videos/test" / f"clip-0000{k}.mp4", videos / f"late{k}.mp4")
    assert run() == 2
    after = shards(bank)
    assert {name: after[name] for name in before} == before
    assert len(plan_of(bank).units) == 3


def test_removed_videos_stay_until_they_are_pruned_and_may_come_back(
    bank: Path, videos: Path, run: Callable[..., int], tmp_path: Path, toy: Path
) -> None:
    before, old = shards(bank), features(bank)
    kept = (videos / "clip-00001.mp4").rename(tmp_path / "kept.mp4")
    words = ["encode", videos, "--out", bank, "--tower", toy / "tower", "--frames", 8]
    result = command(*words, "--device", "cpu")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if "no longer exist" in line]
    assert "1 clip (clip-00001.mp4)" in line
    assert "--prune" in line
    assert set(features(bank)) == set(old)
    result = command(*words, "--device", "cpu", "--prune")
    assert "no longer served" in result.stdout
    assert set(features(bank)) == set(old) - {"clip-00001.mp4"}
    assert plan_of(bank).pruned == {sample_key("clip-00001.mp4")}
    assert run() == 0
    assert "clip-00001.mp4" not in features(bank)
    kept.rename(videos / "clip-00001.mp4")
    assert run() == 0
    assert plan_of(bank).pruned == frozenset()
    assert set(features(bank)) == set(old)
    assert shards(bank) == before


def test_videos_that_are_not_asked_for_are_not_removed(
    bank: Path, videos: Path, toy_options: EncodeOptions
) -> None:
    encode([str(videos / "clip-00002.mp4")], bank, toy_options, prune=True)
    assert len(Bank.open(bank)) == 6


@pytest.mark.slow
def test_a_line_taken_out_of_the_quarantine_is_encoded_again(
    videos: Path, toy: Path, run: Callable[..., int], tmp_path: Path
) -> None:
    good = (videos / "clip-00000.mp4").read_bytes()
    (videos / "clip-00000.mp4").write_bytes(b"bad")
    assert run() == 5
    bank = tmp_path / "bank"
    (bank / "quarantine.jsonl").unlink()
    assert run() == 0
    assert list(read_entries(bank)) == ["clip-00000.mp4"]
    (videos / "clip-00000.mp4").write_bytes(good)
    assert run() == 1


def test_a_reader_goes_on_while_the_bank_grows(
    bank: Path, videos: Path, toy: Path, run: Callable[..., int]
) -> None:
    opened = Bank.open(bank)
    before = [opened.read(row, 4).copy() for row in range(3)]
    shutil.copy(toy / "videos/test/clip-00000.mp4", videos / "clip-00000.mp4")
    shutil.copy(toy / "videos/test/clip-00001.mp4", videos / "late.mp4")
    assert run() == 2
    for row in range(3):
        assert (opened.read(row, 4) == before[row]).all()
    assert (len(opened), len(Bank.open(bank))) == (6, 7)


def test_a_bank_being_extended_opens_as_it_was(
    bank: Path, videos: Path, toy: Path, run: Callable[..., int]
) -> None:
    shutil.copy(toy / "videos/test/clip-00001.mp4", videos / "late.mp4")
    manifest_then, plan_then = (bank / "bank.json").read_bytes(), plan_of(bank)
    index = shutil.copytree(bank / "index.zarr", bank.parent / "index")
    assert run() == 1
    # as after the new shard's commit, before the catalogue
    (bank / "bank.json").write_bytes(manifest_then)
    shutil.rmtree(bank / "index.zarr")
    index.rename(bank / "index.zarr")
    assert len(plan_of(bank).units) > len(plan_then.units)
    assert len(Bank.open(bank)) == 6


def test_unusual_names_and_one_stem_twice_are_clips_of_their_own(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    long = "/".join("d" * 60 for _ in range(4)) + "/" + "x" * 90 + ".mp4"
    names = ["a.mp4", "a.mkv", "b/a.mp4", "v1.2.final.mp4", "影片 é.mp4", long]
    for name in names:
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(toy / "videos/test/clip-00000.mp4", tmp_path / "videos" / name)
    bank = tmp_path / "bank"
    assert encode([str(tmp_path / "videos")], bank, toy_options).clips == len(names)
    assert encode([str(tmp_path / "videos")], bank, toy_options).skipped == len(names)
    opened = Bank.open(bank)
    assert set(opened.ids) == set(names)
    assert {clip.key for clip in plan_of(bank).clips} == set(map(sample_key, names))
    assert len({sample_key(name) for name in names}) == len(names)


# --- moved, and tried again ---


@pytest.mark.slow
def test_a_retry_finds_videos_that_have_moved(
    videos: Path, toy: Path, run: Callable[..., int], tmp_path: Path
) -> None:
    good = (videos / "clip-00003.mp4").read_bytes()
    (videos / "clip-00003.mp4").write_bytes(b"bad")
    assert run() == 5
    bank = tmp_path / "bank"
    moved = videos.rename(tmp_path / "elsewhere")
    (moved / "clip-00003.mp4").write_bytes(good)
    assert retry(bank).clips == 0
    result = command("retry", bank, "--video-root", moved, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "clip-00003.mp4" in Bank.open(bank).ids
    assert run(moved) == 0


def test_a_moved_clip_is_found_under_a_root_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "new" / "sub").mkdir(parents=True)
    (tmp_path / "new" / "sub" / "a.mp4").write_bytes(b"a")
    (tmp_path / "new" / "v.tar").write_bytes(b"tar")
    (tmp_path / "still.mp4").write_bytes(b"still")
    gone = ClipSource("sub/a.mp4", "a", "/old/sub/a.mp4", "sub/a.mp4")
    member = ClipSource("x.mp4", "x", "/old/v.tar", "x.mp4", offset=512, nbytes=1)
    here = ClipSource("a", "s", str(tmp_path / "still.mp4"), "sub/a.mp4")
    lost = ClipSource("b.mp4", "b", "/old/b.mp4", "b.mp4")
    found = clips_under([gone, member, here, lost], [str(tmp_path), str(tmp_path / "new")])
    new = str(tmp_path / "new")
    assert [clip.path for clip in found] == [
        f"{new}/sub/a.mp4",
        f"{new}/v.tar",
        here.path,
        lost.path,
    ]
