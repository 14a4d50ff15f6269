"""`bf16: auto` takes bfloat16 where a step is clearly faster with it, and a run keeps its answer.

pytest tests/train/test_arithmetic.py
pytest tests/train/test_arithmetic.py -m slow     SmolLM2 on this CPU's matrix units
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from model.cpu.matrix_units import least_seconds, matrix_units
from shards.signed import Json
from train.data.dataset import open_dataset
from train.measured.arithmetic import (
    CLEAR,
    decide,
    is_clear,
    measure,
    with_arithmetic,
)
from train.settings.config import TrainConfig, parse


def test_only_a_clear_gain_counts() -> None:
    assert is_clear({False: 2.0, True: 1.0})
    assert not is_clear({False: 1.0, True: 1.0})
    assert not is_clear({False: CLEAR - 0.01, True: 1.0})


def test_both_kinds_come_in_turn_and_the_first_round_does_not_count() -> None:
    said: list[bool] = []

    def take(bf16: bool) -> None:
        said.append(bf16)
        work = 3_000_000 if len(said) <= 2 else 300_000 if bf16 else 30_000
        sum(range(work))

    least = least_seconds((False, True), take)
    assert said == [False, True] * 4
    assert least[False] < least[True] < 0.05


def test_the_setting_is_true_false_or_auto(toy_config: TrainConfig, tmp_path: Path) -> None:
    flags = ["--stage_path", toy_config.stage_path, "--bank", *toy_config.bank]
    flags += ["--data_path", *toy_config.data_path, "--output_dir", str(tmp_path / "out")]
    for words, meant in (
        ([], False),
        (["--bf16"], True),
        (["--bf16", "no"], False),
        (["--bf16", "Auto"], "auto"),
    ):
        assert parse([*flags, *words], {}).bf16 == meant


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_goes_on_is_not_measured_again(
    toy_config: TrainConfig, tmp_path: Path, before: bool
) -> None:
    """A run that was killed before its first checkpoint has written its settings down."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"config": {"bf16": before}, "since_step": 0}))
    config = replace(toy_config, bf16="auto", output_dir=str(out), resume="auto")
    decided, note = with_arithmetic(config, open_dataset(config), on_cpu=True)
    assert decided.bf16 is before
    assert note == f"bf16 {str(before).lower()} (auto): as the run began"


def test_the_cpu_decides_where_accelerate_takes_it_beside_an_accelerator(
    toy_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = replace(toy_config, bf16="auto", output_dir=str(tmp_path / "out"), resume="none")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        _, note = with_arithmetic(config, open_dataset(config), on_cpu=False)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert "an accelerator is here" not in note


def test_the_toy_run_stays_in_float32_bit_for_bit(
    train_here: Callable[..., Path], tmp_path: Path
) -> None:
    plain = train_here(tmp_path / "plain", max_steps=2)
    auto = train_here(tmp_path / "auto", max_steps=2, bf16="auto")
    assert json.loads((auto / "run.json").read_text())["config"]["bf16"] is False
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, auto)
    ]
    assert losses[0] == losses[1]
    weights = [(run / "llm" / "model.safetensors").read_bytes() for run in (plain, auto)]
    assert weights[0] == weights[1]
    assert "bf16 false (auto): " in (auto / "train.log").read_text()


@pytest.mark.slow
def test_a_real_model_takes_the_matrix_units(toy_config: TrainConfig, real_models: Path) -> None:
    if not (matrix_units() and torch.cpu._is_amx_tile_supported()):
        pytest.skip("this CPU has no matrix units")
    config = replace(toy_config, stage_path=str(real_models / "smollm2-135m"), bf16="auto")
    dataset = open_dataset(config)
    pace: Json = measure(config, dataset)
    assert is_clear(pace), pace
    assert decide(config, dataset, on_cpu=True)[0]
