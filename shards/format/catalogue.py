"""The catalogue: one row per clip that is served, one Zarr array per column, read once into NumPy.

Rows are in the order of shards and of samples within them. Ragged columns (ids, timestamps, frame
indices) are a flat array and `offsets` with one more entry than rows.

Each column is one uncompressed chunk of plain little-endian values: any Zarr v3 reader opens
`index.zarr`, and ours uses the bytes without decoding. The manifest has the checksum of each.
"""

# Columns read whole, and no database: a million rows of six columns loaded in 0.16 s from 17 MB of Zarr;
# the same rows in SQLite took 76 MB. zarr-python is not used for reading: its import takes 0.3 s.

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from shards.errors import UserError, naming
from shards.format.commits import ArrayRecord, CommitRecord, StreamRecord
from shards.format.samples import SampleMeta
from shards.signed import digest
from shards.storage import Files, open_files
from shards.text import some

Columns = dict[str, np.ndarray]
READERS = 8
"""Threads that read columns: remote ones take a round trip each."""


def build_columns(
    shards_dir: str | Path,
    commits: Sequence[CommitRecord],
    strides: Sequence[int],
    serving: Mapping[str, int] | None = None,
) -> Columns:
    """Return the columns of the samples served, from commit records and json members of the tars.

    commits: in the order of the plan; column `shard` numbers those with samples. serving: by key, the
    unit whose sample is served; samples of other keys are left out. None serves all.
    """
    files = open_files(shards_dir)
    keys: list[str] = []
    metas: list[SampleMeta] = []
    places: list[tuple[int, int]] = []
    streams: dict[int, list[StreamRecord]] = {stride: [] for stride in strides}
    for number, commit in enumerate(one for one in commits if one.samples):
        for sample in commit.samples:
            if serving is not None and serving.get(sample.key) != commit.unit:
                continue
            # from the tars themselves: a catalogue can be rebuilt at any time, and
            # cannot disagree with them
            text = files.read(commit.shard, *sample.json)
            try:
                metas.append(SampleMeta.from_json(json.loads(text)))
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{files.where}/{commit.shard}: the json of sample {sample.key} is damaged; run "
                    "`preprocess repair`"
                ) from None
            keys.append(sample.key)
            places.append((number, sample.offset))
            for stride in strides:
                streams[stride].append(sample.streams[stride])
    # an id is found by binary search of its hash: no dictionary of a million texts is built at start
    hashes = _column((int(key[-16:], 16) for key in keys), np.uint64)
    columns: Columns = {
        "shard": _column((place[0] for place in places), np.uint32),
        "offset": _column((place[1] for place in places), np.uint64),
        **_ragged_text("key", keys),
        **_ragged_text("id", [meta.id for meta in metas]),
        "key_hash": hashes,
        "key_order": np.argsort(hashes, kind="stable").astype(np.uint32),
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
        **_ragged("frame_index", [meta.frame_index for meta in metas], np.uint32),
    }
    for stride, entries in streams.items():
        columns |= _stream_columns(f"stride{stride}", entries)
    return columns


def _stream_columns(name: str, streams: Sequence[StreamRecord]) -> Columns:
    """Return the columns that locate one stride's values; offsets are from the start of the tar."""
    shapes = np.asarray([stream.shape for stream in streams], np.uint32)
    columns = {**_places(name, streams), f"{name}_shape": shapes.reshape(-1)}
    frame_nbytes = [stream.frame_nbytes for stream in streams if stream.frame_nbytes is not None]
    if frame_nbytes:
        columns |= _ragged(f"{name}_frame_nbytes", frame_nbytes, np.uint32)
    scales = [stream.scale for stream in streams if stream.scale is not None]
    if scales:
        columns |= _places(f"{name}_scale", scales)
    return columns


def _places(name: str, arrays: Sequence[ArrayRecord]) -> Columns:
    return {
        f"{name}_offset": _column((array.offset for array in arrays), np.uint64),
        f"{name}_nbytes": _column((array.nbytes for array in arrays), np.uint64),
        f"{name}_crc32c": _column((array.crc32c for array in arrays), np.uint32),
    }


# -- files


def checksums(columns: Columns) -> dict[str, int]:
    """Return the crc32c of each column's bytes: the manifest's `catalogue`."""
    return {name: google_crc32c.value(columns[name]) for name in sorted(columns)}


