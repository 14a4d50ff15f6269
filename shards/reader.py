"""Read a bank: (clip, stride, frames) -> array, by positional reads of just those bytes.

bank = Bank.open("banks/toy")
row = bank.row("train/clip-00000.mp4")
features = bank.read(row, stride=4, frames=[0, 2])   # float16 (2, rows, cols, dim)
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from shards.catalogue import Columns, read_columns, split_text
from shards.schema import FORMAT_VERSION, FeatureConfig, Json, differences
from shards.writer import read_signed_json


@dataclass(frozen=True)
class ClipInfo:
    """One banked clip, as its catalogue row tells it."""

    id: str
    start: float
    end: float
    """Bounds in seconds from the file's first shown frame; 0 to its end for a whole file."""
    timestamps: np.ndarray
    """Of each banked frame, float64 seconds from the file's first shown frame."""
    frame_index: np.ndarray
    display_size: tuple[int, int]
    """(height, width) in pixels."""
    patch_grid: tuple[int, int]
    covered: tuple[float, float, float, float]
    """The part of the frame under the patch grid: y0, x0, y1, x1 as fractions."""

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass
class Bank:
    """An opened bank. Safe to fork and to pickle: files are opened on first use in each process."""

    path: Path
    manifest: Json
    config: FeatureConfig
    columns: Columns
    ids: list[str]
    _rows: dict[str, int] = field(repr=False)
    _files: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> "Bank":
        """Open a finished bank; raises ValueError naming what is missing or newer."""
        path = Path(path)
        manifest = read_manifest(path)
        try:
            columns = read_columns(path / "index.zarr")
            ids = split_text(columns, "id")
        except (OSError, KeyError):
            raise ValueError(
                f"{path}: its catalogue index.zarr is not whole: the bank was copied in part; copy "
                "it again"
            ) from None
        if len(ids) != manifest["clips"]:
            raise ValueError(
                f"{path}: the catalogue lists {len(ids)} clips, bank.json {manifest['clips']}: "
                "the bank was copied in part; copy it again"
            )
        config = FeatureConfig.from_json(manifest["features"])
        return cls(path, manifest, config, columns, ids, {id_: row for row, id_ in enumerate(ids)})

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id_: str) -> bool:
        return id_ in self._rows

    def row(self, id_: str) -> int:
        return self._rows[id_]

    def clip(self, row: int) -> ClipInfo:
        columns = self.columns
        ragged = {}
        for name in ("timestamps", "frame_index"):
            offsets = columns[f"{name}_offsets"]
            ragged[name] = columns[name][offsets[row] : offsets[row + 1]]
        y0, x0, y1, x1 = columns["covered"][4 * row : 4 * row + 4].tolist()
        return ClipInfo(
            id=self.ids[row],
            start=float(columns["start"][row]),
            end=float(columns["end"][row]),
            display_size=(int(columns["display_height"][row]), int(columns["display_width"][row])),
            patch_grid=(int(columns["patch_rows"][row]), int(columns["patch_cols"][row])),
            covered=(y0, x0, y1, x1),
            **ragged,
        )

    def shape(self, row: int, stride: int) -> tuple[int, int, int, int]:
        """Return (frames, cell_rows, cell_cols, dim) of a stored stream."""
        frames, rows, cols, dim = self.columns[f"stride{stride}_shape"][4 * row : 4 * row + 4]
        return int(frames), int(rows), int(cols), int(dim)

    def read(self, row: int, stride: int, frames: Sequence[int] | None = None) -> np.ndarray:
        """Return the features of some frames (default all), read without touching the others.

        Returns float16 (uint16 for a bfloat16 bank) `(frames, cell_rows, cell_cols, dim)`.
        """
        total, *cell_shape = self.shape(row, stride)
        wanted = range(total) if frames is None else frames
        begin = int(self.columns[f"stride{stride}_offset"][row])
        dtype = np.dtype(np.float16 if self.config.dtype == "float16" else np.uint16)
        nbytes = int(np.prod(cell_shape)) * dtype.itemsize
        file = self._file(int(self.columns["shard"][row]))
        out = np.empty((len(wanted), *cell_shape), dtype)
        view = out.reshape(-1).view(np.uint8).data
        for first, last in runs(wanted):
            assert 0 <= wanted[first] <= wanted[last] < total, (wanted, total)
            target = view[first * nbytes : (last + 1) * nbytes]
            got = os.preadv(file, [target], begin + wanted[first] * nbytes)
            if got != len(target):
                shard = self.manifest["shards"][int(self.columns["shard"][row])]["name"]
                raise ValueError(f"{self.path}/shards/{shard}: ends early; copy the bank again")
        return out

    def _file(self, shard: int) -> int:
        place = (os.getpid(), shard)
        if place not in self._files:
            name = self.manifest["shards"][shard]["name"]
            self._files[place] = os.open(self.path / "shards" / name, os.O_RDONLY)
        return self._files[place]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": {}}


