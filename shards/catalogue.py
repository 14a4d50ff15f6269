"""The catalogue: one row per clip, one Zarr array per column, read once into NumPy.

Rows follow the order of shards and of samples within them. Ragged columns (ids, timestamps,
frame indices) are a flat array and `offsets` of one more entry than rows.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import zarr

from shards.schema import Json, SampleMeta

CHUNK = 65_536

Columns = dict[str, np.ndarray]


def build_columns(shards_dir: Path, commits: Sequence[Json], strides: Sequence[int]) -> Columns:
    """Return the columns of all samples, from commit records and the json members of the tars."""
    keys: list[str] = []
    metas: list[SampleMeta] = []
    places: list[tuple[int, int]] = []
    streams: dict[int, list[Json]] = {stride: [] for stride in strides}
    for number, commit in enumerate(commits):
        with open(shards_dir / commit["shard"], "rb") as file:
            for sample in commit["samples"]:
                offset, nbytes = sample["json"]
                metas.append(
                    SampleMeta.from_json(json.loads(os.pread(file.fileno(), nbytes, offset)))
                )
                keys.append(sample["key"])
                places.append((number, sample["offset"]))
                for stride in strides:
                    streams[stride].append(sample["streams"][str(stride)])
    columns: Columns = {
        "shard": _column((place[0] for place in places), np.uint32),
        "offset": _column((place[1] for place in places), np.uint64),
        **_ragged_text("key", keys),
        **_ragged_text("id", [meta.id for meta in metas]),
        "start": _column((meta.start for meta in metas), np.float64),
        "end": _column((meta.end for meta in metas), np.float64),
        "fps": _column((meta.fps for meta in metas), np.float64),
        "display_height": _column((meta.display_size[0] for meta in metas), np.uint32),
        "display_width": _column((meta.display_size[1] for meta in metas), np.uint32),
        "patch_rows": _column((meta.patch_grid[0] for meta in metas), np.uint16),
        "patch_cols": _column((meta.patch_grid[1] for meta in metas), np.uint16),
        "covered": np.asarray([meta.covered for meta in metas], np.float64).reshape(-1),
        "frames_per_unit": _column((meta.frames_per_unit for meta in metas), np.uint8),
        **_ragged("timestamps", [meta.timestamps for meta in metas], np.float64),
        **_ragged("frame_index", [meta.frame_index for meta in metas], np.int64),
    }
    for stride, entries in streams.items():
        name = f"stride{stride}"
        columns[f"{name}_offset"] = _column((entry["offset"] for entry in entries), np.uint64)
        columns[f"{name}_nbytes"] = _column((entry["nbytes"] for entry in entries), np.uint64)
        columns[f"{name}_crc32c"] = _column((entry["crc32c"] for entry in entries), np.uint32)
        shapes = np.asarray([entry["shape"] for entry in entries], np.uint32)
        columns[f"{name}_shape"] = shapes.reshape(-1)
    return columns


def write_columns(path: Path, columns: Columns) -> None:
    """Write the catalogue beside its place and rename it there, replacing an older one."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    group = zarr.open_group(str(temporary), mode="w", zarr_format=3)
    for name in sorted(columns):
        column = columns[name]
        chunks = (max(1, min(CHUNK, len(column))),)
        group.create_array(name, data=column, chunks=chunks)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def read_columns(path: Path) -> Columns:
    """Read every column into memory; zarr is not used after this."""
    group = zarr.open_group(str(path), mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}


def split_text(columns: Columns, name: str) -> list[str]:
    """Return a ragged text column as strings, one per row."""
    blob = columns[name].tobytes()
    offsets = columns[f"{name}_offsets"].tolist()
    return [blob[a:b].decode() for a, b in pairwise(offsets)]


def _column(values: Iterable[float | int], dtype: type[np.generic]) -> np.ndarray:
    return np.asarray(list(values), dtype=dtype)


def _ragged(name: str, rows: Sequence[Sequence[float]], dtype: type[np.generic]) -> Columns:
    lengths = np.asarray([len(row) for row in rows], np.int64)
    flat = np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.empty(0, dtype)
    return {name: flat, f"{name}_offsets": np.concatenate([[0], np.cumsum(lengths)])}


def _ragged_text(name: str, rows: Sequence[str]) -> Columns:
    return _ragged(name, [list(row.encode()) for row in rows], np.uint8)
