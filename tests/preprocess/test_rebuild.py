"""`preprocess index --rebuild`: the catalogue as it was, from what it was made of.

pytest tests/preprocess/test_rebuild.py
"""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from preprocess.cli.export import index
from shards.errors import UserError
from shards.format.commits import done_path
from shards.read.bank import Bank
from shards.signed import read_signed_json, signed_json
from shards.write.lock import BankLock


@pytest.fixture
def bank(toy_bank: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bank, tmp_path / "bank"))


def run(*words: object) -> Result:
    return CliRunner().invoke(index, list(map(str, words)))


def content(bank: Path) -> dict[str, bytes]:
    files = (path for path in (bank / "index.zarr").rglob("*") if path.is_file())
    return {path.relative_to(bank).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("harm", ["column", "catalogue", "manifest", "both"])
def test_the_catalogue_comes_back_byte_for_byte(bank: Path, harm: str) -> None:
    before, manifest = content(bank), read_signed_json(bank / "bank.json")
    if harm == "column":
        (bank / "index.zarr" / "end" / "c" / "0").write_bytes(b"nonsense")
    if harm in ("catalogue", "both"):
        shutil.rmtree(bank / "index.zarr")
    if harm in ("manifest", "both"):
        (bank / "bank.json").unlink()
    with pytest.raises(UserError, match=r"rebuild|not over"):
        Bank.open(bank)
    done = run(bank, "--rebuild")
    assert (done.exit_code, done.output) == (
        0,
        f"{bank}: catalogue and bank.json are written, of 9 clips\n",
    )
    assert content(bank) == before
    after = read_signed_json(bank / "bank.json")
    provenance = manifest.pop("provenance"), after.pop("provenance")
    assert after == manifest
    assert provenance[0]["tower"] == provenance[1]["tower"]
    assert "is whole, of 9 clips" in run(bank).output
    assert not list(bank.glob(".lock*"))


def test_a_damaged_tar_is_refused_by_name_and_nothing_changes(bank: Path) -> None:
    before = content(bank)
    shard = bank / "shards" / "bank-000000.tar"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    done = run(bank, "--rebuild")
    assert isinstance(done.exception, UserError)
    assert f"{shard}: is damaged" in str(done.exception)
    assert "preprocess repair" in str(done.exception)
    assert content(bank) == before


def test_a_damaged_commit_record_is_refused_by_name(bank: Path) -> None:
    done_file = done_path(bank / "shards" / "bank-000000.tar")
    done_file.write_text(done_file.read_text().replace('"unit":0', '"unit":1'))
    assert str(done_file) in str(run(bank, "--rebuild").exception)


def test_a_run_that_is_not_over_is_left_to_encode(bank: Path) -> None:
    plan = read_signed_json(bank / "plan.json")
    plan["units"].append([plan["units"][0][0]])
    (bank / "plan.json").write_bytes(signed_json(plan))
    assert "1 of 2 shards are not finished" in str(run(bank, "--rebuild").exception)


def test_a_bank_that_is_written_and_a_folder_without_plan_are_refused(bank: Path) -> None:
    with BankLock(bank, "preprocess encode x"):
        assert "writes here" in str(run(bank, "--rebuild").exception)
    (bank / "plan.json").unlink()
    assert "no bank to index" in str(run(bank, "--rebuild").exception)
