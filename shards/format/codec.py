"""Codecs: features of a clip -> stored bytes, and back.

`none` stores them unchanged. `blosc` (numcodecs, lossless) compresses each video frame separately, so
that some frames can be read without the others. `int8` stores round(x / (channel_scale * token_scale)),
where channel_scale is the root mean square of a channel over calibration clips, fixed for the bank, and
token_scale maps each token's largest value to 127. With a scale per token alone, small channels would be
rounded to zero beside the few massive ones of vision transformers.

    codec = Codec("int8", "float16", {4: channel_rms(arrays)})
    stored = codec.encode(4, features)
    codec.decode(4, stored.data, features.shape[1:], stored.frame_nbytes, stored.scale)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
from numcodecs import Blosc, blosc

from shards.format.features import CODECS

INT8_MOST = 127
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}

# Of zstd and LZ4 at levels 1 to 9 with each shuffle: within 4 % of the smallest size that is not ten
# times slower to make (0.93 of float16, 0.79 of bfloat16), at 0.9 GB/s a core. LZ4 leaves float16 as is.
BLOSC = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE)
blosc.use_threads = False  # its threads do not survive a fork, and data loaders fork


@dataclass(frozen=True)
class Stored:
    """One stream of a clip as stored in a shard."""

    data: np.ndarray
    """none: the features. blosc: uint8, the concatenated compressed frames. int8: int8."""
    frame_nbytes: list[int] | None = None
    """blosc: the compressed bytes of each frame."""
    scale: np.ndarray | None = None
    """int8: float32 `(frames, cell_rows, cell_cols)`, the scale of each token."""


@dataclass(frozen=True)
class Int8:
    """Features as `int8` stores them, with their scales: half the bytes to move to a device."""

    values: np.ndarray
    """int8 `(frames, cell_rows, cell_cols, dim)`."""
    token_scale: np.ndarray
    """float32 `(frames, cell_rows, cell_cols)`."""
    channel_scale: np.ndarray
    """float32 `(dim)`."""
    dtype: str
    """dtype of the decoded features: float16 or bfloat16."""


@dataclass(frozen=True)
class Codec:
    """How one bank stores features."""

    name: str = "none"
    dtype: str = "float16"
    """Of the features: float16, or bfloat16 kept as uint16."""
    channel_scale: Mapping[int, np.ndarray] = field(default_factory=dict)
    """int8: per stride, float32 `(dim)`."""

    def __post_init__(self) -> None:
        assert self.name in CODECS, self.name

    @property
    def stored_dtype(self) -> np.dtype:
        """dtype that `decode` returns."""
        return np.dtype(np.float16 if self.dtype == "float16" else np.uint16)

    def encode(self, stride: int, features: np.ndarray) -> Stored:
        """Return the stored form of features, `dtype` `(frames, cell_rows, cell_cols, dim)`."""
        features = np.ascontiguousarray(features)
        if self.name == "none":
            return Stored(features)
        if self.name == "blosc":
            # frame by frame, so that a read of 8 of 64 frames decompresses 8
            frames = [BLOSC.encode(frame) for frame in features]
            data = np.frombuffer(b"".join(frames), np.uint8)
            return Stored(data, frame_nbytes=[len(frame) for frame in frames])
        # in float32: divided by a small scale, a value may pass the largest float16
        relative = as_float32(features) / self.channel_scale[stride]
        largest = np.abs(relative).max(axis=-1)
        scale = np.maximum(
            largest / INT8_MOST, np.finfo(np.float32).tiny
        )  # tokens of zeros: no 0 / 0
        quantised = np.rint(relative / scale[..., None]).astype(np.int8)
        return Stored(quantised, scale=scale.astype(np.float32))

    def decode(
        self,
        stride: int,
        data: np.ndarray,
        cell_shape: Sequence[int],
        frame_nbytes: Sequence[int] | None = None,
        scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the features of whole frames: `stored_dtype` `(frames, rows, cols, dim)`.

        data, frame_nbytes, scale: of these frames, as in `Stored`. Raises UserError for bytes that
        no encoder wrote.
        """
        if self.name == "none":
            return data.reshape(-1, *cell_shape)
        if self.name == "blosc":
            assert frame_nbytes is not None
            out = np.empty((len(frame_nbytes), *cell_shape), self.stored_dtype)
            edges = accumulate(frame_nbytes, initial=0)
            for frame, (begin, end) in zip(out, pairwise(edges), strict=True):
                _decompress(data[begin:end], frame)
            return out
        assert scale is not None
        values = data.reshape(-1, *cell_shape) * self.channel_scale[stride]
        values *= scale.reshape(values.shape[:-1])[..., None]
        # Rounding up in int8 may pass the largest float16, which would become infinite.
        most = LARGEST[self.dtype]
        return from_float32(values.clip(-most, most, out=values), self.dtype)


