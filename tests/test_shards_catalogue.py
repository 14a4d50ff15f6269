"""The catalogue: its columns say what the samples' json says, and stock zarr opens it.

pytest tests/test_shards_catalogue.py
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

from shards.catalogue import build_columns, read_columns, split_text, write_columns
from shards.schema import SampleMeta, sample_key
from shards.writer import ShardWriter

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


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
    write_columns(path, wanted)
    found = read_columns(path)
    assert set(found) == set(wanted)
    for name, column in wanted.items():
        assert found[name].dtype == column.dtype
        np.testing.assert_array_equal(found[name], column)


def test_more_rows_than_a_chunk_survive_the_disk(tmp_path: Path) -> None:
    column = np.arange(150_001, dtype=np.uint64) ** 2
    write_columns(tmp_path / "index.zarr", {"offset": column})
    np.testing.assert_array_equal(read_columns(tmp_path / "index.zarr")["offset"], column)


def test_a_catalogue_replaces_the_older_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "index.zarr"
    write_columns(path, {"old": np.arange(3), "both": np.arange(3)})
    (tmp_path / "index.zarr.tmp").mkdir()
    (tmp_path / "index.zarr.tmp" / "left").write_text("by a crash")
    write_columns(path, {"both": np.arange(5)})
    found = read_columns(path)
    assert list(found) == ["both"]
    assert len(found["both"]) == 5
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
        writer = ShardWriter(shards / f"bank-{unit:06d}.tar")
        for id_, frames in clips[unit::2]:
            arrays = {4: np.full((frames, 1, 1, 2), frames, np.float16)}
            times = [0.1 * k for k in range(frames)]
            writer.write(sample_key(id_), make_meta(id_, arrays, timestamps=times), arrays)
        commits.append(writer.commit(unit, ""))
    wanted = [*clips[0::2], *clips[1::2]]
    built = build_columns(shards, commits, [4])
    assert split_text(built, "id") == [id_ for id_, _ in wanted]
    assert built["shard"].tolist() == [0] * len(clips[0::2]) + [1] * len(clips[1::2])
    offsets = built["timestamps_offsets"]
    assert np.diff(offsets).tolist() == [frames for _, frames in wanted]
    assert built["timestamps"].tolist() == [0.1 * k for _, frames in wanted for k in range(frames)]
