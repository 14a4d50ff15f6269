"""The catalogue: its columns say what the samples' json says, and stock zarr opens it.

pytest tests/shards/format/test_catalogue.py
"""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.format.catalogue import (
    CatalogueMismatch,
    Columns,
    TextColumn,
    build_columns,
    checksums,
    read_columns,
    split_text,
    write_columns,
)
from shards.format.codec import Codec, channel_rms
from shards.format.samples import SampleMeta, sample_key
from shards.read.bank import Bank
from shards.storage import open_files
from shards.write.shard import ShardWriter

MakeBank = Callable[..., Path]
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def written(path: Path, columns: Columns) -> Columns:
    """Return columns as they come back from the disk."""
    write_columns(path, columns)
    return read_columns(open_files(path.parent), checksums(columns))


def samples_of(bank: Path) -> list[tuple[str, dict[str, Any], dict[str, np.ndarray], int]]:
    """Return key, json, arrays and offset of each sample, as tarfile sees them."""
    found = []
    for path in sorted((bank / "shards").glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    key = member.name.removesuffix(".json")
                    text = tar.extractfile(member)
                    assert text
                    arrays = {}
                    for stride in ("4", "8"):
                        npy = tar.extractfile(f"{key}.stride{stride}.npy")
                        assert npy
                        arrays[stride] = np.load(io.BytesIO(npy.read()), allow_pickle=False)
                    found.append((key, json.load(text), arrays, member.offset))
    return found


def test_stock_zarr_reads_what_the_samples_say(toy_bank: Path) -> None:
    group = zarr.open_group(str(toy_bank / "index.zarr"), mode="r")
    assert group.metadata.zarr_format == 3
    samples = samples_of(toy_bank)
    assert len(samples) == 9

    def column(name: str) -> np.ndarray:
        array = group[name]
        assert isinstance(array, zarr.Array)
        return np.asarray(array[:])

    def ragged(name: str) -> list[np.ndarray]:
        return np.split(column(name), column(f"{name}_offsets")[1:-1])

    metas = [meta for _, meta, _, _ in samples]
    assert [part.tobytes().decode() for part in ragged("key")] == [key for key, *_ in samples]
    assert [part.tobytes().decode() for part in ragged("id")] == [meta["id"] for meta in metas]
    for name in ("timestamps", "frame_index"):
        assert [part.tolist() for part in ragged(name)] == [meta[name] for meta in metas]
    for name in ("start", "end", "fps", "frames_per_unit"):
        assert column(name).tolist() == [meta[name] for meta in metas]
    sizes = np.stack([column("display_height"), column("display_width")], 1)
    assert sizes.tolist() == [meta["display_size"] for meta in metas]
    grids = np.stack([column("patch_rows"), column("patch_cols")], 1)
    assert grids.tolist() == [meta["patch_grid"] for meta in metas]
    assert column("covered").reshape(-1, 4).tolist() == [meta["covered"] for meta in metas]
    assert column("shard").tolist() == [0] * 9
    assert column("offset").tolist() == [offset for *_, offset in samples]
    raw = (toy_bank / "shards" / "bank-000000.tar").read_bytes()
    for stride in ("4", "8"):
        arrays = [arrays[stride] for _, _, arrays, _ in samples]
        shapes = column(f"stride{stride}_shape").reshape(-1, 4)
        assert shapes.tolist() == [list(array.shape) for array in arrays]
        begins, lengths = column(f"stride{stride}_offset"), column(f"stride{stride}_nbytes")
        for array, begin, length in zip(arrays, begins, lengths, strict=True):
            assert raw[begin : begin + length] == array.tobytes()


columns = st.dictionaries(
    st.text("abcxyz_0123456789", min_size=1, max_size=12).filter(lambda s: s.strip("_") == s),
    st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64, np.int64, np.float64]).flatmap(
        lambda dtype: st.integers(0, 9).map(lambda n: np.arange(n).astype(dtype) * 3)
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=15, deadline=None)
@given(columns)
def test_columns_survive_the_disk(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.mktemp("columns") / "index.zarr"
    found = written(path, wanted)
    assert set(found) == set(wanted)
    for name, column in wanted.items():
        assert found[name].dtype == column.dtype
        np.testing.assert_array_equal(found[name], column)


def test_each_column_is_one_chunk_of_plain_values(tmp_path: Path) -> None:
    column = np.arange(150_001, dtype=np.uint64) ** 2
    zeros = np.zeros(7, np.float64)
    found = written(tmp_path / "index.zarr", {"offset": column, "zeros": zeros})
    np.testing.assert_array_equal(found["offset"], column)
    for name, values in (("offset", column), ("zeros", zeros)):
        assert (tmp_path / "index.zarr" / name / "c" / "0").read_bytes() == values.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        found["offset"][0] = 1


def test_a_catalogue_replaces_the_older_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "index.zarr"
    write_columns(path, {"old": np.arange(3), "both": np.arange(3)})
    (tmp_path / "index.zarr.tmp").mkdir()
    (tmp_path / "index.zarr.tmp" / "left").write_text("by a crash")
    (tmp_path / "index.zarr.old").mkdir()
    found = written(path, {"both": np.arange(5)})
    assert len(found["both"]) == 5
    assert [entry.name for entry in path.iterdir() if entry.is_dir()] == ["both"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.zarr"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(names, st.integers(1, 4)), max_size=6, unique_by=lambda item: item[0]))
def test_ids_and_ragged_times_of_any_clips_are_kept_in_order_of_shards(
    tmp_path_factory: pytest.TempPathFactory,
    make_meta: Callable[..., SampleMeta],
    clips: list[tuple[str, int]],
) -> None:
    shards = tmp_path_factory.mktemp("shards")
    commits = []
    for unit in range(2):  # the odd clips, then the even ones
        writer = ShardWriter(shards / f"bank-{unit:06d}.tar", unit, "")
        for id_, frames in clips[unit::2]:
            arrays = {4: np.full((frames, 1, 1, 2), frames, np.float16)}
            times = [0.1 * k for k in range(frames)]
            writer.write(sample_key(id_), make_meta(id_, arrays, timestamps=times), arrays)
        commits.append(writer.commit())
    wanted = [*clips[0::2], *clips[1::2]]
    built = build_columns(shards, commits, [4])
    assert split_text(built, "id") == [id_ for id_, _ in wanted]
    assert built["shard"].tolist() == [0] * len(clips[0::2]) + [1] * len(clips[1::2])
    offsets = built["timestamps_offsets"]
    assert np.diff(offsets).tolist() == [frames for _, frames in wanted]
    assert built["timestamps"].tolist() == [0.1 * k for _, frames in wanted for k in range(frames)]


def edit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 16
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "c" / "0").unlink(), "column end is missing"),
        (lambda folder: edit(folder / "c" / "0"), "column end has another checksum"),
        (lambda folder: (folder / "c" / "0").write_bytes(b"1234"), "column end is damaged"),
        (lambda folder: (folder / "zarr.json").write_text("{"), "column end is damaged"),
        (lambda folder: (folder / "zarr.json").unlink(), "column end is missing"),
    ],
)
def test_a_column_that_is_not_as_it_was_written_is_named(
    tmp_path: Path, change: Callable[[Path], object], told: str
) -> None:
    columns = {"end": np.arange(5.0), "shard": np.zeros(5, np.uint32)}
    write_columns(tmp_path / "index.zarr", columns)
    change(tmp_path / "index.zarr" / "end")
    with pytest.raises(CatalogueMismatch) as caught:
        read_columns(open_files(tmp_path), checksums(columns))
    assert str(caught.value) == f"{tmp_path}/index.zarr: {told}"
    assert list(caught.value.wrong) == ["end"]
    assert caught.value.rows == 5


