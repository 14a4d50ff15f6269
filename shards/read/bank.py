"""Read a bank: (clip, stride, frames) -> array, by positional reads of just those bytes.

bank = Bank.open("banks/toy")             # or s3://..., memory://..., whatever fsspec knows
row = bank.row("train/clip-00000.mp4")
features = bank.read(row, stride=4, frames=[0, 2])   # float16 (2, rows, cols, dim)
"""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import google_crc32c
import numpy as np

from shards.errors import UserError
from shards.format.catalogue import Columns, TextColumn, id_hash
from shards.format.codec import Codec, Int8
from shards.format.manifest import Manifest
from shards.format.samples import SampleMeta
from shards.read.opening import load, load_partial, refuse_missing_shards
from shards.storage import Files, LocalFiles, open_files
from shards.text import printable


@dataclass(frozen=True)
class ClipInfo:
    """One banked clip, as its catalogue row tells it."""

    id: str
    start: float
    end: float
    """Bounds in seconds from the file's first shown frame; 0 to its end for a whole file."""
    timestamps: np.ndarray
    """Of each entry of a stream's axis 0, float64 seconds from the file's first shown frame: of a
    frame, or the mean of the frames that the tower saw as one unit."""
    frame_index: np.ndarray
    """Of each such entry, its (first) frame among those that the file shows."""
    display_size: tuple[int, int]
    """(height, width) in pixels."""
    patch_grid: tuple[int, int]
    covered: tuple[float, float, float, float]
    """The part of the frame under the patch grid: y0, x0, y1, x1 as fractions."""

    @property
    def duration(self) -> float:
        return self.end - self.start


