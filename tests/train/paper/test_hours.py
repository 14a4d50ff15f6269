"""The hours that `--plan` prints for the paper's runs: those of the table in train/README.md.

pytest tests/train/paper/test_hours.py

Records are as many as published, over clips of as many frames and cells; what is not published, the
length of their texts, is assumed. The LLM is Qwen2-7B by its sizes alone.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from shards.format.features import FeatureConfig
from tests.readmes import text_of
from tests.train.paper.heads import PRESETS
from tests.train.paper.published import talk
from train.run import main

QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
"""Of its config.json."""
DIM = 4
"""Numbers of a cell: the tower's width has no part in the hours."""


@dataclass(frozen=True)
class Data:
    """What a stage reads: thousands of records about videos, and about pictures."""

    videos: float
    pictures: float = 0.0

    @property
    def records(self) -> int:
        return round(1000 * (self.videos + self.pictures))


DATA = {
    "content_alignment": Data(1280),
    "coordinate_alignment": Data(149 + 92 + 95, 101 + 150 + 100),
    "instruction_tuning": Data(
        459 + 84 + 41 + 81 + 36 + 81 + 222 + 338 + 66 + 168, 190 + 288 + 22 + 288
    ),
    "charades_sta": Data(12.408),
    "stvg": Data(10.131 + 80.684),
    "refcoco": Data(0, 120.624 + 120.191 + 80.512),
    "llava_video_178k": Data(178.51 + 960.792 + 196.198 + 17.09 + 17.024 + 23.53 + 1.803),
}
WORDS = 70, 30
"""Tokens of a question and of its answer, assumed; the template's come on top."""
EPOCH = 4
"""Steps in the stand-in's records; a run takes them over and over, as many as are published."""


@pytest.fixture(scope="module")
def llm(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage by its sizes: a config, a tokenizer, and a file of no weights."""
    folder = tmp_path_factory.mktemp("qwen2-7b")
    AutoTokenizer.from_pretrained(toy / "llm").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(QWEN2_7B))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return folder


@pytest.fixture
def bank(
    tmp_path: Path, make_bank: Callable[..., Path], features: FeatureConfig
) -> Callable[..., Path]:
    """A function that writes a bank of a video and a picture, of 27 x 27 patches."""

    def make(frames: int, strides: tuple[int, int]) -> Path:
        def cells(count: int) -> dict[int, np.ndarray]:
            sides = {stride: math.ceil(27 / stride) for stride in strides}
            return {s: np.zeros((count, n, n, DIM), np.float16) for s, n in sides.items()}

        return make_bank(
            tmp_path / "bank",
            {"video.mp4": cells(frames)},
            {"picture.jpg": cells(1)},
            config=replace(features, strides=strides),
            meta={"patch_grid": (27, 27)},
            width=DIM,
        )

    return make


def rows(of: Data, count: int) -> list[dict[str, Any]]:
    """Return so many records, in the proportion of videos and pictures."""
    pictures = round(count * 1000 * of.pictures / of.records)
    asked, answered = (" ".join(["the"] * count) for count in WORDS)
    return [
        {
            "id": str(k),
            "video": "picture.jpg" if k < pictures else "video.mp4",
            "conversations": talk(f"<video>\n{asked}", answered),
        }
        for k in range(count)
    ]


def planned(
    preset: Path,
    bank: Callable[..., Path],
    llm: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> dict[str, str]:
    """Return what `--plan` prints of a preset, by the first word of its lines."""
    alone = preset.stem in ("charades_sta", "stvg", "refcoco")
    base = preset.with_name("instruction_tuning.yaml") if alone else preset
    settings = {**yaml.safe_load(base.read_text()), **yaml.safe_load(preset.read_text())}
    devices = settings["plan_devices"]
    step = (
        settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * devices
    )
    of = DATA[preset.stem]
    written = folder / "records.jsonl"
    written.write_text("".join(json.dumps(row) + "\n" for row in rows(of, EPOCH * step)))
    made = bank(
        settings["max_frames_num"], (settings["mm_spatial_pool_stride"], settings["fast_stride"])
    )
    mixture = folder / "data.yaml"
    mixture.write_text(f"stand_in: {{records: {written}, banks: {made}}}\n")
    flags = [word for path in dict.fromkeys((base, preset)) for word in ("--config", str(path))]
    flags += ["--stage_path", str(llm), "--data_config", str(mixture), "--data_mixture", "stand_in"]
    steps = settings["num_train_epochs"] * -(-of.records // step)
    flags += ["--max_steps", str(steps), "--output_dir", str(folder / "out"), "--plan"]
    main(flags)
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line[10:] for line in lines}


def table() -> dict[str, list[str]]:
    """Return the cells of the table of the paper's runs, by the preset's name."""
    page = text_of("train/README.md").partition("## The paper's runs")[2].partition("\n## ")[0]
    found = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`").removesuffix(".yaml").rpartition("/")[2]: cells for cells in found}


def test_the_table_has_every_preset() -> None:
    assert list(table()) == [preset.stem for preset in PRESETS] == list(DATA)


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(p, marks=pytest.mark.slow if DATA[p.stem].records > 400_000 else ())
        for p in PRESETS
    ],
    ids=lambda preset: preset.stem,
)
def test_steps_and_hours_are_those_that_plan_prints(
    preset: Path,
    bank: Callable[..., Path],
    llm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = planned(preset, bank, llm, tmp_path, capsys)
    cells = table()[preset.stem]
    steps = int(plan["steps"].split()[0])
    assert f"{steps:,}" in cells, plan["steps"]
    assert plan["hours"].removeprefix("about ").removesuffix(" MFU (assumed)") in cells, plan[
        "hours"
    ]
    assert f"{DATA[preset.stem].records:,}" in cells
