"""Three steps of lmms-engine from a bank are those with the tower, whose features are rounded alike.

`test_registry.py` runs this where lmms-engine is. Its trainer asks for a GPU's name and waits for the
GPU: where there is none, two functions of torch.cuda are replaced.
"""

import gc
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lmms_engine.datasets.naive import VisionSFTDataset
from lmms_engine.launch import cli
from lmms_engine.mapping_func import register_dataset

from shards.errors import UserError
from tests.train.bank_vlm.processors import FRAMES, banked_frames, draw_videos
from tests.train.bank_vlm.trainer_checks import (
    SETTINGS,
    STEPS,
    no_video_is_opened,
    rounded,
    towers_alive,
    whole,
)
from tests.train.bank_vlm.worlds import World, Worlds
from train.recipes.lmms_bank import BankCollator


@pytest.fixture(scope="module")
def world(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("lmms")
    draw_videos(root / "videos", 24, 24)  # of the tower's own size: nothing is resized
    return Worlds(root, toy / "llm")("qwen2_5_vl")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be the one process of a run, on a CPU where there is no GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@register_dataset("live")
class Live(VisionSFTDataset):
    """lmms-engine's own, to which the banked frames of the files are read."""

    world: World

    def load_videos(self, path: str, data_folder: str | None = None, fps: float = 1) -> Any:
        pixels, facts = banked_frames(self.world, path)
        return pixels.numpy(), len(pixels) / facts["total_num_frames"] * facts["fps"]

    def get_collator(self) -> BankCollator:
        return BankCollator(self.processor)


def config_of(world: World, out: Path, records: Path, kind: str = "framebank") -> dict[str, Any]:
    processor = {"processor_name": str(whole(world)), "processor_type": kind}
    if kind == "framebank":
        processor["extra_kwargs"] = {"bank": str(world.bank)}
    return {
        "trainer_type": "hf_trainer",
        "dataset_config": {
            "dataset_type": "framebank" if kind == "framebank" else "live",
            "dataset_format": "jsonl",
            "dataset_path": str(records),
            "shuffle": False,
            "processor_config": processor,
        },
        "model_config": {"load_from_pretrained_path": str(whole(world))},
        "trainer_args": SETTINGS | {"output_dir": str(out)},
    }


@pytest.fixture
def records(tmp_path: Path) -> Path:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "from 1.5 to 2"}]}
    lines = []
    for name in [*FRAMES] * STEPS:
        video = {"type": "video_url", "video_url": {"url": name}}
        question = [video, {"type": "text", "text": "When is it seen?"}]
        lines.append({"messages": [{"role": "user", "content": question}, answer]})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows_of(task: Any) -> list[dict[str, torch.Tensor]]:
    """Return what a record of each video is to the model, but for what its tower takes."""
    names = ("input_ids", "labels", "video_grid_thw", "second_per_grid_ts")
    return [{name: task.train_dataset[k][name] for name in names} for k in range(len(FRAMES))]


def losses_of(task: Any) -> list[float]:
    task.run()
    return [line["loss"] for line in task.trainer.state.log_history if "loss" in line]


def test_lmms_engine_trains_from_the_bank(
    world: World, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Live.world = world
    with monkeypatch.context() as patch:
        runner = cli.TrainRunner.__base__
        patch.setattr(cli, "TrainRunner", type("WithTower", (runner,), {
            "_build_model": lambda self: rounded(world, runner._build_model(self)),
            "safe_save_model_for_hf_trainer": lambda *_: None,  # 0.1.4 fails in it
        }))  # fmt: skip
        task = cli.create_train_task(config_of(world, tmp_path / "live", records, "qwen2_5_vl"))
    task.build()
    rows, expected = rows_of(task), losses_of(task)
    weights = {name: value.clone() for name, value in task.model.state_dict().items()}
    del task
    gc.collect()
    with no_video_is_opened(monkeypatch):
        task = cli.create_train_task(config_of(world, tmp_path / "out", records))
        task.build()
        assert not towers_alive(world)
        torch.testing.assert_close(rows_of(task), rows)
        losses = losses_of(task)
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    saved = type(world.model()).from_pretrained(tmp_path / "out").state_dict()
    for name, value in task.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=1e-4, msg=name)
        assert torch.equal(saved[name], value), name


@pytest.mark.parametrize(
    ("part", "name", "value", "error"),
    [
        ("", "trainer_type", "fsdp2_trainer", "a trainer that has not been tried with a bank"),
        ("trainer_args", "use_rmpad", True, "has not been tried with a bank, got use_rmpad"),
        ("dataset_config", "fps", 2, "frames and their size are those of the bank, got fps"),
        ("dataset_config", "dataset_type", "live", "not the dataset of this recipe"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    world: World, records: Path, tmp_path: Path, part: str, name: str, value: Any, error: str
) -> None:
    config = config_of(world, tmp_path / "out", records)
    (config[part] if part else config)[name] = value
    with pytest.raises(UserError, match=error):
        cli.create_train_task(config).build()
