"""The quarantine: who enters it with what facts, and how `preprocess retry` empties it.

pytest tests/preprocess/encode/test_retry.py
"""

import json
import os
import re
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from preprocess.care.retry import retry
from preprocess.cli.main import main
from preprocess.decode.clip import Clip
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from preprocess.decode.source import SourceReader
from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from preprocess.toy_models import save_tower
from shards.errors import UserError
from shards.format.features import Sampling
from shards.format.plan import ClipSource, read_plan, write_plan
from shards.format.quarantine import (
    QuarantineEntry,
    Reason,
    quarantine_path,
    read_entries,
    read_quarantine,
    update_quarantine,
)
from shards.format.samples import sample_key
from shards.read.bank import Bank
from shards.write.lease import Leases
from shards.write.lock import folder_lock


@pytest.fixture
def videos(toy: Path, tmp_path: Path) -> Path:
    """Two good videos and two bad ones."""
    folder = tmp_path / "videos"
    shutil.copytree(toy / "videos" / "test", folder)
    (folder / "clip-00002.mp4").rename(tmp_path / "kept.mp4")
    (folder / "clip-00002.mp4").write_bytes(b"no video")
    (folder / "bad.mp4").write_bytes(b"")
    return folder


@pytest.fixture
def bank(videos: Path, toy_options: EncodeOptions, tmp_path: Path) -> Path:
    encode([str(videos)], tmp_path / "bank", toy_options)
    return tmp_path / "bank"


def mend(videos: Path) -> None:
    shutil.copy(videos.parent / "kept.mp4", videos / "clip-00002.mp4")


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")


def test_an_entry_tells_all_that_is_known(bank: Path, videos: Path) -> None:
    entry = read_entries(bank)["bad.mp4"]
    assert set(asdict(entry)) == {
        *("id", "key", "path", "stage", "reason", "message", "attempts", "seconds"),
    }
    assert (entry.key, entry.path) == (sample_key("bad.mp4"), str(videos / "bad.mp4"))
    assert (entry.stage, entry.reason, entry.attempts) == ("decode", "cannot-open", 1)
    assert 0 <= entry.seconds < 60


def test_a_mended_video_joins_the_bank_and_the_other_counts_another_attempt(
    bank: Path, videos: Path, toy_bank: Path
) -> None:
    before = {path.name: path.read_bytes() for path in (bank / "shards").iterdir()}
    mend(videos)
    result = command("retry", bank, "--device", "cpu")
    assert result.exit_code == 1
    assert "1 clip, 8 frames" in result.stdout
    assert "bad.mp4: cannot-open: " in result.stdout
    after = {path.name: path.read_bytes() for path in (bank / "shards").iterdir()}
    assert {name: after[name] for name in before} == before
    assert "bank-000001.tar" in after
    (entry,) = read_quarantine(bank)
    assert (entry.id, entry.attempts) == ("bad.mp4", 2)
    opened, whole = Bank.open(bank), Bank.open(toy_bank)
    assert set(opened.ids) == {f"clip-0000{k}.mp4" for k in range(3)}
    mended = opened.read(opened.row("clip-00002.mp4"), 4)
    assert (mended == whole.read(whole.row("test/clip-00002.mp4"), 4)).all()


@pytest.mark.slow
def test_a_retry_in_which_all_fail_adds_nothing_but_attempts(bank: Path) -> None:
    before = {path.name: path.read_bytes() for path in (bank / "shards").iterdir()}
    plan, manifest = read_plan(bank), (bank / "bank.json").read_bytes()
    for attempts in (2, 3):
        assert len(retry(bank).failures) == 2
        assert {entry.attempts for entry in read_quarantine(bank)} == {attempts}
        assert len(read_quarantine(bank)) == 2
    assert {path.name: path.read_bytes() for path in (bank / "shards").iterdir()} == before
    assert read_plan(bank) == plan
    assert (bank / "bank.json").read_bytes() == manifest


def test_a_retry_of_nothing_is_done_at_once(toy_bank: Path, tmp_path: Path) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    result = command("retry", bank)
    assert result.exit_code == 0
    assert "0 clips" in result.stdout


def test_encode_after_a_retry_finds_everything_done(
    bank: Path, videos: Path, toy_options: EncodeOptions
) -> None:
    mend(videos)
    (videos / "bad.mp4").write_bytes((videos / "clip-00000.mp4").read_bytes())
    assert retry(bank).clips == 2
    assert not quarantine_path(bank).exists()
    again = encode([str(videos)], bank, toy_options)
    assert (again.clips, again.skipped, again.failures) == (0, 4, [])
    assert Bank.open(bank).ids[2:] == sorted(["bad.mp4", "clip-00002.mp4"], key=sample_key)


