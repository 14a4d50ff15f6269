"""What a run prints: a bar that moves on a terminal, lines alone in a log."""

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import threading
import time
from pathlib import Path
from typing import TextIO

import pytest

from shards.signed import Json
from tests.full_disk import full
from train.loop.log import RunLog

LINE = "step 2/4 ce 0.7500 skill 0.250"


def printed(run: Path, stream: TextIO, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(sys, "stderr", stream)
    log = RunLog(run, 0, active=True)
    for step in range(1, 5):
        log.show(step, 4, {"ce_loss": 1.5 / step, "ar_skill": 0.25}, line=step == 2)
        time.sleep(0.12)  # the bar is drawn anew after a tenth of a second
    log.close()


def recorded(run: Path, metrics: Json) -> None:
    log = RunLog(run, 0, active=True)
    log.record(0, metrics)
    log.close()


@pytest.mark.parametrize(
    # TensorBoard writes in a thread of its own: one of the two files alone may be too large
    ("most", "metrics", "named"),
    [
        (0, {}, "logs"),
        (3000, {f"loss_{n}": 1.5 for n in range(100)}, "logs"),
        (500, {"note": "x" * 500}, "metrics.jsonl"),
    ],
)
def test_a_full_disk_is_said_once_with_the_name_of_what_could_not_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    most: int,
    metrics: Json,
    named: str,
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # it is replaced
    with full(most), pytest.raises(OSError, match=f"File too large: '{tmp_path}/{named}'"):
        recorded(tmp_path, metrics)
    assert "Traceback" not in capfd.readouterr().err


def test_a_terminal_has_a_bar_and_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(theirs, "w", encoding="utf-8") as terminal:
        printed(tmp_path, terminal, monkeypatch)
        monkeypatch.undo()
        seen = b""
        while select.select([ours], [], [], 0.2)[0]:
            seen += os.read(ours, 1 << 16)
    os.close(ours)
    text = seen.decode()
    assert "2/4" in text
    assert ", ce 0.7500 skill 0.250]" in text
    # the line stands alone, where the bar was wiped off
    (line,) = [piece for piece in text.split("\n") if LINE in piece]
    assert line.rstrip("\r").rpartition("\r")[2] == LINE
    assert (tmp_path / "train.log").read_text() == f"{LINE}\n"


def test_a_log_has_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "log.txt", "w", encoding="utf-8") as file:
        printed(tmp_path, file, monkeypatch)
    monkeypatch.undo()
    assert (tmp_path / "log.txt").read_text() == f"{LINE}\n"