def _decompress(data: np.ndarray, out: np.ndarray) -> None:
    # Blosc trusts the sizes in a frame's own header, so damaged ones must be caught here.
    nbytes, _, cbytes = np.frombuffer(data[4:16].tobytes().ljust(12, b"\0"), "<u4").tolist()
    if (nbytes, cbytes) != (out.nbytes, len(data)):
        raise ValueError(
            f"compressed frame of {cbytes} bytes for {nbytes} (expected {len(data)} for "
            f"{out.nbytes}); restore the shard or encode again"
        )
    try:
        BLOSC.decode(np.ascontiguousarray(data), out=out)
    except RuntimeError as error:
        raise ValueError(f"compressed frame: {error}; restore the shard or encode again") from None


# -- calibration and error measures


def channel_rms(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Return each channel's root mean square over features `(..., dim)`: float32, never zero.

    A scale is at least 1/16 of the median. For a nearly constant channel a smaller one would make a token
    in which that channel is large lose the precision of all others.
    """
    # in float64: sums of millions of squares lose float32's digits
    total, count = 0.0, 0
    for array in arrays:
        values = as_float32(array).reshape(-1, array.shape[-1]).astype(np.float64)
        total, count = total + np.square(values).sum(axis=0), count + len(values)
    rms = np.sqrt(np.asarray(total) / count)
    # channels that are always 0 have no scale of their own, and would lower the median
    varying = rms[rms > 0]
    least = np.median(varying) / 16 if len(varying) else 1.0
    return np.maximum(rms, least).astype(np.float32)


def channel_error(features: Iterable[np.ndarray], decoded: Iterable[np.ndarray]) -> np.ndarray:
    """Return each channel's root mean square error / root mean square: float32 `(dim)`."""
    wrong = size = 0.0
    for exact, rough in zip(features, decoded, strict=True):
        a, b = (as_float32(x).reshape(-1, x.shape[-1]).astype(np.float64) for x in (exact, rough))
        wrong, size = wrong + np.square(a - b).sum(axis=0), size + np.square(a).sum(axis=0)
    return np.sqrt(wrong / np.maximum(size, np.finfo(np.float64).tiny)).astype(np.float32)


def token_cosine(features: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of each token and its decoded form: float32 `(..., cols)`."""
    a, b = as_float32(features), as_float32(decoded)
    dots, sizes = (a * b).sum(-1), np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    # a token of zeros has no direction, and comes back as zeros: 1
    return np.where(sizes > 0, dots / np.where(sizes > 0, sizes, 1), 1.0).astype(np.float32)


# -- float16 and bfloat16


def as_float32(features: np.ndarray) -> np.ndarray:
    """Return float16, or uint16 that holds bfloat16, as float32."""
    if features.dtype == np.uint16:
        return (features.astype(np.uint32) << 16).view(np.float32)
    return features.astype(np.float32)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 as float16, or rounded to even as uint16 that holds bfloat16."""
    if dtype == "float16":
        return values.astype(np.float16)
    # bfloat16 is the upper half of float32. Round to nearest, ties to even (IEEE 754): add half of the
    # dropped part, and one less if the kept part is even.
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