def test_a_retry_beside_a_worker_that_makes_its_unit_keeps_the_unit_in_the_plan(
    bank: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.write.lock.BEAT_SECONDS", 0.1)
    plan = read_plan(bank)
    assert plan
    failed = [clip for clip in plan.clips if clip.id in read_entries(bank)]
    longer = replace(plan, units=[*plan.units, failed])
    write_plan(bank, longer)  # as if killed while decoding
    mend(videos)
    with Leases(bank, "preprocess work") as leases:
        assert leases.take(1)
        with pytest.raises(UserError, match=r"preprocess work.*makes the unit of these clips"):
            retry(bank)
    assert read_plan(bank) == longer
    assert retry(bank).clips == 1


@pytest.mark.slow
@pytest.mark.parametrize("again", ["encode", "retry"])
def test_a_shard_of_no_unit_of_the_plan_is_refused_and_not_taken_for_new_clips(
    bank: Path, videos: Path, toy_options: EncodeOptions, again: str
) -> None:
    before = (bank / "plan.json").read_bytes()
    mend(videos)
    retry(bank)
    (bank / "plan.json").write_bytes(before)  # as of a backup
    shutil.copy(videos / "clip-00000.mp4", videos / "new.mp4")

    def run() -> object:
        return encode([str(videos)], bank, toy_options) if again == "encode" else retry(bank)

    with pytest.raises(UserError, match=r"shards of no unit of its plan: bank-000001.done"):
        run()
    assert (bank / "plan.json").read_bytes() == before


def test_a_retry_cut_off_before_its_commit_is_made_again(bank: Path, videos: Path) -> None:
    plan = read_plan(bank)
    assert plan
    failed = [clip for clip in plan.clips if clip.id in read_entries(bank)]
    write_plan(bank, replace(plan, units=[*plan.units, failed]))  # as if killed while decoding
    mend(videos)
    assert retry(bank).clips == 1
    extended = read_plan(bank)
    assert extended
    assert len(extended.units) == 2


def test_a_retry_cut_off_after_its_commit_leaves_no_double(
    bank: Path, videos: Path, toy_options: EncodeOptions
) -> None:
    old = quarantine_path(bank).read_bytes(), (bank / "bank.json").read_bytes()
    mend(videos)
    retry(bank)
    quarantine_path(bank).write_bytes(old[0])  # as if killed just after .done
    (bank / "bank.json").write_bytes(old[1])
    encode([str(videos)], bank, toy_options)
    assert [entry.id for entry in read_quarantine(bank)] == ["bad.mp4"]
    assert sorted(Bank.open(bank).ids) == [f"clip-0000{k}.mp4" for k in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True], ids=["all mended", "one still bad"])
def test_a_retry_after_one_that_was_killed_before_its_end_tries_no_clip_that_is_banked(
    bank: Path, videos: Path, tmp_path: Path, other: bool
) -> None:
    old = {path: path.read_bytes() for path in (quarantine_path(bank), bank / "bank.json")}
    mend(videos)
    if not other:
        (videos / "bad.mp4").write_bytes((videos / "clip-00000.mp4").read_bytes())
    retry(bank)
    after = {path: path.read_bytes() for path in bank.rglob("*.tar")}
    manifest = (bank / "bank.json").read_bytes()
    for path, data in old.items():
        path.write_bytes(data)  # as if killed after the shard
    again = retry(bank)
    assert (again.clips, len(again.failures)) == (0, int(other))
    assert {path: path.read_bytes() for path in bank.rglob("*.tar")} == after
    assert (bank / "bank.json").read_bytes() == manifest
    assert list(read_entries(bank)) == ["bad.mp4"] * other


def test_failures_that_no_finish_has_listed_yet_are_tried(
    bank: Path, videos: Path, toy_bank: Path
) -> None:
    for path in (quarantine_path(bank), bank / "bank.json"):
        path.unlink()  # as after `preprocess work`
    mend(videos)
    assert (made := retry(bank)).clips == 1
    assert [entry.id for entry in made.failures] == ["bad.mp4"]
    assert "clip-00002.mp4" in Bank.open(bank)


def test_an_unfinished_bank_and_a_folder_without_one_are_refused(
    bank: Path, tmp_path: Path
) -> None:
    (bank / "shards" / "bank-000000.done").unlink()
    for folder, said in (
        (bank, "its run is not finished"),
        (tmp_path / "none", "no bank to retry"),
    ):
        result = command("retry", folder)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert said in line
        assert "preprocess encode" in line


def test_another_tower_is_refused_and_a_moved_one_can_be_named(
    bank: Path, videos: Path, toy: Path, tmp_path: Path
) -> None:
    mend(videos)
    other = shutil.copytree(toy / "tower", tmp_path / "other")
    save_tower(other, seed=1)
    result = command("retry", bank, "--tower", other)
    assert result.exit_code == 2
    assert "tower_digest" in result.stderr
    moved = shutil.copytree(toy / "tower", tmp_path / "moved")
    assert retry(bank, str(moved)).clips == 1


def test_a_shard_that_was_deleted_is_named_with_the_way_out(
    bank: Path, videos: Path, toy_options: EncodeOptions
) -> None:
    shard = bank / "shards" / "bank-000000.tar"
    before = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=r"bank-000000\.tar: was finished and is missing") as error:
        encode([str(videos)], bank, toy_options)
    assert "\n" not in str(error.value)
    shard.with_suffix(".done").unlink()
    assert encode([str(videos)], bank, toy_options).clips == 2
    assert shard.read_bytes() == before


