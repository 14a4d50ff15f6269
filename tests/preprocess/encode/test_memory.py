"""Peak memory of encoding does not hang on how many frames a clip gives."""

import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from shards.read.bank import Bank

SIDE = 384


def save_tower(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = SiglipVisionConfig(**sizes, num_attention_heads=1, image_size=SIDE, patch_size=48)
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def family(pid: int) -> list[int]:
    """Return a process and all that it started."""
    found = [pid]
    for one in found:
        try:
            tasks = Path(f"/proc/{one}/task").iterdir()
            found += [int(k) for t in tasks for k in (t / "children").read_text().split()]
        except OSError:
            continue
    return found


def proportional_bytes(pid: int) -> int:
    """Return the PSS of all of them together; memory files count where they are mapped."""
    total = 0
    for one in family(pid):
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(
            int(line.split()[1]) << 10 for line in rollup.split("\n") if line.startswith("Pss:")
        )
    return total


def peak(words: list[str]) -> int:
    process = subprocess.Popen([sys.executable, "-m", "preprocess", *words])
    most = 0
    while process.poll() is None:
        most = max(most, proportional_bytes(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0
    return most


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
def test_peak_is_the_same_for_1024_and_4096_frames(suffix: str, tmp_path: Path) -> None:
    video = tmp_path / f"v{suffix}"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mpeg2video" if suffix == ".ts" else "mpeg4", rate=25)
        stream.width = stream.height = SIDE
        for k in range(4096):
            picture = np.full((SIDE, SIDE, 3), k % 200, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    tower = save_tower(tmp_path / "tower")
    used = {}
    # both more than wait for a busy tower: buffers are full with either
    for frames in (1024, 4096):
        out = tmp_path / f"bank-{frames}"
        words = ["encode", str(video), "--out", str(out), "--tower", str(tower), "--layer", "-1"]
        used[frames] = peak([*words, "--stride", "8", "--frames", str(frames)])
        assert len(Bank.open(out).read(0, 8)) == frames
    banked = 4096 * 2 * 16  # one cell of 16 values
    print({frames: round(used_ / 2**20) for frames, used_ in used.items()})
    assert used[4096] - banked <= 1.1 * used[1024]
