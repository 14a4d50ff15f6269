"""A lease per unit: one holder at a time, the next one where it ends, and no harm by one that wakes.

pytest tests/shards/test_lease.py
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.format.commits import (
    attempt_files,
    committed,
    done_path,
    index_path,
    journal_path,
    lease_path,
    part_path,
    read_commit,
    shard_path,
)
from shards.format.quarantine import QuarantineEntry, Reason
from shards.format.samples import SampleMeta
from shards.write import lock
from shards.write.lease import Lease, Leases, holders, sweep
from shards.write.shard import PLAIN, OvertakenError, ShardWriter, resume_commit

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., SampleMeta]
KEYS = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder of this process never beats, and counts as over at the second look."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 60.0)
    monkeypatch.setattr(lock, "WATCHED_SECONDS", 0.0)


def arrays(key: str) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(ord(key))
    return {s: rng.normal(size=(2, n, n, 6)).astype(np.float16) for s, n in ((4, 2), (8, 1))}


def fail(key: str) -> QuarantineEntry:
    return QuarantineEntry(key, key, key, "decode", Reason.DAMAGED, "damaged", 1, 0.5)


def writer_of(lease: Lease) -> ShardWriter:
    return ShardWriter(
        lease.shard, lease.unit, "fe" * 16, token=lease.token, earlier=lease.earlier, wanted=KEYS
    )


def make(lease: Lease, make_meta: Make, writer: ShardWriter | None = None) -> None:
    """Do what a worker does with a unit: b has failed, the others are samples."""
    tokens = [one.token for one in lease.earlier]
    if resume_commit(lease.shard, "fe" * 16, KEYS, tokens, lease.token):
        return
    with writer or writer_of(lease) as open_writer:
        for key in KEYS:
            if key not in open_writer.keys:
                write(open_writer, key, make_meta)
        open_writer.commit({"machine": "x"})


def write(writer: ShardWriter, key: str, make_meta: Make) -> None:
    if key == "b":
        writer.fail(fail(key))
    else:
        writer.write(key, make_meta(key, arrays(key)), arrays(key))


def taken(leases: Leases, unit: int = 0) -> Lease:
    lease = leases.take(unit) or leases.take(unit)
    assert lease
    return lease


def files(shards: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(shards.iterdir())}


@pytest.fixture(scope="module")
def clean(make_meta: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a unit that one holder made."""
    bank = tmp_path_factory.mktemp("clean")
    with Leases(bank, "a") as leases, closing(leases.left([0])) as left:
        for lease in left:
            make(lease, make_meta)
    found = files(bank / "shards")
    assert set(found) == {f"bank-000000.{end}" for end in ("done", "tar", "tar.idx")}
    return found


def test_a_unit_is_held_by_one_and_named_to_the_others(tmp_path: Path, make_meta: Make) -> None:
    with Leases(tmp_path, "preprocess work") as ours, Leases(tmp_path, "other") as other:
        lease = taken(ours)
        assert other.take(0) is None
        assert str(other.held[0]) == str(ours.writer)
        assert holders(tmp_path) == {0: ours.writer}
        make(lease, make_meta)
        assert other.take(0) is None
    assert holders(tmp_path) == {}
    assert not [name for name in files(tmp_path / "shards") if "lease" in name]


def test_of_many_at_once_one_takes_a_unit(tmp_path: Path) -> None:
    got: list[Lease] = []
    ready = threading.Barrier(8)

    def ask() -> None:
        with Leases(tmp_path, "work") as leases:
            ready.wait()
            got.extend(filter(None, map(leases.take, [0])))
            ready.wait()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_what_is_given_up_goes_on_at_once_where_it_was(
    tmp_path: Path, make_meta: Make, clean: dict[str, bytes]
) -> None:
    with Leases(tmp_path, "first") as leases, writer_of(taken(leases)) as writer:
        for key in "ab":
            write(writer, key, make_meta)
    with Leases(tmp_path, "second") as leases:
        lease = leases.take(0)
        assert lease, "it was given up: nothing is to be watched"
        with writer_of(lease) as writer:
            assert writer.keys == {"a", "b"}
            assert [entry.key for entry in writer.failures] == ["b"]
            make(lease, make_meta, writer)
    assert files(tmp_path / "shards") == clean