def test_a_truncated_video_is_banked_on_demand_and_its_flags_say_so(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    import av  # Matroska can be cut anywhere

    source = toy / "videos" / "test" / "clip-00000.mp4"
    with av.open(str(source)) as read, av.open(str(tmp_path / "v.mkv"), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)
    raw = (tmp_path / "v.mkv").read_bytes()
    (tmp_path / "v.mkv").write_bytes(raw[: len(raw) // 2])
    bank = tmp_path / "bank"
    words = ["encode", tmp_path / "v.mkv", "--out", bank, "--tower", toy / "tower", "--frames", 4]
    assert command(*words, "--device", "cpu").exit_code == 1
    assert read_entries(bank)["v.mkv"].reason == "truncated"
    result = command("retry", bank, "--allow-truncated", "--device", "cpu")
    assert result.exit_code == 0, result.output
    (tar,) = [p for p in (bank / "shards").glob("*.tar") if b"frame_count" in p.read_bytes()]
    assert re.search(rb'"flags":"[a-z_ ]*truncated"', tar.read_bytes())
    again = command(*words, "--allow-truncated", "--device", "cpu")
    assert again.exit_code == 0
    assert "1 clip there already" in again.stdout


# --- the file ---


def entry(id_: str, attempts: int = 1) -> QuarantineEntry:
    key, path = sample_key(id_), f"/videos/{id_}"
    return QuarantineEntry(id_, key, path, "decode", Reason.DAMAGED, "damaged", attempts, 0.5)


def fail(bank: Path, *entries: QuarantineEntry) -> None:
    update_quarantine(bank, [], entries)


def test_a_last_line_cut_by_a_power_loss_is_no_entry(tmp_path: Path) -> None:
    fail(tmp_path, entry("a"), entry("b"))
    whole = quarantine_path(tmp_path).read_bytes()
    for length in range(len(whole) // 2 + 1, len(whole) - 1):
        quarantine_path(tmp_path).write_bytes(whole[:length])
        assert list(read_entries(tmp_path)) == ["a"]
    fail(tmp_path, entry("c"))
    assert [line.id for line in read_quarantine(tmp_path)] == ["a", "c"]


def test_a_spoilt_line_elsewhere_is_refused_with_its_number(tmp_path: Path) -> None:
    fail(tmp_path, entry("a"))
    raw = quarantine_path(tmp_path).read_bytes()
    quarantine_path(tmp_path).write_bytes(raw + b"{spoilt\n" + raw)
    with pytest.raises(UserError, match=r"quarantine\.jsonl:2: not an entry"):
        read_entries(tmp_path)


def test_settling_keeps_the_last_entry_of_each_clip_that_is_not_banked(tmp_path: Path) -> None:
    for id_, attempts in (("a", 1), ("b", 1), ("a", 2), ("c", 1)):
        fail(tmp_path, entry(id_, attempts))
    update_quarantine(tmp_path, [sample_key("b")])
    assert [(e.id, e.attempts) for e in read_quarantine(tmp_path)] == [("a", 2), ("c", 1)]
    update_quarantine(tmp_path, [sample_key("a"), sample_key("c")])
    assert not quarantine_path(tmp_path).exists()


def test_a_bank_that_is_being_written_is_not_retried(bank: Path) -> None:
    with folder_lock(bank, "preprocess encode"):
        result = command("retry", bank, "--device", "cpu")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "preprocess encode" in line
    assert str(os.getpid()) in line


# --- two attempts where the machine may be at fault ---


def clip_source(path: Path) -> ClipSource:
    return ClipSource(path.name, sample_key(path.name), str(path), path.name)


class KilledAtFirst(DecodeChild):
    """A child that is killed, as if out of memory, in the first `times` clips."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def receive(self) -> dict[str, object]:
        if self.times:
            self.times -= 1
            assert self.pid
            os.kill(self.pid, signal.SIGKILL)
        return super().receive()


@pytest.mark.parametrize(
    ("kills", "attempts", "comes"), [(0, 1, True), (1, 2, True), (2, 2, False)]
)
def test_a_crash_is_tried_once_more_in_a_fresh_child(
    toy: Path, tmp_path: Path, kills: int, attempts: int, comes: bool
) -> None:
    source = clip_source(toy / "videos" / "test" / "clip-00000.mp4")
    with SourceReader(KilledAtFirst(kills), tmp_path) as reader:
        request = ReadRequest(Path(source.path), Sampling(num_frames=2))
        outcome = reader.read(source, request)
        assert (isinstance(outcome.clip, Clip), outcome.attempts) == (comes, attempts)
        assert comes or (outcome.error and outcome.error.reason == "decoder-crashed")
        assert reader.read(source, request).clip


def test_a_bad_file_is_tried_once(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"")
    with SourceReader(DecodeChild(), tmp_path) as reader:
        bad = clip_source(tmp_path / "bad.mp4")
        outcome = reader.read(bad, ReadRequest(Path(bad.path), Sampling(num_frames=2)))
    assert outcome.attempts == 1
    assert isinstance(outcome.error, VideoError)
    assert json.dumps(outcome.error.args)
