"""How a command ends: lines and exit 2 for what a person can put right, a traceback for a bug."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train.ask
import train.convert
import train.evaluate
import train.export
import train.probe
import train.report
import train.run
from preprocess.cli.main import one_line_errors
from shards.errors import UserError
from tests.full_disk import full
from train.settings.exits import command

ROOT = Path(__file__).resolve().parents[2]


@command
def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (UserError.of(["a: wrong", "b: wrong"]), ["error: a: wrong", "error: b: wrong"]),
        (FileNotFoundError(2, "No such file", "x"), ["error: [Errno 2] No such file: 'x'"]),
    ],
)
def test_what_a_person_can_put_right_is_lines_and_exit_2(
    error: Exception, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        fail(error)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == lines


def writes(path: Path) -> None:
    save_file({"x": torch.zeros(9000)}, path)


def preprocesses(path: Path) -> None:
    with one_line_errors():
        writes(path)


@pytest.mark.parametrize("run", [command(writes), preprocesses], ids=["train", "preprocess"])
def test_a_full_disk_under_safetensors_is_a_line_too(
    run: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full(5000), pytest.raises(SystemExit) as stop:
        run(tmp_path / "x")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "File too large" in line


def test_other_errors_of_safetensors_stay_bugs(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no tensors")
    with pytest.raises(SafetensorError):
        command(load_file)(tmp_path / "x")


COMMANDS = [
    *((m, []) for m in (train.ask, train.evaluate, train.export, train.probe, train.report)),
    (train.run, []),
    *((train.convert, words) for words in ([], ["records"], ["qvhighlights"])),
]


@pytest.mark.parametrize(("module", "words"), COMMANDS)
def test_every_command_prints_its_help(
    module: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse fills a `%` of a text in, and fails where it stands for itself."""
    with pytest.raises(SystemExit) as stop:
        module.main([*words, "--help"])
    assert stop.value.code in (0, None)
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("bug"), AssertionError("bug"), KeyError("bug")])
def test_a_bug_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)):
        fail(error)
    assert not capsys.readouterr().err


def test_what_a_command_returns_is_handed_on() -> None:
    assert command(lambda a, b=1: a + b)(1, b=2) == 3


FAILS = """
import os, sys, time
import train.ask
import train.convert
import train.evaluate
import train.export
import train.probe
import train.report
import train.run
from shards.errors import UserError
from train.settings.exits import command

@command
def main(ranks):
    if os.environ.get("RANK", "0") in ranks:
        raise UserError("wrong", where="here", fix="mend it")
    time.sleep(60)

main(sys.argv[1:])
"""
WAITS = """
import sys, time
from train.settings.exits import command

@command
def main():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("cleaned", flush=True)

main()
"""


def test_ctrl_c_is_a_line_and_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("cleaned\n", "stopped\n")
    finally:
        process.kill()
    assert process.returncode == 130


TWO = ["torchrun", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [
        (TWO, ["0", "1"]),
        pytest.param(TWO, ["1"], marks=pytest.mark.slow),
        (["accelerate", "launch"], ["0"]),
        pytest.param(
            ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"],
            ["0", "1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_under_a_launcher_our_line_comes_once_and_last(
    tmp_path: Path, launcher: list[str], ranks: list[str]
) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    port = ["--main_process_port" if launcher[0] == "accelerate" else "--master_port", free_port()]
    done = subprocess.run(
        [Path(sys.executable).with_name(launcher[0]), *launcher[1:], *port, "fails.py", *ranks],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=50,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in lines, "the launcher's own"
    assert lines[-1] == "error: here: wrong; mend it"
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    # should nothing outlive the launcher, its report has the words too
    assert "here: wrong; mend it" in "\n".join(lines[:-1])


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
