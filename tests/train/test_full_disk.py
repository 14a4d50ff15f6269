"""A disk that takes no more under the files of `train`: a line that names one, and nothing is left.

pytest tests/train/test_full_disk.py
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import train.convert
import train.export
import train.report
from preprocess.show.picture import save
from tests.full_disk import full
from train.data.drops import Drop, write_drops
from train.data.known.sealed import write_sealed
from train.settings.exits import command


def converts(run: Path, out: Path) -> None:
    config = json.loads((run / "run.json").read_text())["config"]
    train.convert.main(["records", *config["data_path"], "--out", str(out)])


def reports(run: Path, out: Path) -> None:
    train.report.main([str(run), "--output", str(out)])


def exports(run: Path, out: Path) -> None:
    train.export.main(["hf", str(run), str(out)])


@command
def draws(_: Path, out: Path) -> None:
    save(Image.effect_noise((99, 99), 50), out)


@command
def lists(_: Path, out: Path) -> None:
    write_drops(out, [Drop("file", str(row), "id", "reason", "text") for row in range(99)])


COMMANDS = {"c.jsonl": converts, "r.html": reports, "e": exports, "p.png": draws, "d.jsonl": lists}


@pytest.mark.parametrize("most", [0, 900])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_a_line_that_names_the_file_and_leaves_what_was_there(
    trained_run: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    name: str,
    most: int,
) -> None:
    out = tmp_path / name
    if name != "e":  # an export goes into a new folder
        COMMANDS[name](trained_run, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full(most):
        line = refused(COMMANDS[name], trained_run, out)
    assert "File too large" in line
    assert str(out) in line
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "e.tmp").exists()


def test_a_cache_that_cannot_be_written_leaves_nothing_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full(10):
        write_sealed(tmp_path / "x", bytes(99), "tokens")
    assert "File too large" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
