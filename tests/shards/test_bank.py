"""Reading a bank: any frames in any order, from any process; a wrong bank is one clear line.

pytest tests/shards/test_bank.py
"""

import gc
import json
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, cycle, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shards import storage as files_module
from shards.errors import UserError
from shards.format.catalogue import build_columns, checksums, write_columns
from shards.format.codec import Codec
from shards.format.commits import done_path, read_commit
from shards.format.features import FeatureConfig, Sampling
from shards.format.manifest import read_manifest
from shards.format.plan import ClipSource, Plan, write_plan
from shards.format.samples import sample_key
from shards.read import opening
from shards.read.bank import Bank, DamagedSample, runs
from shards.read.banks import Banks, arithmetic_note
from shards.signed import signed_json, write_atomic
from shards.storage import LocalFiles

MakeBank = Callable[..., Path]
Arrays = dict[int, np.ndarray]


def arrays_of(seed: int, frames: int = 7) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        4: rng.normal(size=(frames, 2, 3, 5)).astype(np.float16),
        8: rng.normal(size=(frames, 1, 2, 5)).astype(np.float16),
    }


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "PAUSE", 0)


CLIPS = {f"clip {k}.mp4": arrays_of(k, frames=3 + 2 * k) for k in range(4)}


@pytest.fixture(scope="module")
def small_bank(make_bank: MakeBank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips of 3, 5, 7 and 9 frames in two shards. Read it only."""
    items = list(CLIPS.items())
    out = tmp_path_factory.mktemp("small") / "bank"
    return make_bank(out, dict(items[:1]), dict(items[1:]), quarantined=("bad.mp4",))


def test_every_clip_reads_back_whole(small_bank: Path) -> None:
    bank = Bank.open(small_bank)
    assert len(bank) == len(CLIPS)
    for id_, arrays in CLIPS.items():
        assert id_ in bank
        for stride, array in arrays.items():
            read = bank.read(bank.row(id_), stride)
            assert read.dtype == np.float16
            np.testing.assert_array_equal(read, array)
            assert bank.shape(bank.row(id_), stride) == array.shape
    assert "clip 9.mp4" not in bank


@given(id_=st.sampled_from(list(CLIPS)), stride=st.sampled_from([4, 8]), data=st.data())
def test_any_frames_in_any_order_equal_the_full_read(
    small_bank: Path, id_: str, stride: int, data: st.DataObject
) -> None:
    array = CLIPS[id_][stride]
    frames = data.draw(st.lists(st.integers(0, len(array) - 1), max_size=12))
    bank = opened(small_bank)
    read = bank.read(bank.row(id_), stride, frames)
    np.testing.assert_array_equal(read, array[frames])
    assert read.shape == (len(frames), *array.shape[1:])
    np.testing.assert_array_equal(bank.read(bank.row(id_), stride, np.array(frames, int)), read)


BANKS: dict[Path, Bank] = {}


def opened(path: Path) -> Bank:
    if path not in BANKS:
        BANKS[path] = Bank.open(path)
    return BANKS[path]


@given(st.lists(st.integers(0, 9), max_size=20))
@example([])
@example([3, 4, 5, 5, 6, 0])
def test_runs_cut_any_indices_into_consecutive_stretches(indices: list[int]) -> None:
    pieces = [list(range(indices[a], indices[a] + b - a + 1)) for a, b in runs(indices)]
    assert [*chain.from_iterable(pieces)] == indices
    for left, right in pairwise(pieces):
        assert right[0] != left[-1] + 1, "two stretches are one"


@pytest.mark.parametrize("frames", [[-1], [3], [0, 1, 2, 3]])
def test_a_frame_that_is_not_there_is_never_delivered(small_bank: Path, frames: list[int]) -> None:
    bank = Bank.open(small_bank)
    with pytest.raises(IndexError, match=r"'clip 0.mp4' has 3 frames from 0 on, no frame (-1|3)"):
        bank.read(bank.row("clip 0.mp4"), 4, frames)


@contextmanager
def unnoticed(path: Path) -> Iterator[None]:
    """Keep a file's time of change, as a disk does that loses bits."""
    before = path.stat()
    yield
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_read_touches_no_other_bytes(small_bank: Path, tmp_path: Path) -> None:
    path = shutil.copytree(small_bank, tmp_path / "bank")
    bank = Bank.open(path)
    row, frame, nbytes = bank.row("clip 2.mp4"), 4, 2 * 3 * 5 * 2
    begin = int(bank.columns["stride4_offset"][row]) + frame * nbytes
    shard = path / "shards" / "bank-000001.tar"
    size = shard.stat().st_size
    raw = shard.read_bytes()[begin : begin + nbytes]
    bank.read(row, 4)  # the first touch reads all of the clip, and checks it
    with unnoticed(shard):
        shard.write_bytes(b"\xff" * begin + raw + b"\xff" * (size - begin - nbytes))
    np.testing.assert_array_equal(bank.read(row, 4, [frame]), CLIPS["clip 2.mp4"][4][[frame]])


def test_the_facts_of_a_clip_are_those_of_its_json(small_bank: Path) -> None:
    bank = Bank.open(small_bank)
    clip = bank.clip(bank.row("clip 1.mp4"))
    assert (clip.id, clip.start, clip.end, clip.duration) == ("clip 1.mp4", 0, 5 / 8, 5 / 8)
    assert clip.timestamps.tolist() == [k / 8 for k in range(5)]
    assert clip.frame_index.tolist() == list(range(5))
    assert (clip.display_size, clip.patch_grid) == ((48, 64), (8, 6))
    assert clip.covered == (0.0, 0.125, 1.0, 0.875)


def read_in_child(bank: Bank, connection: Any) -> None:
    connection.send({id_: bank.read(bank.row(id_), 4, [2, 0]).tobytes() for id_ in bank.ids})
    connection.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_bank_opened_and_read_before_works_in_another_process(
    small_bank: Path, method: Any
) -> None:
    bank = Bank.open(small_bank)
    for row in range(len(bank)):
        bank.read(row, 4)  # its files are open now
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=read_in_child, args=(bank, there))
    child.start()
    there.close()
    assert here.poll(60)
    assert here.recv() == {id_: CLIPS[id_][4][[2, 0]].tobytes() for id_ in CLIPS}
    child.join(60)
    assert child.exitcode == 0
    np.testing.assert_array_equal(bank.read(0, 4), CLIPS["clip 0.mp4"][4])


