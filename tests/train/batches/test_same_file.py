"""One file in two datasets of a mixture: each has its own banks, rows and ways of splicing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from model.vlm import VLM, VLMConfig
from train.batches.chat import Chat
from train.batches.loader import Loader, Share
from train.batches.plan import plan_run
from train.data.dataset import Dataset, open_dataset
from train.settings.config import TrainConfig
from train.start.templates import load_with_template

WIDTH = 12
CELLS = {2: (4, 3), 4: (2, 2)}
FRAMES = {"a.mp4": 8, "b.mp4": 4, "c.mp4": 6, "d.mp4": 7}


def bank_of(
    make_bank: Callable[..., Path], features: Any, out: Path, longer: int = 1, **meta: Any
) -> str:
    rng = np.random.default_rng(0)
    clips = {
        id_: {s: rng.normal(size=(n * longer, *CELLS[s], WIDTH)).astype(np.float16) for s in CELLS}
        for id_, n in FRAMES.items()
    }
    config = replace(features, strides=(2, 4))
    return str(make_bank(out, clips, config=config, meta=meta))


def opened(folder: Path, mixture: str, entries: Any, **more: Any) -> tuple[TrainConfig, Dataset]:
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(entries))
    config = TrainConfig(data_config=str(path), data_mixture=mixture, **more)
    return config, open_dataset(config)


@pytest.fixture
def records(tmp_path: Path) -> str:
    path = tmp_path / "r.jsonl"
    asked = {"question": "<video>When?", "answer": "at <t:0.25>"}
    path.write_text(json.dumps({"id": "1", "video": "b.mp4"} | asked) + "\n")
    return path.name


def test_times_are_shares_of_each_banks_own_clip(
    make_bank: Callable[..., Path],
    make_model: Callable[..., VLM],
    features: Any,
    records: str,
    tmp_path: Path,
) -> None:
    for name, end in (("short", 0.5), ("long", 2.0)):
        bank_of(make_bank, features, tmp_path / name, end=end)
    entries = {name: {"records": records, "banks": name} for name in ("short", "long")}
    _, dataset = opened(tmp_path, "short+long", entries)
    model = make_model()
    for limit in (0, 10_000):
        loader = Loader(dataset, Chat.of(model), model.config, limit=limit)
        batches = [loader.batch([record]) for record in dataset.records]
        assert [b.label_coord.max().item() for b in batches] == [0.5, 0.125]


@pytest.fixture
def phrases(tmp_path: Path) -> str:
    path = tmp_path / "phrases.jsonl"
    rows = [{"video": id_, "phrase": f"what {id_[0]} shows"} for id_ in FRAMES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


SPLICE = {"records": 12, "parts": 2, "seconds": "0.1-0.4", "questions": "span+order"}
SPLICED: dict[str, tuple[str, Any]] = {
    "rows": ("x+y", {"x": {"sampling_strategy": "first:3"}, "y": {"sampling_strategy": "end:2"}}),
    "banks": ("x+y", {"x": {"banks": "bank"}, "y": {"banks": "long"}}),
    "ways": ("x+y", {"x": {}, "y": {"splice": SPLICE | {"questions": "count"}}}),
    "turns": ("x+y", {"x": {"turns": "independent"}, "y": {"turns": "dialogue"}}),
}


@pytest.mark.parametrize("what", SPLICED)
def test_what_is_planned_of_each_splice_is_what_is_collated(
    make_bank: Callable[..., Path],
    toy: Path,
    features: Any,
    phrases: str,
    tmp_path: Path,
    what: str,
) -> None:
    mixture, entries = SPLICED[what]
    bank = bank_of(make_bank, features, tmp_path / "bank")
    bank_of(make_bank, features, tmp_path / "long", longer=3)
    entries = {
        name: {"records": phrases, "banks": "bank", "splice": SPLICE} | own
        for name, own in entries.items()
    }
    config, dataset = opened(
        tmp_path, mixture, entries, stage_path=str(toy / "llm"), bank=[bank], enable_lape=False
    )
    plan = plan_run(config, dataset, 8)
    chat = Chat(load_with_template(config.stage_path, ""), None)
    loader = Loader(dataset, chat, VLMConfig(slow_stride=2, fast_stride=4, enable_lape=False))
    for step in range(plan.num_steps):
        batches = loader.packs(plan, Share(0, 1), step)  # asserts the tokens of each row
        assert sum(b.num_transitions for b in batches) == plan.num_transitions[step]
