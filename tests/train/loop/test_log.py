"""What a run prints: a bar that moves on a terminal, lines alone in a log."""

import os
import pty
import select
import sys
from pathlib import Path
from typing import TextIO

import pytest

from train.loop.log import RunLog


def printed(run: Path, stream: TextIO, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(sys, "stderr", stream)
    log = RunLog(run, 0, active=True)
    for step in range(1, 5):
        log.show(step, 4, {"ce_loss": 1.5 / step, "ar_skill": 0.25})
        if step == 2:
            log.say("step 2/4 ce 0.7500")
    log.close()


def test_a_terminal_has_a_bar_and_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        printed(tmp_path, terminal, monkeypatch)
        monkeypatch.undo()
        seen = b""
        while select.select([ours], [], [], 0.2)[0]:
            seen += os.read(ours, 1 << 16)
    os.close(ours)
    text = seen.decode()
    assert "1/4" in text
    assert "ce 1.5000 skill 0.250" in text
    # the line begins where the bar was wiped off
    (line,) = [piece for piece in text.split("\n") if "step 2/4 ce 0.7500" in piece]
    assert line.split("\r")[-2] == "step 2/4 ce 0.7500" or line.strip().endswith(
        "step 2/4 ce 0.7500"
    )
    assert (tmp_path / "train.log").read_text() == "step 2/4 ce 0.7500\n"


def test_a_log_has_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "log.txt", "w", encoding="utf-8") as file:
        printed(tmp_path, file, monkeypatch)
    monkeypatch.undo()
    assert (tmp_path / "log.txt").read_text() == "step 2/4 ce 0.7500\n"