def test_a_pickled_bank_carries_no_open_file(small_bank: Path) -> None:
    bank = Bank.open(small_bank)
    bank.read(0, 4)
    again = pickle.loads(pickle.dumps(bank))
    assert isinstance(bank.files, LocalFiles)
    assert isinstance(again.files, LocalFiles)
    assert bank.files._opened
    assert not again.files._opened
    np.testing.assert_array_equal(again.read(0, 8), CLIPS["clip 0.mp4"][8])


def test_threads_share_a_bank(small_bank: Path) -> None:
    bank = Bank.open(small_bank)

    def work(k: int) -> bool:
        id_ = f"clip {k % 4}.mp4"
        return bool((bank.read(bank.row(id_), 4) == CLIPS[id_][4]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_a_bfloat16_bank_reads_as_uint16(
    make_bank: MakeBank, features: FeatureConfig, tmp_path: Path
) -> None:
    arrays = {s: array.view(np.uint16) for s, array in arrays_of(5).items()}
    config = replace(features, dtype="bfloat16")
    bank = Bank.open(make_bank(tmp_path / "bank", {"x.mp4": arrays}, config=config))
    read = bank.read(0, 8, [6, 1])
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, arrays[8][[6, 1]])


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError, match=r".") as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copy(small_bank: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bank, tmp_path / "copy"))


def test_a_folder_without_manifest_is_no_bank(copy: Path) -> None:
    (copy / "bank.json").unlink()
    message = refusal(lambda: Bank.open(copy))
    assert message.startswith(f"{copy}: no bank here")
    assert "preprocess encode" in message


def test_a_folder_that_is_not_there_is_no_bank(tmp_path: Path) -> None:
    assert "no bank here" in refusal(lambda: Bank.open(tmp_path / "nowhere"))


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    manifest = copy / "bank.json"
    text = manifest.read_text()
    assert text.count('"layer":-2') == 1
    manifest.write_text(text.replace('"layer":-2', '"layer":-1'))
    message = refusal(lambda: Bank.open(copy))
    assert str(manifest) in message
    assert "does not match its own hash" in message