def read_manifest(path: Path) -> Json:
    """Read and check `bank.json`, whose existence means that a bank is there."""
    if not (path / "bank.json").exists():
        raise ValueError(
            f"{path}: no bank here (bank.json is missing); make one with "
            f"`preprocess encode INPUT --stride 4,8 --out {path} --tower NAME`"
        )
    manifest = read_signed_json(path / "bank.json")
    if manifest["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format {manifest['format_version']}, this framebank reads up to "
            f"{FORMAT_VERSION}; update framebank"
        )
    return manifest


def runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, last) positions of each stretch of consecutive indices."""
    breaks = [k for k in range(1, len(indices)) if indices[k] != indices[k - 1] + 1]
    edges = [0, *breaks, len(indices)] if len(indices) else []
    return [(a, b - 1) for a, b in pairwise(edges)]


class Banks:
    """Several banks read as one: a clip is found by its id in whichever bank holds it."""

    def __init__(self, banks: Sequence[Bank]) -> None:
        """Raises ValueError unless tower, processor, layer, pooling and strides agree."""
        assert banks
        self.banks = list(banks)
        first = self.banks[0]
        for other in self.banks[1:]:
            lines = differences(joint(first.config), joint(other.config))
            if lines:
                raise ValueError(
                    f"{first.path} and {other.path} cannot be joined: {'; '.join(lines)}"
                )
        self._places: dict[str, tuple[Bank, int]] = {}
        for bank in self.banks:
            for row, id_ in enumerate(bank.ids):
                if id_ in self._places:
                    raise ValueError(
                        f"clip {id_!r} is in {self._places[id_][0].path} and in {bank.path}; "
                        "leave one of the two banks out"
                    )
                self._places[id_] = (bank, row)

    @classmethod
    def open(cls, paths: Sequence[str | Path]) -> "Banks":
        return cls([Bank.open(path) for path in paths])

    @property
    def config(self) -> FeatureConfig:
        return self.banks[0].config

    @property
    def manifest(self) -> Json:
        return self.banks[0].manifest

    def __contains__(self, id_: str) -> bool:
        return id_ in self._places

    def clip(self, id_: str) -> "BankedClip":
        bank, row = self._places[id_]
        return BankedClip(bank, row, bank.clip(row))

    def quarantined(self) -> set[str]:
        """Return the ids of clips that could not be encoded."""
        return {entry["id"] for bank in self.banks for entry in read_quarantine(bank.path)}


@dataclass(frozen=True)
class BankedClip:
    """One clip of a bank: what is known of it, and its features on demand."""

    bank: Bank
    row: int
    info: ClipInfo

    def read(self, stride: int, frames: Sequence[int]) -> np.ndarray:
        return self.bank.read(self.row, stride, frames)


def read_quarantine(path: Path) -> list[Json]:
    """Return the last entry of each clip in a bank's `quarantine.jsonl`; none where it is not there.

    A last line cut off by a power loss is no entry.
    """
    file = path / "quarantine.jsonl"
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    entries = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            entries[entry["id"]] = entry
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(
                f"{file}:{number}: not an entry of a quarantine; remove the line, its clip is "
                "encoded again by `preprocess encode` into another bank"
            ) from None
    return list(entries.values())


def joint(config: FeatureConfig) -> Json:
    """What banks joined in one run must share; sampling and codec may differ."""
    own = ("sampling", "codec", "dtype", "format_version")
    return {name: value for name, value in config.to_json().items() if name not in own}
