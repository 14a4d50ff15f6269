"""Three steps of a trainer from a bank are three steps with the tower, whose features are rounded alike.

transformers' Trainer, TRL's SFTTrainer and a plain loop, as `train/recipes` has them; `test_registry.py`
runs these tests where torchvision and TRL are.
"""

import contextlib
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch

from tests.train.bank_vlm.processors import (
    FRAMES,
    banked_frames,
    draw_videos,
    model_of,
    processor_of,
    talk,
)
from tests.train.bank_vlm.worlds import MAKE, World, Worlds
from train.recipes import conversations, loop
from train.recipes.conversations import Collator, load, read

ROOT = Path(__file__).resolve().parents[3]
STEPS = 3
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.1,
    "optim": "sgd",  # Adam makes steps of what rounding left of a gradient
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,  # TRL runs in it where it is not told, and a tower in bfloat16 makes other features
}


@pytest.fixture(scope="module")
def worlds(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    root = tmp_path_factory.mktemp("trainers")
    draw_videos(root / "videos", 24, 24)  # of the towers' own size: nothing is resized
    return Worlds(root, toy / "llm")


def whole(world: World) -> Path:
    """Return the world's checkpoint with its processor beside it, as a trainer takes it."""
    folder = world.folder.parent / "whole"
    if not folder.exists():
        plain = processor_of(world)
        model_of(world, plain).save_pretrained(folder)
        plain.save_pretrained(folder)
    return folder


def tower_of(world: World, model: Any) -> Any:
    return model.model.visual if world.kind.startswith("qwen") else model.model.vision_tower


def rounded(world: World, model: Any) -> Any:
    """Freeze a model's tower, and round what it gives as a bank does; return the model."""
    tower = tower_of(world, model).requires_grad_(False)
    run = tower.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        for name, value in out.items():
            if torch.is_tensor(value):
                out[name] = value.half().float()
            elif value is not None:  # of several layers, of which some may be left out
                parts = (None if part is None else part.half().float() for part in value)
                out[name] = type(value)(parts)
        return out

    tower.forward = forward
    return model


class LiveCollator(Collator):
    """Pixels of the banked frames, read from the files."""

    def __init__(self, plain: Any, world: World) -> None:
        super().__init__(plain)
        self.world = world

    def __call__(self, records: Any) -> Any:
        talks = [record["messages"] for record in records]
        names = [own[0]["content"][0]["video"] for own in talks]
        pixels, facts = zip(*(banked_frames(self.world, name) for name in names), strict=True)
        batch = self.processor(
            text=[self.processor.apply_chat_template(own) for own in talks],
            videos=list(pixels),
            video_metadata=list(facts),
            do_sample_frames=False,
            return_tensors="pt",
            padding=True,
        )
        batch["labels"] = self.labels(batch["input_ids"])
        return batch


@contextlib.contextmanager
def no_video_is_opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a video was opened")

    with monkeypatch.context() as patch:
        patch.setattr(av, "open", refused)
        patch.setattr(PIL.Image, "open", refused)
        yield


def towers_alive(world: World) -> int:
    """Return how many objects of the tower's class there are in memory."""
    kind = type(tower_of(world, MAKE[world.kind]()))
    gc.collect()
    return sum(type(one) is kind for one in gc.get_objects())


@pytest.fixture
def records(tmp_path: Path) -> Path:
    rows = [{"messages": talk({"type": "video", "video": name})} for name in [*FRAMES] * STEPS]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("recipe", ["trainer", "trl_sft"])
@pytest.mark.parametrize("kind", list(MAKE))
def test_a_trainer_from_the_bank(
    worlds: Worlds,
    kind: str,
    recipe: str,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, rows = worlds(kind), read(records)
    folder = str(whole(world))
    make = importlib.import_module(f"train.recipes.{recipe}").make_trainer

    def run(model: Any, collator: Collator, out: str, **more: Any) -> list[float]:
        trainer = make(model, collator, rows, str(tmp_path / out), **SETTINGS)
        trainer.train(**more)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    live = rounded(world, conversations.AutoModelForImageTextToText.from_pretrained(folder))
    expected = run(live, LiveCollator(processor_of(world), world), "live")
    weights = live.state_dict()
    del live
    with no_video_is_opened(monkeypatch):
        model, processor = load(folder, str(world.bank))
        assert not towers_alive(world)
        losses = run(model, Collator(processor), "banked")
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=1e-4, msg=name)
    again, processor = load(folder, str(world.bank))
    resumed = run(again, Collator(processor), "banked", resume_from_checkpoint=True)
    assert resumed[-1] == pytest.approx(losses[-1], rel=1e-6)
    saved = type(again).from_pretrained(tmp_path / "banked" / f"checkpoint-{STEPS}")
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)


@pytest.mark.parametrize("kind", list(MAKE))
def test_a_plain_loop_from_the_bank(
    worlds: Worlds, kind: str, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, rows = worlds(kind), read(records)
    folder = str(whole(world))

    def run(model: Any, collator: Collator) -> list[float]:
        torch.manual_seed(0)
        return loop.train(model, collator, rows, STEPS, rate=1e-3, workers=0)

    live = rounded(world, conversations.AutoModelForImageTextToText.from_pretrained(folder))
    expected = run(live, LiveCollator(processor_of(world), world))
    del live
    with no_video_is_opened(monkeypatch):
        model, processor = load(folder, str(world.bank))
        assert not towers_alive(world)
        losses = run(model, Collator(processor))
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["trainer", "trl_sft", "loop"])
def test_a_recipe_runs_as_its_first_lines_say(
    worlds: Worlds, recipe: str, records: Path, tmp_path: Path
) -> None:
    world = worlds("qwen2_5_vl")
    script = str(ROOT / "train" / "recipes" / f"{recipe}.py")
    args = [str(whole(world)), str(world.bank), str(records), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", f"import tests.train.bank_vlm.operators, runpy, sys; sys.argv = "
         f"{[script, *args]!r}; runpy.run_path({script!r}, run_name='__main__')"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    saved = type(world.model()).from_pretrained(tmp_path / "out")
    first = world.model().state_dict()
    moved = [n for n, v in saved.state_dict().items() if not torch.equal(v, first[n])]
    assert moved
    assert not [name for name in moved if ".visual." in name]
    conversations.AutoProcessor.from_pretrained(tmp_path / "out")


def test_answers_alone_are_learned(worlds: Worlds, records: Path) -> None:
    world = worlds("qwen2_5_vl")
    _, processor = load(str(whole(world)), str(world.bank))
    batch = Collator(processor)(read(records)[:2])
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        answer = processor.tokenizer.decode(ids[labels >= 0])
        assert answer == "from 1.5 to 2<|im_end|>"
