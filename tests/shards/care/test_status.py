"""status and gc: told of finished, running and killed banks, without a change to any of them.

pytest tests/shards/care/test_status.py
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

from preprocess.care.repair import repair
from preprocess.cli import care as cli_check
from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from shards.care.garbage import leftovers
from shards.care.inventory import read_inventory
from shards.care.status import Status, status, table
from shards.care.verify import verify
from shards.errors import UserError
from shards.format.commits import attempt_path, done_path, journal_path, part_path
from shards.format.features import Sampling
from shards.format.plan import read_plan, write_plan
from shards.format.quarantine import QuarantineEntry, Reason, update_quarantine
from shards.read.bank import Bank
from shards.write.lock import folder_lock, lock_path
from tests.folders import contents

SHARD_BYTES = 12_000


def run(command: object, *words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])  # type: ignore[arg-type]


def lines(found: Status) -> dict[str, str]:
    rows = [line.split(maxsplit=1) for line in table(found).splitlines()]
    return {row[0]: row[1] for row in rows}


@pytest.fixture
def options(toy_options: EncodeOptions) -> EncodeOptions:
    return replace(toy_options, sampling=Sampling(num_frames=4), shard_bytes=SHARD_BYTES)


@pytest.mark.parametrize("writer", [-3600, 0, 3600])
@pytest.mark.parametrize("reader", [-3600, 0, 3600])
def test_the_rate_is_that_of_the_disks_clock(
    toy_bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: int, reader: int
) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    clock, date = time.time, time.gmtime

    def off_by(seconds: int) -> None:
        monkeypatch.setattr(time, "time", lambda: clock() + seconds)
        monkeypatch.setattr(
            time, "gmtime", lambda at=None: date(clock() + seconds if at is None else at)
        )

    for path in (bank / "shards").iterdir():
        os.utime(path, (clock() - 60, clock() - 60))  # made by an earlier run
    off_by(writer)
    with folder_lock(bank, "preprocess encode"):
        off_by(reader)
        found = status(bank)
        assert found.seconds
        assert found.seconds < 60
        assert found.progress.clips_new == 0
        os.utime(next((bank / "shards").glob("*.done")))  # as if it was just made
        found = status(bank)
    assert found.seconds
    assert found.seconds < 60
    assert found.progress.clips_new == 9


SCRIPT = """
import sys
from pathlib import Path
from preprocess.encode.run import encode
from preprocess.encode.features import EncodeOptions
from shards.format.features import Sampling
videos, out, tower = sys.argv[1:]
encode([videos], Path(out), EncodeOptions(tower=tower, strides=(4, 8),
       sampling=Sampling(num_frames=4), shard_bytes=12_000))
"""


@pytest.mark.slow
def test_a_run_is_watched_and_what_a_kill_leaves_is_told(
    toy: Path, options: EncodeOptions, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    words = [str(toy / "videos"), str(bank), str(toy / "tower")]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words],
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[3],
    )
    try:
        deadline = time.monotonic() + 120
        while not any(bank.glob("shards/*.done")):
            assert process.poll() is None, "the run failed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        before = contents(bank)
        seen = status(bank)
        assert contents(bank) == before
        assert seen.writer
        assert seen.writer.pid == process.pid
        rows = lines(seen)
        assert rows["state"].startswith(
            f"being written by `preprocess encode` (process {process.pid}"
        )
        progress = seen.progress
        units = len(list(bank.glob("shards/*.done")))
        assert progress.units_done == units
        assert progress.clips + progress.clips_begun + progress.clips_left == 9
        assert progress.frames == 4 * progress.clips
        assert progress.clips_new == progress.clips + progress.clips_begun
        assert "clips/s" in rows["rate"]
        assert verify(bank) == []  # of what is finished
    finally:
        process.kill()
        process.wait()
    killed = lines(status(bank))
    assert (
        "no process writes (its writer was killed); run `preprocess encode` again"
        in killed["state"]
    )
    assert "rate" not in killed
    assert verify(bank, deep=True) == []
    needed = contents(bank)
    assert run(cli_check.gc, bank).exit_code == 0
    gone = needed.keys() - contents(bank).keys()  # a run that goes on needs the others
    # of a finished shard its writer's own files, which it was killed before it removed
    over = tuple(f"shards/{path.stem}.tar." for path in bank.glob("shards/*.done"))
    assert all(
        name == ".lock" or name.endswith(".tmp") or name.startswith(over) for name in gone
    ), gone
    assert not [name for name in gone if name.endswith((".tar", ".idx", ".done"))]
    encode([str(toy / "videos")], bank, options)
    assert lines(status(bank))["state"] == "finished"


@pytest.fixture(scope="module")
def finished(
    toy: Path, toy_options: EncodeOptions, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bank of several shards. Read it only."""
    bank = tmp_path_factory.mktemp("finished") / "bank"
    options = replace(toy_options, sampling=Sampling(num_frames=4), shard_bytes=SHARD_BYTES)
    encode([str(toy / "videos")], bank, options)
    return bank


@pytest.fixture
def bank(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "bank")


def test_a_finished_bank_on_one_screen(bank: Path) -> None:
    before = contents(bank)
    result = run(cli_check.status, bank)
    assert result.exit_code == 0
    shown = result.stdout.splitlines()
    assert len(shown) < 20
    rows = lines(status(bank))
    assert rows["state"] == "finished"
    assert rows["clips"].startswith("9 banked, 0 written")
    assert rows["frames"].startswith("36 banked")
    assert rows["quarantine"] == "empty"
    assert {line[10:12] for line in shown} == {"  "}, "columns are not aligned"
    assert contents(bank) == before


