"""P4: stock webdataset, tarfile, wids, HF datasets and GNU tar read every shard; stock zarr the index.

pytest tests/promises/test_p04_stock_readers.py
"""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zarr
from click.testing import CliRunner
from PIL import Image

from preprocess.care.repair import repair
from preprocess.cli.export import export
from preprocess.cli.main import one_line_errors
from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from shards.care.verify import verify
from shards.errors import UserError
from shards.format.codec import Codec
from shards.format.commits import index_path
from shards.format.features import FeatureConfig, Sampling
from shards.format.samples import sample_key
from shards.read.bank import Bank
from shards.read.export import write_hf, write_wids
from shards.signed import read_signed_json, signed_json

MakeBank = Callable[..., Path]
CODECS = ("none", "blosc", "int8")
SHARDS = 5


def arrays_of(seed: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (seed % 4 + 1, 4, 3, 8)
    return {s: rng.normal(size=shape).astype(np.float16)[:, : 16 // s] for s in (4, 8)}


CLIPS = {f"dir/clip {k}.mp4": arrays_of(k) for k in range(13)}


@pytest.fixture(scope="module")
def banks_of(
    make_bank: MakeBank, features: FeatureConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The clips in five shards, once in each codec. Read them only."""
    folder, items = tmp_path_factory.mktemp("banks"), list(CLIPS.items())
    return {
        codec: make_bank(
            folder / codec,
            *(dict(items[k::SHARDS]) for k in range(SHARDS)),
            config=replace(features, codec=codec),
        )
        for codec in CODECS
    }


def tars(bank: Path) -> list[Path]:
    return sorted((bank / "shards").glob("*.tar"))


def decoded(bank: Path, sample: dict[str, Any], stride: int) -> np.ndarray:
    """Return the features of a sample as stock readers give it, by the codec of its bank."""
    manifest = json.loads((bank / "bank.json").read_text())
    scales = {int(s): np.float32(x) for s, x in (manifest["calibration"] or {}).items()}
    codec = Codec(manifest["features"]["codec"], "float16", scales)
    meta = sample["json"]
    return codec.decode(
        stride,
        sample[f"stride{stride}.npy"],
        [*meta["cell_grids"][str(stride)], meta["tower_width"]],
        meta.get("frame_nbytes", {}).get(str(stride)),
        sample.get(f"stride{stride}_scale.npy"),
    )


@pytest.mark.parametrize("codec", CODECS)
def test_stock_webdataset_gives_plain_arrays_of_every_codec(
    banks_of: dict[str, Path], codec: str
) -> None:
    path = banks_of[codec]
    bank = Bank.open(path)
    samples = list(webdataset.WebDataset(list(map(str, tars(path))), shardshuffle=False).decode())
    assert [sample["json"]["id"] for sample in samples] == bank.ids
    for row, sample in enumerate(samples):
        for stride in (4, 8):
            array = sample[f"stride{stride}.npy"]
            assert array.dtype == {"none": np.float16, "blosc": np.uint8, "int8": np.int8}[codec]
            np.testing.assert_array_equal(decoded(path, sample, stride), bank.read(row, stride))


LOADER = """
import glob, json, os, sys, webdataset
files = sorted(glob.glob(sys.argv[1]))
clips = webdataset.WebDataset(files, nodesplitter=webdataset.split_by_node, shardshuffle=False)
loader = webdataset.WebLoader(clips.decode(), batch_size=None, num_workers=2)
print(json.dumps([[s["json"]["id"], float(s["stride4.npy"].sum())] for s in loader]))
"""


def test_two_nodes_of_two_workers_get_every_clip_once(banks_of: dict[str, Path]) -> None:
    command = [sys.executable, "-c", LOADER, str(banks_of["none"] / "shards" / "*.tar")]
    nodes = [
        subprocess.Popen(
            command,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [json.loads(node.communicate(timeout=120)[0]) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert all(found)
    got = sorted(id_ for node in found for id_, _ in node)
    assert got == sorted(CLIPS)
    for id_, total in chain(*found):
        assert total == float(CLIPS[id_][4].sum())


def test_the_documented_pipeline_is_the_one_that_is_tested() -> None:
    import shards.read.export

    told = [line.strip() for line in (shards.read.export.__doc__ or "").splitlines()]
    body = [line for line in LOADER.splitlines() if "webdataset." in line]
    assert body == [line for line in told if "webdataset." in line]


def read_offsets(path: Path) -> list[int]:
    """Read `.tar.idx` as Megatron-Energon and Lhotse do: uint64 little-endian, nothing else."""
    raw = path.read_bytes()
    return list(struct.unpack(f"<{len(raw) // 8}Q", raw))


@pytest.mark.parametrize("codec", CODECS)
def test_the_index_beside_a_tar_cuts_it_into_samples(
    banks_of: dict[str, Path], codec: str, tmp_path: Path
) -> None:
    for path in tars(banks_of[codec]):
        offsets = read_offsets(index_path(path))
        raw = path.read_bytes()
        with tarfile.open(path, "r:") as tar:
            names = tar.getnames()
        keys = list(dict.fromkeys(name.split(".")[0] for name in names))
        assert len(offsets) == len(keys) + 1
        assert offsets[0] == 0
        assert not any(raw[offsets[-1] :]), "nothing but the end of the archive"
        for key, begin, end in zip(keys, offsets, offsets[1:], strict=False):
            blob = io.BytesIO(raw[begin:end] + bytes(1024))  # a sample alone is a tar
            with tarfile.open(fileobj=blob, mode="r:") as tar:
                assert {name.split(".")[0] for name in tar.getnames()} == {key}


@pytest.mark.skipif(not shutil.which("tar"), reason="GNU tar is not installed")
@pytest.mark.parametrize("codec", CODECS)
def test_gnu_tar_unpacks_plain_npy_of_every_codec(
    banks_of: dict[str, Path], codec: str, tmp_path: Path
) -> None:
    for path in tars(banks_of[codec]):
        done = subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True, capture_output=True)
        assert done.stderr == b""
    bank = Bank.open(banks_of[codec])
    for row, id_ in enumerate(bank.ids):
        members = tmp_path.glob(f"{sample_key(id_)}.*")
        sample = {
            path.name.split(".", 1)[1]: np.load(path, allow_pickle=False)
            if path.suffix == ".npy"
            else json.loads(path.read_text())
            for path in members
        }
        assert len(sample) == (5 if codec == "int8" else 3)
        array = decoded(banks_of[codec], sample, 8)
        np.testing.assert_array_equal(array, bank.read(row, 8))


@pytest.mark.parametrize("codec", CODECS)
def test_stock_zarr_opens_the_index_of_every_codec(banks_of: dict[str, Path], codec: str) -> None:
    bank = Bank.open(banks_of[codec])
    group = zarr.open_group(str(banks_of[codec] / "index.zarr"), mode="r")
    assert set(group.array_keys()) == set(bank.columns)
    for name, array in group.arrays():
        np.testing.assert_array_equal(np.asarray(array[:]), bank.columns[name])


# Index files for others.


@pytest.fixture(params=CODECS)
def copy(request: pytest.FixtureRequest, banks_of: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(banks_of[request.param], tmp_path / "bank"))


def only(bank: Path, *new: str) -> bool:
    """Tell whether a bank's folder holds just its own files and some new ones."""
    names = {entry.name for entry in bank.iterdir()}
    return names == {"bank.json", "index.zarr", "shards", *new}


def test_wids_reads_samples_by_number(copy: Path, tmp_path: Path) -> None:
    wids = pytest.importorskip("wids")
    bank = Bank.open(copy)
    path = write_wids(copy)
    assert path == copy / "wids.json"
    assert only(copy, "wids.json")
    index = json.loads(path.read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    row = 0
    for shard in index["shardlist"]:
        where = copy / shard["url"]
        assert where.stat().st_size == shard["filesize"]
        with tarfile.open(where, "r:") as tar:
            keys = list(dict.fromkeys(name.split(".")[0] for name in tar.getnames()))
        assert shard["nsamples"] == len(keys)
        assert keys == [sample_key(bank.ids[row + k]) for k in range(len(keys))]
        row += len(keys)
    assert row == len(bank)
    dataset = wids.ShardListDataset(
        str(path), cache_dir=str(tmp_path / "cache"), keep=True, transformations=[]
    )
    assert len(dataset) == len(bank)
    for row in (len(bank) - 1, 0, 5):
        sample = dataset[row]
        assert json.load(sample[".json"])["id"] == bank.ids[row]
        stored = np.load(sample[".stride8.npy"], allow_pickle=False)
        if bank.config.codec == "none":
            np.testing.assert_array_equal(stored, bank.read(row, 8))


def test_hugging_face_datasets_streams_a_bank(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    bank = Bank.open(copy)
    assert write_hf(copy) == copy / "README.md"
    assert write_hf(copy) == copy / "README.md", "our own card may be written again"
    assert only(copy, "README.md")
    shards = str(copy / "shards" / "*.tar")
    for loaded in (
        datasets.load_dataset(str(copy), split="train", streaming=True),
        datasets.load_dataset("webdataset", data_files=shards, split="train", streaming=True),
    ):
        rows = 0
        for row, sample in enumerate(loaded):
            rows += 1
            assert sample["json"]["id"] == bank.ids[row]
            plain = {
                name: np.asarray(value, dtype_of(name, bank.config.codec))
                for name, value in sample.items()
                if name.endswith(".npy")
            }
            array = decoded(copy, plain | {"json": sample["json"]}, 4)
            np.testing.assert_array_equal(array, bank.read(row, 4))
        assert rows == len(bank)


Shape = str | list["Shape"] | dict[str, "Shape"]


def shape_of(value: Any) -> Shape:
    """Return what Arrow makes of a json value: the types of its fields, one of a list's items."""
    if isinstance(value, dict):
        return {name: shape_of(inner) for name, inner in value.items()}
    if isinstance(value, list):
        kinds = [shape_of(inner) for inner in value]
        assert kinds, "an empty list has no type"
        assert all(kind == kinds[0] for kind in kinds), value
        return kinds[:1]
    assert value is not None
    return type(value).__name__


@pytest.fixture(scope="module")
def mixed_bank(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips as they should be, one that cannot be read, then three with flags; a shard for each."""
    root = tmp_path_factory.mktemp("mixed")
    for k, video in enumerate(sorted((toy / "videos").rglob("*.mp4"))[:8]):
        shutil.copy(video, root / f"a{k}.mp4")
    (root / "m.mp4").write_bytes(b"no video")
    (root / "z-frames").mkdir()
    for k in range(3):
        Image.new("RGB", (64, 48), (80 * k, 0, 0)).save(root / "z-frames" / f"{k}.png")
    Image.new("RGB", (64, 48)).save(root / "z-still.png")
    rows = [{"video": f"a{k}.mp4"} for k in range(8)]
    rows += [{"video": "m.mp4"}, {"video": "z-frames"}, {"image": "z-still.png"}]
    rows += [{"video": "a0.mp4", "start": 0, "end": 1}]  # whole numbers
    (root / "list.json").write_text(json.dumps(rows))
    options = EncodeOptions(str(toy / "tower"), (4, 8), Sampling(num_frames=3), shard_bytes=1)
    summary = encode([str(root / "list.json")], root / "bank", options)
    assert (summary.clips, len(summary.failures)) == (11, 1)
    write_hf(root / "bank")
    write_wids(root / "bank")
    return root / "bank"


def test_every_json_field_has_one_type_in_every_sample(mixed_bank: Path) -> None:
    metas = [
        sample["json"]
        for sample in webdataset.WebDataset(
            [*map(str, tars(mixed_bank))], shardshuffle=False
        ).decode()
    ]
    assert {meta["flags"] for meta in metas} >= {"", "folder", "still"}
    shapes = [shape_of(meta) for meta in metas]
    assert [shape for shape in shapes if shape != shapes[0]] == []


def test_a_unit_of_which_no_clip_could_be_read_leaves_no_shard(
    mixed_bank: Path, tmp_path: Path
) -> None:
    assert len(list((mixed_bank / "shards").glob("*.done"))) == 12
    listed = [shard.name for shard in Bank.open(mixed_bank).manifest.shards]
    assert [path.name for path in tars(mixed_bank)] == listed
    assert len(listed) == 11
    for path in tars(mixed_bank):
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 3
    assert verify(mixed_bank, deep=True) == []
    bank = Path(shutil.copytree(mixed_bank, tmp_path / "bank"))
    (empty,) = set((bank / "shards").glob("*.done")) - {
        path.with_suffix(".done") for path in tars(bank)
    }
    before = empty.read_bytes()
    empty.with_suffix(".tar").write_bytes(bytes(10240))  # as banks of format 2 have it
    assert [damage.file for damage in verify(bank)] == [f"shards/{empty.stem}.tar"]
    assert repair(bank, tower="nowhere").remaining == []
    assert (empty.with_suffix(".tar").exists(), empty.read_bytes()) == (False, before)
    empty.write_bytes(before[:-9])
    assert repair(bank, tower="nowhere").remaining == []
    assert read_signed_json(empty)["samples"] == []


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets_loads_a_bank_of_many_kinds(
    mixed_bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    bank = Bank.open(mixed_bank)
    (block,) = re.findall(r"```python\n(clips = .*)\n", (mixed_bank / "README.md").read_text())
    names = {"datasets": datasets, "BANK": str(mixed_bank)}
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    exec(block.replace("streaming=True", f"streaming={streaming}"), names)
    clips = list(names["clips"])
    assert [clip["json"]["id"] for clip in clips] == bank.ids
    for row, clip in enumerate(clips):
        array = clip["stride4.npy"]
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, bank.read(row, 4).astype(np.float32))
        assert isinstance(clip["json"]["timestamps"], np.ndarray)


def test_wids_and_webdataset_read_a_bank_of_many_kinds(mixed_bank: Path, tmp_path: Path) -> None:
    wids = pytest.importorskip("wids")
    ids = Bank.open(mixed_bank).ids
    dataset = wids.ShardListDataset(
        str(mixed_bank / "wids.json"), cache_dir=str(tmp_path), keep=True, transformations=[]
    )
    assert [json.load(dataset[k][".json"])["id"] for k in range(len(dataset))] == ids
    files = [*map(str, tars(mixed_bank))]
    samples = webdataset.WebDataset(files, shardshuffle=False).decode()
    assert [sample["json"]["id"] for sample in samples] == ids


def dtype_of(name: str, codec: str) -> type[np.generic]:
    if "scale" in name:
        return np.float32
    return {"none": np.float16, "blosc": np.uint8, "int8": np.int8}[codec]


# The command.


def ran(*words: str) -> tuple[int, str]:
    with one_line_errors():
        done = CliRunner().invoke(export, words, catch_exceptions=False)
        return done.exit_code, done.output


@pytest.mark.parametrize(("form", "file"), [("wids", "wids.json"), ("hf", "README.md")])
def test_the_command_writes_the_file_and_tells_of_dead_samples(
    banks_of: dict[str, Path], tmp_path: Path, form: str, file: str
) -> None:
    bank = Path(shutil.copytree(banks_of["none"], tmp_path / "bank"))
    assert ran(form, str(bank)) == (0, f"{bank / file}\n")
    assert (bank / file).is_file()
    manifest = read_signed_json(bank / "bank.json")
    dead = {"bank-000000.tar": ["a", "b"], "bank-000003.tar": ["c"]}
    (bank / "bank.json").write_bytes(signed_json(manifest | {"superseded": dead}))
    code, output = ran(form, str(bank))
    assert code == 0
    assert "note: 3 samples of older videos" in output


def test_a_readme_of_somebody_else_is_left_alone(banks_of: dict[str, Path], tmp_path: Path) -> None:
    bank = Path(shutil.copytree(banks_of["none"], tmp_path / "bank"))
    (bank / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README\.md: exists and was not written by framebank"):
        write_hf(bank)
    assert (bank / "README.md").read_text() == "mine"


def test_a_bank_without_its_tar_index_is_told_how_to_mend_it(
    banks_of: dict[str, Path], tmp_path: Path
) -> None:
    bank = Path(shutil.copytree(banks_of["none"], tmp_path / "bank"))
    index_path(tars(bank)[1]).unlink()
    with pytest.raises(
        UserError, match=r"bank-000001\.tar\.idx: is missing; run `preprocess repair"
    ):
        write_wids(bank)
