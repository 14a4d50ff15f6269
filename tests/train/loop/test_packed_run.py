"""Runs of packed rows, of limited records, and on a number of processes that does not divide a step."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from train.batches.plan import plan_run
from train.batches.run_plan import RunPlan
from train.data.dataset import open_dataset
from train.settings.config import TrainConfig

ROOT = Path(__file__).resolve().parents[3]
PACKED = {"pack_tokens": 600, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
Json = dict[str, Any]


def lines_of(out: Path) -> list[Json]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def planned(settings: Mapping[str, Any], rows_per_step: int, **changes: Any) -> RunPlan:
    values = {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
    values |= {"bank": [str(settings["bank"])], "data_path": [str(settings["data_path"])]}
    config = TrainConfig(**values | changes)
    return plan_run(config, open_dataset(config), rows_per_step)


@pytest.fixture(scope="module")
def packed(train_here: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("packed") / "out"
    return train_here(out, **PACKED, max_steps=6, save_steps=3)


def test_a_packed_run_takes_the_steps_of_its_plan(
    packed: Path, run_settings: dict[str, Any]
) -> None:
    plan = planned(run_settings, 4, **PACKED, max_steps=6)
    assert max(len(row) for k in range(plan.num_packs[0]) for row in plan.pack(0, k)) > 1
    lines = lines_of(packed)
    assert [line["supervised_tokens"] for line in lines] == plan.num_labels.tolist()
    assert [line["transitions"] for line in lines] == plan.num_transitions.tolist()
    assert [line["tokens"] for line in lines] == plan.per_step(plan.tokens).tolist()
    assert lines[-1]["loss"] < lines[0]["loss"]
    text = (packed / "train.log").read_text()
    assert "attention sdpa: packed rows, record by record" in text
    assert "6 of 4 rows of up to 600 tokens" in text


def test_a_packed_run_resumes_with_nothing_repeated_or_skipped(
    packed: Path, train_here: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(packed / "checkpoint-3", out / "checkpoint-3")
    train_here(out, **PACKED, max_steps=6, save_steps=3)
    for ours, theirs in zip(lines_of(out), lines_of(packed)[3:], strict=True):
        for name in ("step", "loss", "grad_norm", "tokens", "supervised_tokens"):
            assert ours[name] == theirs[name]


def test_a_resumed_run_may_cut_its_steps_otherwise(
    packed: Path, train_here: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(packed / "checkpoint-3", out / "checkpoint-3")
    other = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    train_here(out, **PACKED | other, max_steps=6)
    assert (
        "kept      a step has 4 rows, as the run began with, not 2"
        in (out / "train.log").read_text()
    )
    for ours, theirs in zip(lines_of(out), lines_of(packed)[3:], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_records_are_cut_down_to_whole_frames_that_fit(
    train_here: Callable[..., Path], run_settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = planned(run_settings, 2)
    limit = int(whole.tokens.max()) - 5
    out = train_here(tmp_path / "out", max_tokens=limit, max_steps=3)
    plan = planned(run_settings, 2, max_tokens=limit, max_steps=3)
    assert (plan.tokens <= limit).all()
    assert (plan.frames < whole.frames).any()
    assert [line["tokens"] for line in lines_of(out)] == plan.per_step(plan.tokens).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PACKED, {"gradient_accumulation_steps": 4}])
def test_three_processes_share_four_packs_and_learn_what_one_does(
    train_here: Callable[..., Path],
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    shared = {**settings, "max_steps": 4, "save_steps": 2}
    alone = train_here(tmp_path / "one", **shared)
    out = tmp_path / "three"
    out.mkdir()
    # a step of four packs comes from the run's first start
    shutil.copytree(alone / "checkpoint-2", out / "checkpoint-2")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3"]
    command += ["--master_port", str(port), "-m", "train.run"]
    flags = as_flags(run_settings | shared | {"output_dir": out})
    done = subprocess.run(
        [*command, *flags],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for ours, theirs in zip(lines_of(out), lines_of(alone)[2:], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
