"""FSDP2 beside a plain run: the same losses, saved in parts and resumed; seconds and memory of a save.

Over NCCL in one process, which cuts nothing: it shows that the way works with this torch and accelerate,
not that it saves memory. Small: two processes over gloo, which do cut.

python -m tests.bench.gpu.fsdp [--small]
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from model.fsdp.parts import PARTS
from preprocess.encode.run import EncodeOptions, encode
from preprocess.toyworld import make_toyworld
from shards.format.features import Sampling

ROOT = Path(__file__).resolve().parents[3]
STEPS = 6
ROWS = 8


def main(small: bool) -> list[dict[str, Any]]:
    processes = 2 if small else 1
    with TemporaryDirectory() as folder:
        place = Path(folder)
        make_toyworld(place / "toy", train_clips=32, test_clips=1)
        sampling = Sampling(num_frames=8)
        options = EncodeOptions(tower=str(place / "toy/tower"), strides=(4, 8), sampling=sampling)
        encode([str(place / "toy/videos")], place / "bank", options)
        sharded = launcher(place, small, processes)
        run = [*sharded, "train.run"]
        plain = losses(place, "plain", [sys.executable, "-m", "train.run"], STEPS, ROWS)
        losses(place, "fsdp", run, STEPS // 2, ROWS // processes)
        assert list((place / "fsdp").glob(f"checkpoint-*/optimizer/{PARTS}"))
        resumed = losses(place, "fsdp", run, STEPS, ROWS // processes)
        words = [str(place / "saving"), *["--small"] * small]
        rows = saved([*sharded, "tests.bench.gpu.saving", *words])
    apart = max(abs(a / b - 1) for a, b in zip(resumed, plain, strict=True))
    assert apart < 1e-3, (resumed, plain)
    note = f"{STEPS} steps, saved in parts and resumed after {STEPS // 2}"
    what = f"FSDP 2, {processes} process{'es' * (processes > 1)}: losses apart from a plain run"
    return [{"what": what, "value": apart, "note": note}, *rows]


def launcher(place: Path, small: bool, processes: int) -> list[str]:
    """Return the command that starts a module in sharded processes."""
    if small:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*command, "--nproc_per_node", str(processes), "-m", "tests.fsdp_on_cpu"]
    written = yaml.safe_load((ROOT / "train/presets/fsdp2_8gpu.yaml").read_text())
    (place / "one.yaml").write_text(yaml.safe_dump(written | {"num_processes": processes}))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*command, "--config_file", str(place / "one.yaml"), "--module"]


def losses(place: Path, name: str, start: list[str], steps: int, rows: int) -> list[float]:
    """Return the loss of each step of a run that goes on where it stopped; rows: of a process."""
    flags = {
        "stage_path": place / "toy/llm",
        "bank": place / "bank",
        "data_path": place / "toy/train.jsonl",
        "output_dir": place / name,
        "per_device_train_batch_size": rows,
        "lr_scheduler_type": "constant",
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "max_steps": steps,
    }
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    subprocess.run([*start, *words], check=True, env=environ(), stdout=sys.stderr)
    lines = (place / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["ce_loss"] for line in lines if "ce_loss" in json.loads(line)]


def saved(command: list[str]) -> list[dict[str, Any]]:
    """Return the rows that the first process prints of a save."""
    done = subprocess.run(command, check=True, env=environ(), stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def environ() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    print(json.dumps(main("--small" in sys.argv)))
