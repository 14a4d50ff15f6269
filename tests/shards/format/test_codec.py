"""What is stored of features, and what comes back: exact where it says so, bounded where not.

pytest tests/shards/format/test_codec.py
"""

import json
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shards.format.codec import (
    Codec,
    as_float32,
    channel_error,
    channel_rms,
    from_float32,
    token_cosine,
)

DTYPES = {"float16": np.float16, "bfloat16": np.uint16}
SHAPES = hnp.array_shapes(min_dims=4, max_dims=4, max_side=5)


def vit_like(seed: int, frames: int = 6, dtype: str = "float16") -> np.ndarray:
    """Features with channels of many sizes, of which 4 are massive, and frames that resemble."""
    sizes = np.exp(np.random.default_rng(0).normal(size=256) * 0.7)
    sizes[[3, 77, 130, 200]] *= 200
    rng = np.random.default_rng(seed + 1)
    common, own = rng.normal(size=(1, 3, 3, 256)), rng.normal(size=(frames, 3, 3, 256))
    return from_float32(((0.8 * common + 0.6 * own) * sizes).astype(np.float32), dtype)


def round_trip(codec: Codec, features: np.ndarray) -> np.ndarray:
    stored = codec.encode(4, features)
    return codec.decode(4, stored.data, features.shape[1:], stored.frame_nbytes, stored.scale)


any_features = st.sampled_from(["float16", "bfloat16"]).flatmap(
    lambda dtype: st.tuples(st.just(dtype), hnp.arrays(DTYPES[dtype], SHAPES))
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["none", "blosc"]), any_features)
def test_lossless_codecs_give_every_bit_back(name: str, drawn: tuple[str, np.ndarray]) -> None:
    dtype, features = drawn
    back = round_trip(Codec(name, dtype), features)
    assert (back.dtype, back.shape) == (features.dtype, features.shape)
    assert back.tobytes() == features.tobytes()


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["none", "blosc", "int8"]), st.data())
def test_some_frames_are_decoded_without_the_others(name: str, data: st.DataObject) -> None:
    features = vit_like(0)
    codec = Codec(name, "float16", {4: channel_rms([features])})
    begin, end = sorted(data.draw(st.tuples(st.integers(0, 6), st.integers(0, 6))))
    stored = codec.encode(4, features)
    if stored.frame_nbytes is None:
        part, nbytes = stored.data[begin:end], None
    else:
        assert len(stored.data) == sum(stored.frame_nbytes)
        edges = np.cumsum([0, *stored.frame_nbytes])
        part, nbytes = stored.data[edges[begin] : edges[end]], stored.frame_nbytes[begin:end]
    scale = None if stored.scale is None else stored.scale[begin:end]
    found = codec.decode(4, part, features.shape[1:], nbytes, scale)
    np.testing.assert_array_equal(found, round_trip(codec, features)[begin:end])


@pytest.mark.parametrize("name", ["none", "blosc", "int8"])
@pytest.mark.parametrize(
    "laid_out",
    [
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=3)[..., ::2],
        lambda a: a[::-1].copy()[::-1],
        lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),  # read-only
    ],
)
def test_bytes_do_not_depend_on_how_an_array_lies_in_memory(
    name: str, laid_out: Callable[[np.ndarray], np.ndarray]
) -> None:
    features = vit_like(1)
    codec = Codec(name, "float16", {4: channel_rms([features])})
    a, b = codec.encode(4, features), codec.encode(4, laid_out(features))
    assert a.data.flags.c_contiguous
    assert b.data.flags.c_contiguous
    assert a.data.tobytes() == b.data.tobytes()
    assert a.frame_nbytes == b.frame_nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_blosc_makes_features_smaller(dtype: str) -> None:
    features = vit_like(2, dtype=dtype)
    assert Codec("blosc", dtype).encode(4, features).data.nbytes < 0.97 * features.nbytes


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:7],
        lambda data: np.zeros_like(data),
        lambda data: np.concatenate([data[:4], data[4:5] ^ 1, data[5:]]),
    ],
)
def test_a_compressed_frame_that_no_encoder_wrote_is_refused(
    damage: Callable[[np.ndarray], np.ndarray],
) -> None:
    features = vit_like(3, frames=1)
    data = damage(Codec("blosc").encode(4, features).data)
    with pytest.raises(ValueError, match="compressed frame") as caught:
        Codec("blosc").decode(4, data, features.shape[1:], [len(data)])
    assert "\n" not in str(caught.value)


