"""Which failures `finish` puts into the quarantine: those of units new to it, whatever the clocks say.

pytest tests/shards/test_finish.py
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.format.commits import done_path, read_commit, read_commits, shard_path, write_commit
from shards.format.features import FeatureConfig
from shards.format.manifest import read_manifest
from shards.format.plan import ClipSource, Plan, planned, write_plan
from shards.format.quarantine import QuarantineEntry, Reason, read_entries, update_quarantine
from shards.format.samples import SampleMeta, sample_key
from shards.signed import read_signed_json, signed_json, write_atomic
from shards.write.finish import finish_alone, is_finished
from shards.write.shard import ShardWriter

Make = Callable[..., None]
HOUR = 3_600_000_000_000
CLOCKS = {"right": 0, "behind": -24 * HOUR, "ahead": 24 * HOUR}


def failure(id_: str, attempts: int = 1) -> QuarantineEntry:
    key = sample_key(id_)
    return QuarantineEntry(id_, key, id_, "decode", Reason.DAMAGED, "damaged", attempts, 0.5)


@pytest.fixture
def add(features: FeatureConfig, make_meta: Callable[..., SampleMeta]) -> Make:
    """A function that plans and makes one more unit; clips called bad fail. clock: its machine's."""

    def make(bank: Path, unit: str, clock: int = 0) -> None:
        plan = planned(bank) if (bank / "plan.json").exists() else Plan(features, [])
        clips = [ClipSource(id_, sample_key(id_), id_, id_) for id_ in unit.split()]
        shard = shard_path(bank, len(plan.units))
        with ShardWriter(shard, len(plan.units), features.fingerprint) as writer:
            for clip in clips:
                if clip.id.startswith("bad"):
                    writer.fail(failure(clip.id))
                else:
                    values: Mapping[int, np.ndarray] = {
                        s: np.ones((2, n, n, 4), np.float16) for s, n in ((4, 2), (8, 1))
                    }
                    writer.write(clip.key, make_meta(clip.id, values), values)
            writer.commit()
        write_plan(bank, replace(plan, units=[*plan.units, clips]))
        for path in shard.parent.glob(f"{shard.stem}.*"):
            now = path.stat().st_mtime_ns
            os.utime(path, ns=(now, now + clock))

    return make


def attempts(bank: Path) -> dict[str, int]:
    return {id_: entry.attempts for id_, entry in read_entries(bank).items()}


def done(bank: Path) -> bool:
    plan = planned(bank)
    return is_finished(bank, plan, read_commits(bank, plan))


@pytest.mark.parametrize("clock", CLOCKS)
def test_each_failure_gets_there_once_by_any_clock(add: Make, tmp_path: Path, clock: str) -> None:
    bank = tmp_path / "bank"
    add(bank, "a bad-1")
    finish_alone(bank)
    assert done(bank)
    for unit in ("bad-2", "bad-3 b"):
        add(bank, unit, CLOCKS[clock])
        assert not done(bank)
    finish_alone(bank)
    bad = ["bad-1", "bad-2", "bad-3"]
    assert attempts(bank) == dict.fromkeys(bad, 1)
    assert done(bank)
    # a retry in which they fail once more; then whatever else finishes the bank
    update_quarantine(bank, [], [failure(id_, 2) for id_ in bad])
    for copy in (bank, tmp_path / "copy"):
        if copy != bank:
            # of another time: the records are newer than the manifest, or as old
            shutil.copytree(bank, copy, copy_function=shutil.copyfile)
        assert done(copy)
        finish_alone(copy)
        assert attempts(copy) == dict.fromkeys(bad, 2)


def test_a_shard_that_was_rewritten_leaves_newer_entries_as_they_are(
    add: Make, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    add(bank, "a bad-1")
    finish_alone(bank)
    update_quarantine(bank, [], [failure("bad-1", 2)])
    shard = shard_path(bank, 0)
    # as of a repair on another machine
    write_commit(shard, replace(read_commit(shard), sha256="0" * 64))
    finish_alone(bank)
    assert attempts(bank) == {"bad-1": 2}


def test_a_unit_that_is_made_again_and_fails_now_is_listed(add: Make, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    add(bank, "a")
    finish_alone(bank)
    done_path(shard_path(bank, 0)).unlink()
    shard_path(bank, 0).unlink()
    plan = planned(bank)
    with ShardWriter(shard_path(bank, 0), 0, plan.features.fingerprint) as writer:
        writer.fail(failure("a"))
        writer.commit()
    finish_alone(bank)
    assert attempts(bank) == {"a": 1}


def test_a_manifest_says_which_units_have_no_tar_only_where_there_are_some(
    add: Make, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    add(bank, "a bad-1")
    finish_alone(bank)
    assert "empty" not in read_signed_json(bank / "bank.json")
    add(bank, "bad-2")
    finish_alone(bank)
    assert read_manifest(bank).empty == ["bank-000001.tar"]
    # one of an older framebank does not say it: nothing is lost, nothing is told twice
    older = read_signed_json(bank / "bank.json")
    del older["empty"]
    write_atomic(bank / "bank.json", signed_json(older))
    update_quarantine(bank, [], [failure("bad-2", 3)])
    finish_alone(bank)
    assert attempts(bank) == {"bad-1": 1, "bad-2": 3}
    assert done(bank)