def write_columns(path: Path, columns: Columns) -> None:
    """Write the catalogue to a temporary folder and rename it, replacing an older one."""
    # here, because it takes a third of a second that readers need not wait
    import zarr
    from zarr.storage import LocalStore

    temporary, old = (path.with_name(path.name + end) for end in (".tmp", ".old"))
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)

    class Store(LocalStore):
        """Makes new files by a rename; zarr by a hard link, which not every file system has."""

        async def set_if_not_exists(self, key: str, value: Any) -> None:
            await self.set(key, value)

    with naming(temporary):
        group = zarr.open_group(Store(temporary), mode="w", zarr_format=3)
        for name in sorted(columns):
            group.create_array(
                name,
                data=columns[name],
                chunks=(max(1, len(columns[name])),),
                compressors=None,
                config={
                    "write_empty_chunks": True
                },  # our reader expects a chunk file, of zeros too
            )
    # A folder cannot be replaced atomically: between the two renames there is none, and `read.opening`
    # retries.
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


class CatalogueMismatch(UserError):
    """Columns that do not match the manifest."""

    def __init__(self, where: str, wrong: Mapping[str, str], rows: int | None) -> None:
        self.wrong, self.rows = wrong, rows
        """The fault of each column; and the number of rows, None if unknown."""
        shown = [f"column {name} {what}" for name, what in wrong.items()]
        super().__init__(some(shown, separator="; "), where=f"{where}/index.zarr")


def read_columns(files: Files, catalogue: Mapping[str, int]) -> Columns:
    """Read the columns that the manifest's `catalogue` names, and check them.

    The arrays are read-only. Raises CatalogueMismatch.
    """

    def read(name: str) -> np.ndarray | str:
        try:
            column = _read_column(files, f"index.zarr/{name}")
        except FileNotFoundError:
            return "is missing"
        except (ValueError, KeyError, TypeError):
            return "is damaged"
        return column if google_crc32c.value(column) == catalogue[name] else "has another checksum"

    with ThreadPoolExecutor(READERS) as pool:
        # The large columns first, so that all threads end at about the same time.
        names = sorted(catalogue, key=lambda name: (name not in LARGE, name))
        found = dict(zip(names, pool.map(read, names), strict=True))
    columns = {name: column for name, column in found.items() if isinstance(column, np.ndarray)}
    wrong = {name: column for name, column in sorted(found.items()) if isinstance(column, str)}
    if wrong:
        try:
            rows = len(_read_column(files, "index.zarr/shard"))
        except (OSError, ValueError, KeyError, TypeError):
            rows = None
        raise CatalogueMismatch(files.where, wrong, rows)
    return columns


LARGE = ("timestamps", "frame_index", "key", "id")


def _read_column(files: Files, name: str) -> np.ndarray:
    """Return a column; raises OSError, ValueError, KeyError or TypeError for anything else."""
    facts = json.loads(files.read(f"{name}/zarr.json"))
    # another writer's column (sharded, compressed) would be read as numbers that mean nothing
    (rows,) = facts["shape"]
    if [codec["name"] for codec in facts["codecs"]] != ["bytes"]:
        raise ValueError("not plain values")
    # zarr writes no chunk for an array of length 0
    values = files.read(f"{name}/c/0") if rows else b""
    column = np.frombuffer(values, np.dtype(facts["data_type"]))
    if len(column) != rows:
        raise ValueError("is not as long as it says")
    return column


# -- text and ragged columns


class TextColumn(Sequence[str]):
    """A ragged text column as a sequence of strings, each decoded on access."""

    def __init__(self, columns: Columns, name: str) -> None:
        self._blob, self._offsets = columns[name], columns[f"{name}_offsets"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row):  # type: ignore[no-untyped-def]
        if isinstance(row, slice):
            return [self[k] for k in range(*row.indices(len(self)))]
        # range knows negative indices and raises IndexError, as a list does
        row = range(len(self))[row]
        return self._blob[self._offsets[row] : self._offsets[row + 1]].tobytes().decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def split_text(columns: Columns, name: str) -> list[str]:
    """Return a ragged text column as strings, one per row."""
    blob = columns[name].tobytes()
    offsets = columns[f"{name}_offsets"].tolist()
    return [blob[a:b].decode() for a, b in pairwise(offsets)]


def id_hash(id_: str) -> int:
    """Return the number whose 16 hexadecimal digits end a clip's key."""
    return int(digest(id_.encode("utf-8", "surrogatepass"), size=8), 16)


def _column(values: Iterable[float | int], dtype: type[np.generic]) -> np.ndarray:
    return np.asarray(list(values), dtype=dtype)


def _ragged(name: str, rows: Sequence[Sequence[float]], dtype: type[np.generic]) -> Columns:
    flat = np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.empty(0, dtype)
    return {name: flat, f"{name}_offsets": _edges(map(len, rows))}


def _ragged_text(name: str, rows: Sequence[str]) -> Columns:
    texts = [row.encode() for row in rows]
    flat = np.frombuffer(b"".join(texts), np.uint8)
    return {name: flat, f"{name}_offsets": _edges(map(len, texts))}


def _edges(lengths: Iterable[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(_column(lengths, np.int64))])
