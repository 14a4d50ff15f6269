"""The whole way on a CUDA device: encode, train, go on, evaluate, ask. Each is a command of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bank(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy clips, encoded on the device that `auto` takes."""
    out = tmp_path_factory.mktemp("gpu") / "bank"
    options = ["--stride", "4,8", "--frames", "8", "--tower", str(toy / "tower"), "--out", str(out)]
    command(["-m", "preprocess", "encode", str(toy / "videos"), *options])
    return out


@pytest.mark.parametrize("kind", ["plain", "packed", "bf16", "lora"])
def test_train_go_on_evaluate_and_ask(
    kind: str,
    bank: Path,
    toy: Path,
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "packed": {"pack_tokens": 512},
        "bf16": {"bf16": True, "eval_path": toy / "test.jsonl", "eval_steps": 2},
        "lora": {"tune_llm": "lora", "lora_r": 4},
    }
    out = tmp_path / "run"
    settings = run_settings | {"bank": bank, "output_dir": out, "save_steps": 2} | changes[kind]
    command(["train/run.py", *as_flags(settings)])
    shutil.rmtree(out / "checkpoint-4")
    assert "resumed" in command(["train/run.py", *as_flags(settings)])
    tested = ["--model", str(out), "--bank", str(bank)]
    command(["train/evaluate.py", *tested, "--data_path", str(toy / "test.jsonl")])
    assert json.loads((out / "eval-test.json").read_text())
    clip = toy / "videos" / "test" / "clip-00000.mp4"
    command(["train/ask.py", str(clip), "When is it visible?", "--model", str(out)])


def command(arguments: list[str]) -> str:
    """Run one of the project's commands in a process; return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
