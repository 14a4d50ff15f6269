"""Shards: the same samples give the same bytes, and every tar reader opens them.

pytest tests/shards/test_shard.py
"""

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shards.errors import UserError
from shards.format.codec import Codec
from shards.format.commits import CommitRecord, done_path, journal_path, part_path, read_commit
from shards.format.plan import read_plan
from shards.format.samples import SampleMeta, sample_key
from shards.read.bank import Bank
from shards.signed import read_signed_json, signed_json
from shards.write.shard import ShardWriter

Arrays = dict[int, np.ndarray]
MakeMeta = Callable[..., SampleMeta]

STOCK_WEBDATASET = """
import io, sys
import numpy as np
import webdataset
found = {}
for sample in webdataset.WebDataset(sys.argv[2:], shardshuffle=False).decode():
    for stride in ("stride4", "stride8"):
        array = sample[stride + ".npy"]
        assert isinstance(array, np.ndarray), type(array)
        found[sample["json"]["id"] + "|" + stride] = array
    assert set(sample) == {"__key__", "__url__", "__local_path__", "json", "stride4.npy",
                           "stride8.npy"}, set(sample)
ours = {"shards", "preprocess", "model", "train"} & {name.split(".")[0] for name in sys.modules}
assert not ours, ours
np.savez(sys.argv[1], **found)
"""


def some_arrays(seed: int, dtype: type = np.float16) -> Arrays:
    rng = np.random.default_rng(seed)
    frames, dim = int(rng.integers(1, 5)), 6
    return {
        stride: (rng.normal(size=(frames, side, side, dim)) * 100).astype(dtype)
        for stride, side in ((8, 1), (4, 2))
    }


def write(path: Path, make_meta: MakeMeta, clips: dict[str, Arrays]) -> CommitRecord:
    writer = ShardWriter(path, 3, "fe" * 16)
    for id_, arrays in clips.items():
        writer.write(sample_key(id_), make_meta(id_, arrays), arrays)
    return writer.commit()


@pytest.fixture
def clips() -> dict[str, Arrays]:
    return {f"folder.v1/clip {k}.mp4": some_arrays(k) for k in range(5)}


