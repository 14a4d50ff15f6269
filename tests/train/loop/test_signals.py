"""Real signals: a run saves and ends with the signal's exit code, and goes on bit by bit.

pytest tests/train/loop/test_signals.py
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train.loop.checkpoint import checkpoints, step_of, verifies
from train.loop.signals import StopSignals, asked_of_all
from train.loop.speed import CLOCK

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
STEPS = 40
WAITING = """
import time
from train.loop.signals import StopSignals
with StopSignals():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


def start(
    command: list[str], flags: list[str], log: Path | None = None
) -> "subprocess.Popen[bytes]":
    err = subprocess.DEVNULL if log is None else open(log, "wb")  # noqa: SIM115
    return subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=err,
    )


def lines_of(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def wait_for_steps(process: "subprocess.Popen[bytes]", out: Path, steps: int) -> None:
    while not lines_of(out) or lines_of(out)[-1]["step"] < steps:
        assert process.poll() is None, process.returncode
        time.sleep(0.01)


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert lines_of(ours) == lines_of(theirs)
    files = sorted(path.relative_to(ours) for path in ours.glob(f"checkpoint-{STEPS}/**/*.safe*"))
    assert any("optimizer" in str(file) for file in files)
    for file in files:
        a, b = load_file(ours / file), load_file(theirs / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items()), file


def test_a_run_stopped_by_sigint_and_by_sigterm_is_the_run_that_never_stopped(
    train_here: Callable[..., Path],
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    flags = as_flags(run_settings | {"max_steps": STEPS, "output_dir": out, "num_threads": 1})
    reached = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start([sys.executable, "-m", "train.run"], flags)
        wait_for_steps(process, out, reached + 2)
        process.send_signal(number)
        assert process.wait() == code
        reached = step_of(checkpoints(out)[0])
        assert 2 <= reached < STEPS
        assert verifies(out / f"checkpoint-{reached}")
        assert f"stopped by {number.name} after step {reached}" in (out / "train.log").read_text()
        assert not (out / "projector.safetensors").exists(), "a stopped run is not a finished one"
    train_here(out, max_steps=STEPS)
    assert_same_run(out, train_here(tmp_path / "straight", max_steps=STEPS))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITING], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(timeout=10) == -second


def test_a_stop_stays_asked_for_a_save_is_taken_once_and_handlers_come_back() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with StopSignals() as signals:
        assert asked_of_all(signals.take()) == (None, False)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked_of_all(signals.take()) == (None, True)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked_of_all(signals.take()) == (signal.SIGINT, False)
        assert asked_of_all(signals.take()) == (signal.SIGINT, False)
    assert {number: signal.getsignal(number) for number in before} == before
    assert asked_of_all([2.0, 1.0, 1.0]) == (signal.SIGTERM, True)


@pytest.mark.slow
def test_accelerate_launch_reports_a_stopped_trainer_as_a_failure(
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
) -> None:
    """Its one-process launcher waits for the trainer, passes no signal on, and exits with 1."""
    out, log = tmp_path / "out", tmp_path / "launch.txt"
    flags = as_flags(run_settings | {"max_steps": 200, "output_dir": out})
    process = start([str(BIN / "accelerate"), "launch", "train/run.py"], flags, log)
    wait_for_steps(process, out, 2)
    (trainer,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(trainer), signal.SIGTERM)
    assert process.wait() == 1
    assert "returned non-zero exit status 143" in log.read_text()
    assert verifies(checkpoints(out)[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_a_signal_on_and_every_rank_saves(
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    out = tmp_path / "out"
    settings = run_settings | {"max_steps": STEPS, "per_device_train_batch_size": 1}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port]
    command += ["-m", "train.run"]

    def run(out: Path) -> "subprocess.Popen[bytes]":
        return start(command, as_flags(settings | {"output_dir": out}))

    process = run(out)
    wait_for_steps(process, out, 2)
    process.send_signal(number)
    assert process.wait() != 0
    reached = step_of(checkpoints(out)[0])
    assert 2 <= reached < STEPS
    assert f"stopped by {number.name} after step {reached}" in (out / "train.log").read_text()
    assert run(out).wait() == 0
    assert run(tmp_path / "straight").wait() == 0
    assert_same_run(out, tmp_path / "straight")
