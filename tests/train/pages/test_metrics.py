"""Metrics as curves: means that are means, a last line that is torn, samples of long files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.pages.written import metrics_lines
from train.pages.read.metrics import MOST_LINES, bucketed, read_metrics


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(2, 50))
def test_a_bucket_is_the_mean_and_the_range_of_its_steps(values: list[float], buckets: int) -> None:
    steps = np.arange(1.0, len(values) + 1)
    curve = bucketed(steps, np.asarray(values), buckets)
    assert len(curve) <= max(buckets, 1)
    edges = np.linspace(0, len(values), buckets, endpoint=False).astype(int).tolist()
    edges = sorted(set(edges)) if len(values) > buckets else list(range(len(values)))
    groups = [values[a:b] for a, b in zip(edges, [*edges[1:], len(values)], strict=True)]
    for k, group in enumerate(groups):
        assert curve.mean[k] == pytest.approx(sum(group) / len(group), abs=1e-6)
        assert (curve.low[k], curve.high[k]) == (min(group), max(group))


def test_what_is_no_number_is_left_out_of_a_curve_and_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": k, "kind": "train", "loss": v} for k, v in enumerate([1.0, np.nan, 3.0], 1)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    metrics = read_metrics(path)
    assert metrics.not_finite
    assert metrics.curve("loss").mean.tolist() == [1.0, 3.0]
    path.write_text("\n".join(metrics_lines(5)) + "\n")
    assert not read_metrics(path).not_finite


def test_a_file_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    held = json.dumps({"step": 3, "kind": "eval", "loss": 9.0})
    lines = metrics_lines(6)
    path.write_text("\n".join([*lines[:3], held, *lines[3:5], lines[5][:40]]))
    metrics = read_metrics(path)
    assert (metrics.steps, metrics.last["step"], metrics.seconds) == (5, 5, 1.25)
    assert [row["loss"] for row in metrics.held_out] == [9.0]
    path.write_text("")
    assert read_metrics(path).last == {}


def test_of_a_long_file_a_sample_is_parsed_and_the_sums_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    count = MOST_LINES + 5_000
    lines = metrics_lines(count)
    path.write_text("\n".join(lines) + "\n")
    metrics = read_metrics(path)
    assert metrics.sampled
    assert len(metrics.rows) == MOST_LINES
    assert (metrics.steps, metrics.last["step"], metrics.seconds) == (count, count, 0.25 * count)
    whole = np.mean([json.loads(line)["ce_loss"] for line in lines])
    assert metrics.column("ce_loss")[1].mean() == pytest.approx(whole, rel=5e-3)
    # what is at every tenth step alone is a tenth of the sample, too
    assert len(metrics.column("ar_skill")[0]) == pytest.approx(MOST_LINES / 10, rel=0.1)
