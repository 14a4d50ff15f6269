"""Banks that become one: nothing is encoded, nothing is lost, and what cannot be one is named.

pytest tests/shards/care/test_merge.py
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from preprocess.cli.main import main
from shards.care.merge import merge
from shards.care.revise import MOVE, revise
from shards.care.verify import verify
from shards.errors import UserError
from shards.format.commits import done_path, index_path, read_commit, shard_path
from shards.format.features import FeatureConfig
from shards.format.manifest import TowerFacts
from shards.format.plan import ClipSource, Plan, TowerSettings, planned, write_plan
from shards.format.quarantine import QuarantineEntry, Reason, read_quarantine
from shards.format.samples import SampleMeta, sample_key
from shards.read.bank import Bank
from shards.signed import read_signed_json, write_atomic
from shards.write.finish import finish
from shards.write.lock import folder_lock
from shards.write.shard import ShardWriter
from tests.folders import contents

Make = Callable[..., Path]


def arrays(id_: str) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(len(id_) + ord(id_[-1]))
    return {s: rng.normal(size=(3, n, n, 6)).astype(np.float16) for s, n in ((4, 2), (8, 1))}


def failure(id_: str) -> QuarantineEntry:
    return QuarantineEntry(id_, sample_key(id_), id_, "decode", Reason.DAMAGED, "damaged", 1, 0.5)


@pytest.fixture
def bank(features: FeatureConfig, make_meta: Callable[..., SampleMeta]) -> Make:
    """A function that writes a bank of units of clips; those called bad fail, a unit may be undone."""

    def make(
        out: Path,
        *units: str,
        config: FeatureConfig = features,
        undone: tuple[int, ...] = (),
        scale: list[float] | None = None,
        device: str | None = None,
    ) -> Path:
        plan = Plan(
            config,
            [
                [ClipSource(id_, sample_key(id_), id_, id_) for id_ in unit.split()]
                for unit in units
            ],
            TowerSettings(name="unnamed", device=device),
            calibration=scale and {"4": scale, "8": scale},
        )
        out.mkdir(parents=True)
        write_plan(out, plan)
        for number, unit in enumerate(plan.units):
            if number in undone:
                continue
            with ShardWriter(shard_path(out, number), number, config.fingerprint) as writer:
                for clip in unit:
                    if clip.id.startswith("bad"):
                        writer.fail(failure(clip.id))
                    else:
                        values = arrays(clip.id)
                        writer.write(clip.key, make_meta(clip.id, values), values)
                writer.commit({"machine": "x"})
        if not undone:
            finish(out, plan, TowerFacts("unnamed", 6))
        return out

    return make


def test_a_clip_that_is_planned_again_and_not_made_is_not_merged_as_its_older_video(
    bank: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = bank(tmp_path / "a", "x y", "x", undone=(1,))
    merge([older, bank(tmp_path / "b", "z")], tmp_path / "c")
    assert sorted(Bank.open(tmp_path / "c").ids) == ["y", "z"]
    assert "lacks 1 clip as planned" in caplog.text
    assert "none of the banks has made: x" in caplog.text
    assert verify(tmp_path / "c", deep=True) == []


def promised(bank: Path) -> dict[str, object]:
    """Return all files of a bank, by name below it; of bank.json without the provenance."""
    found: dict[str, object] = {
        path.relative_to(bank).as_posix(): path.read_bytes()
        for path in bank.rglob("*")
        if path.is_file() and path.name != "bank.json"
    }
    manifest = read_signed_json(bank / "bank.json")
    del manifest["provenance"]
    return found | {"bank.json": manifest}


@pytest.mark.parametrize("linked", [True, False], ids=["links", "copies"])
def test_two_banks_become_the_one_that_would_have_been_made_of_both(
    bank: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    a = bank(tmp_path / "a", "a1 a2", "a3 bad-a")
    b = bank(tmp_path / "b", "b1", "bad-b", "b2 b3")
    before = promised(a), promised(b)
    if not linked:

        def no_links(source: Path, *names: object, real: Callable[..., None] = os.link) -> None:
            if Path(source).suffix in (".tar", ".idx"):  # zarr links, too
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            real(source, *names)

        monkeypatch.setattr(os, "link", no_links)
    merge([a, b], tmp_path / "c")
    monkeypatch.undo()
    both = bank(tmp_path / "both", "a1 a2", "a3 bad-a", "b1", "bad-b", "b2 b3")
    assert promised(tmp_path / "c") == promised(both)
    assert (promised(a), promised(b)) == before
    assert verify(tmp_path / "c", deep=True) == []
    assert {entry.id for entry in read_quarantine(tmp_path / "c")} == {"bad-a", "bad-b"}
    assert shard_path(tmp_path / "c", 2).samefile(shard_path(b, 0)) == linked
    assert not (tmp_path / "c.merging").exists()


def test_a_plan_that_was_made_in_part_on_each_of_two_machines_becomes_whole(
    bank: Make, tmp_path: Path
) -> None:
    units = ("a1 a2", "a3 bad-a", "b1", "b2 b3")
    whole = bank(tmp_path / "whole", *units)
    first = bank(tmp_path / "a", *units, undone=(2, 3))
    second = bank(tmp_path / "b", *units, undone=(0, 1))
    merge([first, second], tmp_path / "c")
    assert promised(tmp_path / "c") == promised(whole)


def test_clips_that_no_bank_has_made_are_named(
    bank: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    units = ("a1 a2", "b1", "bad-c", "d1")
    first = bank(tmp_path / "a", *units, undone=(1, 2, 3))
    second = bank(tmp_path / "b", *units, undone=(0, 1, 3))
    merge([first, second], tmp_path / "c")
    assert "lacks 2 clips as planned" in caplog.text
    assert ": b1, d1; `preprocess encode" in caplog.text
    # one that has changed is in its older version
    plan = planned(first)
    write_plan(first, replace(plan, units=[*plan.units, [plan.units[0][1]]]))
    caplog.clear()
    merge([first], tmp_path / "d")
    assert "lacks 4 clips as planned" in caplog.text
    assert ": a2, b1, bad-c and 1 more; `preprocess encode" in caplog.text


def test_common_clips_are_named_and_nothing_is_made(bank: Make, tmp_path: Path) -> None:
    a, b = bank(tmp_path / "a", "a1 x1", "x2 bad-x"), bank(tmp_path / "b", "x1 b1", "x2 bad-x")
    with pytest.raises(UserError, match=r"have 3 clips in common: bad-x, x1, x2; encode") as error:
        merge([a, b], tmp_path / "c")
    assert str(a) in str(error.value)
    assert str(b) in str(error.value)
    assert not (tmp_path / "c").exists()


def test_other_features_scales_and_readers_are_named(
    bank: Make, tmp_path: Path, features: FeatureConfig
) -> None:
    a = bank(tmp_path / "a", "a1", device="cpu")
    others = {
        "layer": bank(tmp_path / "b", "b1", config=replace(features, layer=-1)),
        "scales of int8": bank(tmp_path / "c", "c1", scale=[1.0] * 6),
        "computed on cpu here, on cuda there": bank(tmp_path / "d", "d1", device="cuda"),
    }
    for said, other in others.items():
        with pytest.raises(UserError, match=said):
            merge([a, other], tmp_path / "out")
    with pytest.raises(UserError, match="layer") as error:
        merge([a, *others.values()], tmp_path / "out")
    assert len(str(error.value).splitlines()) == len(others), "all at once"


def test_a_damaged_a_busy_and_a_missing_bank_are_refused(bank: Make, tmp_path: Path) -> None:
    a, b = bank(tmp_path / "a", "a1"), bank(tmp_path / "b", "b1")
    with folder_lock(b, "preprocess repair"), pytest.raises(UserError, match="writes here"):
        merge([a, b], tmp_path / "c")
    with pytest.raises(UserError, match="no bank here"):
        merge([a, tmp_path / "none"], tmp_path / "c")
    with pytest.raises(UserError, match="exists already"):
        merge([a], b)
    with open(shard_path(b, 0), "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"is damaged.*repair"):
        merge([a, b], tmp_path / "c")


def rewritten(shard: Path) -> None:
    """As `preprocess repair` rewrites a shard with descriptions of an older format."""
    revise(shard, read_commit(shard), lambda meta: replace(meta, flags=["gap"]))


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten": rewritten,
    # a repair on the machine that made it gives equal bytes, in place of damaged ones
    "tar": lambda shard: write_atomic(shard, shard.read_bytes()),
    "index": lambda shard: write_atomic(index_path(shard), index_path(shard).read_bytes()),
    "record": lambda shard: write_atomic(done_path(shard), done_path(shard).read_bytes()),
    "removed": lambda shard: done_path(shard).unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [False, True], ids=["before it is brought", "after"])
def test_a_bank_that_is_repaired_while_it_is_merged_is_refused(
    bank: Make, tmp_path: Path, change: str, late: bool
) -> None:
    a, b = bank(tmp_path / "a", "a1", "a2"), bank(tmp_path / "b", "b1")
    brought: list[int] = []

    def seen(nbytes: int) -> None:
        brought.append(nbytes)
        if len(brought) == 1:
            CHANGES[change](shard_path(a, 0 if late else 1))

    with pytest.raises(UserError, match="was changed while it was merged"):
        merge([a, b], tmp_path / "c", seen)
    assert not (tmp_path / "c" / "bank.json").exists()
    assert not (tmp_path / "c.merging").exists()
    if change != "removed":
        merge([a, b], tmp_path / "c")
        assert verify(tmp_path / "c", deep=True) == []


@pytest.mark.parametrize("damage", ["missing", "short", "half moved"])
def test_a_bank_with_a_lost_index_or_a_repair_that_was_cut_off_is_refused(
    bank: Make, tmp_path: Path, damage: str
) -> None:
    a = bank(tmp_path / "a", "a1")
    index, folder = index_path(shard_path(a, 0)), a / "shards" / ".repair"
    if damage == "missing":
        index.unlink()
    elif damage == "short":
        index.write_bytes(index.read_bytes()[:-8])
    else:
        folder.mkdir()
        (folder / MOVE).write_bytes(done_path(shard_path(a, 0)).read_bytes())
    with pytest.raises(UserError, match="preprocess repair"):
        merge([a], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_merge_that_was_killed_is_made_again(bank: Make, tmp_path: Path) -> None:
    a, b = bank(tmp_path / "a", "a1"), bank(tmp_path / "b", "b1")
    shutil.copytree(a, tmp_path / "c.merging")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".lock").write_text("{}")
    words = ["merge", str(a), str(b), "--out", str(tmp_path / "c")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "2 clips, 6 frames" in result.stdout
    assert Bank.open(tmp_path / "c").ids == ["a1", "b1"]


def merged_and_killed(banks: list[Path], out: Path, step: int) -> int:
    """Merge in a process that dies before its n-th renaming or removing; return its exit code."""
    child = os.fork()
    if child == 0:
        left = iter(range(step))

        def dying(call: Callable[..., object]) -> Callable[..., object]:
            def counted(*args: object, **how: object) -> object:
                if next(left, None) is None:
                    os._exit(9)
                return call(*args, **how)

            return counted

        for name in ("replace", "link", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            merge(banks, out)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_a_merge_that_is_killed_at_any_step_is_whole_when_it_is_run_again(
    bank: Make, tmp_path: Path
) -> None:
    banks = [bank(tmp_path / "a", "a1 bad2"), bank(tmp_path / "b", "b1")]
    whole, step = tmp_path / "whole", 0
    merge(banks, whole)
    while merged_and_killed(banks, out := tmp_path / "out" / str(step), step):
        merge(banks, out)
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        assert contents(out) == contents(whole)
        shutil.rmtree(out)
        step += 4  # most are files of the index
    assert step > 10


def test_a_merge_that_is_killed_when_its_bank_has_its_name_is_whole(
    bank: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    banks, out = [bank(tmp_path / "a", "a1 bad2"), bank(tmp_path / "b", "b1")], tmp_path / "out"
    merge(banks, tmp_path / "whole")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr("shards.care.merge.sync_folder", lambda _: os._exit(9))
        merge(banks, out)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "out.merging").exists()
    result = CliRunner().invoke(main, ["merge", *map(str, banks), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "out.merging").exists()


def test_what_was_merged_before_is_left_alone_and_any_other_bank_is_refused(
    bank: Make, tmp_path: Path
) -> None:
    banks = [bank(tmp_path / name, f"{name}1 bad{name}", f"{name}2") for name in "abc"]
    out = tmp_path / "out"
    first = merge(banks[:2], out)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")}
    assert merge(banks[:2], out) == first
    for others in (banks, banks[:1], banks[1::-1], banks[1:]):
        with pytest.raises(UserError, match="exists already"):
            merge(others, out)
    # a bank that has grown since
    plan = planned(banks[1])
    write_plan(banks[1], replace(plan, units=plan.units[:1]))
    with pytest.raises(UserError, match="exists already"):
        merge(banks[:2], out)
    now = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")}
    assert now == before


@pytest.mark.parametrize("call", ["rmdir", "replace"])
def test_a_second_merge_into_a_folder_is_refused_at_any_moment_of_the_first(
    bank: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    banks, out = [bank(tmp_path / "a", "a1"), bank(tmp_path / "b", "b1")], tmp_path / "out"
    real, asked = getattr(os, call), []

    def interrupted(*args: Path, **how: Any) -> None:
        if out in args:
            asked.append(args)
            with pytest.raises(UserError, match=r"preprocess merge.*writes here"):
                merge(banks, out)
        real(*args, **how)

    monkeypatch.setattr(os, call, interrupted)
    merge(banks, out)
    assert asked
    assert Bank.open(out).ids == ["a1", "b1"]


def test_another_command_that_writes_into_the_folder_is_named(
    bank: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, out, real = bank(tmp_path / "a", "a1"), tmp_path / "out", os.rmdir
    with ExitStack() as held:

        def interrupted(path: Path, **how: Any) -> None:
            if path == out:
                held.enter_context(folder_lock(out, "preprocess encode"))
            real(path, **how)

        monkeypatch.setattr(os, "rmdir", interrupted)
        with pytest.raises(UserError, match=r"preprocess encode.*has begun to write here"):
            merge([a], out)
    assert [path.name for path in out.iterdir()] == []
    assert not (tmp_path / "out.merging").exists()


def test_a_repair_of_the_merged_bank_leaves_the_old_ones_as_they_are(
    bank: Make, tmp_path: Path
) -> None:
    from preprocess.care.repair import repair

    a, b = bank(tmp_path / "a", "a1"), bank(tmp_path / "b", "b1")
    merge([a, b], tmp_path / "c")
    before = promised(b)
    done = done_path(shard_path(tmp_path / "c", 1))
    record = json.loads(done.read_bytes())
    done.write_text(json.dumps(record))  # not canonical: damaged
    assert repair(tmp_path / "c", "nowhere").remaining == []
    assert promised(b) == before
    assert read_commit(shard_path(tmp_path / "c", 1)).unit == 1
