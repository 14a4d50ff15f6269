"""Every preset, run on small stand-ins by the commands that its comments name; its rates, what decays.

pytest tests/train/test_presets.py
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

import train.export
import train.run
from model.vlm import VLM
from preprocess.cli.main import main as preprocess
from tests.params import few
from train.loop import loop
from train.loop.optimizer import parameter_groups
from train.settings.config import TrainConfig, parse

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "train" / "presets"
COMMAND = re.compile(r"(?:accelerate launch|preprocess encode|python -m train\.export) .*")
NEW = ("projector", "visual", "frame_causal")
"""The parts that start anew and are no tables."""


def commands_of(preset: Path) -> list[list[str]]:
    """Return the commands in a preset's comments, as words."""
    lines = [line for line in preset.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(line[1:].strip() for line in lines).replace("\\\n", " ")
    found = [shlex.split(match.group()) for match in COMMAND.finditer(text)]
    return [words for words in found if "..." not in words]


def rates(llm: float | None, new: float, lape: float | None) -> dict[str, float]:
    given = {"llm": llm, "lape": lape} | dict.fromkeys(NEW, new)
    return {name: rate for name, rate in given.items() if rate is not None}


DEFAULT = rates(2e-5, 2e-5, 2e-4)
PEAKS: dict[str, list[dict[str, float]]] = {
    "b0": [rates(2e-5, 2e-5, None)],
    "b1": [DEFAULT],
    "b2": [rates(2e-5, 2e-5, None)],
    "b3": [DEFAULT],
    "b4": [DEFAULT],
    "b5": [DEFAULT],
    "toy": [rates(2e-3, 2e-3, 3e-3)],
    "footage": [rates(2e-3, 2e-3, 3e-3)],
    "so400m_qwen2.5": [rates(None, 1e-3, 1e-3), rates(2e-5, 2e-5, 2e-4)],
    "fsdp2_8gpu": [DEFAULT],
    "fsdp2_nodes": [DEFAULT],
    "llava_video_178k": [rates(1e-5, 1e-5, 1e-4)],
}
"""By preset, the peak rate of each part in each training command that it names."""
ELSEWHERE = {
    "so400m_qwen2.5": "below",
    "llava_video_178k": "tests/train/paper/test_runs.py",
}
"""Presets that need more than a world's bank, and where they are run."""


class Place:
    """A folder with what the commands name, in small; runs commands there, in this process."""

    def __init__(self, root: Path, toy: Path, bank: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.toy = root, toy
        self.peaks: list[dict[str, float]] = []
        """Of each training run, what its optimizer was given."""
        (root / "train").symlink_to(ROOT / "train")
        (root / "videos").symlink_to(toy / "videos")
        settings = {"stage_path": toy / "llm", "bank": bank, "data_path": toy / "train.jsonl"}
        lines = [f"{name}: {path}\n" for name, path in settings.items()]
        (root / "x.yaml").write_text("".join([*lines, "output_dir: runs/x\n"]))
        (root / "toy").symlink_to(toy)
        records = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
        (root / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        for name in ("captions.json", "instructions.json"):
            (root / name).write_text(json.dumps(records))
        self.write_scenes(records)
        patch.chdir(root)
        make = loop.make_optimizer

        def watched(model: VLM, config: TrainConfig) -> torch.optim.Optimizer:
            optimizer = make(model, config)
            self.peaks.append({g["name"]: g["peak"] for g in optimizer.param_groups})
            return optimizer

        patch.setattr(loop, "make_optimizer", watched)

    def write_scenes(self, records: list[Any]) -> None:
        """Write a world of the same clips that has what they show, too."""
        world = self.root / "world"
        world.mkdir()
        for name in ("llm", "train.jsonl"):
            (world / name).symlink_to(self.toy / name)
        videos = sorted({record["video"] for record in records})
        rows = [{"video": name, "phrase": f"thing {k}"} for k, name in enumerate(videos)]
        (world / "train-scenes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def train(self, words: list[str], **changes: object) -> Path:
        """Run a training command; changes: of its settings. Returns its output folder."""
        flags = words[words.index("train/run.py") + 1 :]
        flags = [str(self.toy / "llm") if word == "STAGE_PATH" else word for word in flags]
        flags += [w for name, value in changes.items() for w in (f"--{name}", str(value))]
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            train.run.main(flags)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return self.root / parse(flags, {}).output_dir


@pytest.fixture
def place(toy: Path, toy_bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, toy, toy_bank, monkeypatch)


def first_rate(out: Path) -> float:
    """Return the rate of the first group at the first of two steps, which is its peak."""
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return float(line["learning_rate"])


def test_every_preset_is_run() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(PEAKS)
    for path in PRESETS.glob("*.yaml"):
        named = [words for words in commands_of(path) if "train/run.py" in words]
        assert len(named) == len(PEAKS[path.stem]), path


@pytest.mark.parametrize("name", few([name for name in PEAKS if name not in ELSEWHERE], 3))
def test_a_preset_trains_at_the_rates_of_its_table(place: Place, toy_bank: Path, name: str) -> None:
    (words,) = commands_of(PRESETS / f"{name}.yaml")
    (place.root / "bank").symlink_to(toy_bank)
    out = place.train(words, max_steps=2, per_device_train_batch_size=2)
    assert place.peaks == PEAKS[name]
    assert first_rate(out) == next(iter(place.peaks[0].values()))
    said = next(x for x in (out / "train.log").read_text().splitlines() if x.startswith("rates"))
    assert all(f"{part} {peak:g}" in said for part, peak in PEAKS[name][0].items())


@pytest.mark.slow
def test_the_recipe_of_real_weights_runs_from_videos_to_an_export(place: Place) -> None:
    encode, align, tune, export = commands_of(PRESETS / "so400m_qwen2.5.yaml")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=384, patch_size=14)
    SiglipVisionModel(config).save_pretrained(place.root / "tower")
    SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(
        place.root / "tower"
    )
    words = ["tower" if word.startswith("google/") else word for word in encode[1:]]
    done = CliRunner().invoke(preprocess, [*words, "--device", "cpu"])
    assert done.exit_code == 0, done.output

    aligned = place.train(align, stage_path=place.toy / "llm", max_steps=2)
    tuned = place.train(tune, max_steps=2)
    assert place.peaks == PEAKS["so400m_qwen2.5"]
    assert first_rate(aligned) == 1e-3
    assert first_rate(tuned) == 2e-5
    said = (aligned / "train.log").read_text()
    assert "7x7 cells; F: stride 8, 4x4" in said
    place.train(
        tune, max_steps=1, output_dir="runs/lora", tune_llm="lora", lora_r=2,
        learning_rate="2e-4", projector_lr="2e-5",
    )  # fmt: skip
    assert place.peaks[-1] == rates(2e-4, 2e-5, 2e-4)
    train.export.main(export[3:])
    assert (place.root / "out" / "config.json").exists()


def test_what_decays_is_matrices_alone(make_model: Callable[..., VLM]) -> None:
    model = make_model(predictor="xattn", mm_projector_type="mlp_downsample_3x3_fix")
    groups = parameter_groups(model, TrainConfig(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for name, parameter in model.named_parameters():
        found[decay[id(parameter)]].add(re.sub(r"layers\.\d+", "layers.N", name))
    layer = "llm.model.layers.N"
    matrices = [f"self_attn.{one}_proj" for one in "qkvo"]
    matrices += [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
    assert found[True] == {
        "llm.model.embed_tokens.weight",
        *(f"{layer}.{name}.weight" for name in matrices),
        *(f"projector.{place}.weight" for place in (2, 5, 7)),
        "frame_causal.query.weight", "frame_causal.up.weight", "frame_causal.down.weight",
        "frame_causal.attention.in_proj_weight", "frame_causal.attention.out_proj.weight",
    }  # fmt: skip
    assert found[False] == {
        *(f"{layer}.self_attn.{one}_proj.bias" for one in "qkv"),
        *(f"{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
        "llm.model.norm.weight",
        *(f"projector.{place}.{what}" for place in (1, 4) for what in ("weight", "bias")),
        *(f"projector.{place}.bias" for place in (2, 5, 7)),
        "visual.frame_end", "visual.stream",
        "frame_causal.norm.weight", "frame_causal.norm.bias", "frame_causal.stream.weight",
        "frame_causal.query.bias", "frame_causal.up.bias", "frame_causal.down.bias",
        "frame_causal.attention.in_proj_bias", "frame_causal.attention.out_proj.bias",
        "lape.gamma",
        *(f"lape.{role}_tables.{axis}" for role in ("input", "output") for axis in range(3)),
    }  # fmt: skip
