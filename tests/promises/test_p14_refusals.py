"""P14: a wrong key, value, path or bank is exit 2 before torch is imported, every problem in a line.

Each line says where it is and how to put it right.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
sys.argv[0] = {name!r}
from {module} import main
try:
    {call}
finally:
    heavy = {{"torch", "transformers", "accelerate", "decord", "av", "zarr"}} & set(sys.modules)
    print("heavy:", *sorted(heavy), file=sys.stderr)
"""
PREPROCESS = RUN.format(name="preprocess", module="preprocess.cli.main", call="main()")
TRAIN = RUN.format(name="train/run.py", module="train.run", call="main(sys.argv[1:])")


def ended(script: str, words: list[str], folder: Path, **environ: str) -> tuple[int, list[str]]:
    """Return the exit code and the lines on stderr of a command, which must not have imported torch."""
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    *lines, heavy = done.stderr.splitlines()
    assert heavy == "heavy:", done.stderr
    return done.returncode, lines


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["encode", "--help"], 0),
        (["verify", "--help"], 0),
        (["diff", "a", "b"], 2),
        (["toyworld", "--help"], 0),
        (["footage", "--help"], 0),
        (["realmodels", "--help"], 0),
        (["encode", "v", "--out", "b", "--tower", "t", "--stride", "8,4"], 2),
        (["encode", "v", "--out", "b", "--tower", "t", "--frames", "8", "--fps", "1"], 2),
        (["encode", "/no/video", "--out", "b", "--tower", "t"], 2),
        (["encode", ".", "--out", "b", "--tower", "t"], 2),
        (["encod"], 2),
    ],
)
def test_help_and_usage_errors_come_before_torch(
    tmp_path: Path, words: list[str], code: int
) -> None:
    found, lines = ended(PREPROCESS, words, tmp_path)
    assert found == code, lines
    assert len(lines) == (1 if code else 0), lines
    assert all(line.startswith("error: ") for line in lines)


def test_all_wrong_settings_come_before_torch_each_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("seed: 1\nlearning_rat: 1e-5\nbf16: maybe\n")
    words = ["--config", "x.yaml", "--stage_path", "nowhere", "--max_steps", "-4"]
    words += ["--bank", "bank", "--data_path", "none.json", "--output_dir", "out"]
    code, lines = ended(TRAIN, words, tmp_path, NUM_SPATIAL_TOKENS="x")
    assert code == 2
    expected = [
        "x.yaml:2 learning_rat: unknown setting; did you mean learning_rate?",
        "x.yaml:3 bf16 must be true, false or auto, got 'maybe'",
        "--max_steps must be",
        "NUM_SPATIAL_TOKENS must be an integer in [2, 1000], got 'x'",
    ]
    assert [[part in line for part in expected].count(True) for line in lines] == [1] * 4, lines
    (tmp_path / "x.yaml").write_text("")
    words[words.index("-4")] = "4"
    code, lines = ended(TRAIN, words, tmp_path)
    assert code == 2
    expected = ["no such folder: nowhere (expected a folder", "no such file: none.json"]
    assert len(lines) == 2, lines
    assert all(part in line for part, line in zip(expected, lines, strict=True)), lines


def test_what_a_bank_lacks_comes_before_torch(
    make_bank: Callable[..., Path], tmp_path: Path
) -> None:
    clip = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    make_bank(tmp_path / "bank", {"a.mp4": clip})
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}")
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "x"}]
    record = {"id": "r", "video": "z.mp4", "conversations": turns}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    words = "--stage_path llm --data_path r.jsonl --bank bank --output_dir out --fast_stride 3"
    code, lines = ended(TRAIN, words.split(), tmp_path)
    assert code == 2
    assert any("fast_stride 3" in line for line in lines)
    assert any("no bank knows the clip 'z.mp4'" in line for line in lines)
    assert all(line.startswith("error: ") for line in lines)
    assert not (tmp_path / "out").exists()
