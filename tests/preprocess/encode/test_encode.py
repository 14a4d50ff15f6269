"""Encoding, end to end: true features, exact reruns, crashes, refusals, bad videos.

pytest tests/preprocess/encode/test_encode.py
FRAMEBANK_CLIPS=videos pytest tests/preprocess/encode/test_encode.py    also real clips
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from preprocess.encode.run import EncodeOptions, encode
from preprocess.sources.find import FindOptions
from shards.errors import UserError
from shards.format.commits import read_commit, shard_path
from shards.format.features import Sampling
from shards.format.plan import absolute_name, read_plan
from shards.format.quarantine import read_quarantine
from shards.format.samples import sample_key
from shards.read.bank import Bank
from tests.folders import contents

CLIPS = os.environ.get("FRAMEBANK_CLIPS")
needs_clips = pytest.mark.skipif(not CLIPS, reason="FRAMEBANK_CLIPS does not name the test videos")


def moments(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("bank-*")}


def arrays(bank: Path) -> dict[tuple[str, int], np.ndarray]:
    opened = Bank.open(bank)
    return {
        (id_, stride): opened.read(row, stride)
        for row, id_ in enumerate(opened.ids)
        for stride in opened.config.strides
    }


def metas(bank: Path) -> dict[str, dict[str, Any]]:
    """Return the json of each clip, by id, from the bytes that the commit records point at."""
    found = {}
    for done in sorted((bank / "shards").glob("*.done")):
        record = json.loads(done.read_bytes())
        raw = (bank / "shards" / record["shard"]).read_bytes()
        for sample in record["samples"]:
            begin, nbytes = sample["json"]
            meta = json.loads(raw[begin : begin + nbytes])
            found[meta["id"]] = meta
    return found


def draw_video(path: Path, height: int, width: int, codec: str, frames: int = 11) -> None:
    """Write moving gradients, 5 frames per second."""
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=5)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for k in range(frames):
            red, green = (x * 3 + 20 * k) % 256, (y * 4 + 9 * k) % 256
            image = np.stack([red, green, (x + y + 30 * k) % 256], -1).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def by_hand(
    video: Path, tower: Path, count: int, model_class: Any, prefix: int = 0
) -> tuple[dict[int, np.ndarray], list[float]]:
    """Return fp32 features of strides 4 and 8 at layer -2, and the frames' times, step by step."""
    with av.open(str(video)) as container:
        decoded = list(container.decode(video=0))
    chosen = [k * (len(decoded) - 1) // (count - 1) for k in range(count)]
    processor = AutoImageProcessor.from_pretrained(tower, backend="pil")
    model = model_class.from_pretrained(tower).eval()
    side = model.config.image_size // model.config.patch_size
    cells: dict[int, list[np.ndarray]] = {4: [], 8: []}
    for index in chosen:
        picture = Image.fromarray(decoded[index].to_ndarray(format="rgb24"))
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            hidden = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][0]
        patches = hidden[prefix:].numpy().reshape(side, side, -1)
        for stride, frames in cells.items():
            steps = range(0, side, stride)
            frames.append(
                np.array(
                    [
                        [patches[r : r + stride, c : c + stride].mean((0, 1)) for c in steps]
                        for r in steps
                    ]
                )
            )
    times = [float((decoded[k].pts - decoded[0].pts) * decoded[k].time_base) for k in chosen]
    return {stride: np.stack(frames) for stride, frames in cells.items()}, times


def assert_equal_to_an_ulp(banked: np.ndarray, exact: np.ndarray) -> None:
    """Compare float16 with its fp32 reference, allowing what fp32 sums in another order differ."""
    assert banked.dtype == np.float16
    assert banked.shape == exact.shape
    half = np.maximum(abs(exact), 2.0**-6).astype(np.float16)
    error = abs(banked.astype(np.float64) - exact) / np.spacing(half).astype(np.float64)
    assert error.max() < 1, f"off by {error.max():.2f} units in the last place"
    assert exact.std() > 0.01, "a reference that says nothing"


