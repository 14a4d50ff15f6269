"""What a step's sums mean, and the three logs."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.batch import Batch
from model.mask import dense_mask, intervals
from model.vlm import VLM
from shards.text import duration
from train.data.records import TASKS, Record, Turn, task_of
from train.loop.held_out import lowest
from train.loop.log import RunLog, keep_until, line_of
from train.loop.metrics import FIELDS, NUM_SUMS, PAIRS, VECTORS, summarise, sums_of
from train.loop.speed import CLOCK, StepTimer

BASELINES = ("copy", "affine", "ridge")
LOSSES = st.lists(
    st.tuples(st.sampled_from(PAIRS), st.floats(0.01, 4), st.tuples(*[st.floats(0.01, 4)] * 3)),
    max_size=8,
)
TOKENS = st.lists(st.tuples(st.floats(0, 9), st.booleans(), st.sampled_from(TASKS)), max_size=8)


def batch_of(tokens: int, tasks: list[str], coordinates: list[bool], padding: int = 3) -> Batch:
    """Return the parts of a causal row that the sums read."""
    length = tokens + padding
    start, end = intervals(np.arange(length) // tokens * -1, np.full(length, -1))
    empty = torch.zeros(0)
    return Batch(
        *[empty] * 4,
        mask_start=torch.from_numpy(start)[None],
        mask_end=torch.from_numpy(end)[None],
        predict_index=empty,
        labels=torch.zeros(len(tasks), dtype=torch.long),
        label_axis=torch.tensor([0 if on else -1 for on in coordinates], dtype=torch.long),
        label_coord=empty,
        lengths=torch.tensor([tokens]),
        groups=(),
        transitions=(),
        record_ids=(),
        label_task=torch.tensor([TASKS.index(task) for task in tasks], dtype=torch.long),
    )


@given(
    tokens=TOKENS,
    transitions=LOSSES,
    copied=st.booleans(),
    has_floor=st.booleans(),
    weight=st.floats(0, 2),
)
def test_metrics_are_means_over_tokens_and_transitions(
    tokens: list[tuple[float, bool, str]],
    transitions: list[tuple[str, float, tuple[float, float, float]]],
    copied: bool,
    has_floor: bool,
    weight: float,
) -> None:
    """Of two forwards, which share the transitions and have half of the tokens each."""
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
    for number in range(2):
        own = tokens[number::2]
        out = {name: torch.zeros(4, dtype=torch.float64) for name in VECTORS}
        out["token_ce"] = torch.tensor([loss for loss, _, _ in own], dtype=torch.float64)
        out["ce"] = out["token_ce"].sum()
        is_coordinate = [on for _, on, _ in own]
        out["coordinate_ce"] = out["token_ce"][torch.tensor(is_coordinate, dtype=torch.bool)].sum()
        for pair, loss, others in transitions[number::2]:
            k = PAIRS.index(pair)
            out["ar"][k] += loss
            out["ar_count"][k] += 1
            if copied:
                out["ar_copy_count"][k] += 1
                for name, other in zip(BASELINES, others, strict=True):
                    out[f"ar_{name}"][k] += other if name == "copy" or has_floor else 0
        sums += sums_of(out, batch_of(10, [task for _, _, task in own], is_coordinate))
    found = summarise(sums, weight)

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    ce, ar = mean([loss for loss, _, _ in tokens]), mean([loss for _, loss, _ in transitions])
    baselines = {
        f"ar_{name}_baseline": mean([others[k] for _, _, others in transitions])
        for k, name in enumerate(BASELINES if has_floor else BASELINES[:1])
        if copied
    }
    floor = min(baselines.values()) if copied and has_floor and transitions else None
    expected = {
        "loss": (ce or 0.0) + weight * (ar or 0.0),
        "ce_loss": ce,
        "coordinate_ce": mean([loss for loss, is_coordinate, _ in tokens if is_coordinate]),
        "autoregressive_loss": ar,
        "autoregressive_loss_weighted": None if ar is None else weight * ar,
        **baselines,
        "ar_skill": None if floor is None or ar is None else 1 - ar / floor,
        "tokens": 20,
        "pairs": 2 * 55,
        "supervised_tokens": len(tokens),
        "transitions": len(transitions),
    }
    for pair in PAIRS:
        expected[f"ar_{pair}"] = mean([loss for name, loss, _ in transitions if name == pair])
        own = [others for name, _, others in transitions if name == pair]
        if floor is not None and own:
            lowest = min(sum(other) / len(own) for other in zip(*own, strict=True))
            expected[f"ar_skill_{pair}"] = 1 - expected[f"ar_{pair}"] / lowest
    for task in TASKS:
        expected[f"ce_{task}"] = mean([loss for loss, _, name in tokens if name == task])
    expected = {name: value for name, value in expected.items() if value is not None}
    assert found == pytest.approx(expected)
    assert found.keys() <= FIELDS.keys()


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
    assert found["pairs"] == sum(
        int(dense_mask(batch.mask_start, batch.mask_end)[row, 0, :length].sum())
        for row, length in enumerate(batch.lengths.tolist())
    )
    assert found["transitions"] == 4
    assert found["ce_loss"] == pytest.approx(out["ce"].item() / len(batch.labels))
    assert found["coordinate_ce"] == pytest.approx(out["coordinate_ce"].item())
    assert found["ar_SF"] == pytest.approx(out["ar"][1].item() / 2)
    assert found["ar_copy_baseline"] == pytest.approx(out["ar_copy"].sum().item() / 4)
    assert "ar_skill" not in found  # without fits there is nothing to read it against
    # without tasks nothing is split, with them the split is the whole
    assert not found.keys() & {f"ce_{task}" for task in TASKS}
    task = torch.arange(len(batch.labels)) % 2
    split = summarise(sums_of(out, replace(batch, label_task=task)), 0.15)
    parts = [split["ce_text"] * (task == 0).sum(), split["ce_time"] * (task == 1).sum()]
    assert sum(parts).item() == pytest.approx(out["ce"].item())


@pytest.mark.parametrize(
    ("answers", "task"),
    [
        (["a cat"], "text"),
        (["from <t:1> to <t:2>"], "span"),
        (["a cat", "at <x:0.1><y:0.2>", "<t:1>"], "point"),
        (["<x:0.1><y:0.2><x:0.3><y:0.4>"], "box"),
        (["<t:1>", "yes"], "time"),
    ],
)
def test_the_task_of_a_record_is_that_of_its_first_answer_with_coordinates(
    answers: list[str], task: str
) -> None:
    turns = [turn for text in answers for turn in (Turn("user", "<t:0>"), Turn("assistant", text))]
    assert TASKS[task_of(Record("r", (), tuple(turns), "", "here"))] == task


def test_the_timer_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 101.0, 104.0, 110.0, 110.0, 112.0])  # start, ready, done, rest, ready, done
    monkeypatch.setattr("train.loop.speed.time.monotonic", lambda: next(now))
    timer = StepTimer(5, 10, lambda metrics: metrics["tokens"] * 6e9, devices=2, peak=1e12)
    timer.data_ready()
    first = timer.rates(6, {"tokens": 400, "supervised_tokens": 40})
    assert first.pop("memory_gb") > 0.01
    assert first == pytest.approx(
        {
            "seconds": 4.0,
            "data_wait": 0.25,
            "tokens_per_second": 100,
            "supervised_per_second": 10,
            "eta_seconds": 16.0,
            "mfu": 400 * 6e9 / (4 * 2 * 1e12),
        }
    )
    timer.pause_over()  # a checkpoint was written
    timer.data_ready()
    second = timer.rates(7, {"tokens": 400, "supervised_tokens": 0})
    assert (second["seconds"], second["data_wait"]) == (2.0, 0.0)
    assert second["eta_seconds"] == pytest.approx(12 / 2 * 3)
    assert second.keys() == CLOCK


def test_without_a_known_peak_there_is_no_mfu() -> None:
    rates = StepTimer(0, 1, lambda metrics: 1.0).rates(1, {"tokens": 1, "supervised_tokens": 1})
    assert rates.keys() == CLOCK - {"mfu"}


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
    assert text == "step 3/9 ce 1.2346 ar 0.5000 lr 1.00e-04"
    rates = {"ar_skill": 0.25, "grad_norm": 0.8, "supervised_per_second": 3140, "mfu": 0.41}
    rates |= {"tokens_per_second": 88e3, "data_wait": 0.01, "memory_gb": 31.2, "eta_seconds": 4321}
    text = line_of(120, 4000, {"ce_loss": 1.92, "autoregressive_loss": 0.41, **rates})
    assert text == (
        "step 120/4000 ce 1.9200 ar 0.4100 skill 0.250 gn 0.80 | sup 3.1k tok/s all 88.0k tok/s"
        " | MFU 41% data-wait 1% mem 31.2 GB | ETA 1h12m"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3600, "1h00m"), (9e4, "1d01h")],
)
def test_durations_are_read_at_a_glance(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_numbers_are_mirrored_to_wandb_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)),
        finish=lambda: calls.append("finish"),
    )
    service = ModuleType("wandb")
    service.init = lambda **facts: calls.append(facts) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", service)
    RunLog(tmp_path, 0, active=False, wandb={"seed": 1}).close()
    assert not calls
    log = RunLog(tmp_path, 0, active=True, wandb={"seed": 1})
    log.record(1, {"loss": 1.0, "note": "text"})
    log.close()
    facts, logged, last = calls
    assert (facts["name"], facts["config"]) == (tmp_path.name, {"seed": 1})
    assert (logged, last) == ((1, {"train/loss": 1.0}), "finish")


@given(st.lists(st.floats(0, 9) | st.sampled_from([math.nan, math.inf]), min_size=1))
def test_the_lowest_loss_is_that_of_all_that_are_numbers(losses: list[float]) -> None:
    best = None
    for step, loss in enumerate(losses):
        best = lowest(best, loss, step, [])
    assert best is not None
    numbers = [loss for loss in losses if not math.isnan(loss)]
    if numbers:
        assert best["loss"] == min(numbers)
        assert best["step"] == losses.index(min(numbers))
