"""`preprocess bench`: stages measured apart, hours that follow from them, one table.

pytest tests/preprocess/encode/test_bench.py
"""

import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from preprocess.cli.main import main
from preprocess.encode.bench import Asked, Job, Pace, spread, table
from preprocess.encode.estimate import expected_frames, share_of_most
from shards.format.plan import ClipSource

GPU = Pace(decode=0.040, tower=0.010, write=0.001, nbytes=100_000, clips=8, frames=512, cores=16)
JOB = Job(clips=1_000, frames=36_000)


def hours(pace: Pace, decoders: int, devices: int, machines: int = 1) -> float:
    return pace.seconds(JOB.frames, decoders, devices, machines) / 3600


def test_the_slowest_stage_sets_the_pace() -> None:
    assert hours(GPU, 1, 1) == pytest.approx(0.4)
    assert hours(GPU, 2, 1) == pytest.approx(0.2)
    assert hours(GPU, 4, 1) == hours(GPU, 64, 1) == pytest.approx(0.1)
    assert hours(GPU, 4, 4) == pytest.approx(0.1 / 4)
    assert hours(GPU, 4, 4, 2) == pytest.approx(0.1 / 8)
    assert GPU.decoders == 4


def test_decoders_share_the_cores_of_their_machine() -> None:
    assert hours(GPU, 4, 8) == hours(GPU, 64, 8) == hours(GPU, 2, 8) == pytest.approx(0.4 / 16)
    assert hours(GPU, 4, 8, 2) == pytest.approx(0.4 / 32)


def test_on_a_cpu_all_stages_share_its_cores_whatever_devices_are_asked_for() -> None:
    cpu = Pace(decode=0.010, tower=0.060, write=0.010, nbytes=1, clips=1, frames=1, cores=1,
               tower_cores=1)  # fmt: skip
    for decoders, devices in ((1, 1), (8, 1), (1, 8)):
        assert hours(cpu, decoders, devices) == pytest.approx(0.8)
    assert hours(cpu, 1, 1, 2) == pytest.approx(0.4)
    assert cpu.decoders == 1
    # a tower that keeps two cores busy leaves none for decoding: (10 + 2 * 60 + 10) / 2 ms
    assert hours(replace(cpu, cores=2, tower_cores=2), 2, 1) == pytest.approx(0.7)


def test_the_table_tells_hours_and_money() -> None:
    lines = table(GPU, JOB, Asked((1, 4), (1,), (1, 2), price=2.0))
    assert lines[0] == (
        "1,000 clips, 36,000 frames, 3.6 GB in the bank; measured on 8 clips, 512 frames"
    )
    text = "\n".join(lines)
    assert re.search(r"decode, one decoder +40\.00 +25 +24m00s", text)
    assert re.search(r"tower, one device +10\.00 +100 +6m00s", text)
    assert re.search(r"hours \(cost\) by +1 device +2 x 1 device", text)
    assert re.search(r"1 decoder a device +0\.4 \(0\.80\) +0\.2 \(0\.80\)", text)
    assert re.search(r"4 decoders a device +0\.1 \(0\.20\) +0\.05 \(0\.20\)", text)
    assert lines[-1].startswith("4 decoders, a core each, keep a device busy")
    assert lines[-1].endswith("; the 16 cores of this machine feed 4")
    assert "(" not in table(GPU, JOB, Asked((1,), (1,), (1,)))[7]


def test_clips_of_all_sizes_are_measured_and_none_that_cannot_be_opened() -> None:
    clips = [ClipSource(str(k), str(k), "", "", size=k, frames=k and 8) for k in range(9)]
    assert [clip.size for clip in spread(clips, 4)] == [2, 4, 6, 8]
    assert len(spread(clips, 100)) == 8
    assert spread(clips[:1], 3) == []


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_the_command_measures_and_leaves_nothing(toy: Path, tmp_path: Path, codec: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["bench", toy / "videos" / "test", "--tower", toy / "tower", "--out", disk]
    words += ["--frames", 4, "--clips", 2, "--codec", codec, "--price", 1]
    words += [] if codec == "none" else ["--device", "cpu"]
    result = CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("3 clips, 12 frames, ")
    assert "measured on 2 clips, 8 frames" in result.stdout
    for stage in ("decode", "tower", "write"):
        found = re.search(rf"^{stage}, one \w+ +([\d.]+)", result.stdout, re.MULTILINE)
        assert found
        assert float(found[1]) > 0
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_clips_of_archives_count_as_many_frames_as_those_that_were_tried(
    toy: Path, tmp_path: Path
) -> None:
    """Their headers are not read: all that a plan knows is how many frames sampling takes at most."""
    file, *members = sorted((toy / "videos" / "test").iterdir())
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in members:
            tar.add(path, path.name)
    inputs = [tmp_path / "a.tar", file]

    def said(command: str, *more: object) -> str:
        words = [command, *inputs, "--tower", toy / "tower", "--device", "cpu", *more]
        result = CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")
        assert result.exit_code == 0, result.output
        return result.stdout

    (banked,) = re.findall(r", (\d+) frames", said("encode", "--out", tmp_path / "bank"))
    assert said("bench").startswith(f"3 clips, {banked} frames, ")
    planned = said("plan", "--out", tmp_path / "planned", "--no-estimate")
    (most,) = re.findall(r"to encode: 3 clips, at most (\d+) frames", planned)
    assert f"3 clips, at most {most} frames in 1 shard" in planned
    assert int(most) > 3 * int(banked)


def test_expected_frames_are_of_the_kind_that_was_tried() -> None:
    file, member = ClipSource("f", "f", "", "", frames=10), ClipSource("m", "m", "", "", frames=64)
    member = replace(member, offset=512)
    assert share_of_most([(file, 7), (member, 16), (replace(member, frames=32), 8)]) == 0.25
    assert share_of_most([(file, 7)]) == 1
    assert expected_frames([file, member, member, replace(member, frames=None)], 0.25) == 42


def test_a_list_of_what_is_skipped_is_not_named_where_there_is_no_bank(
    toy: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy / "videos" / "test", tmp_path / "v")
    (tmp_path / "v" / "note.txt").write_text("x")
    line = ["bench", tmp_path / "v", "--tower", toy / "tower", "--out", tmp_path, "--clips", 1]
    result = CliRunner().invoke(main, [str(word) for word in line], prog_name="preprocess")
    assert result.stdout.splitlines()[0] == "skipped: 1 file of unknown type: .txt 1"


def test_what_cannot_be_measured_is_said_in_a_line(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    for words, told in (
        ([tmp_path / "bad.mp4"], "none of the clips that were tried can be encoded"),
        ([tmp_path / "bad.mp4", "--out", tmp_path / "no"], "no such folder"),
        ([tmp_path / "bad.mp4", "--decoders", "1,x"], "positive integers such as 1,2,4"),
    ):
        line = [str(w) for w in ("bench", *words, "--tower", toy / "tower", "--device", "cpu")]
        result = CliRunner().invoke(main, line, prog_name="preprocess")
        assert result.exit_code == 2
        assert told in result.stderr.splitlines()[-1]
    shutil.rmtree(tmp_path)