@pytest.mark.parametrize(
    ("name", "size", "codec"),
    [
        ("wide.mp4", (64, 144), "libx264"),
        ("tall.mkv", (98, 52), "mpeg4"),
        ("even.webm", (74, 92), "libvpx-vp9"),  # of odd sizes decord and PyAV blur colours unlike
    ],
)
def test_features_are_those_computed_by_hand(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path, name: str, size: Any, codec: str
) -> None:
    draw_video(tmp_path / name, *size, codec)
    options = replace(toy_options, sampling=Sampling(num_frames=4))
    assert encode([str(tmp_path / name)], tmp_path / "bank", options).clips == 1
    exact, times = by_hand(tmp_path / name, toy / "tower", 4, SiglipVisionModel)
    found = arrays(tmp_path / "bank")
    for stride in (4, 8):
        assert_equal_to_an_ulp(found[name, stride], exact[stride])
    meta = metas(tmp_path / "bank")[name]
    assert meta["timestamps"] == pytest.approx(times, abs=1e-9)
    assert meta["display_size"] == list(size)
    assert meta["covered"] == [0, 0, 1, 1]


@pytest.mark.parametrize("clip", ["train/clip-00003.mp4", "test/clip-00001.mp4"])
def test_the_toy_bank_holds_features_computed_by_hand(toy: Path, toy_bank: Path, clip: str) -> None:
    exact, _ = by_hand(toy / "videos" / clip, toy / "tower", 8, SiglipVisionModel)
    for stride in (4, 8):
        assert_equal_to_an_ulp(arrays(toy_bank)[clip, stride], exact[stride])


def test_a_cropping_tower_with_a_class_token_is_encoded_as_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=48,
        patch_size=4,
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    ).save_pretrained(tmp_path / "tower")
    draw_video(tmp_path / "wide.mp4", 64, 144, "libx264")
    options = EncodeOptions(
        tower=str(tmp_path / "tower"), strides=(4, 8), sampling=Sampling(num_frames=3)
    )
    encode([str(tmp_path / "wide.mp4")], tmp_path / "bank", options)
    exact, _ = by_hand(tmp_path / "wide.mp4", tmp_path / "tower", 3, CLIPVisionModel, prefix=1)
    found = arrays(tmp_path / "bank")
    for stride, grid in ((4, (3, 3)), (8, (2, 2))):  # 12 patches a side: the last cell is half
        assert found["wide.mp4", stride].shape == (3, *grid, 32)
        assert_equal_to_an_ulp(found["wide.mp4", stride], exact[stride])
    y0, x0, y1, x1 = metas(tmp_path / "bank")["wide.mp4"]["covered"]
    assert (y0, y1) == (0, 1)
    assert (x0, x1) == pytest.approx((30 / 108, 78 / 108))  # 64x144 is resized to 48x108


