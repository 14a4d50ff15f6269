"""The command: its table, its page, what it refuses, how it follows a run, how slow and large it gets."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import train.report
from shards.write.lock import folder_lock
from tests.train.pages.written import metrics_lines, predictions, write_a_run, write_scores
from train.pages.page import page
from train.pages.read.metrics import MOST_LINES
from train.pages.read.runs import goes_on, read_runs
from train.report import PAGE, main

pytest.importorskip("matplotlib")


def test_the_table_is_printed_and_the_path_of_the_page_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_a_run(tmp_path / "run", ["a.mp4"])
    main([str(run)])
    header, row, last = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["run", "pattern"]
    assert row.split()[0] == str(run)
    assert last == f"written: {run / PAGE}"
    assert (run / PAGE).read_text().startswith("<!DOCTYPE html>")
    assert not list(run.glob("*.tmp"))


def test_what_is_no_run_is_refused_and_all_of_it_told(
    tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "name the folders of runs" in refused(main, [])
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("no metrics.jsonl") == 2
    run = write_a_run(tmp_path / "run", ["a.mp4"])
    (run / "run.json").write_text("[]")
    assert "holds no settings of a run" in refused(main, [str(run)])
    assert "its folder is not there" in refused(
        main,
        [str(write_a_run(tmp_path / "good", ["a.mp4"])), "--output", str(tmp_path / "no" / "x")],
    )


def test_without_the_library_that_draws_there_is_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_a_run(tmp_path / "run", ["a.mp4"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        main([str(run)])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out.splitlines()[1].split()[0] == str(run)
    assert "pip install 'framebank[report]'" in said.err


@pytest.mark.slow
def test_a_run_that_goes_on_is_followed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page is whole whenever it is looked at; it stops loading itself when the run has ended."""
    monkeypatch.setattr(train.report, "PAUSE_SECONDS", 0.05)
    run = write_a_run(tmp_path / "run", ["a.mp4"], steps=20)
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("")
    seen: set[str] = set()
    began = threading.Event()

    def trains() -> None:
        with folder_lock(run, "train/run.py"):
            began.set()
            for part in (whole[:10], whole):
                (run / "metrics.jsonl").write_text("".join(part))
                count = f"<b>{len(part)} of 20 steps</b>" if len(part) < 20 else "<b>20 steps</b>"
                while count not in (text := text_of(run / PAGE)):
                    time.sleep(0.05)
                assert text.endswith("</html>\n")
                assert 'http-equiv="refresh"' in text
                seen.add(count)

    writer = threading.Thread(target=trains)
    writer.start()
    assert began.wait(60)
    assert goes_on(run)
    main(["--watch", str(run)])
    writer.join(60)
    assert len(seen) == 2
    text = text_of(run / PAGE)
    assert 'http-equiv="refresh"' not in text
    assert "is training" not in text
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {run / PAGE}"
    assert not goes_on(run)


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def large_runs(top: Path, runs: int, lines: int, clips: int) -> list[Path]:
    """Return runs of so many metric lines, and five answers about each of so many clips."""
    first = write_a_run(top / "run-0", ["a.mp4"], steps=10)
    steps = metrics_lines(lines)
    (first / "metrics.jsonl").write_text("\n".join(steps) + "\n")
    said = predictions([f"clip-{k}.mp4" for k in range(clips)], good=True)
    write_scores(first, "test", said)
    folders = [first]
    for number in range(1, runs):
        folder = top / f"run-{number}"
        shutil.copytree(first, folder, copy_function=os.link)
        folders.append(folder)
    return folders


def made(folders: list[Path]) -> tuple[float, int]:
    """Return the CPU seconds and the bytes of a page."""
    began = time.process_time()
    text = page(read_runs(folders))
    return time.process_time() - began, len(text.encode())


def test_a_page_does_not_grow_with_the_lines_of_its_runs(tmp_path: Path) -> None:
    folders = large_runs(tmp_path, runs=2, lines=2 * MOST_LINES, clips=40)
    seconds, nbytes = made(folders)
    assert nbytes < 1_500_000
    assert seconds < 10


@pytest.mark.slow
def test_twelve_runs_of_a_hundred_thousand_steps_and_two_thousand_answers(tmp_path: Path) -> None:
    seconds, nbytes = made(large_runs(tmp_path, runs=12, lines=100_000, clips=400))
    assert nbytes < 10_000_000
    assert seconds < 20
