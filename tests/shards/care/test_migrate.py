"""A bank of format 1: refused by every command in a line, brought up to date by `repair`.

pytest tests/shards/care/test_migrate.py

The banks are written here, in the shape that earlier versions gave them.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from preprocess.care.repair import repair
from preprocess.cli.main import main
from shards import Bank
from shards.care.verify import verify
from shards.errors import UserError
from shards.format.commits import done_path, shard_path
from shards.format.plan import read_plan
from shards.signed import Json, digest, read_signed_json, signed_json, write_atomic

ADDED = {
    "plan.json": ("calibration", "how", "pruned", "quality"),
    "bank.json": ("calibration", "catalogue", "codec", "superseded"),
    ".done": ("crc32c", "provenance", "underflowed"),
    "sample": ("crc32c", "nbytes"),
}
"""What later banks of format 1 have and the first ones had not."""
EVERY = [(kind, name) for kind, names in ADDED.items() for name in names]


def downgrade(bank: Path, lacking: Callable[[str, str], bool]) -> None:
    """Give a fresh bank the small files that format 1 had. lacking: of which file which field."""

    def written(path: Path, record: Json, kind: str) -> None:
        kept = {name: value for name, value in record.items() if not lacking(kind, name)}
        write_atomic(path, signed_json(kept))

    plan = read_signed_json(bank / "plan.json")
    features = plan["features"] | {"format_version": 1}
    fingerprint = digest(signed_json(features))  # of another time; nobody compares it
    tower = plan.pop("tower")
    how = {
        "batch_frames": tower["batch_frames"],
        "tower_threads": tower["threads"],
        "tower": tower["name"],
    }
    for clip in (clip for unit in plan["units"] for clip in unit):
        clip["full_digest"] = "0" * 32  # of --verify-inputs full
    version = {"format_version": 1, "features": features}
    written(bank / "plan.json", plan | version | {"how": how}, "plan.json")
    manifest = read_signed_json(bank / "bank.json")
    written(bank / "bank.json", manifest | version | {"fingerprint": fingerprint}, "bank.json")
    for path in (bank / "shards").glob("*.done"):
        record = read_signed_json(path)
        record["samples"] = [
            {name: value for name, value in sample.items() if not lacking("sample", name)}
            for sample in record["samples"]
        ]
        written(path, record | {"fingerprint": fingerprint}, ".done")


@pytest.fixture
def bank(toy_bank: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bank, tmp_path / "bank"))


def contents(bank: Path) -> dict[str, Any]:
    """Return the bytes of every file; of json files what they say, what made the bank left out."""
    found: dict[str, Any] = {}
    for path in bank.rglob("*"):
        if path.is_file():
            found[path.relative_to(bank).as_posix()] = path.read_bytes()
    for name in found:
        if name in ("bank.json", "plan.json") or name.endswith(".done"):
            record = read_signed_json(bank / name)
            left_out = ("provenance", "underflowed", "quality", "codec", "tower")
            found[name] = {key: value for key, value in record.items() if key not in left_out}
    return found


TABLE = [
    ("all there", lambda kind, name: False),
    ("the first", lambda kind, name: (kind, name) in EVERY),
    *((f"{k} without {n}", lambda kind, name, k=k, n=n: (kind, name) == (k, n)) for k, n in EVERY),
]


@pytest.mark.parametrize("lacking", [row[1] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_bank_of_format_1_is_brought_up_to_date_and_its_shards_stay(
    bank: Path, toy_bank: Path, lacking: Callable[[str, str], bool]
) -> None:
    downgrade(bank, lacking)
    before = {path: path.stat() for path in (bank / "shards").glob("*.tar*")}
    done = repair(bank, tower="nowhere")
    assert (done.encoded, done.remaining, done.lost, done.damages) == ([], [], [], [])
    assert contents(bank) == contents(toy_bank)
    for path, stat in before.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert verify(bank, deep=True) == []
    old, new = Bank.open(toy_bank), Bank.open(bank)
    for row in range(len(old)):
        np.testing.assert_array_equal(new.read(row, 8), old.read(row, 8))
    plan = read_plan(bank)
    assert plan
    assert plan.tower.name == old.manifest.provenance.tower == new.manifest.provenance.tower
    assert repair(bank, tower="nowhere").files == []


@pytest.mark.parametrize("kept", ["plan.json", "bank.json"])
def test_who_was_killed_between_two_files_goes_on(bank: Path, toy_bank: Path, kept: str) -> None:
    fresh = {name: (bank / name).read_bytes() for name in ("plan.json", "bank.json")}
    downgrade(bank, lambda kind, name: (kind, name) in EVERY)
    other = next(name for name in fresh if name != kept)
    write_atomic(bank / other, fresh[other])
    assert repair(bank, tower="nowhere").remaining == []
    assert contents(bank) == contents(toy_bank)


def test_a_lost_record_of_a_shard_that_the_manifest_proves_is_written(
    bank: Path, toy_bank: Path
) -> None:
    downgrade(bank, lambda kind, name: (kind, name) in EVERY)
    done_path(shard_path(bank, 0)).unlink()
    assert repair(bank, tower="nowhere").encoded == []
    assert contents(bank) == contents(toy_bank)


def test_a_damaged_clip_of_an_old_bank_is_encoded_again_and_nothing_else(
    bank: Path, toy_bank: Path
) -> None:
    downgrade(bank, lambda kind, name: False)
    sample = read_signed_json(done_path(shard_path(bank, 0)))["samples"][2]
    raw = bytearray(shard_path(bank, 0).read_bytes())
    raw[sample["streams"]["4"]["offset"]] ^= 1
    shard_path(bank, 0).write_bytes(raw)
    assert repair(bank).encoded == [sample["key"]]
    assert contents(bank) == contents(toy_bank)


@pytest.mark.parametrize(
    "words",
    [
        ["show"],
        ["verify"],
        ["status"],
        ["gc"],
        ["gc", "--dry-run"],
        ["retry"],
        ["diff", "{bank}"],
        ["export", "wids"],
        ["export", "hf"],
        ["encode", "{videos}", "--tower", "{tower}", "--out"],
        ["plan", "{videos}", "--tower", "{tower}", "--out"],
    ],
)
@pytest.mark.parametrize("version", [1, 2, 4, "two", None])
def test_every_command_refuses_another_format_in_a_line(
    bank: Path, toy: Path, words: list[str], version: object
) -> None:
    for name in ("plan.json", "bank.json"):
        record = read_signed_json(bank / name)
        (bank / name).write_bytes(signed_json(record | {"format_version": version}))
    before = {path: path.read_bytes() for path in bank.rglob("*") if path.is_file()}
    names = {"bank": bank, "videos": toy / "videos", "tower": toy / "tower"}
    done = CliRunner().invoke(main, [*(word.format(**names) for word in words), str(bank)])
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    mend = f"`preprocess repair {bank}`"
    way_out = {1: mend, 2: mend, 4: "update framebank"}
    assert f"format {version!r}" in line
    assert way_out.get(version, "is unknown; restore the file") in line  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in bank.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("partial", [False, True])
def test_a_reader_refuses_another_format_in_a_line(bank: Path, partial: bool) -> None:
    downgrade(bank, lambda kind, name: (kind, name) in EVERY)
    with pytest.raises(UserError, match=r"format 1, .*preprocess repair") as caught:
        Bank.open(bank, allow_partial=partial)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["features", "units", "all"])
def test_a_plan_that_lacks_what_cannot_be_filled_in_is_refused(bank: Path, name: str) -> None:
    downgrade(bank, lambda kind, field: (kind, field) == ("plan.json", name))
    if name == "all":
        (bank / "plan.json").unlink()
    before = {path: path.read_bytes() for path in bank.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="cannot be brought up to date") as caught:
        repair(bank, tower="nowhere")
    assert "\n" not in str(caught.value)
    assert "encode again" in str(caught.value)
    assert {path: path.read_bytes() for path in bank.rglob("*") if path.is_file()} == before
