"""P3: any flipped bit, cut, missing or double member is found and named; `repair` encodes only that.

pytest tests/promises/test_p03_repair.py

Here damages are found, and the old bytes come back. tests/shards/care/test_verify.py does a thousand
random damages more, and checks for each that exactly what was damaged is named.
"""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import pytest
from click.testing import CliRunner, Result

from preprocess.care.repair import Repaired, repair
from preprocess.cli.care import repair as repair_command
from preprocess.cli.care import verify as verify_command
from preprocess.cli.main import main
from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode, work
from preprocess.toy_models import save_tower
from shards.care.garbage import collect
from shards.care.status import status, table
from shards.care.verify import verify
from shards.errors import UserError
from shards.format.commits import done_path, index_path
from shards.format.features import Sampling
from shards.format.manifest import TowerFacts, read_manifest
from shards.format.plan import read_plan, write_plan
from shards.format.samples import sample_key
from shards.read.bank import Bank
from shards.signed import file_facts, read_signed_json, signed_json, write_atomic
from shards.write.finish import finish
from shards.write.lock import folder_lock
from tests.folders import contents
from tests.params import few


@pytest.fixture(scope="module")
def world(toy: Path, toy_options: EncodeOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos of our own, and its bank of three shards. Read it only."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(toy / "videos", folder / "videos")
    options = replace(toy_options, sampling=Sampling(num_frames=4), shard_bytes=12_000)
    encode([str(folder / "videos")], folder / "bank", options)
    assert len(list((folder / "bank" / "shards").glob("*.tar"))) > 1
    assert verify(folder / "bank", deep=True) == []
    return folder


@pytest.fixture
def bank(world: Path, tmp_path: Path) -> Path:
    return shutil.copytree(world / "bank", tmp_path / "bank")


def shard(bank: Path, unit: int = 0) -> Path:
    return bank / "shards" / f"bank-{unit:06d}.tar"


def samples(bank: Path, unit: int = 0) -> list[dict[str, object]]:
    return list(read_signed_json(done_path(shard(bank, unit)))["samples"])


def flip(path: Path, byte: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 4
    path.write_bytes(raw)


def flip_values(bank: Path, number: int, unit: int = 0) -> str:
    """Flip a bit among the features of a clip; return its key."""
    sample = samples(bank, unit)[number]
    flip(shard(bank, unit), sample["streams"]["4"]["offset"] + 5)  # type: ignore[index]
    return str(sample["key"])


def without_provenance(folder: Path) -> dict[str, object]:
    """Return the contents of a bank; of json files what they say, provenance left out."""
    found: dict[str, object] = dict(contents(folder))
    for name in found:
        if name == "bank.json" or name.endswith(".done"):
            record = read_signed_json(folder / name)
            del record["provenance"]
            found[name] = {key: value for key, value in record.items() if key != "underflowed"}
    return found


def mended(bank: Path, world: Path, lost_record: bool = False, **how: str) -> Repaired:
    """Repair a bank, all of it. lost_record: of a sound shard, what made it is not known any more."""
    done = repair(bank, **how)  # type: ignore[arg-type]
    assert (done.remaining, done.notes, done.lost) == ([], [], [])
    read = without_provenance if lost_record else contents
    assert read(bank) == read(world / "bank")
    return done


def test_a_finished_shard_whose_record_is_lost_is_not_made_again_in_its_place(
    bank: Path, world: Path, toy_options: EncodeOptions
) -> None:
    """Its video may be gone: `encode` and `work` would remove what `repair` keeps."""
    for path in (bank / "shards").glob("*.done"):
        path.unlink()  # as by a copy without them
    before = contents(bank)
    options = replace(toy_options, sampling=Sampling(num_frames=4), shard_bytes=12_000)
    with pytest.raises(UserError, match=r"commit record .* is missing.*preprocess repair"):
        encode([str(world / "videos")], bank, options)
    with pytest.raises(UserError, match=r"commit record .* is missing.*preprocess repair"):
        work(bank)
    assert contents(bank) == before
    assert f"run `preprocess repair {bank}` first" in table(status(bank))
    assert not mended(bank, world, lost_record=True).encoded


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_repair_that_is_killed_while_its_shard_takes_the_place_costs_no_clip(
    bank: Path, world: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """The new shard is without a sample that is not served, so all others stand elsewhere in it."""
    plan, manifest = read_plan(bank), read_manifest(bank)
    assert plan
    gone, *others = [str(sample["key"]) for sample in samples(bank)]
    plan = replace(plan, pruned=frozenset({gone}))
    write_plan(bank, plan)
    finish(bank, plan, TowerFacts(manifest.provenance.tower, manifest.tower_width))
    whole = [Bank.open(bank).read(row, 4) for row in range(len(others))]
    assert flip_values(bank, 0) == gone
    rename, left = os.replace, [renames]

    def killed(source: Path, target: Path) -> None:
        if Path(target).parent.name == "shards":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            repair(bank)
    (world / "videos").rename(world / "away")  # whatever is encoded again would be lost
    try:
        collect(bank)
        done = repair(bank)
    finally:
        (world / "away").rename(world / "videos")
    assert (done.remaining, done.lost, done.encoded) == ([], [], [])
    assert verify(bank, deep=True) == []
    assert [sample["key"] for sample in samples(bank)] == others
    for row, array in enumerate(whole):
        assert (Bank.open(bank).read(row, 4) == array).all()


def test_a_flipped_bit_costs_the_encoding_of_its_clip_alone(bank: Path, world: Path) -> None:
    key = flip_values(bank, 1)
    assert {(d.key, d.part) for d in verify(bank, deep=True)} == {(key, "stride4")}
    done = mended(bank, world)
    assert done.encoded == [key]
    assert "index.zarr" not in done.files


def test_several_shards_are_mended_at_once(bank: Path, world: Path) -> None:
    keys = [flip_values(bank, 0, 0), flip_values(bank, 1, 0), flip_values(bank, 0, 1)]
    assert sorted(mended(bank, world).encoded) == sorted(keys)


def rewritten(tar: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    with tarfile.open(tar) as opened:
        pairs = [(info, opened.extractfile(info).read()) for info in opened]  # type: ignore[union-attr]
    change(pairs)
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as opened:
        for info, data in pairs:
            opened.addfile(info, io.BytesIO(data))


def delete_files(bank: Path) -> list[str]:
    index_path(shard(bank)).unlink()
    done_path(shard(bank, 1)).unlink()
    shutil.rmtree(bank / "index.zarr")
    return []


def delete_manifest(bank: Path) -> list[str]:
    (bank / "bank.json").unlink()
    return []


def spoil_records(bank: Path) -> list[str]:
    flip(done_path(shard(bank)), 200)
    flip(index_path(shard(bank, 1)), 3)
    flip(bank / "index.zarr" / "timestamps" / "c" / "0", 12)
    return []


def spoil_manifest(bank: Path) -> list[str]:
    flip(bank / "bank.json", 100)
    return []


def spoil_a_header(bank: Path) -> list[str]:
    flip(shard(bank), int(str(samples(bank)[1]["offset"])) + 30)
    return [str(samples(bank)[1]["key"])]


def keys_of(bank: Path, unit: int = 0) -> list[str]:
    return [str(sample["key"]) for sample in samples(bank, unit)]


def append_a_member(bank: Path) -> list[str]:
    (bank.parent / "extra.json").write_text("{}")
    subprocess.run(["tar", "-rf", shard(bank), "-C", bank.parent, "extra.json"], check=True)
    return []


def cut_off_the_zeros(bank: Path) -> list[str]:
    with open(shard(bank), "r+b") as file:
        file.truncate(shard(bank).stat().st_size - 600)
    return []


def reverse_the_members(bank: Path) -> list[str]:
    rewritten(shard(bank), lambda pairs: pairs.reverse())
    return keys_of(bank)


def double_a_member(bank: Path) -> list[str]:
    rewritten(shard(bank), lambda pairs: pairs.insert(2, pairs[1]))
    return keys_of(bank)  # all that follows is out of its place


def double_a_member_at_the_end(bank: Path) -> list[str]:
    rewritten(shard(bank), lambda pairs: pairs.append(pairs[1]))
    return []


def delete_a_member(bank: Path) -> list[str]:
    rewritten(shard(bank), lambda pairs: pairs.pop(1) and None)
    return keys_of(bank)


def spoil_a_description(bank: Path) -> list[str]:
    sample = samples(bank)[1]
    flip(shard(bank), sample["json"][0] + 40)  # type: ignore[index]
    return [str(sample["key"])]


def cut_off_a_sample(bank: Path) -> list[str]:
    last = samples(bank)[-1]
    with open(shard(bank), "r+b") as file:
        file.truncate(int(str(last["offset"])))
    return [str(last["key"])]


def delete_a_shard(bank: Path) -> list[str]:
    shard(bank).unlink()
    return keys_of(bank)


def delete_a_shard_and_its_record(bank: Path) -> list[str]:
    keys = delete_a_shard(bank)
    done_path(shard(bank)).unlink()
    return keys


def spoil_a_shard_and_its_record(bank: Path) -> list[str]:
    keys = keys_of(bank)
    flip_values(bank, 1)
    done_path(shard(bank)).unlink()
    return keys


CRIMES = [
    delete_files,
    spoil_records,
    spoil_a_header,
    reverse_the_members,
    delete_a_member,
    cut_off_a_sample,
    delete_a_shard,
]
MORE_CRIMES = [
    delete_manifest,
    spoil_manifest,
    append_a_member,
    cut_off_the_zeros,
    double_a_member,
    double_a_member_at_the_end,
    spoil_a_description,
    delete_a_shard_and_its_record,
    spoil_a_shard_and_its_record,
]


@pytest.mark.parametrize(
    "crime", [*CRIMES, *(pytest.param(crime, marks=pytest.mark.slow) for crime in MORE_CRIMES)]
)
def test_every_byte_comes_back_and_only_what_is_gone_is_encoded(
    bank: Path, world: Path, crime: Callable[[Path], list[str]]
) -> None:
    keys = crime(bank)
    named = {damage.key for damage in verify(bank, deep=True)}
    assert named
    assert set(keys) <= named or None in named
    # Without a tower where none is needed.
    how = {} if keys else {"tower": "nowhere"}
    lost_record = crime in (delete_files, spoil_records)
    assert mended(bank, world, lost_record, **how).encoded == keys


@pytest.mark.parametrize("harm", ["column", "catalogue", "manifest", "both"])
def test_catalogue_and_manifest_come_back_without_a_tower(
    bank: Path, world: Path, harm: str
) -> None:
    if harm == "column":
        (bank / "index.zarr" / "end" / "c" / "0").write_bytes(b"nonsense")
    if harm in ("catalogue", "both"):
        shutil.rmtree(bank / "index.zarr")
    if harm in ("manifest", "both"):
        (bank / "bank.json").unlink()
    with pytest.raises(UserError, match=r"preprocess repair|not finished"):
        Bank.open(bank)
    done = mended(bank, world, tower="nowhere")
    assert done.files == ["index.zarr", "bank.json"]
    assert len(Bank.open(bank)) == 9


def test_a_run_that_is_not_over_is_left_to_encode(bank: Path) -> None:
    plan = read_plan(bank)
    assert plan
    write_plan(bank, replace(plan, units=[*plan.units, plan.units[0][:1]]))
    (bank / "bank.json").unlink()
    shutil.rmtree(bank / "index.zarr")
    assert repair(bank, tower="nowhere").files == []
    assert not (bank / "bank.json").exists()


def test_a_sound_bank_is_left_alone(bank: Path, world: Path) -> None:
    moments = {path: path.stat().st_mtime_ns for path in bank.rglob("*") if path.is_file()}
    done = mended(bank, world, tower="nowhere")
    assert (done.damages, done.files) == ([], [])
    assert {path: path.stat().st_mtime_ns for path in moments} == moments


# --- sources that are not there, or are others ---


@pytest.fixture
def own_world(world: Path, toy_options: EncodeOptions, tmp_path: Path) -> Path:
    """Videos and their bank, both to be changed."""
    folder = tmp_path / "own"
    shutil.copytree(world / "videos", folder / "videos")
    options = replace(toy_options, sampling=Sampling(num_frames=4), shard_bytes=12_000)
    encode([str(folder / "videos")], folder / "bank", options)
    return folder


def videos_of(world: Path, key: str) -> Path:
    (found,) = [
        path
        for path in (world / "videos").rglob("*.mp4")
        if sample_key(path.relative_to(world / "videos").as_posix()) == key
    ]
    return found


@pytest.mark.parametrize("crime", few(["gone", "other", "not a video"], 3))
def test_a_clip_without_its_source_stays_damaged_and_is_named(own_world: Path, crime: str) -> None:
    bank = own_world / "bank"
    before = contents(bank)
    lost, saved = flip_values(bank, 0), flip_values(bank, 1)
    video = videos_of(own_world, lost)
    kept = video.read_bytes()
    if crime == "gone":
        video.unlink()
    elif crime == "other":
        video.write_bytes(videos_of(own_world, saved).read_bytes())
    else:
        video.write_bytes(b"text")
    done = repair(bank)
    assert done.encoded == [saved]
    assert {damage.key for damage in done.remaining} == {lost}
    (note,) = done.notes
    assert lost in note
    assert str(video) in note
    after = contents(bank)
    assert {name for name in before if after[name] != before[name]} == {"shards/bank-000000.tar"}
    assert {d.key for d in verify(bank, deep=True)} == {lost}
    assert verify(bank) == []  # every header is in its place: other tools read the shard

    video.write_bytes(kept)
    assert repair(bank).encoded == [lost]
    assert contents(bank) == before


def test_a_lost_shard_without_sources_keeps_its_places(own_world: Path) -> None:
    bank = own_world / "bank"
    before = contents(bank)
    keys = [str(sample["key"]) for sample in samples(bank)]
    moved = own_world / "moved"
    (own_world / "videos").rename(moved)
    shard(bank).unlink()
    done = repair(bank)
    assert {damage.key for damage in done.remaining} == set(keys)
    assert len(done.notes) == len(keys)
    with tarfile.open(shard(bank)) as tar:
        assert [name.split(".")[0] for name in tar.getnames()[::3]] == keys
    done = repair(bank, video_roots=[str(moved)])
    assert (done.encoded, done.remaining) == (keys, [])
    assert contents(bank) == before


def test_another_tower_is_refused_by_name_after_what_needs_none_is_done(
    bank: Path, toy: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(toy / "tower", tmp_path / "other")
    save_tower(other, seed=1)
    flip_values(bank, 0)
    index_path(shard(bank, 1)).unlink()
    with pytest.raises(UserError, match="tower_digest"):
        repair(bank, str(other))
    assert index_path(shard(bank, 1)).exists()
    assert not (bank / ".lock").exists()


def test_without_its_plan_nothing_is_repaired(bank: Path) -> None:
    flip_values(bank, 0)
    flip(bank / "plan.json", 50)
    before = contents(bank)
    done = repair(bank)
    assert done.remaining == done.damages
    assert contents(bank) == before
    assert "plan.json" in done.notes[0]


def test_one_writer_at_a_time(bank: Path) -> None:
    flip_values(bank, 0)
    with (
        folder_lock(bank, "preprocess encode"),
        pytest.raises(UserError, match="preprocess encode"),
    ):
        repair(bank)


# --- another machine ---


@pytest.fixture
def foreign(bank: Path) -> tuple[Path, str]:
    """A bank whose shard 0 was made where sums round otherwise, and a key in it."""
    done = read_signed_json(done_path(shard(bank)))
    sample = done["samples"][1]
    raw = bytearray(shard(bank).read_bytes())
    at = sample["streams"]["8"]["offset"]
    raw[at] ^= 1
    begin, end = sample["offset"], sample["offset"] + sample["nbytes"]
    sample["streams"]["8"]["crc32c"] = google_crc32c.value(
        bytes(raw[at : at + sample["streams"]["8"]["nbytes"]])
    )
    sample["crc32c"] = google_crc32c.value(bytes(raw[begin:end]))
    shard(bank).write_bytes(raw)
    write_atomic(done_path(shard(bank)), signed_json(done | file_facts(shard(bank))))
    (bank / "bank.json").unlink()
    assert repair(bank).remaining == []
    assert verify(bank, deep=True) == []
    return bank, str(sample["key"])


def test_features_that_round_otherwise_are_committed_and_told_of(
    foreign: tuple[Path, str], world: Path
) -> None:
    bank, key = foreign
    flip_values(bank, 1)
    old_record = done_path(shard(bank)).read_bytes()
    done = repair(bank)
    assert (done.encoded, done.remaining) == ([key], [])
    (note,) = done.notes
    assert key in note
    assert shard(bank).read_bytes() == shard(world / "bank").read_bytes()

    # As if killed between the tar's rename and that of its commit record.
    new_record = done_path(shard(bank)).read_bytes()
    done_path(shard(bank)).write_bytes(old_record)
    assert {d.key for d in verify(bank, deep=True) if d.file.endswith(".tar")} == {key}
    assert repair(bank).remaining == []
    assert done_path(shard(bank)).read_bytes() == new_record


# --- kill -9 ---

SCRIPT = """
import sys
from pathlib import Path
from preprocess.care.repair import repair
print("ready", flush=True)
repair(Path(sys.argv[1]))
"""


def kill_repairs(bank: Path, world: Path, seed: int, times: int) -> None:
    draw = random.Random(seed)
    killed = 0
    for _ in range(times):
        for unit in (0, 1):
            flip_values(bank, 0, unit)
        done_path(shard(bank, 1)).unlink()
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(bank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout
        process.stdout.readline()
        time.sleep(draw.random() * 0.8)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        done = repair(bank)
        assert done.remaining == []
        assert contents(bank) | {".lock": b""} == contents(world / "bank") | {".lock": b""}
    assert killed


@pytest.mark.slow
def test_repairs_killed_at_many_moments_are_gone_on_from(bank: Path, world: Path) -> None:
    kill_repairs(bank, world, seed=1, times=6)


# --- the commands ---


def run(command: object, *words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])  # type: ignore[arg-type]


def test_the_commands_tell_what_was_found_and_done(bank: Path, world: Path) -> None:
    assert run(verify_command, bank, "--deep").exit_code == 0
    key = flip_values(bank, 0)
    assert run(verify_command, bank).exit_code == 0  # a bit among features is for --deep
    result = run(verify_command, bank, "--deep")
    assert result.exit_code == 1
    assert f"shards/bank-000000.tar: {key}: stride4: " in result.stdout
    result = run(repair_command, bank, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "1 damage, 1 clip encoded again" in result.stdout
    assert contents(bank) == contents(world / "bank")


def test_repair_exits_with_1_if_something_remains(own_world: Path) -> None:
    bank = own_world / "bank"
    key = flip_values(bank, 0)
    videos_of(own_world, key).unlink()
    result = run(repair_command, bank, "--device", "cpu")
    assert result.exit_code == 1
    assert f"remains: shards/bank-000000.tar: {key}: stride4" in result.stdout


def test_a_folder_without_a_bank_is_refused(tmp_path: Path) -> None:
    for name in ("verify", "repair", "status", "gc"):
        result = run(main, name, tmp_path)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert "no bank here" in line
    assert list(tmp_path.iterdir()) == []
