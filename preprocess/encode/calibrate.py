"""The scales that `int8` stores features by, from some clips of the plan, and how well they serve.

    with SourceReader(DecodeChild(), bank) as reader:
        calibration = calibrate(plan.clips, tower, options, reader)
    codec = Codec("int8", "float16", calibration.channel_scale)

The clips are drawn by the hash at the end of their keys: the same for any order of the inputs, and
from all of their folders. Half of them give the scales, the others show what these scales lose.
The lossless codecs need none of this and lose nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from model.slow_fast import uniform_indices
from model.tower.pooling import FeatureRangeError
from model.tower.tower import Tower
from preprocess.decode.source import SourceReader
from preprocess.encode.features import EncodeOptions, encode_frames
from shards.errors import UserError
from shards.format.codec import Codec, channel_error, channel_rms, token_cosine
from shards.format.plan import ClipSource, Plan

CLIPS = 16
"""To calibrate on, and as many to measure on."""
TRIED = 64
FRAMES = 8
"""Of each clip: enough, and few enough to be held in memory together."""


@dataclass(frozen=True)
class Calibration:
    """What a codec needs to know of the features of a bank, and what it does to them."""

    channel_scale: dict[int, np.ndarray]
    """int8: per stride, float32 `(dim)`. Else empty."""
    quality: dict[int, dict[str, float]]
    """Per stride: cosine_mean, cosine_min (of a token and its decoded self), channel_error_median,
    channel_error_worst (relative to the channel's root mean square)."""

    def kept_in(self, plan: Plan) -> Plan:
        """Return a plan that holds this, for every process that makes its units."""
        scales = {str(stride): scale.tolist() for stride, scale in self.channel_scale.items()}
        quality = {str(stride): facts for stride, facts in self.quality.items()}
        return replace(plan, calibration=scales or None, quality=quality)


def calibrate(
    clips: Sequence[ClipSource], tower: Tower, options: EncodeOptions, reader: SourceReader
) -> Calibration:
    """Return the scales for `options.codec`; clips that cannot be encoded are passed over.

    Raises UserError where none can.
    """
    if options.codec != "int8":
        return lossless(options.strides)
    found = list(_encoded(clips, tower, options, reader))
    if not found:
        raise UserError(
            f"--codec int8: none of {min(len(clips), TRIED)} clips can be encoded, to calibrate on; "
            "look at the videos, or use --codec none to have each named in the quarantine"
        )
    return measured(found, options.strides, options.dtype)


def lossless(strides: Sequence[int]) -> Calibration:
    """Return what the codecs need that lose nothing."""
    return Calibration({}, {stride: _quality(np.ones(1), np.zeros(1)) for stride in strides})


def measured(
    found: Sequence[Mapping[int, np.ndarray]], strides: Sequence[int], dtype: str
) -> Calibration:
    """Return the scales for int8 from every second clip, and what they lose of the others.

    found: of each clip, per stride, features of a `dtype` `(frames, rows, cols, dim)`; one at least.
    """
    used, held_out = found[::2], found[1::2] or found
    scales = {stride: channel_rms(arrays[stride] for arrays in used) for stride in strides}
    codec = Codec("int8", dtype, scales)
    quality = {}
    for stride in strides:
        exact = [arrays[stride] for arrays in held_out]
        decoded = [_round_trip(codec, stride, array) for array in exact]
        cosines = [token_cosine(a, b).ravel() for a, b in zip(exact, decoded, strict=True)]
        quality[stride] = _quality(np.concatenate(cosines), channel_error(exact, decoded))
    return Calibration(scales, quality)


def drawn(clips: Iterable[ClipSource]) -> list[ClipSource]:
    """Return clips in the order in which they are tried."""
    return sorted(clips, key=lambda clip: (clip.key[-16:], clip.key))


def _encoded(
    clips: Sequence[ClipSource], tower: Tower, options: EncodeOptions, reader: SourceReader
) -> Iterator[dict[int, np.ndarray]]:
    """Yield the features of up to twice `CLIPS` clips: per stride `(frames, rows, cols, dim)`."""
    good = 0
    for source in drawn(clips)[:TRIED]:
        outcome = reader.read(source, options.request(source, tower.pixels))
        if outcome.clip is None:
            continue
        frames, each = outcome.clip.frames, tower.frames_per_unit
        units = uniform_indices(-(-len(frames) // each), FRAMES // each)
        chosen = np.concatenate([frames[each * unit : each * (unit + 1)] for unit in units])
        try:
            arrays, _ = encode_frames(tower, chosen, options)
        except FeatureRangeError:
            continue
        yield arrays
        good += 1
        if good == 2 * CLIPS:
            return


def _round_trip(codec: Codec, stride: int, features: np.ndarray) -> np.ndarray:
    stored = codec.encode(stride, features)
    return codec.decode(stride, stored.data, features.shape[1:], stored.frame_nbytes, stored.scale)


def _quality(cosines: np.ndarray, errors: np.ndarray) -> dict[str, float]:
    return {
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "channel_error_median": float(np.median(errors)),
        "channel_error_worst": float(errors.max()),
    }
