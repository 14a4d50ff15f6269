"""Read a bank: (clip, stride, frames) -> array, by positional reads of just those bytes.

bank = Bank.open("banks/toy")             # or s3://..., memory://..., whatever fsspec knows
row = bank.row("train/clip-00000.mp4")
features = bank.read(row, stride=4, frames=[0, 2])   # float16 (2, rows, cols, dim)
"""

# Positional reads at catalogued offsets, because streaming a tar copies it in blocks of 10 KiB: on cached
# files random reads gave 4.6 GB per CPU second, webdataset 1.0, zarr-python 0.2; plain preadv gives 5.0.

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.format.catalogue import TextColumn, id_hash
from shards.format.codec import Codec, Int8
from shards.format.samples import SampleMeta
from shards.read.beside import Beside, open_beside
from shards.read.opening import load, load_partial, refuse_missing_shards
from shards.storage import Files, LocalFiles, open_files
from shards.text import printable


@dataclass(frozen=True)
class ClipInfo:
    """One banked clip, from its catalogue row."""

    id: str
    start: float
    end: float
    """Bounds in seconds from the file's first shown frame; of a whole file 0 and its duration."""
    timestamps: np.ndarray
    """float64 `(frames,)`, one for each entry along a stream's axis 0: seconds from the file's first
    shown frame; the mean of its frames if the tower saw several as one unit."""
    frame_index: np.ndarray
    """`(frames,)`: the place of each such entry's (first) frame among those that the file shows."""
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
    """The bytes of a sample are not those that were banked."""


@dataclass(frozen=True)
class _Place:
    """Where the values of one npy are in a shard, frame after frame."""

    row: int
    stride: int
    begin: int
    edges: list[int]
    """Offsets from `begin`: the beginning of each frame, then the end."""
    crc32c: int