def test_a_bank_of_a_newer_format_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "bank.json").read_text())
    manifest.pop("self_hash")
    (copy / "bank.json").write_bytes(signed_json(manifest | {"format_version": 4}))
    message = refusal(lambda: Bank.open(copy))
    assert re.search(r"format 4\b.*up to 3\b.*update framebank", message)


def test_a_bank_whose_catalogue_is_of_another_bank_is_refused(
    copy: Path, make_bank: MakeBank, tmp_path: Path
) -> None:
    other = make_bank(tmp_path / "other", {"x.mp4": arrays_of(1)})
    shutil.rmtree(copy / "index.zarr")
    shutil.copytree(other / "index.zarr", copy / "index.zarr")
    message = refusal(lambda: Bank.open(copy))
    assert "lists 1 clips, bank.json 4" in message


def test_a_bank_without_catalogue_is_refused_with_a_way_out(copy: Path) -> None:
    shutil.rmtree(copy / "index.zarr")
    message = refusal(lambda: Bank.open(copy))
    assert str(copy) in message
    assert "copy it again" in message


def test_a_shard_that_ends_early_is_named(copy: Path) -> None:
    shard = copy / "shards" / "bank-000001.tar"
    bank = Bank.open(copy)
    row = len(bank) - 1
    os.truncate(shard, int(bank.columns["stride8_offset"][row]) + 10)
    message = refusal(lambda: bank.read(row, 8))
    assert str(shard) in message
    assert "ends early" in message


def test_a_shard_that_goes_is_named(copy: Path) -> None:
    bank = Bank.open(copy)
    (copy / "shards" / "bank-000000.tar").unlink()
    assert re.search(
        r"bank-000000\.tar.*is missing.*preprocess repair", refusal(lambda: bank.read(0, 4))
    )


def test_shards_that_were_not_copied_are_named_at_once(copy: Path) -> None:
    first, second = (copy / "shards" / f"bank-00000{k}.tar" for k in (0, 1))
    size = second.stat().st_size
    first.unlink()
    os.truncate(second, 512)
    message = refusal(lambda: Bank.open(copy))
    assert f"bank-000000.tar is missing, bank-000001.tar has 512 of {size} bytes" in message
    assert "copy it again" in message


def test_two_banks_are_read_as_one_by_id(
    small_bank: Path, make_bank: MakeBank, tmp_path: Path
) -> None:
    more = {"extra.mp4": arrays_of(9, frames=2)}
    other = make_bank(tmp_path / "other", more, quarantined=("worse.mp4",))
    banks = Banks.open([small_bank, other])
    for id_, arrays in (CLIPS | more).items():
        assert id_ in banks
        clip = banks.clip(id_)
        assert clip.info.id == id_
        assert clip.bank.path == (other if id_ in more else small_bank)
        np.testing.assert_array_equal(clip.read(8, [1, 0]), arrays[8][[1, 0]])
    assert "bad.mp4" not in banks
    assert banks.quarantined() == {"bad.mp4", "worse.mp4"}


def config_changes(features: FeatureConfig) -> dict[str, FeatureConfig]:
    return {
        "tower_digest": replace(features, tower_digest="11" * 16),
        "tower_type": replace(features, tower_type="clip_vision_model"),
        "layer": replace(features, layer=-1),
        "strides": replace(features, strides=(4,)),
        "pool": replace(features, pool="max"),
        "processor.width": replace(features, processor={**features.processor, "width": 32}),
        "attention": replace(features, attention="eager"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "tower_digest",
        "tower_type",
        "layer",
        "strides",
        "pool",
        "processor.width",
        "attention",
    ],
)
def test_banks_that_disagree_are_refused_by_field(
    small_bank: Path, make_bank: MakeBank, features: FeatureConfig, tmp_path: Path, name: str
) -> None:
    config = config_changes(features)[name]
    other = make_bank(tmp_path / "other", {"x.mp4": arrays_of(1)}, config=config)
    message = refusal(lambda: Banks.open([small_bank, other]))
    assert f"{small_bank} and {other} cannot be joined: {name}: " in message
    assert message.count(" here, ") == 1


