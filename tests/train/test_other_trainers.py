"""train/README.md's recipe for other trainers, as it stands there, trains a plain LLM of transformers.

pytest tests/train/test_other_trainers.py
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from shards import Bank
from shards.format.features import FeatureConfig
from tests.readmes import python_block

STEPS = 6


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """What the recipe's code defines."""
    code = python_block("train/README.md", "A loop of your own")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def records_of(toy: Path, tokenizer: Any) -> list[tuple[str, list[int], list[int]]]:
    rows = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
    found = []
    for row in rows:
        human, gpt = (turn["value"] for turn in row["conversations"][:2])
        prompt = tokenizer(human.removeprefix("<video>\n") + "\n")["input_ids"]
        found.append((row["video"], prompt, tokenizer(gpt + "<|im_end|>")["input_ids"]))
    return found


def test_an_item_is_the_banks_cells_slow_and_fast_in_turn(
    recipe: dict[str, Any], toy: Path, toy_bank: Path, make_tokenizer: Callable[[], Any]
) -> None:
    records = records_of(toy, make_tokenizer())
    cells, prompt, answer = recipe["BankedClips"](toy_bank, records)[2]
    assert (prompt.tolist(), answer.tolist()) == records[2][1:]
    bank = Bank.open(toy_bank)
    row = bank.row(records[2][0])
    expected = []
    for frame in range(8):
        whole = bank.read(row, 8 if frame % 2 else 4)
        expected.append(whole[frame].reshape(-1, whole.shape[-1]))
    assert cells.dtype == torch.float32
    np.testing.assert_array_equal(cells.numpy(), np.concatenate(expected))


def test_a_bank_of_bfloat16_is_read_as_what_it_holds(
    recipe: dict[str, Any],
    features: FeatureConfig,
    make_bank: Callable[..., Path],
    tmp_path: Path,
) -> None:
    values = {4: torch.randn(2, 2, 2, 6).bfloat16(), 8: torch.randn(2, 1, 1, 6).bfloat16()}
    stored = {stride: value.view(torch.uint16).numpy() for stride, value in values.items()}
    config = replace(features, dtype="bfloat16")
    bank = make_bank(tmp_path / "bank", {"a.mp4": stored}, config=config)
    cells, *_ = recipe["BankedClips"](bank, [("a.mp4", [1], [2])])[0]
    expected = torch.cat([values[4][0].reshape(-1, 6), values[8][1].reshape(-1, 6)]).float()
    assert torch.equal(cells, expected)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_plain_llm_learns_by_it(
    recipe: dict[str, Any],
    toy: Path,
    toy_bank: Path,
    make_tokenizer: Callable[[], Any],
    make_llm: Callable[..., Any],
    workers: int,
) -> None:
    clips = recipe["BankedClips"](toy_bank, records_of(toy, make_tokenizer()))
    llm = make_llm(width=64).train()
    width = Bank.open(toy_bank).shape(0, 4)[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        projector = nn.Linear(width, 64)
    optimizer = torch.optim.AdamW([*llm.parameters(), *projector.parameters()], lr=3e-3)
    losses = []
    for _ in range(STEPS):
        total = torch.zeros(())
        for item in DataLoader(clips, batch_size=None, num_workers=workers):
            total = total + recipe["loss_of"](llm, projector, *item) / len(clips)
        optimizer.zero_grad()
        total.backward()
        gradient = projector.weight.grad
        assert gradient is not None
        assert gradient.abs().max() > 0  # the answer is read from the clip
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.8 * losses[0], losses
    assert losses == sorted(losses, reverse=True), losses
