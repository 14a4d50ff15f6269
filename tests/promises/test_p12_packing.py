"""P12: the LM head runs on supervised tokens alone, and packed rows are at least 99 % full.

`make bench` prints what that is worth (tests/bench/training.py); how full the rows of its 20,000 records
are is known without running a step, and tested here.
"""

from collections.abc import Callable
from typing import Any

import pytest

from model.batch import Batch
from model.vlm import VLM
from tests.bench.training import packing

QUESTION = "Look.<video>\nWhat is at <x:0.31><y:0.52> at <t:1.75>?"
ANSWER = "red from <t:0.4> to <t:3.3> at <x:0.111><y:0.999>"
SHORT = ("Where?", "at <x:0.5>")


def test_rows_of_the_benchmark_are_full_to_a_hundredth() -> None:
    ratio = packing()["ratio"]
    assert isinstance(ratio, float)
    assert 0.99 <= ratio <= 1


@pytest.mark.parametrize("enable_lape", [True, False])
def test_only_supervised_rows_pass_through_the_head(
    make_model: Callable[..., VLM],
    make_clip: Callable[..., Any],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    enable_lape: bool,
) -> None:
    model = make_model(enable_lape=enable_lape)
    batch = make_batch(model, ([make_clip()], QUESTION, ANSWER), ([], *SHORT))
    rows: list[int] = []
    head = model.llm.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    model(batch)
    assert rows == [len(batch.labels)]
    monkeypatch.setattr("model.lape.head.HEAD_ROWS", 4)
    rows.clear()
    out = model(batch)
    assert sum(rows) == len(batch.labels)
    assert max(rows) <= 4
    out["ce"].backward()
    assert sum(rows) == 2 * len(batch.labels)  # each chunk once more
