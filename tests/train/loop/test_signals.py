"""Real signals: a run saves and ends with the signal's exit code, and goes on bit by bit.

pytest tests/train/loop/test_signals.py
"""

import json
import os
import shlex
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
from train.loop.signals import STOPS, StopSignals, asked_of_all
from train.loop.speed import CLOCK

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
STEPS = 40
WAITING = """
import sys, time
from train.loop import signals
signals.ECHO_SECONDS = 1.0
with signals.StopSignals():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


def start(
    command: list[str], flags: list[str], log: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start a command as a job of its own, as an interactive shell does."""
    err = subprocess.DEVNULL if log is None else open(log, "wb")  # noqa: SIM115
    return subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=err,
        start_new_session=True,
        preexec_fn=in_foreground,
    )


def in_foreground() -> None:
    """Heed signals, though these tests themselves may run under nohup or behind `&`."""
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)


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


@pytest.fixture(scope="module")
def straight(train_here: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stopped. Read it only."""
    return train_here(tmp_path_factory.mktemp("straight") / "out", max_steps=STEPS)


@pytest.mark.slow
def test_a_run_stopped_in_turn_by_sigint_by_sigterm_and_by_its_launchers_end_is_that_run(
    train_here: Callable[..., Path],
    straight: Path,
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    flags = as_flags(run_settings | {"max_steps": STEPS, "output_dir": out, "num_threads": 1})
    reached = 0
    python, accelerate = [sys.executable, "-m", "train.run"], ["launch", "train/run.py"]
    for command, number, code in (
        (python, signal.SIGINT, 130),
        (python, signal.SIGTERM, 143),
        # it dies of the signal, and passes none on
        ([str(BIN / "accelerate"), *accelerate], signal.SIGTERM, -signal.SIGTERM),
    ):
        process = start(command, flags)
        wait_for_steps(process, out, reached + 2)
        process.send_signal(number)
        assert process.wait() == code
        wait_for_the_end(process, out)
        before, reached = reached, step_of(checkpoints(out)[0])
        assert before + 2 <= reached < STEPS
        assert verifies(out / f"checkpoint-{reached}")
        assert not (out / "projector.safetensors").exists(), "a stopped run is not a finished one"
    said = [x for x in (out / "train.log").read_text().splitlines() if x.startswith("stopped by")]
    for line, name in zip(said, ("SIGINT", "SIGTERM", "the end of accelerate launch"), strict=True):
        assert line.startswith(f"stopped by {name} "), line
    train_here(out, max_steps=STEPS)
    assert_same_run(out, straight)


def wait_for_the_end(process: "subprocess.Popen[bytes]", out: Path, seconds: float = 60) -> None:
    """Wait until nothing of a run is left, though what was started has gone."""
    end = time.monotonic() + seconds
    while trainers := processes_of(out):
        assert time.monotonic() < end, f"of {process.pid}: {trainers} live on"
        time.sleep(0.05)


def processes_of(out: Path) -> list[int]:
    """Return the processes that were given this output folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(out) in words:
            found.append(int(path.name))
    return found


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


COMMANDS = {
    "python": [sys.executable, "-m", "train.run"],
    "accelerate": [str(BIN / "accelerate"), "launch", "train/run.py"],
    "accelerate of two": [
        *(str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"),
        *("--main_process_port", "PORT", "train/run.py"),
    ],
    "torchrun": [
        *(
            str(BIN / "torchrun"),
            "--nproc_per_node",
            "2",
            "--master_port",
            "PORT",
            "-m",
            "train.run",
        )
    ],
}
STOPPED = [
    # (command, what is around it, signal, to whom, exit code of what was started)
    ("python", "", signal.SIGHUP, "process", 129),
    ("python", "sh", signal.SIGTERM, "process", -signal.SIGTERM),
    ("python", "tee", signal.SIGINT, "job", -signal.SIGINT),
    ("accelerate", "", signal.SIGINT, "process", -signal.SIGINT),
    ("accelerate", "sh", signal.SIGTERM, "process", -signal.SIGTERM),
    ("accelerate", "tee", signal.SIGINT, "job", -signal.SIGINT),
    ("accelerate of two", "", signal.SIGTERM, "process", 1),
    ("accelerate of two", "", signal.SIGINT, "job", 1),
    ("torchrun", "", signal.SIGTERM, "process", 1),
    ("torchrun", "", signal.SIGINT, "process", 1),
    ("torchrun", "", signal.SIGKILL, "process", -signal.SIGKILL),
    ("torchrun", "sh", signal.SIGTERM, "process", -signal.SIGTERM),
    ("torchrun", "tee", signal.SIGINT, "job", -signal.SIGINT),
]


@pytest.fixture(scope="module")
def straight_of_two(
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("straight") / "two"
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 1, "output_dir": out}
    command = [port() if word == "PORT" else word for word in COMMANDS["torchrun"]]
    assert start(command, as_flags(run_settings | settings)).wait() == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "around", "number", "whom", "code"),
    STOPPED,
    ids=[f"{name}-{around}-{number.name}-{whom}" for name, around, number, whom, _ in STOPPED],
)
def test_a_signal_to_any_of_them_saves_and_the_run_goes_on_exactly(
    request: pytest.FixtureRequest,
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
    name: str,
    around: str,
    number: signal.Signals,
    whom: str,
    code: int,
) -> None:
    """process: what was started, a shell where there is one; job: its process group, as Ctrl-C does."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    settings = run_settings | {"max_steps": STEPS, "output_dir": out, "num_threads": 1}
    two = name in ("torchrun", "accelerate of two")
    if two:
        settings["per_device_train_batch_size"] = 1
    flags = as_flags(settings)

    def command() -> list[str]:
        words = [port() if word == "PORT" else word for word in [*COMMANDS[name], *flags]]
        line = shlex.join(words)
        if around == "sh":
            return ["sh", "-c", f"{line}; exit $?"]
        return ["sh", "-c", f"{line} 2>&1 | tee {log}"] if around == "tee" else words

    process = start(command(), [])
    wait_for_steps(process, out, 2)
    if whom == "job":
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait() == code
    wait_for_the_end(process, out)
    reached = step_of(checkpoints(out)[0])
    assert 2 <= reached < STEPS
    assert verifies(out / f"checkpoint-{reached}")
    assert f" after step {reached} of {STEPS}" in (out / "train.log").read_text()
    assert start(command(), []).wait() == 0
    assert_same_run(out, request.getfixturevalue("straight_of_two" if two else "straight"))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    process = waiting()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(timeout=10) == -second


def test_what_torchrun_passes_on_is_no_second_signal() -> None:
    """A job that Slurm or `kill -PGID` ends: the workers are told twice, once by torchrun."""
    process = waiting(TORCHELASTIC_RUN_ID="none")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.poll() is None
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


def waiting(**environ: str) -> "subprocess.Popen[bytes]":
    """Return a process that has opened a StopSignals, and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env=os.environ | environ,
        preexec_fn=in_foreground,
    )
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    return process


def test_a_stop_stays_asked_for_a_save_is_taken_once_and_handlers_come_back() -> None:
    before = {n: signal.getsignal(n) for n in (*STOPS, signal.SIGUSR1)}
    with StopSignals() as signals:
        assert asked_of_all(signals.take()) == (None, False)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked_of_all(signals.take()) == (None, True)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked_of_all(signals.take()) == (signal.SIGINT, False)
        assert asked_of_all(signals.take()) == (signal.SIGINT, False)
    assert {number: signal.getsignal(number) for number in before} == before
    assert asked_of_all([2.0, 1.0, 0.0, 1.0]) == (signal.SIGTERM, True)
    assert asked_of_all([0.0, 0.0, 1.0, 0.0]) == (signal.SIGHUP, False)


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