@pytest.mark.parametrize("codec", ["none", "blosc", "int8"])
def test_the_columns_say_where_each_stored_array_lies(
    codec: str, make_meta: Callable[..., SampleMeta], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    clips = {
        f"{k}.mp4": {s: rng.normal(size=(k + 1, 2, s, 6)).astype(np.float16) for s in (4, 8)}
        for k in range(3)
    }
    scales = {s: channel_rms(arrays[s] for arrays in clips.values()) for s in (4, 8)}
    path = tmp_path / "bank-000000.tar"
    with ShardWriter(path, 0, "", Codec(codec, "float16", scales)) as writer:
        for id_, arrays in clips.items():
            writer.write(sample_key(id_), make_meta(id_, arrays), arrays)
        columns = build_columns(tmp_path, [writer.commit()], (4, 8))
    raw = path.read_bytes()
    with tarfile.open(path, "r:") as tar:
        for row, (id_, arrays) in enumerate(clips.items()):
            for stride in (4, 8):
                places = {f"stride{stride}": f"{sample_key(id_)}.stride{stride}.npy"}
                if codec == "int8":
                    places[f"stride{stride}_scale"] = f"{sample_key(id_)}.stride{stride}_scale.npy"
                for name, member in places.items():
                    file = tar.extractfile(member)
                    assert file
                    values = np.load(io.BytesIO(file.read()), allow_pickle=False).tobytes()
                    begin, nbytes = (int(columns[f"{name}_{x}"][row]) for x in ("offset", "nbytes"))
                    assert raw[begin : begin + nbytes] == values
                shape = columns[f"stride{stride}_shape"][4 * row : 4 * row + 4]
                assert shape.tolist() == list(arrays[stride].shape)
                if codec == "blosc":
                    first, last = columns[f"stride{stride}_frame_nbytes_offsets"][row : row + 2]
                    sizes = columns[f"stride{stride}_frame_nbytes"][first:last]
                    assert len(sizes) == len(arrays[stride])
                    assert sizes.sum() == columns[f"stride{stride}_nbytes"][row]


def test_only_the_samples_that_are_served_have_rows(
    make_meta: Callable[..., SampleMeta], tmp_path: Path
) -> None:
    def shard(unit: int, *ids: str) -> dict[str, Any]:
        writer = ShardWriter(tmp_path / f"bank-{unit:06d}.tar", unit, "")
        for id_ in ids:
            arrays = {4: np.full((1, 1, 1, 2), unit, np.float16)}
            writer.write(sample_key(id_), make_meta(id_, arrays), arrays)
        return writer.commit()

    commits = [shard(0, "a", "b", "c"), shard(1, "d"), shard(3, "b", "d")]
    serving = {sample_key(id_): unit for id_, unit in [("a", 0), ("b", 3), ("d", 3), ("c", 2)]}
    columns = build_columns(tmp_path, commits, [4], serving)
    assert split_text(columns, "id") == ["a", "b", "d"]  # c: its unit 2 has no shard
    assert columns["shard"].tolist() == [0, 2, 2], "of the commits, not the units"


def test_a_clip_is_found_by_the_hash_that_its_key_ends_with(
    make_bank: MakeBank, tmp_path: Path
) -> None:
    arrays = {s: np.ones((1, 1, 1, 2), np.float16) for s in (4, 8)}
    bank = Bank.open(make_bank(tmp_path / "bank", {f"clip {k}.mp4": arrays for k in range(50)}))
    hashes, order = bank.columns["key_hash"], bank.columns["key_order"]
    assert [f"{value:016x}" for value in hashes] == [sample_key(id_)[-16:] for id_ in bank.ids]
    assert sorted(order.tolist()) == list(range(50))
    assert (np.diff(hashes[order].astype(object)) > 0).all()
    assert [bank.row(id_) for id_ in bank.ids] == list(range(50))


def test_text_is_decoded_row_by_row() -> None:
    texts = ["", "a", "žluť", "", "漢字/1.mp4"]
    blob = "".join(texts).encode()
    offsets = np.cumsum([0] + [len(text.encode()) for text in texts])
    column = TextColumn({"id": np.frombuffer(blob, np.uint8), "id_offsets": offsets}, "id")
    assert list(column) == texts
    assert column == texts
    assert column != texts[1:]
    assert column[2] == column[-3] == "žluť"
    assert column[1:4] == texts[1:4]
    assert (len(column), column.index("漢字/1.mp4"), "b" in column) == (5, 4, False)
    with pytest.raises(IndexError):
        column[5]
