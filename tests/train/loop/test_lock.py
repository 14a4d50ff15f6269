"""Two runs in one output folder: the second is told by name who is there, the first never notices.

pytest tests/train/loop/test_lock.py
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.loop.checkpoint import checkpoints

ROOT = Path(__file__).resolve().parents[3]


def steps(out: Path) -> list[int]:
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["step"] for line in text.split("\n")[:-1]]


def test_a_second_run_is_refused_by_name_and_a_killed_one_leaves_the_folder_free(
    train_here: Callable[..., Path],
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    shared = {"max_steps": 4000, "save_steps": 4}
    process = subprocess.Popen(
        [sys.executable, "-m", "train.run", *as_flags(run_settings | shared | {"output_dir": out})],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        while not checkpoints(out):
            assert process.poll() is None
            time.sleep(0.01)
        line = refused(train_here, out, **shared, learning_rate=0.5)
        assert re.fullmatch(
            rf"error: {out}: `train/run.py --stage_path .* \.\.\.` \(process {process.pid} on "
            rf"{re.escape(socket.gethostname())}\) writes here since \S+Z; wait for its end, end it, or "
            "name another output_dir",
            line,
        ), line
        assert 4 in steps(out), "the run that was there keeps its metrics"
        assert '"learning_rate": 0.5' not in (out / "run.json").read_text()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (out / ".lock").exists()
    first = int(checkpoints(out)[0].name.removeprefix("checkpoint-"))
    train_here(out, max_steps=first + 1)
    assert steps(out) == list(range(1, first + 2))
    assert not (out / ".lock").exists()
