"""LAPE's gamma is set from the run's first records with media, whatever else the data hold.

pytest tests/train/loop/test_calibrate.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from train.batches.chat import Chat
from train.batches.loader import Loader
from train.data.dataset import open_dataset
from train.settings.config import TrainConfig
from train.start.stage import build

Json = dict[str, Any]
STILL = {"learning_rate": 1e-4, "lape_lr": 1e-6, "max_steps": 1, "per_device_train_batch_size": 2}


def text_only(number: int) -> Json:
    turns = [("human", f"What is {number} and {number}?"), ("gpt", f"It is {2 * number}.")]
    talk = [{"from": who, "value": words} for who, words in turns]
    return {"id": f"text-{number}", "conversations": talk}


@pytest.fixture(scope="module")
def mixed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six records of the toy clips among forty without any."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.json"
    clips = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
    path.write_text(
        json.dumps([*map(text_only, range(20)), *clips, *map(text_only, range(20, 40))])
    )
    return path


def gamma_of(out: Path) -> list[float]:
    return load_file(out / "lape" / "tables.safetensors")["gamma"].tolist()


def by_hand(run_settings: Json, data: Path, seed: int, most: int) -> float:
    """Return the gamma that the first records with clips of an epoch's shuffle give."""
    values = {name: str(v) if isinstance(v, Path) else v for name, v in run_settings.items()}
    values |= {"bank": [values["bank"]], "data_path": [str(data)], "seed": seed}
    config = TrainConfig(**values)
    dataset = open_dataset(config)
    shuffled = np.random.default_rng([seed, 0]).permutation(len(dataset.records))
    chosen = [dataset.records[k] for k in shuffled if dataset.records[k].clips][:most]
    torch.manual_seed(seed)
    model = build(config, dataset, lambda line: None)
    model.calibrate(Loader(dataset, Chat.of(model), model.config).batch(chosen))
    assert model.lape is not None
    return model.lape.gamma[0].item()


@pytest.mark.parametrize("seed", range(2))
def test_it_is_set_whatever_the_first_step_holds(
    train_here: Callable[..., Path], run_settings: Json, mixed: Path, tmp_path: Path, seed: int
) -> None:
    out = train_here(tmp_path / "out", data_path=mixed, seed=seed, **STILL | {"max_steps": 23})
    expected = by_hand(run_settings, mixed, seed, 8)
    assert gamma_of(out) == pytest.approx([expected] * 3, rel=1e-3)
    assert expected < 0.5
    assert "positions / features by RMS at gamma 1" in (out / "train.log").read_text()


def test_a_run_that_comes_to_no_clip_takes_those_of_the_data(
    train_here: Callable[..., Path], mixed: Path, tmp_path: Path
) -> None:
    out = train_here(tmp_path / "out", data_path=mixed, seed=0, **STILL)
    assert gamma_of(out) == pytest.approx([gamma_of(out)[0]] * 3, rel=1e-3)
    assert gamma_of(out)[0] < 0.5


def test_without_any_the_run_says_so_and_the_next_one_sets_it(
    train_here: Callable[..., Path], toy: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.json"
    text.write_text(json.dumps([*map(text_only, range(6))]))
    out = train_here(tmp_path / "text", data_path=text, **STILL)
    assert gamma_of(out) == [1.0] * 3
    assert (
        "no record has a picture or a clip: the strength of positions (gamma) stays at 1"
        in (out / "train.log").read_text()
    )
    after = train_here(tmp_path / "clips", stage_path=out, **STILL)
    assert gamma_of(after)[0] < 0.5
    last = train_here(tmp_path / "again", stage_path=after, **STILL)
    assert gamma_of(last) == pytest.approx(gamma_of(after), rel=1e-3), "set once"


def test_st_has_no_gamma_to_set_and_says_nothing(
    train_here: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.json"
    text.write_text(json.dumps([*map(text_only, range(6))]))
    out = train_here(tmp_path / "out", data_path=text, lape_preset="st", **STILL)
    assert gamma_of(out) == [1.0] * 3
    assert "stays at 1" not in (out / "train.log").read_text()