def test_the_same_samples_give_the_same_bytes(
    tmp_path: Path, make_meta: MakeMeta, clips: dict[str, Arrays]
) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder / "bank-000000.tar", make_meta, clips)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["bank-000000.done", "bank-000000.tar", "bank-000000.tar.idx"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_memory_layout_does_not_reach_the_bytes(tmp_path: Path, make_meta: MakeMeta) -> None:
    arrays = some_arrays(1)
    strange = {stride: np.asfortranarray(array) for stride, array in arrays.items()}
    a = write(tmp_path / "a.tar", make_meta, {"x.mp4": arrays})
    b = write(tmp_path / "b.tar", make_meta, {"x.mp4": strange})
    assert a.sha256 == b.sha256


def test_members_are_contiguous_in_order_and_their_headers_fixed(
    tmp_path: Path, make_meta: MakeMeta, clips: dict[str, Arrays]
) -> None:
    path = tmp_path / "bank-000000.tar"
    write(path, make_meta, clips)
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
    expected = [
        f"{sample_key(id_)}.{suffix}"
        for id_ in clips
        for suffix in ("json", "stride4.npy", "stride8.npy")
    ]
    assert [member.name for member in members] == expected
    for member in members:
        facts = (member.mtime, member.uid, member.gid, member.mode, member.uname, member.gname)
        assert facts == (0, 0, 0, 0o644, "", "")
        assert member.isreg()
        assert member.name.count("/") == 0
    raw = path.read_bytes()
    assert len(raw) % 512 == 0
    assert raw[257:263] == b"ustar\0"
    assert raw.endswith(bytes(1024))


def test_the_idx_holds_each_first_header_and_the_end(
    tmp_path: Path, make_meta: MakeMeta, clips: dict[str, Arrays]
) -> None:
    path = tmp_path / "bank-000000.tar"
    write(path, make_meta, clips)
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
    firsts = [member.offset for member in members if member.name.endswith(".json")]
    last = members[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    raw = (tmp_path / "bank-000000.tar.idx").read_bytes()
    assert len(raw) == 8 * (len(clips) + 1)
    assert [int.from_bytes(raw[k : k + 8], "little") for k in range(0, len(raw), 8)] == [
        *firsts,
        end,
    ]


def test_the_commit_record_holds_true_hashes_and_places(
    tmp_path: Path, make_meta: MakeMeta, clips: dict[str, Arrays]
) -> None:
    path = tmp_path / "bank-000000.tar"
    returned = write(path, make_meta, clips)
    data = path.read_bytes()
    record = json.loads((tmp_path / "bank-000000.done").read_bytes())
    claimed = record.pop("self_hash")
    assert record == json.loads(json.dumps(returned.to_json()))
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert claimed == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    assert (record["nbytes"], record["shard"]) == (len(data), "bank-000000.tar")
    assert (record["unit"], record["fingerprint"]) == (3, "fe" * 16)
    for sample, (id_, arrays) in zip(record["samples"], clips.items(), strict=True):
        begin, nbytes = sample["json"]
        assert json.loads(data[begin : begin + nbytes])["id"] == id_
        for stride, array in arrays.items():
            stream = sample["streams"][str(stride)]
            stored = data[stream["offset"] : stream["offset"] + stream["nbytes"]]
            assert stored == array.tobytes()
            assert stream["shape"] == list(array.shape)
            assert stream["crc32c"] == crc32c(stored)


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_the_crc_here_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([np.float16, np.uint16]).flatmap(
        lambda dtype: st.lists(
            hnp.arrays(dtype, hnp.array_shapes(min_dims=4, max_dims=4, max_side=4)),
            min_size=1,
            max_size=4,
        )
    )
)
def test_any_array_written_is_read_back_by_tarfile_and_numpy(
    tmp_path_factory: pytest.TempPathFactory, make_meta: MakeMeta, arrays: list[np.ndarray]
) -> None:
    path = tmp_path_factory.mktemp("law") / "bank-000000.tar"
    write(path, make_meta, {f"{k}.mp4": {4: array} for k, array in enumerate(arrays)})
    with tarfile.open(path, "r:") as tar:
        for k, array in enumerate(arrays):
            member = tar.extractfile(f"{sample_key(f'{k}.mp4')}.stride4.npy")
            assert member
            read = np.load(io.BytesIO(member.read()), allow_pickle=False)
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert read.tobytes() == array.tobytes()


def test_a_shard_without_commit_leaves_no_final_file(
    tmp_path: Path, make_meta: MakeMeta, clips: dict[str, Arrays]
) -> None:
    writer = ShardWriter(tmp_path / "bank-000000.tar", 0, "")
    for id_, arrays in clips.items():
        writer.write(sample_key(id_), make_meta(id_, arrays), arrays)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["bank-000000.tar.journal", "bank-000000.tar.part"]
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_does_not_reach_the_next_shard(
    tmp_path: Path, make_meta: MakeMeta, clips: dict[str, Arrays]
) -> None:
    (tmp_path / "bank-000000.tar.part").write_bytes(b"left over" * 100_000)
    (tmp_path / "bank-000000.tar").write_bytes(b"renamed, never committed")
    left = write(tmp_path / "bank-000000.tar", make_meta, clips)
    clean = write(tmp_path / "clean" / "bank-000000.tar", make_meta, clips)
    assert left == clean
    assert (tmp_path / "bank-000000.tar").read_bytes() == (
        tmp_path / "clean" / "bank-000000.tar"
    ).read_bytes()


LENGTHS = [1, 3, 2, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1), st.floats(0, 1)), max_size=5),
    st.sampled_from(["none", "blosc", "int8"]),
)
def test_a_writer_stopped_anywhere_and_followed_by_another_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    make_meta: MakeMeta,
    stops: list[tuple[int, float, float]],
    name: str,
) -> None:
    """A stop cuts the files at any byte, as a power loss may, after so many samples more."""
    folder = tmp_path_factory.mktemp("stopped")
    scale = {stride: np.linspace(1, 50, 6, dtype=np.float32) for stride in (4, 8)}
    codec = Codec(name, "float16", scale)
    clips = {f"{k}.mp4": some_arrays(k) for k in range(4)}

    def go_on(path: Path, samples: int) -> ShardWriter:
        writer = ShardWriter(path, 7, "fe", codec)
        for id_, arrays in clips.items():
            if samples and sample_key(id_) not in writer.keys:
                writer.write(sample_key(id_), make_meta(id_, arrays), arrays)
                samples -= 1
        return writer

    path = folder / "stopped" / "bank-000000.tar"
    for samples, *cuts in stops:
        go_on(path, samples).close()
        for file, cut in zip((part_path(path), journal_path(path)), cuts, strict=True):
            raw = file.read_bytes()
            file.write_bytes(raw[: int(cut * len(raw)) or None])
    stopped = go_on(path, 4).commit()
    clean = go_on(folder / "clean" / "bank-000000.tar", 4).commit()
    assert stopped == clean
    for file in ("bank-000000.tar", "bank-000000.tar.idx", "bank-000000.done"):
        assert (folder / "stopped" / file).read_bytes() == (folder / "clean" / file).read_bytes()
    assert len(list((folder / "stopped").iterdir())) == 3


