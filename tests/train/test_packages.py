"""Packages and keys that are not here are named before torch is imported.

pytest tests/train/test_packages.py
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from train.settings.config import TrainConfig
from train.settings.packages import has_wandb_key, installed, missing_packages

ROOT = Path(__file__).resolve().parents[2]
MISSING = [
    (
        "wandb",
        {"wandb": True},
        "--wandb wandb: wandb is not installed; pip install wandb, or set wandb: false",
    ),
    (
        "peft",
        {"tune_llm": "lora"},
        "tune_llm tune_llm lora: peft is not installed; pip install peft, or set tune_llm: full or "
        "frozen",
    ),
    (
        "flash_attn",
        {"attn": "flash_attention_2", "frame_attention": "token"},
        "attn attn flash_attention_2: flash-attn is not installed; pip install flash-attn "
        "--no-build-isolation, or set attn: auto",
    ),
    (
        "tensorboard",
        {},
        "tensorboard: not installed, a run writes curves by it; pip install tensorboard",
    ),
]


@pytest.mark.parametrize(("package", "settings", "line"), MISSING)
def test_a_package_that_is_not_here_is_named(
    package: str, settings: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, "kernels"):
        monkeypatch.setitem(sys.modules, name, None)  # as Python marks what cannot be imported
    asked = vars(TrainConfig(**settings))
    origins = {"wandb": "--wandb"}
    assert missing_packages(asked, origins, {"WANDB_MODE": "offline"}) == [line]


def test_a_folder_of_logs_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "framelogs" / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not installed("framelogs")
    (tmp_path / "framelogs" / "__init__.py").write_text("")
    assert not installed("no_such_package_at_all")
    assert installed("torch")


def test_a_missing_package_ends_the_command_before_torch(
    run_settings: Mapping[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
) -> None:
    code = """
import sys
sys.modules["peft"] = None
from train.run import main
try:
    main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
"""
    settings = {**run_settings, "output_dir": tmp_path / "out", "tune_llm": "lora"}
    done = subprocess.run(
        [sys.executable, "-c", code, *as_flags(settings)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --tune_llm tune_llm lora: peft is not installed; pip install")
    assert not (tmp_path / "out").exists()


def test_a_key_is_found_where_wandb_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert not has_wandb_key({})
    assert not has_wandb_key({"WANDB_API_KEY": "", "WANDB_MODE": "online"})
    for environ in (
        {"WANDB_API_KEY": "x" * 40},
        {"WANDB_MODE": "offline"},
        {"WANDB_MODE": "disabled"},
        {"WANDB_IDENTITY_TOKEN_FILE": "token"},
    ):
        assert has_wandb_key(environ), environ
    other = tmp_path / "keys"
    other.write_text("machine wandb.lab.example login user password secret\n")
    at_lab = {"NETRC": str(other), "WANDB_BASE_URL": "https://wandb.lab.example"}
    assert has_wandb_key(at_lab)
    assert not has_wandb_key({"NETRC": str(other)}), "a key of another server"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_wandb_key({})
    (tmp_path / ".netrc").write_text("machine\n")  # not valid: W&B finds none in it either
    assert not has_wandb_key({})
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # `wandb offline`
    assert has_wandb_key({})
    assert not has_wandb_key({"WANDB_MODE": "online"})


def test_a_key_that_is_missing_is_named_once_by_the_process_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    asked = vars(TrainConfig(wandb=True))
    assert missing_packages(asked, {"wandb": "x.yaml:3"}, {}) == [
        "x.yaml:3 wandb: no key to log in with, and nobody to ask; run `wandb login`, set "
        "WANDB_API_KEY, or WANDB_MODE=offline to send the run later"
    ]
    assert missing_packages(asked, {}, {"RANK": "1"}) == []
    assert missing_packages(asked, {}, {"WANDB_API_KEY": "k"}) == []
