"""`make gpu` on a machine without one: its pieces run small, are kept, and are not run again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("attention", "training-0.5B", "training-1.5B", "live", "encoding", "fsdp")


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench.gpu", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_it_says_so() -> None:
    done = gpu()
    assert done.returncode == 2
    assert done.stderr == "make gpu: no CUDA device here; SMALL=1 tries the machinery\n"


@pytest.mark.slow
def test_pieces_are_run_once_kept_and_shown(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ("--small", "--out", str(out))
    stopped = gpu(*words, "--minutes", "1.5")
    assert stopped.returncode == 1, stopped.stderr
    assert "left for the next time: training-0.5B" in stopped.stderr
    assert "attention" in json.loads(out.read_text())
    done = gpu(*words)
    assert done.returncode == 0, done.stderr
    assert "== attention" not in done.stdout
    kept = json.loads(out.read_text())
    assert set(kept) == set(SMALL)
    rows = [row for piece in kept.values() for row in piece["rows"]]
    assert all(
        isinstance(row["value"], float) for row in rows
    )  # figures of a busy machine mean nothing
    assert len(done.stdout.splitlines()[-len(rows) :]) == len(rows)
    assert gpu(*words).stdout.splitlines()[0].startswith("| what")
    assert "== live" in gpu(*words, "live").stdout