def test_banks_of_a_tower_that_computed_in_other_types_join_and_are_told(
    small_bank: Path, make_bank: MakeBank, features: FeatureConfig, tmp_path: Path
) -> None:
    config = replace(features, tower_dtype="bfloat16")
    other = make_bank(tmp_path / "other", {"x.mp4": arrays_of(1)}, config=config)
    banks = Banks.open([small_bank, other])
    assert "x.mp4" in banks
    (line,) = arithmetic_note(banks)
    assert f"float32 for {small_bank}, bfloat16 for {other}" in line
    assert arithmetic_note(Banks.open([small_bank]), "float32") == []
    assert arithmetic_note(Banks.open([other]), "float32")


def test_banks_of_other_sampling_join(
    small_bank: Path, make_bank: MakeBank, features: FeatureConfig, tmp_path: Path
) -> None:
    config = replace(features, sampling=Sampling(fps="2", max_frames=9))
    other = make_bank(tmp_path / "other", {"x.mp4": arrays_of(1)}, config=config)
    assert "x.mp4" in Banks.open([small_bank, other])


def test_banks_with_a_clip_in_common_are_refused(
    small_bank: Path, make_bank: MakeBank, tmp_path: Path
) -> None:
    other = make_bank(tmp_path / "other", {"clip 1.mp4": arrays_of(1)})
    message = refusal(lambda: Banks.open([small_bank, other]))
    assert "'clip 1.mp4'" in message
    assert str(small_bank) in message
    assert str(other) in message


@settings(max_examples=30)
@given(st.lists(st.integers(0, 8), max_size=9))
def test_a_clip_of_joined_banks_reads_any_frames(small_bank: Path, frames: list[int]) -> None:
    clip = Banks([opened(small_bank)]).clip("clip 3.mp4")
    np.testing.assert_array_equal(clip.read(4, frames), CLIPS["clip 3.mp4"][4][frames])


# Checksums.


CODECS = ["none", "blosc", "int8"]


