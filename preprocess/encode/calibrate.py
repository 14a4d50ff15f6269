"""Calibrate the scales of codec `int8` on some clips of the plan, and measure the error.

    with SourceReader(DecodeChild(), bank) as reader:
        calibration = calibrate(plan.clips, tower, options, reader)
    codec = Codec("int8", "float16", calibration.channel_scale)

The clips are chosen by the hash at the end of their keys, so that they are the same for any order of the
inputs, and from all folders. Half of them give the scales; the error is measured on the other half. The
lossless codecs need no calibration.
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
"""Clips to calibrate on, and as many to measure the error on."""
TRIED = 64
FRAMES = 8
"""Frames of each clip: all features must fit into memory together."""


@dataclass(frozen=True)
class Calibration:
    """The scales of a bank's codec, and its measured errors."""

    channel_scale: dict[int, np.ndarray]
    """int8: by stride, float32 `(dim)`. Otherwise empty."""
    quality: dict[int, dict[str, float]]
    """By stride: cosine_mean, cosine_min (of a token and its decoded form), channel_error_median,
    channel_error_worst (relative to the channel's root mean square)."""

    def kept_in(self, plan: Plan) -> Plan:
        """Return the plan with this calibration, so that every worker uses the same scales."""
        scales = {str(stride): scale.tolist() for stride, scale in self.channel_scale.items()}
        quality = {str(stride): facts for stride, facts in self.quality.items()}
        return replace(plan, calibration=scales or None, quality=quality)


def calibrate(
    clips: Sequence[ClipSource], tower: Tower, options: EncodeOptions, reader: SourceReader
) -> Calibration:
    """Return the calibration for `options.codec`; clips that cannot be encoded are skipped.

    Raises UserError if none can be encoded.
    """
    if options.codec != "int8":
        return lossless(options.strides)
    found = list(_encoded(clips, tower, options, reader))
    if not found:
        raise UserError(
            f"--codec int8: none of {min(len(clips), TRIED)} clips can be encoded, to calibrate on; "
            "check the videos, or use --codec none to have each named in the quarantine"
        )
    return measured(found, options.strides, options.dtype)


def lossless(strides: Sequence[int]) -> Calibration:
    """Return the calibration of lossless codecs: no scales, no error."""
    return Calibration({}, {stride: _quality(np.ones(1), np.zeros(1)) for stride in strides})


def measured(
    found: Sequence[Mapping[int, np.ndarray]], strides: Sequence[int], dtype: str
) -> Calibration:
    """Return the scales for int8 from every second clip, and their errors on the others.

    found: for each clip, by stride, features `(frames, rows, cols, dim)` of type `dtype`; not empty.
    """
    # Not measured on the clips that gave the scales: those would show too small an error.
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
    """Return clips in the order in which they are tried: by the hash in their keys."""
    # a key ends with the hash of the id: unrelated to folders, names and dates
    return sorted(clips, key=lambda clip: (clip.key[-16:], clip.key))


def _encoded(
    clips: Sequence[ClipSource], tower: Tower, options: EncodeOptions, reader: SourceReader
) -> Iterator[dict[int, np.ndarray]]:
    """Yield the features of up to 2 * `CLIPS` clips: by stride `(frames, rows, cols, dim)`."""
    good = 0
    # more than are needed: some may not be readable
    for source in drawn(clips)[:TRIED]:
        outcome = reader.read(source, options.request(source, tower.pixels))
        if outcome.clip is None:
            continue
        frames, each = outcome.clip.frames, tower.frames_per_unit
        # whole units: half a pair of frames is no input of a Qwen tower
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
