"""From a sweep to command lines: each run's is the one that gives its settings; conflicts are refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.errors import UserError
from train.settings.config import parse
from train.sweep.runs import Run, runs_of

ROOT = Path(__file__).resolve().parents[3]

TEXT = """
config: train/presets/toy.yaml
settings: {num_spatial_tokens: 20, output_dir: elsewhere, augment: [jitter, drop=0.25]}
seeds: [0, 3]
runs:
  off: {enable_lape: false}
  on: {learning_rate: 1e-3, slow_frame_ratio: 0.30, augment: []}
  long: {stage: on, max_steps: 800, data_path: "${WORLD}/test.jsonl"}
"""


Make = Callable[..., list[Run]]


@pytest.fixture
def make(
    toy: Path, toy_bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Run]]:
    """A function that returns the runs of a YAML's text and more flags, data_path unless it is among."""
    monkeypatch.chdir(ROOT)

    def runs(text: str, *flags: str, environ: Any = None) -> list[Run]:
        (tmp_path / "s.yaml").write_text(text)
        words = ["--stage_path", str(toy / "llm"), "--bank", str(toy_bank)]
        if "data_path" not in text:
            words += ["--data_path", str(toy / "train.jsonl")]
        words += ["--sweep", str(tmp_path / "s.yaml"), "--output_dir", str(tmp_path / "out")]
        return runs_of([*words, *flags], {"WORLD": str(toy)} | (environ or {}), None)

    return runs


def problems_of(make: Make, *args: Any, **more: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        make(*args, **more)
    return error.value.problems


def test_the_command_line_of_a_run_gives_its_settings(
    make: Make, tmp_path: Path, toy: Path
) -> None:
    text = TEXT.replace("  on:", "  on: {}\n  other:").replace(
        "settings: {", f"settings: {{data_path: {toy}/train.jsonl, "
    )
    runs = make(
        text, "--max_grad_norm=0.5", environ={"NUM_TEMPORAL_TOKENS": "30", "ENABLE_LAPE": "true"}
    )
    assert [run.name for run in runs] == [
        f"{name}/seed-{seed}" for seed in (0, 3) for name in ("off", "on", "other", "long")
    ]
    for run in runs:
        assert run.folder == tmp_path / "out" / run.name
        if run.stage is None:
            environ = {"NUM_TEMPORAL_TOKENS": "30", "ENABLE_LAPE": "true"}
            assert parse(run.words, environ) == run.config
    off, on, other, long = (run.config for run in runs[:4])
    assert (off.enable_lape, on.enable_lape) == (False, True)
    assert (on.num_spatial_tokens, on.num_temporal_tokens) == (20, 30)
    assert on.augment == ["jitter", "drop=0.25"]
    assert (other.augment, other.learning_rate, other.slow_frame_ratio) == ([], 1e-3, "0.30")
    assert (on.learning_rate, on.max_grad_norm) == (2e-3, 0.5)
    assert long.stage_path == str(runs[1].folder)
    assert long.data_path == [str(toy / "test.jsonl")]
    assert runs[3].words[-2:] == ("--stage_path", str(runs[1].folder))
    # a list that the sweep and its run both say is the run's
    assert runs[3].words.count("--data_path") == runs[2].words.count("--augment=") == 1
    assert "--augment" not in runs[2].words


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        (
            "runs: {a: {lerning_rate: 1}}",
            (),
            "s.yaml:1 lerning_rate: unknown setting; did you mean",
        ),
        ("runs: {a: {lape_sigma: -1}}", (), "s.yaml:1 lape_sigma must be a number in [0.01, "),
        ("runs: {a: {max_steps: many}}", (), "s.yaml:1 max_steps must be an integer"),
        (
            "settings: {nonsense_here: 1}\nruns: {a: {}}",
            (),
            "s.yaml:1 nonsense_here: unknown setting",
        ),
        ("seeds: [x]\nruns: {a: {}}", (), "s.yaml seeds seed must be an integer"),
        ("runs: {a: {bf16: true}}", ("--bf16", "false"), "--bf16: "),
        ("seeds: [1]\nruns: {a: {}}", ("--seed", "2"), "--seed: "),
        ("config: train/presets/toy.yaml\nruns: {a: {}}", ("--config", "x.yaml"), "--config: "),
        ("runs: {a: {}}", ("--no_such", "1"), "--no_such: unknown setting"),
        ("seeds: [1]\nruns: {a: {}, b: {stage: a, seeds: [2]}}", (), "b: a has no seed 2"),
        ("runs: {a: {attn: nothing}}", (), "s.yaml:1 attn must be one of auto"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_opened(
    make: Make, text: str, flags: tuple[str, ...], words: str
) -> None:
    assert any(words in problem for problem in problems_of(make, text, *flags))


def test_every_problem_is_told_once(make: Make) -> None:
    text = "seeds: [0, 1, 2]\nruns: {a: {lape_sigma: 0}, b: {typo_here: 1}, c: {}}"
    assert len(problems_of(make, text, "--max_steps", "x")) == 3


def test_two_sweeps_share_a_run_of_the_same_settings_and_no_other(
    make: Make, tmp_path: Path
) -> None:
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text("runs: {a: {bf16: true}, c: {}}")
    other.write_text("runs: {a: {bf16: false}}")
    runs = make("runs: {a: {bf16: true}}", "--sweep", str(same))
    assert [run.name for run in runs] == ["a/seed-0", "a/seed-0", "c/seed-0"]
    (line,) = problems_of(make, "runs: {a: {bf16: true}}", "--sweep", str(other))
    assert line.startswith(f"{other} a: ")


def test_the_sweeps_of_the_evidence_can_be_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy: Path, toy_bank: Path
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "toy").mkdir()
    for name in ("train", "train-128", "train-512", "test"):
        (tmp_path / "toy" / f"{name}.jsonl").symlink_to(toy / "train.jsonl")
    (tmp_path / "toy" / "llm").symlink_to(toy / "llm")
    (tmp_path / "space").symlink_to(toy)
    presets = sorted((ROOT / "train" / "presets" / "evidence").glob("*.yaml"))
    words = ["--sweep", *map(str, presets), "--output_dir", str(tmp_path / "runs")]
    # of one name with other settings, and with other steps: it stands alone
    words.remove(str(ROOT / "train" / "presets" / "evidence" / "small.yaml"))
    runs = runs_of(words, os.environ | {"EVIDENCE": str(tmp_path)}, None)
    core = [run.name for run in runs if run.sweep.name == "lape"]
    assert len(core) == 15
    assert all(name.endswith("seed-0") for name in core[:5])
    plus = {run.folder for run in runs if run.variant.name == "lape-plus"}
    assert len(plus) == 3
    assert {run.config.max_steps for run in runs if run.sweep.name == "lape"} == {400}
    small = [str(ROOT / "train" / "presets" / "evidence" / "small.yaml"), "--output_dir", "x"]
    assert len(runs_of(["--sweep", *small], os.environ | {"EVIDENCE": str(tmp_path)}, None)) == 5