def of_units(
    timestamps: np.ndarray, frame_index: np.ndarray, frames_per_unit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean time and the first index of the frames of each unit; the last may have fewer."""
    if frames_per_unit == 1:
        return timestamps, frame_index
    first = np.arange(0, len(timestamps), frames_per_unit)
    counts = np.diff(first, append=len(timestamps))
    return np.add.reduceat(timestamps, first) / counts, frame_index[first]


class DamagedSample(UserError):
    """Bytes of a sample that are not those which were banked."""


@dataclass(frozen=True)
class _Place:
    """Where the values of one npy lie in a shard, frame after frame."""

    row: int
    stride: int
    begin: int
    edges: list[int]
    """From `begin`: where each frame begins, and the end."""
    crc32c: int


class Bank:
    """An opened bank. Safe to fork, to pickle and to share among threads."""

    def __init__(self, files: Files, manifest: Manifest, columns: Columns) -> None:
        """Use `Bank.open`."""
        self.files, self.manifest, self.columns = files, manifest, columns
        self.config = manifest.features
        self.ids = TextColumn(columns, "id")
        """Of each row, decoded as it is asked for."""
        scales = {
            int(stride): np.asarray(scale, np.float32)
            for stride, scale in (manifest.calibration or {}).items()
        }
        self.codec = Codec(self.config.codec, self.config.dtype, scales)
        self._sorted_hashes = columns["key_hash"][columns["key_order"]]
        self._checked = self._none_checked()

    @classmethod
    def open(cls, path: str | Path, *, allow_partial: bool = False) -> "Bank":
        """Open a finished bank; raises UserError naming what is missing, damaged or of another format.

        The checksum of a clip's stream is compared when this process first reads of it.
        allow_partial: of a bank whose run is not over, open the shards that are finished.
        """
        files = open_files(path)
        manifest, columns = (load_partial if allow_partial else load)(files)
        refuse_missing_shards(files, manifest.shards)
        return cls(files, manifest, columns)

    @property
    def path(self) -> Path:
        """The bank's folder; of a bank at a URL there is none."""
        assert isinstance(self.files, LocalFiles), f"{self.where} is no folder"
        return self.files.folder

    @property
    def where(self) -> str:
        """The bank's folder or URL, for messages."""
        return self.files.where

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id_: str) -> bool:
        return self.find(id_) is not None

    def row(self, id_: str) -> int:
        """Return a clip's row; KeyError for one that is not here."""
        found = self.find(id_)
        if found is None:
            raise KeyError(id_)
        return found

    def find(self, id_: str) -> int | None:
        """Return a clip's row, None for one that is not here."""
        key = np.uint64(id_hash(id_))
        place = int(np.searchsorted(self._sorted_hashes, key))
        while place < len(self) and self._sorted_hashes[place] == key:
            row = int(self.columns["key_order"][place])
            if self.ids[row] == id_:
                return row
            place += 1
        return None

    def clip(self, row: int) -> ClipInfo:
        columns = self.columns
        ragged = {}
        for name in ("timestamps", "frame_index"):
            offsets = columns[f"{name}_offsets"]
            ragged[name] = columns[name][offsets[row] : offsets[row + 1]]
        y0, x0, y1, x1 = columns["covered"][4 * row : 4 * row + 4].tolist()
        timestamps, frame_index = of_units(
            **ragged, frames_per_unit=columns["frames_per_unit"][row]
        )
        return ClipInfo(
            id=self.ids[row],
            start=float(columns["start"][row]),
            end=float(columns["end"][row]),
            display_size=(int(columns["display_height"][row]), int(columns["display_width"][row])),
            patch_grid=(int(columns["patch_rows"][row]), int(columns["patch_cols"][row])),
            covered=(y0, x0, y1, x1),
            timestamps=timestamps,
            frame_index=frame_index,
        )

    def shape(self, row: int, stride: int) -> tuple[int, int, int, int]:
        """Return (frames, cell_rows, cell_cols, dim) of a stored stream."""
        frames, rows, cols, dim = self.columns[f"stride{stride}_shape"][4 * row : 4 * row + 4]
        return int(frames), int(rows), int(cols), int(dim)

    def read(
        self,
        row: int,
        stride: int,
        frames: Sequence[int] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the features of some frames (default all), in any order and with repeats.

        Returns float16 (uint16 for a bfloat16 bank) `(frames, cell_rows, cell_cols, dim)`: `out`
        where it is given, contiguous and of that shape and type, such as pinned memory that is used
        again and again. Once a stream is checked, no bytes of other frames are touched. Raises
        DamagedSample.
        """
        total, *cells = self.shape(row, stride)
        wanted = range(total) if frames is None else frames
        assert all(0 <= frame < total for frame in wanted), (wanted, total)
        codec, name = self.codec, f"stride{stride}"
        if out is None:
            out = np.empty((len(wanted), *cells), codec.stored_dtype)
        assert out.shape == (len(wanted), *cells), (out.shape, len(wanted), cells)
        assert out.dtype == codec.stored_dtype
        assert out.flags.c_contiguous
        if codec.name == "int8":
            some = self.read_int8(row, stride, wanted)
            np.copyto(out, codec.decode(stride, some.values, cells, scale=some.token_scale))
            return out
        frame_nbytes = None
        if codec.name == "blosc":
            begin, end = self.columns[f"{name}_frame_nbytes_offsets"][row : row + 2].tolist()
            sizes = self.columns[f"{name}_frame_nbytes"][begin:end].tolist()
            frame_nbytes = [sizes[frame] for frame in wanted]
            data = np.empty(sum(frame_nbytes), np.uint8)
            edges = [0, *np.cumsum(sizes).tolist()]
        else:
            data, edges = out, _even(total, int(np.prod(cells)) * out.itemsize)
        self._fill(data, self._place(row, stride, name, edges), wanted)
        self._checked[stride][row] = True
        if codec.name == "blosc":
            try:
                np.copyto(out, codec.decode(stride, data, cells, frame_nbytes))
            except ValueError as error:
                raise self._damaged(row, stride, str(error)) from None
        return out

    def read_int8(self, row: int, stride: int, frames: Sequence[int] | None = None) -> Int8:
        """Return the features of some frames of an int8 bank as they are stored, as `read` does."""
        assert self.codec.name == "int8", self.codec.name
        total, *cells = self.shape(row, stride)
        wanted = range(total) if frames is None else frames
        assert all(0 <= frame < total for frame in wanted), (wanted, total)
        name = f"stride{stride}"
        values = np.empty((len(wanted), *cells), np.int8)
        scale = np.empty(values.shape[:-1], np.float32)
        for array, part in ((values, name), (scale, f"{name}_scale")):
            edges = _even(total, int(np.prod(array.shape[1:])) * array.itemsize)
            self._fill(array, self._place(row, stride, part, edges), wanted)
        self._checked[stride][row] = True
        return Int8(values, scale, self.codec.channel_scale[stride], self.codec.dtype)

    def meta(self, row: int) -> SampleMeta:
        """Return the json of a sample, the first member at its place in the shard."""
        shard, begin = self._shard(row), int(self.columns["offset"][row])
        try:
            header = self.files.read(shard, begin, tarfile.BLOCKSIZE)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            text = self.files.read(shard, begin + tarfile.BLOCKSIZE, member.size)
            return SampleMeta.from_json(json.loads(text))
        except (tarfile.HeaderError, ValueError, KeyError, TypeError):
            where = f"{self.where}/{shard}"
            problem = f"{where}: damaged where {self.ids[row]} lies; copy the bank again"
            raise UserError(printable(problem)) from None

    def _place(self, row: int, stride: int, name: str, edges: list[int]) -> _Place:
        begin, crc = self.columns[f"{name}_offset"][row], self.columns[f"{name}_crc32c"][row]
        return _Place(row, stride, int(begin), edges, int(crc))

    def _fill(self, target: np.ndarray, place: _Place, frames: Sequence[int]) -> None:
        """Read the bytes of some frames into `target`; of all, and checked, where they are not yet."""
        view = target.reshape(-1).view(np.uint8)
        edges = place.edges
        whole = len(view) == edges[-1] and list(frames) == list(range(len(edges) - 1))
        if not self._checked[place.stride][place.row]:
            everything = view if whole else np.empty(edges[-1], np.uint8)
            self._read(everything, place, 0)
            if google_crc32c.value(everything) != place.crc32c:
                raise self._damaged(place.row, place.stride, "checksum does not match")
            if not whole:
                _gather(view, everything, edges, frames)
            return
        filled = 0
        for first, last in runs(frames):
            begin, end = edges[frames[first]], edges[frames[last] + 1]
            self._read(view[filled : filled + end - begin], place, begin)
            filled += end - begin

    def _read(self, view: np.ndarray, place: _Place, begin: int) -> None:
        try:
            got = self.files.read_into(self._shard(place.row), place.begin + begin, view)
        except FileNotFoundError:
            raise self._damaged(place.row, place.stride, "the shard is gone") from None
        if got != len(view):
            raise self._damaged(place.row, place.stride, "the shard ends early")

    def _shard(self, row: int) -> str:
        return f"shards/{self.manifest.shards[int(self.columns['shard'][row])].name}"

    def _damaged(self, row: int, stride: int, reason: str) -> DamagedSample:
        begin, end = self.columns["key_offsets"][row : row + 2]
        key = self.columns["key"][begin:end].tobytes().decode()
        return DamagedSample(
            f"{self.where}/{self._shard(row)}: sample {key}, stride {stride}: {reason}; run "
            f"`preprocess repair {self.where}`, or copy the shard again"
        )

    def _none_checked(self) -> dict[int, np.ndarray]:
        return {stride: np.zeros(len(self), np.bool_) for stride in self.config.strides}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_checked": self._none_checked()}


def _even(frames: int, nbytes: int) -> list[int]:
    return [k * nbytes for k in range(frames + 1)]


def _gather(
    target: np.ndarray, source: np.ndarray, edges: Sequence[int], frames: Sequence[int]
) -> None:
    filled = 0
    for frame in frames:
        piece = source[edges[frame] : edges[frame + 1]]
        target[filled : filled + len(piece)] = piece
        filled += len(piece)


def runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, last) positions of each stretch of consecutive indices."""
    breaks = [k for k in range(1, len(indices)) if indices[k] != indices[k - 1] + 1]
    edges = [0, *breaks, len(indices)] if len(indices) else []
    return [(a, b - 1) for a, b in pairwise(edges)]
