"""`preprocess diff`: equal features and exit code 0, or a line for each field and exit code 1.

pytest tests/shards/care/test_compare.py
"""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from preprocess.cli.main import main
from shards.care.compare import LABELS, diff
from shards.errors import UserError
from shards.format.features import Derived, FeatureConfig, Sampling
from shards.format.plan import Plan, refuse_other_features, write_plan


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")


def planned(folder: Path, features: FeatureConfig) -> Path:
    folder.mkdir()
    write_plan(folder, Plan(features, []))
    return folder


CHANGES: dict[str, tuple[Any, str]] = {
    "tower_type": ("clip_vision_model", "tower_type"),
    "tower_digest": ("11" * 16, "tower_digest"),
    "layer": (-1, "layer"),
    "processor": (
        {"height": 96, "width": 64, "crop": None, "mean": [0.5, 0.5, 0.5]},
        "processor.height",
    ),
    "dtype": ("bfloat16", "dtype"),
    "tower_dtype": ("bfloat16", "tower_dtype"),
    "attention": ("eager", "attention"),
    "sampling": (Sampling(num_frames=9), "sampling.num_frames"),
    "strides": ((4,), "strides"),
    "pool": ("max", "pool"),
    "codec": ("int8", "codec"),
    "format_version": (4, "format_version"),
    "derived": (Derived("11" * 16, (2, 4), "none"), "derived"),
}


def test_every_field_is_changed_here_and_has_its_words() -> None:
    assert {field.name for field in fields(FeatureConfig)} == set(CHANGES) == set(LABELS)


@pytest.mark.parametrize("name", CHANGES)
def test_each_field_is_told_by_name_and_by_no_other(
    features: FeatureConfig, tmp_path: Path, name: str
) -> None:
    value, shown = CHANGES[name]
    a = planned(tmp_path / "a", features)
    b = planned(tmp_path / "b", replace(features, **{name: value}))
    (line,) = diff(a, b)
    assert line.startswith(f"{shown} ({LABELS[name]}): ")
    assert f" in {a}, " in line
    assert line.endswith(f" in {b}")
    result = command("diff", a, b)
    assert (result.exit_code, result.stdout) == (1, line + "\n")
    with pytest.raises(UserError, match="holds other features") as refusal:
        refuse_other_features(a, replace(features, **{name: value}), features)
    assert f" {shown}: " in str(refusal.value)


def test_banks_plans_and_files_of_the_same_features_are_one(
    features: FeatureConfig, make_bank: Callable[..., Path], tmp_path: Path
) -> None:
    arrays = {s: np.zeros((2, 8 // s, 8 // s, 4), np.float16) for s in (4, 8)}
    bank = make_bank(tmp_path / "bank", {"a.mp4": arrays})
    plan = planned(tmp_path / "plan", features)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(features.to_json()))
    for a in (bank, plan, config, plan / "plan.json", bank / "bank.json"):
        for b in (bank, plan, config):
            result = command("diff", a, b)
            assert (result.exit_code, result.stdout) == (0, "same features\n")


def test_what_holds_no_features_is_refused_in_a_line(
    features: FeatureConfig, tmp_path: Path
) -> None:
    plan = planned(tmp_path / "plan", features)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no json")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"layer": -2}')
    edited = planned(tmp_path / "edited", features) / "plan.json"
    edited.write_text(edited.read_text().replace("average", "max"))
    newer = tmp_path / "newer.json"
    newer.write_text(json.dumps(features.to_json() | {"colour": "blue"}))
    for name, said in {
        "nowhere": "no such file or folder",
        "empty": "neither a bank nor a plan",
        "text": "not a json file",
        "list.json": "not a feature config",
        "other.json": "not a feature config",
        "edited": "does not match its own hash",
        "newer.json": "newer framebank",
    }.items():
        result = command("diff", plan, tmp_path / name)
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        assert said in line