def test_what_failed_is_counted_by_reason(bank: Path) -> None:
    reasons = [Reason.TRUNCATED, Reason.DAMAGED, Reason.TRUNCATED, Reason.TRUNCATED]
    entries = [
        QuarantineEntry(f"{k}", f"{k}", f"{k}", "decode", reason, "", 1, 0.1)
        for k, reason in enumerate(reasons)
    ]
    update_quarantine(bank, [], entries)
    row = lines(status(bank))["quarantine"]
    assert row.startswith("4 clips: 3 truncated, 1 damaged; ")


def test_superseded_and_pruned_samples_are_dead_bytes(bank: Path) -> None:
    plan = read_plan(bank)
    assert plan
    keys = frozenset(clip.key for clip in plan.units[0])
    write_plan(bank, replace(plan, pruned=keys))
    found = status(bank)
    assert found.dead == len(keys)
    assert found.dead_bytes > 0
    assert found.dead_shards == ["bank-000000.tar"]
    before = contents(bank)
    result = run(cli_check.gc, bank)
    assert "shards/bank-000000.tar holds no clip that is served" in result.stdout
    assert contents(bank) == before


def test_damaged_records_are_told_of(bank: Path) -> None:
    done = done_path(bank / "shards" / "bank-000000.tar")
    done.write_bytes(done.read_bytes().replace(b"offset", b"0ffset", 1))
    assert "bank-000000.done: does not match its own hash" in lines(status(bank))["damaged"]


def test_no_bank_no_status(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no bank here"):
        status(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- gc ---


def litter(bank: Path) -> set[str]:
    """Leave what killed writers leave; return the names."""
    first, none = bank / "shards" / "bank-000000.tar", bank / "shards" / "bank-000099.tar"
    (bank / "shards" / ".repair").mkdir()
    (bank / "index.zarr.old" / "c").mkdir(parents=True)
    files = [
        part_path(first),
        journal_path(first),
        journal_path(none),
        part_path(none),
        none,
        done_path(none),
        bank / "bank.json.tmp",
        bank / "shards" / "bank-000001.tar.idx.tmp",
        bank / "shards" / ".repair" / "bank-000000.tar.part",
        bank / "index.zarr.old" / "c" / "0",
    ]
    for file in files:
        file.write_bytes(bytes(100))
    tops = {file.relative_to(bank).parts for file in files}
    return {"/".join(part[:2] if part[0] == "shards" else part[:1]) for part in tops}


def test_gc_names_and_removes_what_nothing_refers_to(bank: Path, finished: Path) -> None:
    names = litter(bank)
    (bank / "notes.txt").write_text("of the user")
    before = contents(bank)
    dry = run(cli_check.gc, bank, "--dry-run")
    assert dry.exit_code == 0
    assert contents(bank) == before
    assert {
        piece.path.relative_to(bank).as_posix() for piece in leftovers(read_inventory(bank))
    } == names
    for name in names:
        assert f"  {name}: " in dry.stdout
    assert f"can be removed, {len(names)} in all" in dry.stdout
    done = run(cli_check.gc, bank)
    assert done.stdout.splitlines()[:-1] == dry.stdout.splitlines()[:-1]
    (bank / "notes.txt").unlink()
    assert contents(bank) == contents(finished)
    assert len(Bank.open(bank)) == 9


@pytest.mark.parametrize("made", [False, True])
def test_gc_takes_no_file_of_a_unit_that_a_worker_may_have_just_begun(
    bank: Path, made: bool
) -> None:
    shard = bank / "shards" / "bank-000000.tar"
    if not made:
        done_path(shard).unlink()
    files = {
        attempt_path(shard, "5e1f0c3a", f"{kind}{end}")
        for kind in ("part", "journal", "record", "index", "holder")
        for end in ("", ".tmp")
    }
    for file in files:
        file.write_bytes(bytes(100))
    found = {piece.path for piece in leftovers(read_inventory(bank))}
    assert found == (files if made else set())


def test_gc_takes_turns_with_other_writers(bank: Path) -> None:
    litter(bank)
    with folder_lock(bank, "preprocess encode"):
        result = run(cli_check.gc, bank)
        assert isinstance(result.exception, UserError)
        assert "preprocess encode" in str(result.exception)
        dry = run(cli_check.gc, bank, "--dry-run")
        assert "some of these may be its own" in dry.stdout
    assert leftovers(read_inventory(bank))
    assert not lock_path(bank).exists()


def test_gc_removes_nothing_where_it_cannot_know_what_is_needed(bank: Path) -> None:
    litter(bank)
    (bank / "plan.json").write_bytes(b"{}")
    before = contents(bank)
    result = run(cli_check.gc, bank)
    assert isinstance(result.exception, UserError)
    assert contents(bank) == before


def test_what_gc_would_remove_is_no_damage_and_counted_by_all(bank: Path) -> None:
    names = litter(bank)
    assert verify(bank, deep=True) == []
    assert repair(bank, "nowhere").files == []
    assert status(bank).leftovers == len(names)
    assert f"note: {len(names)} leftovers" in run(cli_check.verify, bank).stdout
    run(cli_check.gc, bank)
    assert status(bank).leftovers == 0
    assert verify(bank, deep=True) == []
