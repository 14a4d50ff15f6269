"""FSDP 2 over NCCL in one process beside a plain run: the same losses, saved, resumed.

One process cuts nothing, so this shows that the way works with this torch and accelerate, not that it
saves memory.

python -m tests.bench.gpu.fsdp
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from preprocess.encode.run import EncodeOptions, encode
from preprocess.toyworld import make_toyworld
from shards.format.features import Sampling

ROOT = Path(__file__).resolve().parents[3]
STEPS = 6


def main() -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        place = Path(folder)
        make_toyworld(place / "toy", train_clips=32, test_clips=1)
        sampling = Sampling(num_frames=8)
        options = EncodeOptions(tower=str(place / "toy/tower"), strides=(4, 8), sampling=sampling)
        encode([str(place / "toy/videos")], place / "bank", options)
        written = yaml.safe_load((ROOT / "train/presets/fsdp2_8gpu.yaml").read_text())
        (place / "one.yaml").write_text(yaml.safe_dump(written | {"num_processes": 1}))
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        plain = losses(place, "plain", [sys.executable], STEPS)
        sharded = [*launcher, "--config_file", str(place / "one.yaml")]
        losses(place, "fsdp", sharded, STEPS // 2)
        resumed = losses(place, "fsdp", sharded, STEPS)
    apart = max(abs(a / b - 1) for a, b in zip(resumed, plain, strict=True))
    assert apart < 1e-3, (resumed, plain)
    note = f"{STEPS} steps, saved and resumed after {STEPS // 2}"
    return [
        {"what": "FSDP 2, one process: losses apart from a plain run", "value": apart, "note": note}
    ]


def losses(place: Path, name: str, start: list[str], steps: int) -> list[float]:
    """Return the loss of each step of a run that goes on where it stopped."""
    flags = {
        "stage_path": place / "toy/llm",
        "bank": place / "bank",
        "data_path": place / "toy/train.jsonl",
        "output_dir": place / name,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "max_steps": steps,
    }
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*start, str(ROOT / "train/run.py"), *words], check=True, env=environ)
    lines = (place / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["ce_loss"] for line in lines if "ce_loss" in json.loads(line)]


if __name__ == "__main__":
    print(json.dumps(main()))