class Killed(Exception):
    pass


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


STEPS = 15
"""System calls of a commit: syncs, names given and taken, removals."""


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("step", range(1, STEPS + 2))
def test_a_writer_killed_within_its_commit_is_followed_by_one_that_encodes_nothing(
    tmp_path: Path, make_meta: MakeMeta, monkeypatch: pytest.MonkeyPatch, step: int, links: bool
) -> None:
    """It dies at its n-th call to the system. Some file systems have no hard links."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path, clips = tmp_path / "a" / "bank-000000.tar", {key: some_arrays(ord(key)) for key in "ab"}
    clean = write(tmp_path / "b" / "bank-000000.tar", make_meta, clips)
    writer = ShardWriter(path, 3, "fe" * 16)
    for id_, arrays in clips.items():
        writer.write(sample_key(id_), make_meta(id_, arrays), arrays)
    calls = 0
    with monkeypatch.context() as context:
        for owner, name in ((os, "fsync"), (os, "link"), (os, "replace"), (Path, "unlink")):
            real = getattr(owner, name)

            def dying(*args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == step:
                    raise Killed
                return real(*args, **options)

            context.setattr(owner, name, dying)
        try:
            writer.commit()
        except Killed:
            writer.close()
        else:
            assert step > STEPS, "a commit that takes fewer steps"
    done = done_path(path)
    if not done.exists():
        with ShardWriter(path, 3, "fe" * 16) as again:
            assert again.keys == {sample_key(id_) for id_ in clips}
            assert again.commit() == clean
    assert read_commit(path) == clean
    for name in ("bank-000000.tar", "bank-000000.tar.idx", "bank-000000.done"):
        assert (path.parent / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_full_disk_leaves_what_the_next_writer_goes_on_from(
    tmp_path: Path, make_meta: MakeMeta
) -> None:
    path, clips = tmp_path / "bank-000000.tar", {key: some_arrays(7) for key in "abc"}
    clean = write(tmp_path / "b" / "bank-000000.tar", make_meta, clips)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = clean.samples[1].offset + 600  # within the second sample
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):  # noqa: PT012, SIM117
            with ShardWriter(path, 3, "fe" * 16) as writer:
                for id_, arrays in clips.items():
                    writer.write(sample_key(id_), make_meta(id_, arrays), arrays)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert part_path(path).stat().st_size == limit
    with ShardWriter(path, 3, "fe" * 16) as writer:
        assert writer.keys == {sample_key("a")}
        for id_ in "bc":
            writer.write(sample_key(id_), make_meta(id_, clips[id_]), clips[id_])
        assert writer.commit() == clean


def test_samples_on_the_disk_are_not_written_again(tmp_path: Path, make_meta: MakeMeta) -> None:
    path, arrays = tmp_path / "bank-000000.tar", some_arrays(0)
    with ShardWriter(path, 0, "fe") as writer:
        writer.write("a", make_meta("a", arrays), arrays, underflowed=7)
    with ShardWriter(path, 0, "fe") as writer:
        assert writer.keys == {"a"}
        assert [entry.underflowed for entry in writer.entries] == [7]
    with ShardWriter(path, 0, "other features") as writer:
        assert writer.keys == set()


def test_a_flipped_bit_in_what_was_left_drops_its_sample_and_the_later(
    tmp_path: Path, make_meta: MakeMeta
) -> None:
    path, arrays = tmp_path / "bank-000000.tar", some_arrays(0)
    with ShardWriter(path, 0, "fe") as writer:
        for key in "abc":
            writer.write(key, make_meta(key, arrays), arrays)
        second = writer.entries[1].sample
    raw = bytearray(part_path(path).read_bytes())
    raw[second.offset + 700] ^= 4
    part_path(path).write_bytes(raw)
    with ShardWriter(path, 0, "fe") as writer:
        assert writer.keys == {"a"}


def test_a_copied_sample_is_the_one_that_was_written(tmp_path: Path, make_meta: MakeMeta) -> None:
    path, copied = tmp_path / "a.tar", tmp_path / "b" / "a.tar"
    clips = {key: some_arrays(k) for k, key in enumerate("abc")}
    codec = Codec("int8", "float16", {s: np.ones(6, np.float32) for s in (4, 8)})
    writer = ShardWriter(path, 0, "fe", codec)
    for key, arrays in clips.items():
        writer.write(key, make_meta(key, arrays), arrays)
    whole, raw = writer.commit(), path.read_bytes()
    other = ShardWriter(copied, 0, "fe", codec)
    for sample in whole.samples:  # each from where it is not in the end
        blob = raw[sample.offset : sample.end]
        other.copy(blob, sample.moved(512 * 9))
    assert other.commit() == whole
    assert copied.read_bytes() == raw


def test_a_unit_without_a_sample_leaves_no_tar(tmp_path: Path, make_meta: MakeMeta) -> None:
    """Stock readers stop at a tar that holds nothing."""
    record = write(tmp_path / "bank-000000.tar", make_meta, {})
    assert record.samples == []
    assert not list(tmp_path.glob("*.tar*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.replace(b'"unit":3', b'"unit":4'),
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: b"[]",
        lambda raw: b"null",
        lambda raw: b"{}",
        lambda raw: b"\xff" + raw,
    ],
)
def test_an_edited_or_damaged_commit_record_is_refused(
    tmp_path: Path, make_meta: MakeMeta, damage: Callable[[bytes], bytes]
) -> None:
    write(tmp_path / "bank-000000.tar", make_meta, {"x.mp4": some_arrays(0)})
    done = tmp_path / "bank-000000.done"
    raw = done.read_bytes()
    assert damage(raw) != raw
    done.write_bytes(damage(raw))
    with pytest.raises(UserError, match="restore it") as caught:
        read_signed_json(done)
    assert str(done) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=5))
def test_a_signed_record_reads_back(
    tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("signed") / "x.json"
    record.pop("self_hash", None)
    path.write_bytes(signed_json(record))
    assert read_signed_json(path) == record


def tars(bank: Path) -> list[Path]:
    return sorted((bank / "shards").glob("*.tar"))


def test_stock_webdataset_reads_a_bank_without_our_code(toy_bank: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.npz"
    command = [sys.executable, "-P", "-c", STOCK_WEBDATASET, out, *tars(toy_bank)]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    found = np.load(out)
    bank = Bank.open(toy_bank)
    assert set(found) == {f"{id_}|stride{stride}" for id_ in bank.ids for stride in (4, 8)}
    for id_ in bank.ids:
        for stride in (4, 8):
            ours, theirs = bank.read(bank.row(id_), stride), found[f"{id_}|stride{stride}"]
            assert ours.dtype == theirs.dtype == np.float16
            np.testing.assert_array_equal(ours, theirs)


def test_python_tarfile_reads_a_bank(toy_bank: Path) -> None:
    bank = Bank.open(toy_bank)
    seen = 0
    for path in tars(toy_bank):
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    continue
                file = tar.extractfile(member)
                assert file
                row = bank.row(json.load(file)["id"])
                for stride in (4, 8):
                    name = member.name.replace(".json", f".stride{stride}.npy")
                    npy = tar.extractfile(name)
                    assert npy
                    array = np.load(io.BytesIO(npy.read()), allow_pickle=False)
                    np.testing.assert_array_equal(array, bank.read(row, stride))
                seen += 1
    assert seen == len(bank) == 9


@pytest.mark.skipif(not shutil.which("tar"), reason="GNU tar is not installed")
def test_gnu_tar_lists_and_extracts_a_bank(toy_bank: Path, tmp_path: Path) -> None:
    bank = Bank.open(toy_bank)
    keys = [sample_key(id_) for id_ in bank.ids]
    (path,) = tars(toy_bank)
    listed = subprocess.run(
        ["tar", "--utc", "-tvf", path], check=True, capture_output=True, text=True
    )
    assert listed.stderr == ""
    lines = listed.stdout.splitlines()
    assert len(lines) == 3 * len(keys)
    assert all(line.startswith("-rw-r--r-- 0/0 ") for line in lines), lines[0]
    assert all(" 1970-01-01 00:00 " in line for line in lines), lines[0]
    subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True)
    for row, key in enumerate(keys):
        assert json.loads((tmp_path / f"{key}.json").read_text())["id"] == bank.ids[row]
        for stride in (4, 8):
            array = np.load(tmp_path / f"{key}.stride{stride}.npy", allow_pickle=False)
            np.testing.assert_array_equal(array, bank.read(row, stride))


def test_samples_lie_in_the_order_of_the_plan(toy_bank: Path) -> None:
    plan = read_plan(toy_bank)
    assert plan
    assert Bank.open(toy_bank).ids == [clip.id for clip in plan.clips]
