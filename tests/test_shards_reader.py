"""Reading a bank: any frames in any order, from any process; a wrong bank is one clear line.

pytest tests/test_shards_reader.py
"""

import json
import multiprocessing
import os
import pickle
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shards.reader import Bank, Banks, runs
from shards.schema import FeatureConfig, Sampling
from shards.writer import signed_json

MakeBank = Callable[..., Path]
Arrays = dict[int, np.ndarray]


def arrays_of(seed: int, frames: int = 7) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        4: rng.normal(size=(frames, 2, 3, 5)).astype(np.float16),
        8: rng.normal(size=(frames, 1, 2, 5)).astype(np.float16),
    }


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
    with pytest.raises(AssertionError):
        bank.read(bank.row("clip 0.mp4"), 4, frames)


def test_a_read_touches_no_other_bytes(small_bank: Path, tmp_path: Path) -> None:
    path = shutil.copytree(small_bank, tmp_path / "bank")
    bank = Bank.open(path)
    row, frame, nbytes = bank.row("clip 2.mp4"), 4, 2 * 3 * 5 * 2
    begin = int(bank.columns["stride4_offset"][row]) + frame * nbytes
    shard = path / "shards" / "bank-000001.tar"
    size = shard.stat().st_size
    raw = shard.read_bytes()[begin : begin + nbytes]
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
    for file in bank._files.values():
        os.close(file)  # whoever used these numbers now fails
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
    with pytest.raises(ValueError, match=r".") as caught:
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
    (copy / "bank.json").write_bytes(signed_json(manifest | {"format_version": 2}))
    message = refusal(lambda: Bank.open(copy))
    assert re.search(r"format 2\b.*up to 1\b.*update framebank", message)


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
    end = int(bank.columns["stride8_offset"][row]) + 10
    os.truncate(shard, end)
    message = refusal(lambda: bank.read(row, 8))
    assert str(shard) in message
    assert "ends early" in message


def test_a_shard_that_is_gone_is_named(copy: Path) -> None:
    (copy / "shards" / "bank-000000.tar").unlink()
    bank = Bank.open(copy)
    with pytest.raises(OSError, match=r"bank-000000\.tar"):
        bank.read(0, 4)


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
        "tower_dtype": replace(features, tower_dtype="bfloat16"),
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
        "tower_dtype",
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
