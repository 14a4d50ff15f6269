"""A disk that takes no more: a line that names the file, nothing half-written, the same bytes later.

pytest tests/shards/care/test_full_disk.py
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.care.garbage import collect
from shards.care.merge import merge
from shards.care.verify import verify
from shards.format.plan import ClipSource, Plan, write_plan
from shards.format.samples import sample_key
from shards.read.bank import Bank
from shards.read.export import write_hf, write_wids
from shards.write.finish import finish_alone
from shards.write.lock import lock_path
from tests.folders import contents
from tests.full_disk import full

MakeBank = Callable[..., Path]


def no_links(number: int) -> Callable[..., None]:
    """Return an `os.link` of a file system that has no hard links, or of two of them."""

    def link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return link


@pytest.fixture
def bank(make_bank: MakeBank, tmp_path: Path) -> Path:
    """A bank of two shards with its plan."""
    rng = np.random.default_rng(0)
    clips = {
        f"{k}.mp4": {
            s: rng.normal(size=(3, n, n, 64)).astype(np.float16) for s, n in ((4, 2), (8, 1))
        }
        for k in range(3)
    }
    shards = [{"0.mp4": clips["0.mp4"]}, {id_: clips[id_] for id_ in ("1.mp4", "2.mp4")}]
    made = make_bank(tmp_path / "bank", *shards)
    units = [[ClipSource(id_, sample_key(id_), id_, id_) for id_ in shard] for shard in shards]
    write_plan(made, Plan(Bank.open(made).config, units))
    return made


def merged(bank: Path, out: Path) -> None:
    merge([bank], out)


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "finish": lambda bank, _: finish_alone(bank),
    "merge": merged,
    "export wids": lambda bank, _: write_wids(bank),
    "export hf": lambda bank, _: write_hf(bank),
    "gc": lambda bank, _: collect(bank),
}


@pytest.mark.parametrize("most", [0, 600, 3000])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_finds_no_room_names_the_file_and_is_whole_when_it_is_run_again(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    monkeypatch.setattr(os, "link", no_links(errno.EXDEV))  # another disk: shards are copied
    twin, out = shutil.copytree(bank, tmp_path / "twin" / "bank"), tmp_path / "out"
    command = COMMANDS[name]
    command(twin, tmp_path / "twin" / "out")
    whole = contents(tmp_path / "twin")
    before = contents(bank)
    try:
        with full(most):
            command(bank, out)
    except OSError as error:
        text = str(error)
        assert os.strerror(errno.EFBIG) in text
        assert "free space" in text
        assert "\n" not in text
        named = Path(text.partition(": ")[0])
        # where it is written to, and not where a copy is read from
        assert named.is_relative_to(out if name == "merge" else bank) or out.name in str(named)
        assert not lock_path(bank).exists()
        assert not (out / "bank.json").exists()
        assert not (tmp_path / "out.merging").exists()
        assert {n: data for n, data in contents(bank).items() if n in before} == before
        assert len(Bank.open(bank)) == 3
        command(bank, out)
    else:
        assert most
    found = {"bank": contents(bank), "out": contents(out)}
    assert {f"{top}/{n}": data for top in found for n, data in found[top].items()} == whole
    assert verify(bank, deep=True) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_holds_the_same_bank(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    finish_alone(bank)
    before = contents(bank)
    monkeypatch.setattr(os, "link", no_links(number))
    shutil.rmtree(bank / "index.zarr")
    (bank / "bank.json").unlink()
    finish_alone(bank)
    assert contents(bank) == before
    merge([bank], tmp_path / "out")
    assert verify(tmp_path / "out", deep=True) == []


def test_a_merge_of_linked_shards_has_their_bytes_and_not_the_links(
    bank: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    for path in [*(bank / "shards").glob("*.tar*")]:
        path.rename(tmp_path / "disk" / path.name)
        path.symlink_to(f"../../disk/{path.name}")
    merge([bank], tmp_path / "a" / "deeper" / "out")
    shutil.rmtree(tmp_path / "disk")
    assert verify(tmp_path / "a" / "deeper" / "out", deep=True) == []