@pytest.fixture(scope="module")
def banks_of(
    make_bank: MakeBank, features: FeatureConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The clips once in each codec. Read them only."""
    folder = tmp_path_factory.mktemp("codecs")
    return {
        codec: make_bank(folder / codec, CLIPS, config=replace(features, codec=codec))
        for codec in CODECS
    }


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_reads_back_what_it_promises(banks_of: dict[str, Path], codec: str) -> None:
    bank = Bank.open(banks_of[codec])
    scales = {int(s): np.float32(x) for s, x in (bank.manifest.calibration or {}).items()}
    own = Codec(codec, "float16", scales)
    for id_, arrays in CLIPS.items():
        for stride, array in arrays.items():
            stored = own.encode(stride, array)
            wanted = own.decode(
                stride, stored.data, array.shape[1:], stored.frame_nbytes, stored.scale
            )
            read = bank.read(bank.row(id_), stride)
            assert read.dtype == np.float16
            np.testing.assert_array_equal(read, wanted)
            if codec != "int8":
                np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=15, deadline=None)
@given(frames=st.lists(st.integers(0, 8), max_size=9), data=st.data())
def test_any_frames_are_those_of_the_whole(
    banks_of: dict[str, Path], codec: str, frames: list[int], data: st.DataObject
) -> None:
    bank = Bank.open(banks_of[codec])
    row, stride = bank.row("clip 3.mp4"), data.draw(st.sampled_from([4, 8]))
    out = np.empty((len(frames), *bank.shape(row, stride)[1:]), np.float16)
    read = bank.read(row, stride, frames, out)  # of a fresh bank: a first touch
    assert read is out
    again = bank.read(row, stride, frames)
    whole = bank.read(row, stride)
    np.testing.assert_array_equal(read, whole[frames])
    np.testing.assert_array_equal(again, whole[frames])


def flip(path: Path, place: int, bit: int = 3) -> None:
    with unnoticed(path), open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_found_at_first_touch_whatever_frame_is_asked_for(
    banks_of: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    codec: str,
    data: st.DataObject,
) -> None:
    path = shutil.copytree(banks_of[codec], tmp_path_factory.mktemp("flip") / "bank")
    bank = Bank.open(path)
    id_, stride = data.draw(st.sampled_from(list(CLIPS))), data.draw(st.sampled_from([4, 8]))
    row = bank.row(id_)
    names = [f"stride{stride}", *([f"stride{stride}_scale"] if codec == "int8" else [])]
    name = data.draw(st.sampled_from(names))
    begin, nbytes = (int(bank.columns[f"{name}_{what}"][row]) for what in ("offset", "nbytes"))
    place = begin + data.draw(st.integers(0, nbytes - 1))
    flip(path / "shards" / "bank-000000.tar", place, data.draw(st.integers(0, 7)))
    frames = data.draw(st.sampled_from([None, [], [0], [2, 1]]))
    for _ in range(2):  # a stream that failed is looked at again
        with pytest.raises(DamagedSample) as caught:
            bank.read(row, stride, frames)
        for word in ("bank-000000.tar", sample_key(id_), f"stride {stride}", "preprocess repair"):
            assert word in str(caught.value)
    for other in set(CLIPS) - {id_}:
        bank.read(bank.row(other), stride)


def test_checksums_are_compared_when_a_process_first_reads_of_a_stream(copy: Path) -> None:
    bank = Bank.open(copy)
    place = int(bank.columns["stride4_offset"][2])
    shard = copy / "shards" / "bank-000001.tar"

    def found(frames: list[int] | None) -> bool:
        try:
            bank.read(2, 4, frames)
        except DamagedSample:
            return True
        return False

    flip(shard, place)
    assert found([1])
    assert found(None)
    flip(shard, place)  # as it was
    assert not found([1])
    flip(shard, place)
    assert not found([1])
    assert not found(None)
    # the other stream, and another process, have not been here
    flip(shard, int(bank.columns["stride8_offset"][2]))
    with pytest.raises(DamagedSample):
        bank.read(2, 8)
    with pytest.raises(DamagedSample):
        pickle.loads(pickle.dumps(bank)).read(2, 4, [1])


# Reading into given memory, with what the system has.


def test_a_read_fills_the_memory_it_is_given_and_no_other_shape(small_bank: Path) -> None:
    bank = Bank.open(small_bank)
    pool = np.zeros((2, 9, 2, 3, 5), np.float16)
    for k, id_ in enumerate(CLIPS):
        frames = len(CLIPS[id_][4])
        out = pool[k % 2, :frames]
        assert bank.read(bank.row(id_), 4, out=out) is out
        np.testing.assert_array_equal(pool[k % 2, :frames], CLIPS[id_][4])
    for wrong in (pool[0, :2], pool[0, :3].astype(np.float32), pool[0, :6:2]):
        with pytest.raises(ValueError, match=r"out is float.*; needed: float16 \(3, 2, 3, 5\)"):
            bank.read(0, 4, out=wrong)


@pytest.mark.parametrize("codec", CODECS)
def test_a_system_without_preadv_reads_the_same(
    banks_of: dict[str, Path], codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Bank.open(banks_of[codec])
    wanted = [bank.read(row, 4, [1, 2, 0]) for row in range(4)]
    monkeypatch.delattr(os, "preadv")
    again = Bank.open(banks_of[codec])
    for row, array in enumerate(wanted):
        np.testing.assert_array_equal(again.read(row, 4, [1, 2, 0]), array)


def test_ten_epochs_of_random_reads_leave_nothing(
    make_bank: MakeBank, features: FeatureConfig, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    clips = {
        f"{k}.mp4": {s: rng.normal(size=(8, 8, 8, 64)).astype(np.float16) for s in (4, 8)}
        for k in range(48)
    }
    bank = make_bank(tmp_path / "bank", clips, config=replace(features, codec="int8"))
    script = """
import os, sys
import numpy as np
from shards.read.bank import Bank
bank, sizes = Bank.open(sys.argv[1]), []
before = os.listdir("/dev/shm"), len(os.listdir("/proc/self/fd"))
for epoch in range(12):
    for row in np.random.default_rng(epoch).permutation(len(bank)):
        bank.read(int(row), 4)
        bank.read(int(row), 8, [3, 1])
    sizes.append(int(open("/proc/self/statm").read().split()[1]))
print(sizes[1], sizes[-1])
assert os.listdir("/dev/shm") == before[0]
assert len(os.listdir("/proc/self/fd")) <= before[1] + 1
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(bank)], check=True, capture_output=True, text=True
    )
    early, late = map(int, done.stdout.split())
    assert late <= 1.02 * early, f"resident pages: {early} after two epochs, {late} after twelve"


# Manifest and catalogue that do not belong together.


def lock(bank: Path, pid: int) -> None:
    record = {"pid": pid, "host": socket.gethostname(), "command": "preprocess encode x"}
    (bank / ".lock").write_text(json.dumps(record | {"started": "now"}))


