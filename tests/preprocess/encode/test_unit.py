"""One unit to one shard: codecs, threads, what earlier runs left, values that nothing can hold.

pytest tests/preprocess/encode/test_unit.py
"""

import errno
import resource
import signal
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.tower.forward.hidden import layers_of
from model.tower.tower import Tower
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.source import SourceReader
from preprocess.encode.calibrate import calibrate
from preprocess.encode.features import EncodeOptions, feature_config, load_tower
from preprocess.encode.run import encode
from preprocess.encode.unit import Encoder
from preprocess.sources.find import find_clips
from shards.errors import disk_errors
from shards.format.codec import Codec, channel_error
from shards.format.commits import shard_path
from shards.format.plan import ClipSource
from shards.format.samples import SampleMeta
from shards.read.bank import Bank
from shards.signed import read_signed_json
from shards.write.lease import Leases
from shards.write.shard import ShardWriter


@pytest.fixture(scope="module")
def clips(toy: Path) -> list[ClipSource]:
    return find_clips([str(toy / "videos" / "test")]).clips


def encode_one(
    out: Path,
    tower: Tower,
    options: EncodeOptions,
    clips: list[ClipSource],
    codec: Codec | None = None,
) -> dict[str, Any]:
    """Encode a unit; return its commit record."""
    out.mkdir(parents=True, exist_ok=True)
    codec = codec or Codec(options.codec, options.dtype)
    features = feature_config(tower, options)
    with (
        Encoder(out, features, tower, options, codec) as encoder,
        Leases(out, "a test") as leases,
    ):
        lease = leases.take(0)
        assert lease
        encoder.encode_unit(lease, clips)
    return read_signed_json(shard_path(out, 0).with_suffix(".done"))


def test_a_bank_of_each_codec_holds_the_plain_features(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    plain = Bank.open(toy_bank)
    for codec, dtype in (("blosc", "float16"), ("int8", "bfloat16")):
        out = tmp_path / codec
        encode([str(toy / "videos")], out, replace(toy_options, codec=codec, dtype=dtype))
        bank = Bank.open(out)
        assert bank.ids == plain.ids
        for stride in (4, 8):
            exact = [plain.read(row, stride) for row in range(len(plain))]
            found = [bank.read(row, stride) for row in range(len(plain))]
            if codec == "blosc":
                assert all((a == b).all() for a, b in zip(exact, found, strict=True))
            else:
                assert found[0].dtype == np.uint16
                assert 0 < channel_error(exact, found).max() < 0.02
        ratio = read_signed_json(out / "bank.json")["codec"]["strides"]["4"]["ratio"]
        assert ratio < (1.04 if codec == "blosc" else 0.54)  # 512 bytes a frame do not shrink


def test_threads_outside_do_not_reach_the_bytes_and_are_left_as_they_were(
    tower: Tower, clips: list[ClipSource], toy_options: EncodeOptions, tmp_path: Path
) -> None:
    before, found = torch.get_num_threads(), []
    seen = set()
    tower.model.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            record = encode_one(tmp_path / str(threads), tower, toy_options, clips)
            assert torch.get_num_threads() == threads
            found.append(record)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    assert seen == {1}, "the tower's two threads have a part of the batch each"
    facts = found[0]["provenance"]
    assert set(facts) == {"batch_frames", "tower_threads", "torch", "transformers", "machine"}
    assert (facts["batch_frames"], facts["tower_threads"]) == (16, 2)


def test_what_is_left_of_a_unit_of_other_clips_is_not_used(
    tower: Tower,
    clips: list[ClipSource],
    toy_options: EncodeOptions,
    make_meta: Any,
    tmp_path: Path,
) -> None:
    clean = encode_one(tmp_path / "clean", tower, toy_options, clips)
    path = shard_path(tmp_path / "bank", 0)
    arrays = {stride: np.zeros((1, 1, 1, 64), np.float16) for stride in (4, 8)}
    meta: SampleMeta = make_meta("other", arrays)
    with ShardWriter(path, 0, feature_config(tower, toy_options).fingerprint) as writer:
        writer.write("other", meta, arrays)
    assert encode_one(tmp_path / "bank", tower, toy_options, clips) == clean


@pytest.mark.parametrize(
    ("value", "said"),
    [(1e7, "does not fit float16; use --dtype bfloat16"), (float("nan"), "NaN or infinity")],
)
def test_features_that_cannot_be_stored_name_clip_frame_and_stride(
    clips: list[ClipSource],
    toy_options: EncodeOptions,
    tmp_path: Path,
    value: float,
    said: str,
) -> None:
    tower = load_tower(toy_options)
    calls = 0

    def spoil(_: Any, __: Any, output: Any) -> None:
        """Change the last cell of frame 5 of the second clip."""
        nonlocal calls
        calls += 1
        if calls == 2:
            output[5, -1, 3] = value

    layers_of(tower.model)[-2].register_forward_hook(spoil)
    record = encode_one(tmp_path, tower, replace(toy_options, tower_threads=1), clips)
    assert [sample["key"] for sample in record["samples"]] == [clips[0].key, clips[2].key]
    (entry,) = record["failures"]
    assert (entry["stage"], entry["reason"]) == ("tower", "not-representable")
    assert entry["message"].startswith(f"{clips[1].path}: frame 5, stride 4: ")
    assert said in entry["message"]
    assert "\n" not in entry["message"]


def test_clips_are_encoded_as_they_were_calibrated(
    tower: Tower, clips: list[ClipSource], toy_options: EncodeOptions, tmp_path: Path
) -> None:
    options = replace(toy_options, codec="int8")
    with SourceReader(DecodeChild(), tmp_path) as reader:
        scales = calibrate(clips, tower, options, reader).channel_scale
    record = encode_one(tmp_path / "bank", tower, options, clips, Codec("int8", "float16", scales))
    for sample in record["samples"]:
        for stream in sample["streams"].values():
            assert stream["nbytes"] == np.prod(stream["shape"])
            assert stream["scale"]["nbytes"] == 4 * np.prod(stream["shape"][:-1])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ENOENT])
def test_errors_of_the_disk_are_one_line_once(tmp_path: Path, number: int) -> None:
    with pytest.raises(OSError, match="run the same command again") as caught:  # noqa: SIM117
        with disk_errors(tmp_path), disk_errors(tmp_path):
            raise OSError(number, "what happened", str(tmp_path / "file"))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'file'}: what happened; ")
    assert text.count("intact") == 1
    assert "\n" not in text


def test_a_full_disk_while_an_archive_is_unpacked_is_no_clips_fault(
    toy: Path, tower: Tower, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    archive = tmp_path / "videos.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(toy / "videos" / "test", "test")
    inside = find_clips([str(archive)]).clips
    assert inside
    least = min(clip.nbytes for clip in inside if clip.nbytes)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (least // 2, before[1]))
    try:
        with pytest.raises(OSError, match="run the same command again"):
            encode_one(tmp_path / "bank", tower, toy_options, inside)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    record = encode_one(tmp_path / "bank", tower, toy_options, inside)
    assert len(record["samples"]) == 3
    assert "failures" not in record