DIE = """
import os, signal, sys
from pathlib import Path
from shards.write.lease import Leases
with Leases(Path(sys.argv[1]), "preprocess work") as leases:
    assert leases.take(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_holder_on_this_machine_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WATCHED_SECONDS", 1e9)
    died = subprocess.run([sys.executable, "-c", DIE, str(tmp_path)], cwd=ROOT)
    assert died.returncode == -signal.SIGKILL
    assert holders(tmp_path) == {}
    with Leases(tmp_path, "second") as leases:
        assert leases.take(0)


@pytest.mark.parametrize("words", ["", "{", '{"token": "x"}'])
def test_a_lease_that_does_not_say_whose_it_is_is_watched(tmp_path: Path, words: str) -> None:
    path = lease_path(shard_path(tmp_path, 0), 1)
    path.parent.mkdir()
    path.write_text(words)
    with Leases(tmp_path, "second") as leases:
        assert leases.take(0) is None
        assert leases.held == {0: None}
        assert leases.take(0)


def test_a_holder_of_another_machine_with_our_name_and_number_is_watched(tmp_path: Path) -> None:
    with Leases(tmp_path, "work") as leases:
        lease = taken(leases)
        said = json.loads(lease.path.read_text())
        said["writer"] |= {"boot": "another", "pid": 2**22 + 1}
        lease.path.write_text(json.dumps(said))
        with Leases(tmp_path, "second") as other:
            assert other.take(0) is None
            os.utime(lease.path)
            assert other.take(0) is None, "it was touched between two looks"
            assert other.take(0)
            with pytest.raises(OvertakenError):
                lease.check()


def test_who_finds_only_living_holders_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "WATCHED_SECONDS", 1e9)
    with Leases(tmp_path, "work") as ours, Leases(tmp_path, "other") as other:
        assert taken(ours, 1)
        with closing(other.left([0, 1, 2], first=1)) as left:
            order = [lease.unit for lease in left if done_path(lease.shard).write_bytes(b"x")]
    assert order == [2, 0]
    assert other.elsewhere == set()


# --- a holder that is paused, and wakes when another has taken its unit ---

STEPS = 24


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_holder_that_wakes_at_any_step_changes_nothing(
    tmp_path: Path,
    make_meta: Make,
    clean: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    links: bool,
) -> None:
    """At its n-th system call from its third sample on, another takes over and makes the unit."""
    if not links:
        if step > 8:  # without them the end of a commit is two calls and no longer one
            pytest.skip("one machine at a time")
        monkeypatch.setattr(os, "link", no_links)
    calls, inside = 0, False
    with Leases(tmp_path, "paused") as ours, Leases(tmp_path, "next") as other:
        lease = taken(ours)
        writer = writer_of(lease)
        for key in "ab":
            write(writer, key, make_meta)
        with monkeypatch.context() as context:
            for owner, name in ((os, "fsync"), (os, "link"), (os, "replace"), (Path, "unlink")):
                real = getattr(owner, name)

                def pausing(*args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
                    nonlocal calls, inside
                    calls += not inside
                    if calls == step and not inside:
                        inside = True
                        if not committed(tmp_path, 0):
                            make(taken(other), make_meta)
                        other._release()
                        calls += 1
                        inside = False
                    return real(*args, **options)

                context.setattr(owner, name, pausing)
            try:
                make(lease, make_meta, writer)
            except (OvertakenError, FileNotFoundError):
                writer.abandon()
            finally:
                ours._release()
    assert calls > step, "it was not paused"
    sweep(tmp_path)
    assert files(tmp_path / "shards") == clean


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_what_a_sleeper_had_written_is_copied_and_its_files_are_its_own(
    tmp_path: Path, make_meta: Make
) -> None:
    with Leases(tmp_path, "paused") as ours, Leases(tmp_path, "next") as other:
        first = taken(ours)
        sleeper = writer_of(first)
        write(sleeper, "a", make_meta)
        second = taken(other)
        with writer_of(second) as writer:
            assert writer.keys == {"a"}
            write(writer, "b", make_meta)
            before = part_path(second.shard, second.token).read_bytes()
            for key in "cd":
                write(sleeper, key, make_meta)
            assert part_path(second.shard, second.token).read_bytes() == before
            assert writer.keys == {"a", "b"}
        sleeper.close()
        third = taken(Leases(tmp_path, "third"))
        with writer_of(third) as writer:
            assert writer.keys == {"a", "c", "d"}, "the one who came furthest"
            make(third, make_meta, writer)
    record = read_commit(shard_path(tmp_path, 0))
    assert [sample.key for sample in record.samples] == ["a", "c", "d"]
    assert record.failures == [fail("b")]


def test_who_gives_up_what_another_has_taken_over_leaves_it_held(
    tmp_path: Path, make_meta: Make
) -> None:
    """Also if nothing of the first one's is left: the second one's lease must not stand behind a gap."""
    with (
        Leases(tmp_path, "paused") as ours,
        Leases(tmp_path, "next") as other,
        Leases(tmp_path, "third") as third,
    ):
        with writer_of(taken(ours)) as writer:
            second = taken(other)
            writer.abandon()
        ours._release()
        assert third.take(0) is None
        assert third.held[0] == other.writer
        make(second, make_meta)
        other._release()
    assert committed(tmp_path, 0)


@pytest.mark.parametrize(
    ("fingerprint", "wanted", "ours"),
    [("fe" * 16, KEYS, True), ("fe" * 16, ("a", "b"), False), ("00" * 16, KEYS, False)],
)
def test_a_commit_that_was_begun_is_ended_if_it_is_of_this_unit(
    tmp_path: Path,
    make_meta: Make,
    clean: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    fingerprint: str,
    wanted: tuple[str, ...],
    ours: bool,
) -> None:
    """A retry that is killed leaves files of a unit that its plan gives up."""
    with Leases(tmp_path, "first") as leases, writer_of(taken(leases)) as writer:
        for key in KEYS:
            write(writer, key, make_meta)
        with monkeypatch.context() as context:  # all is written, nothing has its name
            context.setattr(os, "link", no_links)
            context.setattr(os, "open", no_links)
            with pytest.raises(OSError, match="not permitted"):
                writer.commit({"machine": "x"})
    with Leases(tmp_path, "second") as leases:
        lease = taken(leases)
        tokens = [one.token for one in lease.earlier]
        record = resume_commit(lease.shard, fingerprint, wanted, tokens, lease.token)
        assert (record is not None) == done_path(lease.shard).exists() == ours
    assert not ours or files(tmp_path / "shards") == clean


@pytest.mark.parametrize("ended", [False, True], ids=["begun", "whole"])
@pytest.mark.parametrize("same", [True, False])
def test_only_samples_of_the_planned_videos_are_continued(
    tmp_path: Path, make_meta: Make, monkeypatch: pytest.MonkeyPatch, ended: bool, same: bool
) -> None:
    """A retry was killed, a video was replaced, and the next retry has a unit of the same number."""
    with Leases(tmp_path, "first") as leases, writer_of(taken(leases)) as writer:
        for key in KEYS:
            write(writer, key, make_meta)
        with monkeypatch.context() as context:
            context.setattr(os, "link", no_links)
            context.setattr(os, "open", no_links)
            if ended:
                with pytest.raises(OSError, match="not permitted"):
                    writer.commit({"machine": "x"})
    digest = make_meta("a", arrays("a")).digest
    digests = {"a": digest, "c": digest if same else "another"}
    with Leases(tmp_path, "second") as leases:
        lease = taken(leases)
        tokens = [one.token for one in lease.earlier]
        record = resume_commit(lease.shard, "fe" * 16, KEYS, tokens, lease.token, digests)
        assert (record is not None) == (ended and same)
        if not record:
            token, earlier = lease.token, lease.earlier
            with ShardWriter(
                lease.shard, 0, "fe" * 16, PLAIN, token, earlier, KEYS, digests
            ) as again:
                assert again.keys == (set(KEYS) if same else set())


def test_a_unit_of_which_all_has_failed_and_one_with_samples_do_not_mix(
    tmp_path: Path, make_meta: Make
) -> None:
    """Two holders, one of whom could read nothing: whoever ends first has made the unit."""
    for empty_first in (True, False):
        bank = tmp_path / str(empty_first)
        with Leases(bank, "empty") as ours, Leases(bank, "full") as other:
            empty, full = writer_of(taken(ours)), writer_of(taken(other))
            for key in KEYS:
                if key not in empty.keys:
                    empty.fail(fail(key))
                write(full, key, make_meta)
            order = [empty, full] if empty_first else [full, empty]
            order[0].commit()
            with pytest.raises(OvertakenError):
                order[1].commit()
            order[1].abandon()
        shard = shard_path(bank, 0)
        samples = read_commit(shard).samples
        assert bool(samples) != empty_first
        assert shard.exists() == index_path(shard).exists() == bool(samples)


def test_what_is_left_of_finished_units_is_swept_and_of_others_is_not(
    tmp_path: Path, make_meta: Make
) -> None:
    with Leases(tmp_path, "work") as leases:
        make(taken(leases), make_meta)
        leases._release()
        begun = taken(leases, 1)
        with writer_of(begun) as writer:
            write(writer, "a", make_meta)
    done, left = shard_path(tmp_path, 0), files(tmp_path / "shards")
    for stale in (journal_path(done, "0a1b2c3d"), part_path(done), lease_path(done, 7)):
        stale.write_bytes(b"x")
    assert len(list(attempt_files(tmp_path / "shards"))) == 6
    sweep(tmp_path)
    assert files(tmp_path / "shards") == left


def test_a_record_of_another_kind_of_failure_is_refused() -> None:
    from shards.errors import UserError

    said = replace(fail("a")).to_json() | {"reason": "bad luck"}
    with pytest.raises(UserError, match="must be one of cannot-open"):
        QuarantineEntry.from_json(said, "here")