def gone_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_writer_stopped_before_the_manifest_is_told_with_the_way_out(
    copy: Path, make_bank: MakeBank, tmp_path: Path
) -> None:
    longer = make_bank(tmp_path / "longer", CLIPS, {"new.mp4": arrays_of(8)})
    shutil.rmtree(copy / "index.zarr")
    shutil.copytree(longer / "index.zarr", copy / "index.zarr")
    lock(copy, gone_process())
    message = refusal(lambda: Bank.open(copy))
    assert "the catalogue lists 5 clips, bank.json 4" in message
    assert "a writer was stopped" in message
    assert f"preprocess repair {copy}" in message
    lock(copy, os.getpid())
    message = refusal(lambda: Bank.open(copy))
    assert f"is being written by `preprocess encode x` (process {os.getpid()}" in message


@pytest.mark.parametrize("harm", ["delete", "edit"])
def test_one_damaged_column_is_named_with_the_way_out(copy: Path, harm: str) -> None:
    chunk = copy / "index.zarr" / "stride4_offset" / "c" / "0"
    if harm == "delete":
        chunk.unlink()
    else:
        flip(chunk, 3)
    message = refusal(lambda: Bank.open(copy))
    assert f"{copy}/index.zarr: column stride4_offset" in message
    assert f"preprocess repair {copy}" in message


def test_a_bank_that_is_rewritten_meanwhile_opens_whole_or_not_at_all(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "PAUSE", 0.02)
    manifest = read_manifest(copy)
    commits = [read_commit(copy / "shards" / shard.name) for shard in manifest.shards]
    states = []
    for kept in (list(CLIPS), list(CLIPS)[1:]):
        serving = {sample_key(id_): int(id_ != "clip 0.mp4") for id_ in kept}
        columns = build_columns(copy / "shards", commits, (4, 8), serving)
        other = replace(manifest, clips=len(kept), catalogue=checksums(columns))
        states.append((columns, signed_json(other.to_json())))
    over = threading.Event()
    lock(copy, os.getpid())

    def rewrite() -> None:
        for columns, text in islice(cycle(states), 80):
            write_columns(copy / "index.zarr", columns)
            write_atomic(copy / "bank.json", text)
            if over.wait(0.05):
                return

    opened_with, refused = [], []
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(rewrite)
        while not writer.done() and (len(opened_with) < 20 or set(opened_with) != {3, 4}):
            try:
                bank = Bank.open(copy)
            except UserError as error:
                refused.append(str(error))
                continue
            opened_with.append(len(bank))
            assert len(bank) == bank.manifest.clips
            assert bank.ids == list(CLIPS)[-len(bank) :]
            for row in range(len(bank)):
                np.testing.assert_array_equal(bank.read(row, 8), CLIPS[bank.ids[row]][8])
        over.set()
        writer.result()
    assert set(opened_with) == {3, 4}
    assert all("is being written" in message for message in refused)


# A run that is not over.


@pytest.mark.parametrize("codec", CODECS)
def test_finished_shards_of_an_unfinished_run_open_on_demand(
    make_bank: MakeBank, features: FeatureConfig, tmp_path: Path, codec: str
) -> None:
    config = replace(features, codec=codec)
    halves = [dict(list(CLIPS.items())[k::2]) for k in (0, 1)]
    path = make_bank(tmp_path / "bank", *halves, config=config)
    whole = Bank.open(path)
    units = [[ClipSource(id_, sample_key(id_), id_, id_) for id_ in half] for half in halves]
    units.append([ClipSource("new", sample_key("new"), "new", "new")])
    calibration = whole.manifest.calibration
    pruned = frozenset({sample_key("clip 3.mp4")})
    write_plan(path, Plan(config, units, calibration=calibration, pruned=pruned))
    (path / "bank.json").unlink()
    shutil.rmtree(path / "index.zarr")
    assert "allow_partial" in refusal(lambda: Bank.open(path))
    bank = Bank.open(path, allow_partial=True)
    assert bank.ids == ["clip 0.mp4", "clip 2.mp4", "clip 1.mp4"]  # clip 3 is pruned
    for id_ in bank.ids:
        np.testing.assert_array_equal(bank.read(bank.row(id_), 4), whole.read(whole.row(id_), 4))
    done_path(path / "shards" / "bank-000000.tar").unlink()
    assert Bank.open(path, allow_partial=True).ids == ["clip 1.mp4"]