def test_facts_agree_with_the_truth_of_the_drawn_world(toy: Path, toy_bank: Path) -> None:
    truth = {clip["video"]: clip for clip in json.loads((toy / "world.json").read_text())["clips"]}
    found = metas(toy_bank)
    assert set(found) == set(truth)
    for id_, meta in found.items():
        total = truth[id_]["frames"]
        assert meta["frame_count"] == total
        assert (meta["start"], meta["end"], meta["fps"]) == (0, truth[id_]["duration"], 8)
        assert meta["frame_index"] == [k * (total - 1) // 7 for k in range(8)]
        assert meta["timestamps"] == [index / 8 for index in meta["frame_index"]]
        assert all(meta["start"] <= time < meta["end"] for time in meta["timestamps"])
        assert meta["display_size"] == [64, 64]
        assert (meta["patch_grid"], meta["cell_grids"]) == ([8, 8], {"4": [2, 2], "8": [1, 1]})
        assert (meta["tower_width"], meta["frames_per_unit"]) == (64, 1)
        video = toy / "videos" / id_
        raw = video.read_bytes()
        assert (meta["path"], meta["size"]) == (id_, len(raw))
        head_tail = str(len(raw)).encode() + raw[:65536] + raw[-65536:]
        assert meta["digest"] == hashlib.blake2b(head_tail, digest_size=16).hexdigest()


def test_sample_json_holds_no_host_no_time_of_day_and_no_absolute_path(toy_bank: Path) -> None:
    for meta in metas(toy_bank).values():
        assert set(meta) == {
            "id",
            "path",
            "size",
            "digest",
            "start",
            "end",
            "fps",
            "frame_count",
            "frame_index",
            "timestamps",
            "display_size",
            "covered",
            "patch_grid",
            "cell_grids",
            "tower_width",
            "frames_per_unit",
            "decoder",
            "flags",
        }
        assert "/tmp" not in json.dumps(meta)


def test_the_manifest_says_what_is_there(toy: Path, toy_bank: Path) -> None:
    manifest = json.loads((toy_bank / "bank.json").read_bytes())
    assert (manifest["clips"], manifest["frames"], manifest["format_version"]) == (9, 72, 3)
    for shard in manifest["shards"]:
        raw = (toy_bank / "shards" / shard["name"]).read_bytes()
        assert shard["nbytes"] == len(raw)
        assert shard["sha256"] == hashlib.sha256(raw).hexdigest()
    bank = Bank.open(toy_bank)
    assert manifest["fingerprint"] == bank.config.fingerprint
    assert bank.config.strides == (4, 8)
    assert manifest["provenance"]["tower"] == str(toy / "tower")


def test_a_relative_tower_is_named_by_its_whole_path(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy)
    assert absolute_name("tower") == absolute_name(str(toy / "tower")) == str(toy / "tower")
    assert absolute_name("google/siglip") == "google/siglip"


def test_parts_of_a_video_are_clips_of_their_own(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    video = "train/clip-00000.mp4"
    items = [{"video": video}, {"video": video, "start": 1, "end": 2.5}]
    annotations = tmp_path / "train.json"
    annotations.write_text(json.dumps(items))
    options = replace(toy_options, find=FindOptions(video_roots=(str(toy / "videos"),)))
    encode([str(annotations)], tmp_path / "bank", options)
    found = metas(tmp_path / "bank")
    assert set(found) == {video, f"{video}#1-2.5"}
    part = found[f"{video}#1-2.5"]
    assert (part["start"], part["end"], part["frame_count"]) == (1, 2.5, 12)
    assert part["frame_index"] == [8 + k * 11 // 7 for k in range(8)]
    assert part["path"] == video


def test_a_rerun_skips_everything_and_changes_no_byte(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    before, written = contents(bank), moments(bank)
    summary = encode([str(toy / "videos")], bank, toy_options)
    assert (summary.clips, summary.frames, summary.skipped, summary.failures) == (0, 0, 9, [])
    assert contents(bank) == before
    assert moments(bank) == written


def test_the_count_of_underflows_survives_a_rerun(toy: Path, tmp_path: Path) -> None:
    tower = tmp_path / "tower"
    shutil.copytree(toy / "tower", tower)
    model = SiglipVisionModel.from_pretrained(tower)
    for layer in model.encoder.layers:  # nothing is added to the embeddings
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    embeddings = model.embeddings
    for parameter in embeddings.parameters():
        parameter.data.mul_(1e-12)
    model.save_pretrained(tower)
    options = EncodeOptions(str(tower), (4, 8), Sampling(num_frames=2))
    encode([str(toy / "videos" / "test")], tmp_path / "bank", options)
    underflowed = 3 * 2 * (4 + 1) * 64
    before = contents(tmp_path / "bank")
    assert json.loads(before["bank.json"])["provenance"]["underflowed"] == underflowed
    encode([str(toy / "videos" / "test")], tmp_path / "bank", options)
    assert contents(tmp_path / "bank") == before


@pytest.fixture
def videos(toy: Path, tmp_path: Path) -> Path:
    """A copy of the world's videos that a test may change."""
    return Path(shutil.copytree(toy / "videos", tmp_path / "videos"))


def test_bad_videos_are_quarantined_and_change_nothing_else(
    videos: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    (videos / "train" / "empty.mp4").write_bytes(b"")
    (videos / "text.mp4").write_text("not a video\n" * 100)
    whole = (videos / "train" / "clip-00000.mp4").read_bytes()
    (videos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    bank = tmp_path / "bank"
    summary = encode([str(videos)], bank, toy_options)
    bad = {"train/empty.mp4", "text.mp4", "cut.mp4"}
    assert {entry.id for entry in summary.failures} == bad
    assert (summary.clips, summary.skipped) == (9, 0)
    entries = {entry.id: entry for entry in read_quarantine(bank)}
    assert set(entries) == bad
    for id_, entry in entries.items():
        assert entry.key == sample_key(id_)
        assert (entry.stage, entry.reason) == ("decode", "cannot-open")
        assert entry.path == str(videos / id_)
        assert str(videos / id_) in entry.message
        assert "\n" not in entry.message
    for name in ("bank-000000.tar", "bank-000000.tar.idx"):
        assert (bank / "shards" / name).read_bytes() == (toy_bank / "shards" / name).read_bytes()
    with_failures, without = (read_commit(shard_path(b, 0)) for b in (bank, toy_bank))
    assert replace(with_failures, failures=None) == without
    assert with_failures.failures == read_quarantine(bank)
    assert (bank / "bank.json").read_bytes() == (toy_bank / "bank.json").read_bytes()

    before = contents(bank)
    again = encode([str(videos)], bank, toy_options)
    assert (again.clips, again.skipped) == (0, 9)
    assert {entry.id for entry in again.failures} == bad, "a rerun must not hide what failed"
    assert contents(bank) == before
    good_only = encode([str(videos / "test" / "clip-00000.mp4")], tmp_path / "b2", toy_options)
    assert good_only.failures == []


def test_a_bad_video_of_an_unfinished_shard_is_quarantined_once(
    videos: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    (videos / "bad.mp4").write_text("no video")
    bank = tmp_path / "bank"
    encode([str(videos)], bank, toy_options)
    before = contents(bank)
    (bank / "shards" / "bank-000000.done").unlink()  # as if killed just before the commit
    (bank / "shards" / "bank-000000.tar.idx").unlink()
    (bank / "bank.json").unlink()
    summary = encode([str(videos)], bank, toy_options)
    assert (summary.clips, len(summary.failures)) == (9, 1)
    assert contents(bank) == before


def test_values_that_float16_cannot_hold_are_refused_with_the_way_out(
    toy: Path, tmp_path: Path
) -> None:
    tower = shutil.copytree(toy / "tower", tmp_path / "tower")
    model = SiglipVisionModel.from_pretrained(tower)
    model.embeddings.position_embedding.weight.data[0, 0] = 1e6
    model.save_pretrained(tower)
    inputs = [str(toy / "videos" / "test" / "clip-00000.mp4")]
    options = EncodeOptions(str(tower), (1, 8), Sampling(num_frames=2))
    summary = encode(inputs, tmp_path / "bank", options)
    (entry,) = summary.failures
    assert (entry.stage, entry.reason) == ("tower", "not-representable")
    assert "--dtype bfloat16" in entry.message
    assert len(Bank.open(tmp_path / "bank")) == 0
    wide = replace(options, dtype="bfloat16")
    assert encode(inputs, tmp_path / "wide", wide).failures == []


def test_a_video_added_later_makes_a_new_unit_and_moves_nothing(
    videos: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    late = videos / "train" / "clip-00002.mp4"
    late.rename(tmp_path / "late.mp4")
    bank = tmp_path / "bank"
    encode([str(videos)], bank, toy_options)
    before, written, plan = contents(bank / "shards"), moments(bank), read_plan(bank)
    assert plan
    (tmp_path / "late.mp4").rename(late)
    summary = encode([str(videos)], bank, toy_options)
    assert (summary.clips, summary.skipped) == (1, 8)
    after = contents(bank / "shards")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        "bank-000001.tar",
        "bank-000001.tar.idx",
        "bank-000001.done",
    }
    assert {path: moments(bank)[path] for path in written} == written
    extended = read_plan(bank)
    assert extended
    assert extended.units[:1] == plan.units
    assert [[clip.id for clip in unit] for unit in extended.units[1:]] == [["train/clip-00002.mp4"]]
    whole, grown = arrays(toy_bank), arrays(bank)
    assert set(whole) == set(grown)
    for place, array in whole.items():
        np.testing.assert_array_equal(grown[place], array)


def test_another_video_of_a_banked_name_is_refused_not_skipped(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    other = tmp_path / "videos" / "train"
    other.mkdir(parents=True)
    shutil.copy(toy / "videos" / "test" / "clip-00000.mp4", other / "clip-00001.mp4")
    shutil.copy(toy / "videos" / "train" / "clip-00002.mp4", other / "clip-00002.mp4")
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    before = contents(bank)
    with pytest.raises(UserError, match=r"'train/clip-00001\.mp4'") as caught:
        encode([str(tmp_path / "videos")], bank, toy_options)
    assert str(other / "clip-00001.mp4") in str(caught.value)
    assert "clip-00002" not in str(caught.value), "a copy of the same video is no other video"
    assert contents(bank) == before


def test_features_do_not_depend_on_neighbours(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    together = arrays(toy_bank)
    for name in ("train/clip-00000.mp4", "test/clip-00002.mp4"):
        alone = tmp_path / Path(name).stem
        encode([str(toy / "videos" / name)], alone, toy_options)
        for (_, stride), array in arrays(alone).items():
            np.testing.assert_array_equal(array, together[name, stride])


def test_small_and_large_shards_hold_the_same_samples(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    options = replace(toy_options, shard_bytes=1)
    encode([str(toy / "videos")], tmp_path / "bank", options)
    assert len(list((tmp_path / "bank" / "shards").glob("*.tar"))) == 9
    large = arrays(toy_bank)
    for place, array in arrays(tmp_path / "bank").items():
        np.testing.assert_array_equal(array, large[place])
    assert metas(tmp_path / "bank") == metas(toy_bank)


def test_bfloat16_features_are_stored_as_uint16(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    options = replace(toy_options, dtype="bfloat16")
    encode([str(toy / "videos" / "test")], tmp_path / "bank", options)
    assert Bank.open(tmp_path / "bank").config.dtype == "bfloat16"
    half = arrays(toy_bank)
    for (id_, stride), stored in arrays(tmp_path / "bank").items():
        assert stored.dtype == np.uint16
        values = (stored.astype(np.uint32) << 16).view(np.float32)
        reference = half[f"test/{id_}", stride].astype(np.float32)
        np.testing.assert_allclose(values, reference, rtol=2**-8, atol=2**-20)


def test_names_with_dots_spaces_and_other_alphabets_are_banked(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    names = {"clip 1.5s.v2.mp4", "clip 1.6s.v2.mp4", "наука/видео.mp4", "影片 #1-2.mp4"}
    for name in names:
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(toy / "videos/test/clip-00000.mp4", tmp_path / "videos" / name)
    encode([str(tmp_path / "videos")], tmp_path / "bank", toy_options)
    assert set(Bank.open(tmp_path / "bank").ids) == set(metas(tmp_path / "bank")) == names


ENCODE = """
import sys
from pathlib import Path
from preprocess.encode.run import EncodeOptions, encode
from shards.format.features import Sampling
videos, bank, tower = sys.argv[1:]
encode([videos], Path(bank), EncodeOptions(tower, (4, 8), Sampling(num_frames=24), shard_bytes=1))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(toy: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-c", ENCODE, str(toy / "videos"), str(killed), str(toy / "tower")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=Path(__file__).parents[3]
        )
    first = killed / "shards" / "bank-000000.done"
    deadline = time.monotonic() + 60
    while not first.exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    committed = len(list((killed / "shards").glob("*.done")))
    assert 1 <= committed < 9, "the run was over before it was killed"
    with pytest.raises(UserError, match="its run is not finished"):
        Bank.open(killed)
    kept = moments(killed)

    options = EncodeOptions(
        tower=str(toy / "tower"),
        strides=(4, 8),
        sampling=Sampling(num_frames=24),
        shard_bytes=1,
    )
    summary = encode([str(toy / "videos")], killed, options)
    assert (summary.clips, summary.skipped) == (9 - committed, committed)
    for done in sorted((killed / "shards").glob("*.done"))[:committed]:
        assert moments(killed)[str(done)] == kept[str(done)], "a finished shard was made again"
    encode([str(toy / "videos")], whole, options)
    assert len(list((whole / "shards").glob("*.tar"))) == 9
    assert contents(killed) == contents(whole)


@needs_clips
def test_real_clips_of_many_kinds_tell_their_true_facts(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    # frames shown, displayed (height, width), reader: as the README of the clips has them
    expected = {
        "av1_360p.mkv": (125, [360, 640], "pyav-seek"),
        "mpeg1_ps.mpg": (100, [128, 128], "pyav-scan"),
        "mpeg4_bframes.avi": (164, [240, 320], "pyav-scan"),
        "nasa_rotated.mp4": (17, [480, 270], "pyav-seek"),
        "pancake.mkv": (310, [240, 426], "pyav-seek"),
    }
    assert CLIPS
    options = replace(toy_options, sampling=Sampling(num_frames=5))
    summary = encode([f"{CLIPS}/{name}" for name in expected], tmp_path / "bank", options)
    assert summary.failures == []
    found = metas(tmp_path / "bank")
    assert set(found) == set(expected)
    for name, (frames, size, decoder) in expected.items():
        meta = found[name]
        assert (meta["frame_count"], meta["display_size"]) == (frames, size)
        assert meta["decoder"] == decoder
        assert meta["frame_index"] == [k * (frames - 1) // 4 for k in range(5)]
        with av.open(f"{CLIPS}/{name}") as container:
            stream = container.streams.best("video")
            decoded = list(container.decode(stream))
        if all(frame.pts is not None for frame in decoded) and "avi" not in name:
            seconds = [float((f.pts - decoded[0].pts) * f.time_base) for f in decoded]
            exact = [seconds[index] for index in meta["frame_index"]]
            assert meta["timestamps"] == pytest.approx(exact, abs=1e-6)
        assert meta["timestamps"] == sorted(meta["timestamps"])
        assert 0 == meta["start"] <= meta["timestamps"][0]
        assert meta["timestamps"][-1] < meta["end"]
        assert meta["end"] == pytest.approx(frames / meta["fps"])
    assert found["mpeg1_ps.mpg"]["flags"] == "no_index"
    assert {"avi_b", "nopts"} & set(found["mpeg4_bframes.avi"]["flags"].split())


@needs_clips
@pytest.mark.parametrize("name", ["bikes.mp4", "av1_360p.mkv"])
def test_features_of_real_clips_are_those_computed_by_hand(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path, name: str
) -> None:
    assert CLIPS
    options = replace(toy_options, sampling=Sampling(num_frames=3))
    encode([f"{CLIPS}/{name}"], tmp_path / "bank", options)
    exact, _ = by_hand(Path(CLIPS) / name, toy / "tower", 3, SiglipVisionModel)
    for stride in (4, 8):
        assert_equal_to_an_ulp(arrays(tmp_path / "bank")[name, stride], exact[stride])


@needs_clips
@pytest.mark.slow
def test_a_tower_of_full_size_gives_cells_of_a_grid_that_no_stride_divides(tmp_path: Path) -> None:
    """SigLIP so400m/14 at 384 with random weights: 27x27 patches, 7x7 and 4x4 cells."""
    assert CLIPS
    tower = tmp_path / "tower"
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    SiglipVisionModel(config).save_pretrained(tower)
    SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(tower)
    options = EncodeOptions(
        tower=str(tower), strides=(4, 8), sampling=Sampling(num_frames=2), batch_frames=2
    )
    encode([f"{CLIPS}/bikes.mp4"], tmp_path / "bank", options)
    found = arrays(tmp_path / "bank")
    assert metas(tmp_path / "bank")["bikes.mp4"]["patch_grid"] == [27, 27]
    assert found["bikes.mp4", 4].shape == (2, 7, 7, 1152)
    assert found["bikes.mp4", 8].shape == (2, 4, 4, 1152)
    exact, _ = by_hand(Path(CLIPS) / "bikes.mp4", tower, 2, SiglipVisionModel)
    for stride in (4, 8):
        np.testing.assert_allclose(
            found["bikes.mp4", stride], exact[stride], rtol=2**-9, atol=2**-9
        )
