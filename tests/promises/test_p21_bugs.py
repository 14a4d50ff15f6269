"""P21: a bug of ours is a traceback, never a quarantined clip or a user's mistake.

`preprocess` exits with 70 then; a trainer as Python does, with 1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from model.tower.tower import Tower
from model.vlm import VLM
from preprocess.cli.main import main
from preprocess.decode.source import SourceReader


def broken(*args: Any, **options: Any) -> Any:
    raise ValueError("a bug of ours")


@pytest.mark.parametrize(("owner", "method"), [(Tower, "features"), (SourceReader, "read")])
def test_a_bug_stops_encoding_with_its_traceback_and_blames_no_clip(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
) -> None:
    monkeypatch.setattr(owner, method, broken)
    words = [
        "encode",
        toy / "videos" / "test",
        "--out",
        tmp_path / "bank",
        "--tower",
        toy / "tower",
    ]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 70
    assert "Traceback" in done.stderr
    assert "in broken" in done.stderr
    assert "ValueError: a bug of ours" in done.stderr
    assert "error: " not in done.stderr
    assert not (tmp_path / "bank" / "quarantine.jsonl").exists()
    assert not (tmp_path / "bank" / "bank.json").exists()
    monkeypatch.undo()
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, "the bug put right, the same command goes on"


def test_a_bug_stops_training_with_its_traceback(
    train_here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLM, "embed", broken)
    with pytest.raises(ValueError, match="a bug of ours"):
        train_here(tmp_path / "out")
