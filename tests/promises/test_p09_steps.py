"""P9: each step runs the same records for any number of processes, however far ahead they are prepared.

Resumed at any step, none is repeated and none skipped. tests/train/test_plan.py has it for any plan.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.batch import Batch
from model.vlm import VLMConfig
from shards.errors import UserError
from train.batches.chat import Chat
from train.batches.loader import Loader, Share
from train.batches.plan import plan_run
from train.batches.run_plan import RunPlan
from train.data.dataset import Dataset, RecordFile, open_dataset
from train.settings.config import TrainConfig

CONFIG = VLMConfig(max_frames_num=4)


@pytest.fixture(scope="module")
def config(toy: Path, toy_bank: Path) -> TrainConfig:
    return TrainConfig(
        stage_path=str(toy / "llm"),
        bank=[str(toy_bank)],
        data_path=[str(toy / "train.jsonl")],
        enable_lape=False,
        max_frames_num=4,
        max_steps=6,
        seed=3,
    )


@pytest.fixture(scope="module")
def dataset(config: TrainConfig) -> Dataset:
    return open_dataset(config)


@pytest.fixture(scope="module")
def loader(dataset: Dataset, toy: Path) -> Loader:
    from transformers import AutoTokenizer

    return Loader(dataset, Chat(AutoTokenizer.from_pretrained(toy / "llm"), None), CONFIG)


@pytest.fixture(params=[0, 900], ids=["plain", "packed"])
def plan(request: pytest.FixtureRequest, config: TrainConfig, dataset: Dataset) -> RunPlan:
    return plan_run(replace(config, pack_tokens=request.param), dataset, rows_per_step=8)


def names(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.record_ids]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_ranks_share_a_step_without_overlap(
    plan: RunPlan, loader: Loader, dataset: Dataset, world: int
) -> None:
    for step in (0, 5):
        shares = [loader.packs(plan, Share(rank, world), step) for rank in range(world)]
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1
        dealt = [names([share[k]]) for k in range(counts[0]) for share in shares if k < len(share)]
        expected = [dataset.records[k].id for k in plan.records(step)]
        assert [name for pack in dealt for name in pack] == expected


def test_a_batch_is_as_long_and_as_supervised_as_planned(plan: RunPlan, loader: Loader) -> None:
    for step in range(plan.num_steps):
        batches = loader.packs(plan, Share(0, 1), step)
        assert sum(len(b.labels) for b in batches) == plan.num_labels[step]
        assert sum(b.num_transitions for b in batches) == plan.num_transitions[step]
        assert sum(int(b.lengths.sum()) for b in batches) == plan.per_step(plan.tokens)[step]
        if plan.pack_tokens:
            assert max(int(b.lengths.max()) for b in batches) <= plan.pack_tokens


@pytest.mark.parametrize(("first", "prefetch"), [(0, 1), (0, 16), (3, 2), (5, 16), (6, 1)])
def test_steps_prepared_ahead_are_those_made_one_by_one(
    plan: RunPlan, loader: Loader, first: int, prefetch: int
) -> None:
    share = Share(1, 2)
    found = list(loader.steps(plan, share, first, copy_every=2, prefetch=prefetch))
    assert [step for step, _ in found] == list(range(first, plan.num_steps))
    for step, batches in found:
        with_copy = step % 2 == 1  # every second step, counted from 1
        alone = loader.packs(plan, share, step, with_copy=with_copy)
        assert names(batches) == names(alone)
        for ours, theirs in zip(batches, alone, strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)
            assert all((pairs.copy is not None) == with_copy for pairs in ours.transitions)


def test_no_more_steps_are_prepared_than_asked(
    plan: RunPlan, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    make = loader.packs

    def noted(plan: RunPlan, share: Share, step: int, **how: Any) -> list[Batch]:
        begun.append(step)
        return make(plan, share, step, **how)

    monkeypatch.setattr(loader, "packs", noted)
    for step, _ in loader.steps(plan, Share(0, 1), 0, copy_every=10, prefetch=2):
        assert max(begun) <= step + 2
    assert sorted(begun) == list(range(plan.num_steps))


def test_a_failure_while_preparing_reaches_the_caller(
    plan: RunPlan, dataset: Dataset, loader: Loader
) -> None:
    broken = Loader(dataset, loader.chat, replace(CONFIG, slow_stride=16))
    with pytest.raises(UserError, match="holds the strides 4, 8, and no 16"):
        list(broken.steps(plan, Share(0, 1), 0, copy_every=10))


def test_rows_hold_the_frames_that_the_config_or_the_plan_asks_for(
    dataset: Dataset, config: TrainConfig, loader: Loader
) -> None:
    plan = plan_run(config, dataset, rows_per_step=6)
    (batch,) = [loader.batch(dataset.records[:3])]
    assert sum(len(group.time) for group in batch.groups) == 3 * CONFIG.max_frames_num
    limit = int(plan.tokens.max()) - 1
    short = plan_run(replace(config, max_tokens=limit), dataset, rows_per_step=6)
    assert set(short.frames) < {1, 2, 3, 4}
    assert 4 not in short.frames[plan.tokens > limit]
    batches = loader.packs(short, Share(0, 1), 0)
    frames = sum(len(group.time) for batch in batches for group in batch.groups)
    assert frames == short.frames[short.records(0)].sum()
    assert all((batch.lengths <= limit).all() for batch in batches)


def test_rows_of_one_fixed_length_are_padded_to_it(plan: RunPlan, loader: Loader) -> None:
    fixed = Loader(loader.dataset, loader.chat, CONFIG, row_length=1024)
    assert fixed.pack(plan, 0, 0).input_ids.shape[1] == 1024


def test_threads_do_not_disturb_each_others_tokens(make_tokenizer: Callable[[], Any]) -> None:
    from train.data.records import Turn

    chat = Chat(make_tokenizer(), None)
    turns = [Turn("user", "is <|im_end|> here?"), Turn("assistant", "<|im_start|> yes")]
    alone = chat.encode(turns, []).ids
    found: Counter[tuple[int, ...]] = Counter()

    def work() -> None:
        for _ in range(200):
            found[tuple(chat.encode(turns, []).ids)] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {tuple(alone)}


def test_a_dataset_repeats_its_files(dataset: Dataset) -> None:
    twice = replace(dataset, files=(RecordFile("x", "", dataset.records, 2),))
    assert twice.records == dataset.records * 2
