"""What a step's sums mean, and the three logs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.vlm import VLM
from train.metrics import NUM_SUMS, PAIRS, RunLog, keep_until, line_of, summarise, sums_of

LOSSES = st.lists(
    st.tuples(st.sampled_from(PAIRS), st.floats(0.01, 4), st.floats(0.01, 4)), max_size=8
)
TOKENS = st.lists(st.tuples(st.floats(0, 9), st.booleans()), max_size=8)


@given(tokens=TOKENS, transitions=LOSSES, copied=st.booleans(), weight=st.floats(0, 2))
def test_metrics_are_means_over_tokens_and_transitions(
    tokens: list[tuple[float, bool]],
    transitions: list[tuple[str, float, float]],
    copied: bool,
    weight: float,
) -> None:
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
    sums[0] = math.fsum(loss for loss, _ in tokens)
    sums[1] = math.fsum(loss for loss, is_coordinate in tokens if is_coordinate)
    sums[2], sums[3] = len(tokens), sum(is_coordinate for _, is_coordinate in tokens)
    sums[4] = 100
    for pair, loss, copy in transitions:
        k = PAIRS.index(pair)
        sums[5 + k] += loss
        sums[9 + k] += 1
        if copied:
            sums[13 + k] += copy
            sums[17 + k] += 1
    found = summarise(sums, weight)

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    ce, ar = mean([loss for loss, _ in tokens]), mean([loss for _, loss, _ in transitions])
    copy = mean([copy for _, _, copy in transitions]) if copied else None
    expected = {
        "loss": (ce or 0.0) + weight * (ar or 0.0),
        "ce_loss": ce,
        "coordinate_ce": mean([loss for loss, is_coordinate in tokens if is_coordinate]),
        "autoregressive_loss": ar,
        "autoregressive_loss_weighted": None if ar is None else weight * ar,
        "ar_copy_baseline": copy,
        "ar_skill": None if copy is None or ar is None else 1 - ar / copy,
        "tokens": 100,
        "supervised_tokens": len(tokens),
        "transitions": len(transitions),
    }
    for pair in PAIRS:
        expected[f"ar_{pair}"] = mean([loss for name, loss, _ in transitions if name == pair])
    expected = {name: value for name, value in expected.items() if value is not None}
    assert found == pytest.approx(expected)


def test_a_forwards_sums_are_its_losses_and_counts(
    make_model: Callable[..., VLM], make_batch: Callable[..., Any], make_clip: Callable[..., Any]
) -> None:
    model = make_model()
    batch = make_batch(model, ([make_clip()], "<video> When?", "at <t:2.0>"), ([], "Hello", "you"))
    with torch.no_grad():
        out = model(batch)
    sums = sums_of(out, batch)
    assert sums.shape == (NUM_SUMS,)
    assert sums.dtype == torch.float64
    found = summarise(sums, 0.15)
    assert found["supervised_tokens"] == len(batch.labels)
    assert found["tokens"] == batch.lengths.sum().item()
    assert found["transitions"] == 4
    assert found["ce_loss"] == pytest.approx(out["ce"].item() / len(batch.labels))
    assert found["coordinate_ce"] == pytest.approx(out["coordinate_ce"].item())
    assert found["ar_SF"] == pytest.approx(out["ar"][1].item() / 2)
    assert "ar_skill" in found


@given(st.lists(st.integers(1, 20)), st.integers(0, 20))
def test_a_metrics_file_is_cut_back_to_a_step(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], step: int
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 3}) + "\n" for s in steps))
    keep_until(path, step)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == [{"step": s, "loss": s / 3} for s in steps if s <= step]


def test_a_line_torn_by_a_crash_is_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_no_metrics_file_needs_no_cutting(tmp_path: Path) -> None:
    keep_until(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_the_three_logs_hold_what_was_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, 0, active=True)
    log.say("hello")
    for step in (1, 2):
        log.record(step, {"loss": 1 / step, "tokens": 7})
    log.record(2, {"loss": 0.25}, kind="eval")
    log.close()
    assert (tmp_path / "train.log").read_text() == "hello\n"
    assert capsys.readouterr().err == "hello\n"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "kind": "train", "loss": 1.0, "tokens": 7},
        {"step": 2, "kind": "train", "loss": 0.5, "tokens": 7},
        {"step": 2, "kind": "eval", "loss": 0.25},
    ]
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/tokens", "eval/loss"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, 0, active=False)
    log.say("hello")
    log.record(1, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_a_line_shows_what_there_is() -> None:
    text = line_of(3, 9, {"ce_loss": 1.23456, "autoregressive_loss": 0.5, "learning_rate": 1e-4})
    assert text == "step 3/9  ce_loss 1.2346  autoregressive_loss 0.5000  lr 1.00e-04"