def test_blosc_works_after_a_fork() -> None:
    features, codec = vit_like(4), Codec("blosc")
    before = codec.encode(4, features).data.tobytes()
    child = os.fork()
    if child == 0:
        same = codec.encode(4, features).data.tobytes() == before
        os._exit(0 if same and (round_trip(codec, features) == features).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_keeps_every_channel_to_one_percent(dtype: str) -> None:
    """Calibrated on other clips. A scale for each token alone would lose the small channels."""
    scale = channel_rms([vit_like(k, dtype=dtype) for k in range(10, 18)])
    features = [vit_like(k, dtype=dtype) for k in range(20, 24)]
    ours = Codec("int8", dtype, {4: scale})
    decoded = [round_trip(ours, array) for array in features]
    assert channel_error(features, decoded).max() < 0.0125
    assert np.median(channel_error(features, decoded)) < 0.01
    assert min(token_cosine(a, b).min() for a, b in zip(features, decoded, strict=True)) > 0.999

    per_token = Codec("int8", dtype, {4: np.ones(256, np.float32)})
    rough = channel_error(features, [round_trip(per_token, array) for array in features])
    assert np.median(rough) > 0.2, "the comparison says nothing"
    assert rough.max() > 0.8


def test_int8_takes_a_byte_a_value_and_a_scale_a_token() -> None:
    features = vit_like(0)
    stored = Codec("int8", "float16", {4: channel_rms([features])}).encode(4, features)
    assert (stored.data.dtype, stored.data.shape) == (np.int8, features.shape)
    assert stored.scale is not None
    assert (stored.scale.dtype, stored.scale.shape) == (np.float32, features.shape[:-1])
    assert abs(stored.data.astype(int)).max(axis=-1).min() == 127, "each token uses the whole range"


finite = st.floats(-65504, 65504, width=16)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float16, SHAPES, elements=finite), st.data())
def test_int8_is_off_by_half_a_step_at_most(features: np.ndarray, data: st.DataObject) -> None:
    dim = features.shape[-1]
    sizes = data.draw(hnp.arrays(np.float32, dim, elements=st.floats(2**-10, 2**10, width=32)))
    codec = Codec("int8", "float16", {4: sizes})
    stored = codec.encode(4, features)
    assert stored.scale is not None
    back = round_trip(codec, features).astype(np.float64)
    assert np.isfinite(back).all()
    exact = features.astype(np.float64)
    step = stored.scale[..., None].astype(np.float64) * sizes
    rounding = 2**-11 * (abs(exact) + step) + 2**-25  # of float16, and a little of float32
    assert (abs(back - exact) <= step / 2 * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_zeros_come_back_as_zeros(dtype: str) -> None:
    features = vit_like(5, dtype=dtype)
    features[2, 1] = 0
    codec = Codec("int8", dtype, {4: channel_rms([features])})
    with np.errstate(all="raise"):
        back = round_trip(codec, features)
    assert not back[2, 1].any()
    assert back[2, 0].any()


def test_features_of_zeros_can_be_calibrated_on() -> None:
    scale = channel_rms([np.zeros((2, 1, 1, 8), np.float16)])
    assert (scale == 1).all()


def test_a_channel_that_calibration_never_saw_stir_does_not_drown_the_others() -> None:
    seen = [vit_like(k) for k in range(4)]
    for array in seen:
        array[..., 9] = 0
    features = vit_like(30)  # here it stirs, as much as others
    codec = Codec("int8", "float16", {4: channel_rms(seen)})
    assert np.isfinite(codec.channel_scale[4]).all()
    back = round_trip(codec, features)
    assert np.isfinite(back).all()
    assert token_cosine(features, back).min() > 0.95


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_largest_values_do_not_overflow(dtype: str) -> None:
    features = vit_like(6, dtype=dtype)
    features[...] = from_float32(np.float32([65504]), dtype)[0]
    features[..., ::3] = from_float32(np.float32([-65504]), dtype)[0]
    scale = np.linspace(1, 3, 256, dtype=np.float32)
    back = as_float32(round_trip(Codec("int8", dtype, {4: scale}), features))
    np.testing.assert_allclose(back, as_float32(features), rtol=0.02)


def test_scales_survive_json() -> None:
    scale = channel_rms([vit_like(0)])
    again = np.array(json.loads(json.dumps(scale.tolist())), np.float32)
    assert (again == scale).all()


def test_channel_rms_is_the_root_mean_square_over_all_tokens_of_all_clips() -> None:
    clips = [vit_like(0, frames=2), vit_like(1, frames=5)]
    tokens = np.concatenate([clip.reshape(-1, 256) for clip in clips]).astype(np.float64)
    np.testing.assert_allclose(channel_rms(clips), np.sqrt((tokens**2).mean(0)), rtol=1e-6)


def test_errors_are_measured_as_they_are_said_to_be() -> None:
    exact = np.array([[[[3.0, 4.0]], [[0.0, 0.0]]]], np.float16)
    rough = np.array([[[[3.0, 2.0]], [[0.0, 0.0]]]], np.float16)
    np.testing.assert_allclose(channel_error([exact], [rough]), [0, 0.5])
    cosine = (3 * 3 + 4 * 2) / (5 * 13**0.5)
    np.testing.assert_allclose(token_cosine(exact, rough), [[[cosine], [1]]], rtol=1e-6)


def test_every_bfloat16_is_a_float32_and_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    wide = as_float32(bits)
    ours = torch.from_numpy(wide)
    theirs = torch.from_numpy(bits).view(torch.bfloat16).float()
    finite = torch.isfinite(theirs)
    assert (ours[finite] == theirs[finite]).all()
    assert (from_float32(wide, "bfloat16") == bits)[finite.numpy()].all()


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    """At each bfloat16, the value itself, those a bit beside it, and those about the next middle."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    finite = bits[(bits & 0x7F80) != 0x7F80]
    below = np.array([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = ((finite << 16)[:, None] | below).view(np.float32)
    theirs = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(from_float32(values, "bfloat16"), theirs)


def test_rounding_to_float16_is_that_of_torch() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32) * 100
    theirs = torch.from_numpy(values).half().numpy()
    np.testing.assert_array_equal(from_float32(values, "float16"), theirs)