def test_a_finished_bank_opens_partially_as_it_is(small_bank: Path) -> None:
    assert Bank.open(small_bank, allow_partial=True).ids == list(CLIPS)
    assert "no bank here" in refusal(lambda: Bank.open(small_bank / "shards", allow_partial=True))


def test_a_clip_that_is_planned_again_and_not_made_yet_is_not_served_by_its_older_video(
    small_bank: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(small_bank, tmp_path / "bank")
    first, *others = map(clip_of, CLIPS)
    plan = Plan(Bank.open(path).config, [[first], others])
    write_plan(path, plan)
    assert Bank.open(path, allow_partial=True).ids == list(CLIPS)
    changed = "clip 1.mp4"
    write_plan(path, replace(plan, units=[*plan.units, [clip_of(changed)]]))
    partial = Bank.open(path, allow_partial=True)
    assert set(partial.ids) == set(CLIPS) - {changed}
    for id_ in partial.ids:
        np.testing.assert_array_equal(partial.read(partial.row(id_), 4), CLIPS[id_][4])
    # new clips alone take nothing away
    write_plan(path, replace(plan, units=[*plan.units, [clip_of("new.mp4")]]))
    assert Bank.open(path, allow_partial=True).ids == list(CLIPS)


def clip_of(id_: str) -> ClipSource:
    return ClipSource(id_, sample_key(id_), id_, id_)


# Shards that are replaced while they are read.


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("forked", [False, True])
def test_a_shard_that_is_replaced_while_it_is_read_is_checked_once_more(
    make_bank: MakeBank,
    features: FeatureConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    codec: str,
    forked: bool,
) -> None:
    """A repair may leave samples out, and all others of the shard then stand elsewhere in it."""
    monkeypatch.setattr(files_module, "MOST_OPEN", 1)
    config = replace(features, codec=codec)
    clips = {f"{k}.mp4": arrays_of(k, 2) for k in range(3)}
    shards = [{id_: clips[id_] for id_ in ("0.mp4", "1.mp4")}, {"2.mp4": clips["2.mp4"]}]
    bank = Bank.open(make_bank(tmp_path / "bank", *shards, config=config))
    before = [bank.read(row, 4) for row in range(3)]  # the last one closes the first shard
    metas = [bank.meta(row) for row in range(2)]
    bank.read(2, 4)
    tar = bank.path / "shards" / "bank-000000.tar"
    turned = dict(reversed(shards[0].items()))
    other = make_bank(tmp_path / "other", turned, shards[1], config=config)

    def replaced_by(source: Path) -> None:
        shutil.copy(source, tmp_path / "new")
        os.utime(tmp_path / "new", ns=(time.time_ns(),) * 2)
        os.replace(tmp_path / "new", tar)

    def reads() -> None:
        # equal bytes, by another writer: read on
        replaced_by(tar)
        for row in (0, 2, 1, 2):
            np.testing.assert_array_equal(bank.read(row, 4), before[row])
        # another order: never one clip's features as another's
        replaced_by(other / "shards" / "bank-000000.tar")
        for row in (0, 1):
            with pytest.raises(DamagedSample, match=r"checksum does not match|ends early"):
                bank.read(row, 4, [1])
            with suppress(UserError):
                assert bank.meta(row) == metas[row]
            np.testing.assert_array_equal(bank.read(2, 4), before[2])

    if not forked:
        reads()
        return
    child = multiprocessing.get_context("fork").Process(target=reads)  # as a loader's worker
    child.start()
    child.join()
    assert child.exitcode == 0


# Large banks.


def test_few_files_stay_open_however_many_shards_there_are(
    make_bank: MakeBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "MOST_OPEN", 3)
    clips = {f"{k}.mp4": arrays_of(k, 2) for k in range(10)}
    bank = Bank.open(make_bank(tmp_path / "bank", *({id_: a} for id_, a in clips.items())))
    before = len(os.listdir("/proc/self/fd"))
    rows = [*range(10)] * 5
    with ThreadPoolExecutor(3) as pool:
        for row, array in zip(rows, pool.map(lambda row: bank.read(row, 4), rows), strict=True):
            np.testing.assert_array_equal(array, clips[bank.ids[row]][4])
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 4
