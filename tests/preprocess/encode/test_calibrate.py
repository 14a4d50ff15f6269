"""Calibration: the same clips for any order of the inputs, none of them bad, honest measures.

pytest tests/preprocess/encode/test_calibrate.py
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.tower.tower import Tower
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.source import SourceReader
from preprocess.encode import calibrate as module
from preprocess.encode.calibrate import calibrate
from preprocess.encode.features import EncodeOptions
from preprocess.sources.find import find_clips
from shards.errors import UserError
from shards.format.codec import Codec, as_float32, channel_rms
from shards.format.samples import sample_key
from shards.read.bank import Bank

LOSSLESS = {
    "cosine_mean": 1.0,
    "cosine_min": 1.0,
    "channel_error_median": 0.0,
    "channel_error_worst": 0.0,
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SourceReader]:
    with SourceReader(DecodeChild(), tmp_path_factory.mktemp("unpacked")) as reader:
        yield reader


def test_scales_are_those_of_half_the_clips_and_measures_those_of_the_others(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tower: Tower, reader: SourceReader
) -> None:
    clips = find_clips([str(toy / "videos")]).clips
    found = calibrate(clips, tower, replace(toy_options, codec="int8"), reader)
    bank = Bank.open(toy_bank)
    ids = sorted(bank.ids, key=lambda id_: sample_key(id_)[-16:])
    for stride in (4, 8):
        of = {id_: bank.read(bank.row(id_), stride) for id_ in ids}
        scale = found.channel_scale[stride]
        np.testing.assert_array_equal(scale, channel_rms([of[id_] for id_ in ids[::2]]))
        assert scale.dtype == np.float32

        codec = Codec("int8", "float16", {stride: scale})
        cosines, wrong, right = [], np.zeros(64), np.zeros(64)
        for id_ in ids[1::2]:
            stored = codec.encode(stride, of[id_])
            back = codec.decode(stride, stored.data, of[id_].shape[1:], None, stored.scale)
            for a, b in zip(
                as_float32(of[id_]).reshape(-1, 64).astype(float),
                as_float32(back).reshape(-1, 64).astype(float),
                strict=True,
            ):
                cosines.append(a @ b / math.sqrt((a @ a) * (b @ b)))
                wrong, right = wrong + (a - b) ** 2, right + a**2
        errors = np.sqrt(wrong / right)
        assert found.quality[stride] == pytest.approx(
            {
                "cosine_mean": np.mean(cosines),
                "cosine_min": np.min(cosines),
                "channel_error_median": np.median(errors),
                "channel_error_worst": errors.max(),
            },
            rel=1e-5,
        )
        assert 0 < found.quality[stride]["channel_error_worst"] < 0.02


@pytest.mark.parametrize("codec", ["none", "blosc"])
def test_lossless_codecs_read_no_clip(
    toy: Path, toy_options: EncodeOptions, tower: Tower, reader: SourceReader, codec: str
) -> None:
    clips = [replace(clip, path="gone") for clip in find_clips([str(toy / "videos")]).clips]
    found = calibrate(clips, tower, replace(toy_options, codec=codec), reader)
    assert found.channel_scale == {}
    assert found.quality == {4: LOSSLESS, 8: LOSSLESS}


def test_neither_the_order_of_clips_nor_bad_ones_change_anything(
    toy: Path, toy_options: EncodeOptions, tower: Tower, reader: SourceReader, tmp_path: Path
) -> None:
    options = replace(toy_options, codec="int8")
    clips = find_clips([str(toy / "videos")]).clips
    videos = tmp_path / "videos"
    shutil.copytree(toy / "videos", videos)
    for k in range(3):
        (videos / f"bad{k}.mp4").write_text("no video")
    with_bad = find_clips([str(videos)]).clips
    assert len(with_bad) == len(clips) + 3
    a = calibrate(clips, tower, options, reader)
    b = calibrate(with_bad[::-1], tower, options, reader)
    for stride in (4, 8):
        np.testing.assert_array_equal(a.channel_scale[stride], b.channel_scale[stride])
    assert a.quality == b.quality


def test_one_clip_is_calibrated_and_measured_on(
    toy: Path, toy_options: EncodeOptions, tower: Tower, reader: SourceReader
) -> None:
    clips = find_clips([str(toy / "videos" / "test" / "clip-00000.mp4")]).clips
    found = calibrate(clips, tower, replace(toy_options, codec="int8"), reader)
    assert (found.channel_scale[4] > 0).all()
    assert 0.99 < found.quality[4]["cosine_min"] < 1


def test_no_more_clips_are_decoded_than_are_needed(
    toy: Path,
    toy_options: EncodeOptions,
    tower: Tower,
    reader: SourceReader,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clips = find_clips([str(toy / "videos")]).clips
    few = sorted(clips, key=lambda clip: clip.key[-16:])[:4]
    monkeypatch.setattr(module, "CLIPS", 2)
    options = replace(toy_options, codec="int8")
    a, b = (calibrate(some, tower, options, reader) for some in (clips, few))
    np.testing.assert_array_equal(a.channel_scale[4], b.channel_scale[4])


def test_nothing_to_calibrate_on_is_one_clear_line(
    toy_options: EncodeOptions, tower: Tower, reader: SourceReader, tmp_path: Path
) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    clips = find_clips([str(tmp_path)]).clips
    with pytest.raises(UserError, match="none of 1 clips can be encoded") as caught:
        calibrate(clips, tower, replace(toy_options, codec="int8"), reader)
    assert "\n" not in str(caught.value)