class Bank:
    """An opened bank. Safe to fork, to pickle and to share among threads."""

    def __init__(self, files: Files, beside: Beside) -> None:
        """Use `Bank.open`."""
        self.files, self.manifest, self.columns = files, beside.manifest, beside.columns
        self.config = self.manifest.features
        """Of the bank's own strides: what a run depends on does not change when others come beside it."""
        self.whole, self.strides = beside.whole, beside.whole.features.strides
        """What the bank and the strides beside it are together; all strides that can be read."""
        self.missing = beside.missing
        """By stride, why one that is beside the bank is not read."""
        self._shards = beside.shards
        self.ids = TextColumn(self.columns, "id")
        """Of each row, decoded as it is asked for."""
        scales = {
            int(stride): np.asarray(scale, np.float32)
            for stride, scale in (self.whole.calibration or {}).items()
        }
        self.codec = Codec(self.config.codec, self.config.dtype, scales)
        # sorted once: each search then takes 20 steps among a million clips
        self._sorted_hashes = self.columns["key_hash"][self.columns["key_order"]]
        self._checked = self._none_checked()
        self._replaced = files.replaced
        """The files' count when `_checked` was last emptied."""

    @classmethod
    def open(cls, path: str | Path, *, allow_partial: bool = False) -> "Bank":
        """Open a finished bank; raises UserError naming what is missing, damaged or of another format.

        allow_partial: open the finished shards of a bank whose run is not finished.

        The checksum of a stream of a clip is compared the first time that this process reads from it. Not
        when the bank is opened, which would read every byte, nor every time: crc32c halves the rate of
        reading.
        """
        files = open_files(path)
        manifest, columns = (load_partial if allow_partial else load)(files)
        # when the bank is opened, not at the first read hours later
        refuse_missing_shards(files, manifest.shards)
        return cls(files, open_beside(files, manifest, columns))

    @property
    def path(self) -> Path:
        """The bank's folder; a bank at a URL has none."""
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
        """Return a clip's row; raises KeyError if the bank does not have it."""
        found = self.find(id_)
        if found is None:
            raise KeyError(id_)
        return found

    def find(self, id_: str) -> int | None:
        """Return a clip's row; None if the bank does not have it."""
        key = np.uint64(id_hash(id_))
        place = int(np.searchsorted(self._sorted_hashes, key))
        while place < len(self) and self._sorted_hashes[place] == key:
            row = int(self.columns["key_order"][place])
            if self.ids[row] == id_:  # hashes of 64 bits may collide
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
        """Return (frames, cell_rows, cell_cols, dim) of a stored stream; UserError for no such stride."""
        if stride not in self._shards:
            raise self._no_stride(stride)
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

        Returns float16 (uint16 for a bfloat16 bank) `(frames, cell_rows, cell_cols, dim)`: `out` if it is
        given (contiguous, of that shape and dtype), such as reused pinned memory. After the first,
        checked read of a stream, only the bytes of the wanted frames are read. Raises DamagedSample;
        IndexError for a frame that the clip does not have, ValueError for an `out` of another kind.
        """
        total, *cells = self.shape(row, stride)
        wanted = self._wanted(row, total, frames)
        codec, name, began = self.codec, f"stride{stride}", self.files.replaced
        if out is None:
            out = np.empty((len(wanted), *cells), codec.stored_dtype)
        shape = (len(wanted), *cells)
        # bytes are read into it as they are
        if out.shape != shape or out.dtype != codec.stored_dtype or not out.flags.c_contiguous:
            layout = "" if out.flags.c_contiguous else ", not contiguous"
            raise ValueError(
                f"out is {out.dtype} {out.shape}{layout}; needed: {codec.stored_dtype} {shape}"
            )
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
            # stored as it is returned: bytes are read straight into the caller's array
            data, edges = out, _even(total, int(np.prod(cells)) * out.itemsize)
        self._fill(data, self._place(row, stride, name, edges), wanted)
        self._checked[stride][row] = self.files.replaced == began
        if codec.name == "blosc":
            try:
                np.copyto(out, codec.decode(stride, data, cells, frame_nbytes))
            except ValueError as error:
                raise self._damaged(row, stride, str(error)) from None
        return out

    def read_int8(self, row: int, stride: int, frames: Sequence[int] | None = None) -> Int8:
        """Return frames of an int8 bank in stored form, with their scales; otherwise as `read`."""
        assert self.codec.name == "int8", self.codec.name
        total, *cells = self.shape(row, stride)
        wanted = self._wanted(row, total, frames)
        name, began = f"stride{stride}", self.files.replaced
        values = np.empty((len(wanted), *cells), np.int8)
        scale = np.empty(values.shape[:-1], np.float32)
        for array, part in ((values, name), (scale, f"{name}_scale")):
            edges = _even(total, int(np.prod(array.shape[1:])) * array.itemsize)
            self._fill(array, self._place(row, stride, part, edges), wanted)
        self._checked[stride][row] = self.files.replaced == began
        return Int8(values, scale, self.codec.channel_scale[stride], self.codec.dtype)

    def _wanted(self, row: int, total: int, frames: Sequence[int] | None) -> Sequence[int]:
        """Return the frames to read, all by default; IndexError for one that the clip does not have."""
        if frames is None:
            return range(total)
        for frame in frames:
            # negative ones, too: counted from the end they would be another frame without a word
            if not 0 <= frame < total:
                raise IndexError(
                    f"{self.ids[row]!r} has {total} frames from 0 on, no frame {frame}"
                )
        return frames

    def meta(self, row: int) -> SampleMeta:
        """Return the json of a sample, the first member at its place in the shard."""
        shard = self._shard(row, self.config.strides[0])
        begin = int(self.columns["offset"][row])
        try:
            # the json's length is in its tar header: no column of the catalogue has it
            header = self.files.read(shard, begin, tarfile.BLOCKSIZE)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            text = self.files.read(shard, begin + tarfile.BLOCKSIZE, member.size)
            meta = SampleMeta.from_json(json.loads(text))
        except (tarfile.HeaderError, ValueError, KeyError, TypeError):
            meta = None
        # of another clip: in a shard that was replaced, one may begin where this one did
        if meta is None or meta.id != self.ids[row]:
            where = f"{self.where}/{shard}"
            problem = f"{where}: damaged at the sample of {self.ids[row]}; copy the bank again"
            raise UserError(printable(problem))
        return meta

    def _place(self, row: int, stride: int, name: str, edges: list[int]) -> _Place:
        begin, crc = self.columns[f"{name}_offset"][row], self.columns[f"{name}_crc32c"][row]
        return _Place(row, stride, int(begin), edges, int(crc))

    def _fill(self, target: np.ndarray, place: _Place, frames: Sequence[int]) -> None:
        """Read the bytes of some frames into `target`; if unchecked, read and check the whole stream."""
        view = target.reshape(-1).view(np.uint8)
        edges = place.edges
        whole = len(view) == edges[-1] and list(frames) == list(range(len(edges) - 1))
        began = self.files.replaced
        if self._checked[place.stride][place.row] and began == self._replaced:
            filled = 0
            # neighbouring frames are neighbours in the file: one read for each run of them
            for first, last in runs(frames):
                begin, end = edges[frames[first]], edges[frames[last] + 1]
                self._read(view[filled : filled + end - begin], place, begin)
                filled += end - begin
            if self.files.replaced == began:
                return
        # A shard was replaced, by a repair perhaps: what was compared of the old one proves nothing.
        if self.files.replaced != self._replaced:
            self._checked, self._replaced = self._none_checked(), self.files.replaced
        # The checksum is over the whole stream, so the first touch reads all of it, once per process.
        everything = view if whole else np.empty(edges[-1], np.uint8)
        if self._read(everything, place, 0, summed=True) != place.crc32c:
            raise self._damaged(place.row, place.stride, "checksum does not match")
        if not whole:
            _gather(view, everything, edges, frames)

    def _read(
        self, view: np.ndarray, place: _Place, begin: int, *, summed: bool = False
    ) -> int | None:
        """Fill `view` from `begin` of a place on; return its crc32c where it is asked for."""
        shard, crc = self._shard(place.row, place.stride), None
        try:
            if summed:
                got, crc = self.files.read_summed(shard, place.begin + begin, view)
            else:
                got = self.files.read_into(shard, place.begin + begin, view)
        except FileNotFoundError:
            raise self._damaged(place.row, place.stride, "the shard is missing") from None
        if got != len(view):
            raise self._damaged(place.row, place.stride, "the shard ends early")
        return crc

    def _shard(self, row: int, stride: int) -> str:
        names, of_row = self._shards[stride]
        return names[of_row[row]]

    def _no_stride(self, stride: int) -> UserError:
        why = f" here: {self.missing[stride]}" if stride in self.missing else ""
        banked = ", ".join(map(str, self.strides))
        return UserError(f"holds the strides {banked}, and no {stride}{why}", where=self.where)

    def _damaged(self, row: int, stride: int, reason: str) -> DamagedSample:
        begin, end = self.columns["key_offsets"][row : row + 2]
        key = self.columns["key"][begin:end].tobytes().decode()
        return DamagedSample(
            f"{self.where}/{self._shard(row, stride)}: sample {key}, stride {stride}: {reason}; run "
            f"`preprocess repair {self.where}`, or copy the shard again"
        )

    def _none_checked(self) -> dict[int, np.ndarray]:
        return {stride: np.zeros(len(self), np.bool_) for stride in self.strides}

    def __getstate__(self) -> dict[str, object]:
        # Checks are per process: another one may read through another mount or cache.
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
    """Return (first, last) positions in `indices` of each run of consecutive values."""
    breaks = [k for k in range(1, len(indices)) if indices[k] != indices[k - 1] + 1]
    edges = [0, *breaks, len(indices)] if len(indices) else []
    return [(a, b - 1) for a, b in pairwise(edges)]
