"""Where a bank's bytes come from: a folder, or any URL of fsspec, with the same answers.

pytest tests/shards/test_storage.py
"""

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import storage
from shards.errors import UserError
from shards.format.features import FeatureConfig
from shards.read import opening
from shards.read.bank import Bank, DamagedSample
from shards.read.banks import Banks
from shards.storage import LocalFiles, RemoteFiles, open_files

MakeBank = Callable[..., Path]
DATA = bytes(range(256)) * 4


def arrays_of(seed: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {s: rng.normal(size=(5, 2, s, 6)).astype(np.float16) for s in (4, 8)}


CLIPS = {f"dir/clip {k}.mp4": arrays_of(k) for k in range(4)}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "PAUSE", 0)


def forget(memory: Any) -> None:
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture(params=["path", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder with one file `a/b`, by path or by URL."""
    root = {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": "memory://place"}
    url = root[request.param]
    with fsspec.open(f"{url}/a/b", "wb", auto_mkdir=True) as file:
        file.write(DATA)
    yield url
    forget(fsspec.filesystem("memory"))


def test_any_part_of_a_file_is_read(place: str) -> None:
    files = open_files(place)
    assert isinstance(files, RemoteFiles if "://" in place else LocalFiles)
    assert files.where == place
    assert files.read("a/b") == DATA
    assert files.read("a/b", 7, 100) == DATA[7:107]
    assert files.read("a/b", 7, 0) == b""
    assert files.read("a/b", 1000) == DATA[1000:]
    assert (files.size("a/b"), files.size("a/c"), files.size("b")) == (1024, -1, -1)
    with pytest.raises(FileNotFoundError):
        files.read("a/c")
    with pytest.raises(FileNotFoundError):
        files.read("a/c", 0, 3)


@pytest.mark.parametrize(("offset", "nbytes", "got"), [(0, 1024, 1024), (1000, 100, 24), (5, 0, 0)])
def test_memory_is_filled_as_far_as_the_file_goes(
    place: str, offset: int, nbytes: int, got: int
) -> None:
    target = np.zeros(nbytes, np.uint8)
    assert open_files(place).read_into("a/b", offset, target) == got
    assert target.tobytes() == DATA[offset : offset + got] + bytes(nbytes - got)


@pytest.mark.parametrize("nbytes", [0, 1, 99, 100, 101, 200, 999, 1024])
@pytest.mark.parametrize("together", [100, 1 << 20])
def test_what_is_read_is_summed_on_the_way(
    place: str, monkeypatch: pytest.MonkeyPatch, together: int, nbytes: int
) -> None:
    monkeypatch.setattr(storage, "SUMMED", together)
    target = np.zeros(nbytes, np.uint8)
    read, crc = open_files(place).read_summed("a/b", 1024 - nbytes, target)
    assert (read, crc) == (nbytes, google_crc32c.value(DATA[1024 - nbytes :]))
    assert target.tobytes() == DATA[1024 - nbytes :]
    longer = np.zeros(nbytes + 3, np.uint8)
    assert open_files(place).read_summed("a/b", 1024 - nbytes, longer)[0] == nbytes


@given(st.integers(0, 1024), st.integers(0, 1024))
def test_short_answers_of_the_system_are_continued(begin: int, nbytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        (Path(folder) / "b").write_bytes(DATA)
        whole = os.preadv
        patch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:100]], at))
        target = np.zeros(nbytes, np.uint8)
        got = LocalFiles(folder).read_into("b", begin, target)
        assert target[:got].tobytes() == DATA[begin : begin + nbytes]


def test_files_are_opened_once_and_closed_with_the_last_reader(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(DATA)
    before = os.listdir("/proc/self/fd")
    files: LocalFiles | None = LocalFiles(tmp_path)
    assert files
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(partial(files.read, "b", nbytes=1), range(256))
        assert b"".join(read) == DATA[:256]
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    assert pickle.loads(pickle.dumps(files)).read("b", 0, 2) == DATA[:2]
    files = None
    assert len(os.listdir("/proc/self/fd")) == len(before)


# Banks at URLs.


@pytest.fixture(scope="module")
def banks_of(
    make_bank: MakeBank, features: FeatureConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder, items = tmp_path_factory.mktemp("banks"), list(CLIPS.items())
    return {
        codec: make_bank(
            folder / codec,
            dict(items[:1]),
            dict(items[1:]),
            config=replace(features, codec=codec),
            quarantined=("bad.mp4",),
        )
        for codec in ("none", "blosc", "int8")
    }


@pytest.fixture
def in_memory() -> Iterator[Callable[[Path], str]]:
    """A function that copies a folder to a URL of fsspec's memory."""
    system = fsspec.filesystem("memory")

    def put(folder: Path) -> str:
        system.put(str(folder), "/lab/bank", recursive=True)
        return "memory://lab/bank"

    yield put
    forget(system)


@pytest.mark.parametrize("codec", ["none", "blosc", "int8"])
def test_a_bank_at_a_url_reads_as_in_its_folder(
    banks_of: dict[str, Path], in_memory: Callable[[Path], str], codec: str
) -> None:
    path = banks_of[codec]
    local = Bank.open(path)
    for url in (in_memory(path), f"file://{path}"):
        bank = Bank.open(url)
        assert bank.where == url
        assert bank.ids == local.ids == list(CLIPS)
        for row in range(len(bank)):
            for frames in (None, [3, 0, 1], []):
                wanted = local.read(row, 8, frames)
                np.testing.assert_array_equal(bank.read(row, 8, frames), wanted)
        for row in (3, 1, 0, 2):
            np.testing.assert_array_equal(bank.read(row, 4), local.read(row, 4))
        assert Banks.open([url]).quarantined() == {"bad.mp4"}
        with pytest.raises(AssertionError, match="is no folder"):
            _ = bank.path


def test_no_bytes_but_the_frames_asked_for_are_fetched(
    banks_of: dict[str, Path], in_memory: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Bank.open(in_memory(banks_of["none"]))
    bank.read(2, 4)  # the first touch reads all of the clip, and checks it
    asked = []
    system = fsspec.filesystem("memory")
    cat_file = system.cat_file

    def noted(path: str, start: int, end: int) -> Any:
        asked.append((start, end))
        return cat_file(path, start=start, end=end)

    monkeypatch.setattr(system, "cat_file", noted)
    bank.read(2, 4, [3, 4, 1])
    begin, nbytes = int(bank.columns["stride4_offset"][2]), 2 * 4 * 6 * 2
    assert asked == [(begin + a * nbytes, begin + b * nbytes) for a, b in [(3, 5), (1, 2)]]


def test_a_damaged_or_missing_part_of_a_url_is_named(
    banks_of: dict[str, Path], in_memory: Callable[[Path], str]
) -> None:
    url = in_memory(banks_of["none"])
    system = fsspec.filesystem("memory")
    shard = "/lab/bank/shards/bank-000001.tar"
    bank = Bank.open(url)
    raw = bytearray(system.cat_file(shard))
    raw[int(bank.columns["stride4_offset"][2])] ^= 1
    system.pipe_file(shard, bytes(raw))
    with pytest.raises(DamagedSample, match=r"memory://lab/bank/shards/bank-000001\.tar: sample"):
        bank.read(2, 4)
    system.pipe_file(shard, bytes(raw[:4000]))
    with pytest.raises(DamagedSample, match="ends early"):
        bank.read(3, 8)
    with pytest.raises(UserError, match=r"bank-000001\.tar has 4000 of \d+ bytes"):
        Bank.open(url)
    system.rm(shard)
    with pytest.raises(UserError, match=r"bank-000001\.tar is missing"):
        Bank.open(url)
    system.rm("/lab/bank/index.zarr/end/c/0")
    with pytest.raises(UserError, match="column end is missing"):
        Bank.open(url)
    system.rm("/lab/bank/bank.json")
    with pytest.raises(UserError, match="no bank here"):
        Bank.open(url)


def read_in_child(bank: Bank, connection: Any) -> None:
    connection.send([bank.read(row, 4, [2, 0]).tobytes() for row in range(len(bank))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_bank_at_a_url_works_in_another_process(banks_of: dict[str, Path], method: Any) -> None:
    bank = Bank.open(f"file://{banks_of['blosc']}")
    bank.read(0, 4)
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=read_in_child, args=(bank, there))
    child.start()
    assert here.poll(60)
    assert here.recv() == [arrays[4][[2, 0]].tobytes() for arrays in CLIPS.values()]
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("url", ["nosuch://bank/a", "s3://bank/a"])
def test_a_url_that_cannot_be_opened_is_one_clear_line(url: str) -> None:
    try:
        import s3fs  # noqa: F401

        if url.startswith("s3"):
            pytest.skip("s3fs is installed")
    except ImportError:
        pass
    with pytest.raises(UserError, match=f"^{url}: cannot be opened: ") as caught:
        Bank.open(url)
    assert "\n" not in str(caught.value)


def test_stock_zarr_opens_the_catalogue_at_a_url(
    banks_of: dict[str, Path], in_memory: Callable[[Path], str]
) -> None:
    import zarr

    group = zarr.open_group(in_memory(banks_of["int8"]) + "/index.zarr", mode="r")
    names = json.loads((banks_of["int8"] / "bank.json").read_text())["catalogue"]
    assert set(group.array_keys()) == set(names)
    scale = group["stride4_scale_nbytes"]
    assert isinstance(scale, zarr.Array)
    assert np.asarray(scale[:]).tolist() == [5 * 2 * 4 * 4] * 4
