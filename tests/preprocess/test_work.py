"""plan, work and finish as commands: the three make what encode makes.

pytest tests/preprocess/test_work.py
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from preprocess.cli.main import main
from preprocess.cli.work import report_units
from preprocess.toy_models import save_tower
from shards.care.status import status, table
from shards.care.verify import verify
from shards.errors import UserError
from shards.format.manifest import read_manifest
from shards.format.plan import planned, read_plan, write_plan
from shards.format.quarantine import read_entries
from shards.read.bank import Bank
from shards.write.lease import Leases
from shards.write.lock import folder_lock
from tests.folders import contents
from tests.params import few

ROOT = Path(__file__).resolve().parents[2]


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")


def flags(toy: Path, videos: Path, bank: Path, *more: object) -> list[object]:
    given = ["--frames", 4, "--device", "cpu", "--shard-size", 1, "--tower", toy / "tower"]
    return [videos, "--out", bank, *given, *more]


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_plan_work_and_finish_make_what_encode_makes(toy: Path, tmp_path: Path, codec: str) -> None:
    videos = toy / "videos" / "test"
    whole, bank = tmp_path / "whole", tmp_path / "bank"
    assert command("encode", *flags(toy, videos, whole, "--codec", codec)).exit_code == 0
    planned = command("plan", *flags(toy, videos, bank, "--codec", codec, "--no-estimate"))
    assert planned.exit_code == 0, planned.output
    assert read_plan(bank) == read_plan(whole), "what int8 is scaled by is planned"
    early = command("finish", bank)
    assert early.exit_code == 2
    (line,) = early.stderr.splitlines()
    assert f"1 unit of 1 is not made yet; run `preprocess work {bank}`" in line
    worked = command("work", bank, "--device", "cpu", "--share", "2/3")
    assert worked.exit_code == 0, worked.output
    assert "3 clips, 12 frames" in worked.stdout
    assert f"all 1 units are made; `preprocess finish {bank}`" in worked.stdout
    with pytest.raises(UserError, match=r"its run is not finished.*`preprocess work .* `finish "):
        Bank.open(bank)
    assert len(Bank.open(bank, allow_partial=True)) == 3
    again = command("work", bank)
    assert "0 clips, 0 frames" in again.stdout
    finished = command("finish", bank)
    assert finished.exit_code == 0
    assert "3 clips, 12 frames" in finished.stdout
    assert contents(bank) == contents(whole)
    assert command("finish", bank).exit_code == 0
    assert contents(bank) == contents(whole)


def test_what_fails_is_told_by_status_before_and_by_quarantine_after_the_end(
    toy: Path, tmp_path: Path
) -> None:
    videos, bank = tmp_path / "videos", tmp_path / "bank"
    videos.mkdir()
    (videos / "bad.mp4").write_text("no video")
    shutil.copy(toy / "videos" / "test" / "clip-00000.mp4", videos / "good.mp4")
    words = flags(toy, videos, bank)
    assert command("plan", *words, "--no-estimate").exit_code == 0
    assert command("work", bank, "--device", "cpu").exit_code == 0, "whatever was quarantined"
    assert not (bank / "quarantine.jsonl").exists()
    assert status(bank).quarantine == {"cannot-open": 1}
    assert command("plan", *words, "--no-estimate").exit_code == 0
    plan = read_plan(bank)
    assert plan
    assert len(plan.units) == 1, "a clip that has failed is not planned again"
    finished = command("finish", bank)
    assert finished.exit_code == 1
    assert "bad.mp4: cannot-open: " in finished.stdout
    assert list(read_entries(bank)) == ["bad.mp4"]
    assert command("encode", *words).exit_code == 1
    assert read_plan(bank) == plan


@pytest.mark.slow
def test_what_is_planned_with_relative_paths_is_made_from_anywhere(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy)
    words = ["videos/test", "--frames", 4, "--device", "cpu", "--tower", "tower"]
    bank, whole = (Path(os.path.relpath(tmp_path / name)) for name in ("bank", "whole"))
    assert command("encode", *words, "--out", whole).exit_code == 0
    assert command("plan", *words, "--out", bank, "--no-estimate").exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert command("work", "bank", "--device", "cpu").exit_code == 0
    monkeypatch.chdir(tmp_path / "bank")
    assert command("finish", ".").exit_code == 0
    assert contents(tmp_path / "bank") == contents(tmp_path / "whole")
    # and planned again from where it was planned, it is the same tower
    monkeypatch.chdir(toy)
    again = command("encode", *words, "--out", bank)
    assert "3 clips there already" in again.stdout
    assert contents(tmp_path / "bank") == contents(tmp_path / "whole")


def test_no_command_adds_frames_of_another_reader_to_a_bank(toy: Path, tmp_path: Path) -> None:
    def read_by_another(bank: Path) -> None:
        write_plan(bank, replace(planned(bank), decoder="decord"))

    videos, begun, made = tmp_path / "videos", tmp_path / "begun", tmp_path / "made"
    shutil.copytree(toy / "videos" / "test", videos)
    (videos / "bad.mp4").write_text("no video")
    begin = flags(toy, videos, begun)
    assert command("plan", *begin, "--no-estimate").exit_code == 0
    assert command("encode", *flags(toy, videos, made)).exit_code == 1
    read_by_another(begun)
    read_by_another(made)
    shutil.copy(toy / "videos" / "test" / "clip-00000.mp4", videos / "bad.mp4")
    for words in (["work", begun], ["plan", *begin], ["encode", *begin], ["retry", made]):
        refused = command(*words, "--device", "cpu")
        assert refused.exit_code == 2, words
        assert "its videos are read by decord, which this version cannot" in refused.stderr
    assert not [*begun.glob("shards/*.tar")]
    # where nothing is to be encoded nothing differs
    assert command("work", made).exit_code == 0
    assert command("finish", made).exit_code == 1


def test_truncated_videos_are_banked_by_workers_as_the_plan_says(toy: Path, tmp_path: Path) -> None:
    raw = (toy / "videos" / "test" / "clip-00000.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(raw)
    words = flags(toy, tmp_path / "v.mp4", tmp_path / "bank", "--allow-truncated")
    assert command("plan", *words, "--no-estimate").exit_code == 0
    plan = read_plan(tmp_path / "bank")
    assert plan
    assert plan.allow_truncated
    from preprocess.encode.features import EncodeOptions

    assert EncodeOptions.of_plan(plan).allow_truncated
    assert command("plan", *words[:-1], "--no-estimate").exit_code == 0
    assert b"allow_truncated" not in (tmp_path / "bank" / "plan.json").read_bytes()


@pytest.mark.slow
def test_a_machine_on_which_all_lies_elsewhere_is_told_where(toy: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(toy / "videos" / "test", there / "videos")
    shutil.copytree(toy / "tower", there / "tower")
    words = flags(toy, there / "videos", tmp_path / "bank")
    words[words.index(toy / "tower")] = there / "tower"
    assert command("encode", *words).exit_code == 0
    shutil.rmtree(tmp_path / "bank" / "shards")
    there.rename(here)
    lost = command("work", tmp_path / "bank", "--device", "cpu")
    assert lost.exit_code == 2
    assert str(there / "tower") in lost.stderr
    other = shutil.copytree(toy / "tower", tmp_path / "other")
    save_tower(other, seed=1)
    where = ["--device", "cpu", "--video-root", here / "videos", "--tower"]
    refused = command("work", tmp_path / "bank", *where, other)
    assert refused.exit_code == 2
    assert "tower_digest" in refused.stderr
    assert command("work", tmp_path / "bank", *where, here / "tower").exit_code == 0
    assert command("finish", tmp_path / "bank").exit_code == 0
    assert len(Bank.open(tmp_path / "bank")) == 3


def test_shards_of_a_plan_that_was_lost_are_not_taken_for_those_of_a_new_one(
    toy: Path, toy_bank: Path, tmp_path: Path
) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    for name in ("plan.json", "bank.json"):
        (bank / name).unlink()
    before = contents(bank)
    for words in (["plan", "--no-estimate"], ["encode"]):
        given = flags(toy, toy / "videos" / "test", bank)
        refused = command(words[0], *given, *words[1:])
        assert refused.exit_code == 2
        assert "has shards and no plan.json" in refused.stderr.splitlines()[-1]
        assert contents(bank) == before


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_machine_without_the_videos_takes_nothing_and_blames_no_clip(
    toy: Path, tmp_path: Path, left: str
) -> None:
    videos, bank, here = tmp_path / "videos", tmp_path / "bank", tmp_path / "here"
    shutil.copytree(toy / "videos" / "test", videos / "sub")
    assert command("plan", *flags(toy, videos, bank), "--no-estimate").exit_code == 0
    videos.rename(here)
    if left == "an empty folder":  # a mount point
        videos.mkdir()
    stopped = command("work", bank, "--device", "cpu")
    assert stopped.exit_code == 2
    (line,) = stopped.stderr.splitlines()[-1:]
    assert f"{videos}: " in line
    assert "--video-root" in line
    assert status(bank).quarantine == {}
    if left == "nothing":
        where = ["--device", "cpu", "--video-root", here]
        assert "3 clips, 12 frames" in command("work", bank, *where).stdout


def test_a_video_that_is_another_one_than_planned_is_named_and_planned_again(
    toy: Path, tmp_path: Path
) -> None:
    videos, bank = tmp_path / "videos", tmp_path / "bank"
    shutil.copytree(toy / "videos" / "test", videos)
    words = flags(toy, videos, bank)
    assert command("plan", *words, "--no-estimate").exit_code == 0
    shutil.copy(toy / "videos" / "train" / "clip-00000.mp4", videos / "clip-00001.mp4")
    assert command("work", bank, "--device", "cpu").exit_code == 0
    finished = command("finish", bank)
    assert finished.exit_code == 1
    assert "clip-00001.mp4: not-as-planned: " in finished.stdout
    assert sorted(Bank.open(bank).ids) == ["clip-00000.mp4", "clip-00002.mp4"]
    assert command("encode", *words).exit_code == 0
    assert len(Bank.open(bank)) == 3
    assert not read_entries(bank)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_a_plan_says_why_its_tower_computes_as_it_does(
    toy: Path, tmp_path: Path, device: str, dtype: str
) -> None:
    words = [str(toy / "videos"), "--frames", "2", "--tower", str(toy / "tower"), "--no-estimate"]
    told = command("plan", *words, "--out", tmp_path / "bank", "--device", device)
    assert told.exit_code == 0, told.output
    plan = planned(tmp_path / "bank")
    assert (plan.features.tower_dtype, plan.tower.device) == (dtype, device)
    assert plan.tower.reason
    assert f"the tower computes in {dtype}: {plan.tower.reason}" in told.stderr
    # as it was asked for: no choice was made
    own = [*words, "--out", tmp_path / "own", "--device", device, "--tower-dtype", dtype]
    assert "the tower computes" not in command("plan", *own).stderr
    assert planned(tmp_path / "own").tower.reason is None


@pytest.mark.parametrize("command_", [pytest.param("retry", marks=pytest.mark.slow), "encode"])
@pytest.mark.parametrize("then", few(["put back", "kept", "replaced once more"], 3))
def test_a_clip_that_was_not_as_planned_is_banked_as_its_file_is_now(
    toy: Path, toy_bank: Path, tmp_path: Path, command_: str, then: str
) -> None:
    videos, bank = tmp_path / "videos", tmp_path / "bank"
    shutil.copytree(toy / "videos" / "test", videos)
    name, words = "clip-00001.mp4", flags(toy, videos, bank)
    files = {"put back": "test/clip-00001.mp4", "kept": "train/clip-00000.mp4"}
    assert command("plan", *words, "--no-estimate").exit_code == 0
    shutil.copy(toy / "videos" / files["kept"], videos / name)
    assert command("work", bank, "--device", "cpu").exit_code == 0
    assert command("finish", bank).exit_code == 1
    now = files.get(then, "train/clip-00001.mp4")
    shutil.copy(toy / "videos" / now, videos / name)
    again = ["retry", bank, "--device", "cpu"] if command_ == "retry" else ["encode", *words]
    result = command(*again)
    assert result.exit_code == 0, result.output
    assert "1 clip, 4 frames" in result.stdout
    assert not read_entries(bank)
    opened, whole = Bank.open(bank), tmp_path / "whole"
    assert command("encode", *flags(toy, videos, whole)).exit_code == 0
    fresh = Bank.open(whole)
    assert sorted(opened.ids) == sorted(fresh.ids)
    for id_ in fresh.ids:
        row, theirs = opened.row(id_), fresh.row(id_)
        assert opened.meta(row) == fresh.meta(theirs)
        assert (opened.read(row, 4) == fresh.read(theirs, 4)).all()
    assert "0 clips, 0 frames" in command("encode", *words).stdout
    assert verify(bank, deep=True) == []


def test_the_batches_asked_for_are_those_of_a_plan_that_has_nothing_yet(
    toy: Path, tmp_path: Path
) -> None:
    bank, words = tmp_path / "bank", flags(toy, toy / "videos" / "test", tmp_path / "bank")
    assert command("plan", *words, "--no-estimate").exit_code == 0
    assert command("encode", *words, "--batch-frames", 2, "--tower-threads", 1).exit_code == 0
    tower = planned(bank).tower
    assert (tower.batch_frames, tower.threads) == (2, 1)
    (encoded,) = read_manifest(bank).provenance.encoded
    assert (encoded["batch_frames"], encoded["tower_threads"]) == (2, 1)
    # once there are shards, the plan says how they were made
    shutil.copytree(toy / "videos" / "test", tmp_path / "more" / "more")
    more = ["encode", tmp_path / "more", *words[1:]]
    assert command(*more, "--batch-frames", 4).exit_code == 0
    assert planned(bank).tower == tower


def test_encode_beside_a_worker_that_lives_ends_by_naming_it(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.write.lock.BEAT_SECONDS", 0.1)
    bank, words = tmp_path / "bank", flags(toy, toy / "videos" / "test", tmp_path / "bank")
    assert command("plan", *words, "--no-estimate").exit_code == 0
    with Leases(bank, "preprocess work") as leases:
        assert leases.take(0)
        ended = command("encode", *words)
        assert ended.exit_code == 2
        assert f"1 of them being made: bank-000000 by {leases.writer}" in ended.stderr
        worked = command("work", bank, "--device", "cpu")
        assert worked.exit_code == 0
        assert f"1 of 1 units are being made elsewhere: {leases.writer}" in worked.stdout
        assert f"being written by 1 worker: process {os.getpid()}" in table(status(bank))
        swept = command("gc", bank)
        assert swept.exit_code == 2
        assert f"{leases.writer} may be at work here" in swept.stderr
        assert f"note: {leases.writer} writes here" in command("verify", bank).stdout
    assert command("encode", *words).exit_code == 0


def test_work_and_finish_refuse_what_they_cannot_do_in_a_line(
    toy_bank: Path, tmp_path: Path
) -> None:
    for words in (["work", tmp_path / "none"], ["finish", tmp_path / "none"]):
        result = command(*words)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert "no plan here" in line
        assert "preprocess plan" in line
        assert not (tmp_path / "none").exists()
    result = command("work", toy_bank, "--share", "3/3")
    assert result.exit_code == 2
    assert "K from 0 to N - 1" in result.stderr
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    with folder_lock(bank, "preprocess encode"):
        result = command("finish", bank)
    assert result.exit_code == 2
    assert "`preprocess encode`" in result.stderr


# --- the job script for Slurm ---

SBATCH = """#!/bin/bash
printf '%s\\n' "$@" >> {log}; echo --- >> {log}
echo 4711
"""


@pytest.fixture
def script(toy_bank: Path, tmp_path: Path) -> Path:
    bank = shutil.copytree(toy_bank, tmp_path / "a bank's")
    result = command("work", bank, "--template", "slurm")
    assert result.exit_code == 0
    path = tmp_path / "job.sh"
    path.write_text(result.stdout)
    return path


def run(script: Path, log: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    (log.parent / "bin").mkdir(exist_ok=True)
    sbatch = log.parent / "bin" / "sbatch"
    sbatch.write_text(SBATCH.format(log=log))
    sbatch.chmod(0o755)
    path = {"PATH": f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    return subprocess.run(
        ["bash", str(script)], env=clean | path | environ, capture_output=True, text=True
    )


def test_the_script_asks_for_an_array_that_may_be_requeued(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = [line for line in lines if line.startswith("#SBATCH")]
    begun = next(k for k, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(line) < begun for line in asked), "Slurm stops reading at a command"
    words = [line.removeprefix("#SBATCH ") for line in asked]
    assert "--array=0-3" in words
    assert "--requeue" in words
    assert "--open-mode=append" in words
    assert all(line.count(" ") == 1 for line in asked), "Slurm takes a comment for an option"


def test_run_by_hand_it_submits_itself_and_after_it_the_end(script: Path, tmp_path: Path) -> None:
    done = run(script, tmp_path / "log")
    assert done.returncode == 0, done.stderr
    first, second, _ = (tmp_path / "log").read_text().split("---\n")
    assert first.splitlines() == ["--parsable", str(script)]
    words = second.splitlines()
    assert "--dependency=afterok:4711" in words
    wrapped = words[-1].removeprefix("--wrap=")
    told = subprocess.run(
        ["sh", "-c", wrapped],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert told.returncode == 0, told.stderr
    assert "9 clips" in told.stdout


@pytest.mark.slow
def test_in_a_task_of_the_array_it_works(script: Path, tmp_path: Path) -> None:
    done = run(script, tmp_path / "log", SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_COUNT="4")
    assert done.returncode == 0, done.stderr
    assert "all 1 units are made" in done.stdout
    assert not (tmp_path / "log").exists(), "and submits nothing"


def test_finish_needs_no_torch(toy_bank: Path, tmp_path: Path) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    code = (
        "import sys; from preprocess.cli.main import main\n"
        f"try: main(['finish', {str(bank)!r}])\n"
        "except SystemExit as left: assert left.code == 0, left.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_a_worker_takes_what_is_planned_while_it_works(toy: Path, tmp_path: Path) -> None:
    videos, bank = tmp_path / "videos", tmp_path / "bank"
    videos.mkdir()
    names = ["clip-00000.mp4", "clip-00001.mp4"]
    words = [*flags(toy, videos, bank), "--no-estimate"]
    shutil.copy(toy / "videos" / "test" / names[0], videos)
    assert command("plan", *words).exit_code == 0
    at_work = [sys.executable, "-m", "preprocess", "work", str(bank), "--device", "cpu"]
    with subprocess.Popen(at_work, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        while worker.poll() is None and not [*bank.glob("shards/*.lease")]:
            time.sleep(0.005)
        # it has read the plan, and holds the only unit
        worker.send_signal(signal.SIGSTOP)
        shutil.copy(toy / "videos" / "test" / names[1], videos)
        assert command("plan", *words).exit_code == 0
        assert command("plan", *words, "--stride", 2).exit_code == 0
        worker.send_signal(signal.SIGCONT)
        said = worker.communicate(timeout=60)[0]
    assert worker.returncode == 0
    assert f"all 3 units are made; `preprocess finish {bank}`" in said
    assert command("finish", bank).exit_code == 0
    assert Bank.open(bank).ids == names


def test_units_that_nobody_makes_are_not_said_to_be_made_elsewhere(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "bank"
    words = flags(toy, toy / "videos" / "test", bank)
    assert command("plan", *words, "--no-estimate").exit_code == 0
    report_units(bank)
    assert (
        capsys.readouterr().out
        == f"1 of 1 units are not made; run `preprocess work {bank}` again\n"
    )
