"""The loader: any cut of a global batch over ranks and micro-batches holds the same records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.batch import Batch
from model.vlm import VLMConfig
from train.chat import Chat
from train.config import TrainConfig
from train.dataset import Dataset, open_dataset
from train.loader import Loader, StepShape

CONFIG = VLMConfig(max_frames_num=4)
SIZE = 12
CUTS = [
    (world, size)
    for world in (1, 2, 3, 4)
    for size in (1, 2, 3, 4, 6, 12)
    if SIZE // size % world == 0
]


@pytest.fixture(scope="module")
def dataset(toy: Path, toy_bank: Path) -> Dataset:
    return open_dataset(TrainConfig(bank=[str(toy_bank)], data_path=[str(toy / "train.jsonl")]))


@pytest.fixture(scope="module")
def loader(dataset: Dataset, make_tokenizer: Callable[[], Any]) -> Loader:
    return Loader(dataset, Chat(make_tokenizer(), None), CONFIG, seed=3)


def names(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.record_ids]


@pytest.mark.parametrize(("world", "size"), CUTS)
def test_any_cut_of_a_step_holds_the_same_records(
    loader: Loader, dataset: Dataset, world: int, size: int
) -> None:
    for step in (0, 5):
        expected = dataset.batch_records(step, SIZE, seed=3)
        shares = []
        for rank in range(world):
            shape = StepShape(size, SIZE // size, rank, world)
            assert shape.records == SIZE
            batches = loader.micro_batches(step, shape, with_copy=False)
            assert all(len(batch.record_ids) == size for batch in batches)
            shares.append(names(batches))
        assert len({len(share) for share in shares}) == 1, "every rank works alike"
        together = sorted(name for share in shares for name in share)
        assert together == sorted(dataset.records[index].id for index in expected)


def test_micro_batches_are_dealt_to_the_ranks_in_turn(loader: Loader, dataset: Dataset) -> None:
    whole = [dataset.records[k].id for k in dataset.batch_records(0, 12, seed=3)]
    shape = StepShape(size=2, micro_batches=6, rank=1, world=3)
    found = [list(b.record_ids) for b in loader.micro_batches(0, shape, with_copy=False)]
    assert found == [whole[2:4], whole[8:10]]


@pytest.mark.parametrize(("first", "last"), [(0, 5), (3, 5), (4, 5), (2, 2)])
def test_steps_prepared_ahead_are_those_made_one_by_one(
    loader: Loader, first: int, last: int
) -> None:
    shape = StepShape(2, 2, 0, 1)
    found = list(loader.steps(first, last, shape, copy_every=2))
    assert [step for step, _ in found] == list(range(first, last))
    for step, batches in found:
        with_copy = step % 2 == 1  # every second step, counted from 1
        alone = loader.micro_batches(step, shape, with_copy=with_copy)
        assert names(batches) == names(alone)
        for ours, theirs in zip(batches, alone, strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)
            assert all((pairs.copy is not None) == with_copy for pairs in ours.transitions)


def test_a_failure_while_preparing_reaches_the_caller(dataset: Dataset, loader: Loader) -> None:
    short = Dataset(dataset.banks, dataset.records[:1], [], 0, 4, 16)
    broken = Loader(short, loader.chat, VLMConfig(slow_stride=16), seed=0)
    with pytest.raises(KeyError, match="stride16"):
        list(broken.steps(0, 3, StepShape(1, 1, 0, 1), copy_every=10))


def test_rows_hold_the_frames_that_the_config_asks_for(loader: Loader) -> None:
    (batch,) = loader.micro_batches(0, StepShape(3, 1, 0, 1), with_copy=False)
    assert sum(len(group.time) for group in batch.groups) == 3 * CONFIG.max_frames_num
    assert batch.num_transitions == 3 * (CONFIG.max_frames_num - 1)
