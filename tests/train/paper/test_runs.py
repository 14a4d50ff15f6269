"""The paper's runs, from published files to scores: the heads' own commands on small stand-ins.

pytest tests/train/paper/test_runs.py -m slow

Replaced are the tower (SigLIP of the same patches, tiny and random), the LLaVA-OneVision checkpoint (as
tiny), the number of steps and rows, and the folder DATA; what is run, in which order and with which flags
is what the heads say.
"""

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

import train.convert
import train.evaluate
import train.run
from preprocess.cli.main import main as preprocess
from shards import Bank
from tests.commands import Command
from tests.train.paper import published
from tests.train.paper.heads import PRESETS, ROOT, STAGES, commands_of
from tests.train.start.tiny import LLAVA_VISION, onevision, save_llava

pytestmark = pytest.mark.slow
SMALL = "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --lora_r 2"


@dataclass
class Place:
    """A folder in which the commands are run, one after the other."""

    root: Path
    llava: Path
    plans: dict[str, str] = field(default_factory=dict)
    """What `--plan` printed before each run, by the preset."""

    def run(self, command: Command, preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [w for word in command.words for w in in_shell(word.replace("$DATA", "data"))]
        words = ["tower" if word.startswith("google/siglip") else word for word in words]
        if words[0] == "preprocess":
            done = CliRunner().invoke(
                preprocess, [*words[1:], "--device", "cpu"], catch_exceptions=False
            )
            assert done.exit_code == 0, done.output
        elif "train.convert" in words:
            train.convert.main(words[words.index("train.convert") + 1 :])
        elif "train/evaluate.py" in words:
            own = words[words.index("train/evaluate.py") + 1 :]
            self.apart(train.evaluate.main, [*own, "--max_new_tokens", "8"])
        else:
            flags = [*words[words.index("train/run.py") + 1 :], *SMALL.split()]
            if preset.stem in ("content_alignment", "llava_video_178k"):
                flags += ["--stage_path", str(self.llava)]
            capsys.readouterr()
            train.run.main([*flags, "--plan"])
            self.plans[preset.stem] = capsys.readouterr().out
            self.apart(train.run.main, flags)

    def apart(self, main: object, words: list[str]) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            main(words)  # type: ignore[operator]
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def place(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("paper")
    published.write_all(root / "data")
    (root / "data" / "records").mkdir()
    (root / "train").symlink_to(ROOT / "train")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=384, patch_size=14)
    SiglipVisionModel(config).save_pretrained(root / "tower")
    SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(root / "tower")
    save_llava(root / "llava", onevision(LLAVA_VISION), toy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DATA", "data")
        yield Place(root, root / "llava")


def in_shell(word: str) -> list[str]:
    """Return a word as a shell would hand it on: a pattern as the files that it fits."""
    return sorted(glob.glob(word)) or [word]


def scores(run: Path, name: str) -> dict[str, float]:
    (task,) = json.loads((run / f"eval-{name}.json").read_text())["tasks"].values()
    return dict(task)


def test_the_runs_of_the_paper(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for preset in PRESETS:
        for command in commands_of(preset):
            place.run(command, preset, capsys)
    check_banks(place.root / "data" / "banks")
    check_stages(place.root / "runs" / "llava_st")
    for name, plan in place.plans.items():
        device = "H100" if name == "llava_video_178k" else "A100"
        assert re.search(
            rf"^hours     about \S+ hours on 8 x {device} at 40% MFU \(assumed\)$", plan, re.M
        )
        assert re.search(r"^encoding  [\d,]+ banked frames: about \S+ hours on 8 x ", plan, re.M)
    for name, rates in RATES.items():
        log = (place.root / "runs" / name / "train.log").read_text()
        assert f"rates     at their peak: {rates}\n" in log
    log = (place.root / "runs" / "llava_st" / "charades_sta" / "train.log").read_text()
    assert "1 records have spans that now end with their clip" in log
    plan = place.plans["llava_video_178k"]
    assert plan.startswith("records   38 kept, 0 dropped")  # 8 x 3, 4 x 2, 4 x 1 and 2 x 1 files


RATES = {
    "llava_st/content": "projector 0.0001, visual 0.0001",
    "llava_st/coordinates": "llm 0.0002, projector 2e-05, visual 2e-05, lape 2e-05",
    "llava_st/instructions": "llm 0.0002, projector 2e-05, visual 2e-05, lape 2e-05",
    "llava_video_178k": "llm 1e-05, projector 1e-05, visual 1e-05, frame_causal 1e-05, lape 0.0001",
}
"""Those of LLaVA-ST's and LLaVA-NeXT's scripts; LAPE's of LLaVA-Video is ours."""


def check_banks(banks: Path) -> None:
    """Clips under the names that records have; a frame of a picture, at most 100 of a video."""
    ids = {folder.name: set(Bank.open(folder).ids) for folder in banks.iterdir()}
    assert ids["charades"] == {"AO8RW.mp4", "3MSZA.mp4"}
    assert ids["vidstg"] == {"0000/2401075277.mp4#2-6"}
    assert ids["st_align_3"] == {"intentqa/i1.mp4", "2401075277.mp4#2-6"}
    assert "0_30_s_academic_v0_1/academic_source/0_30_s-1.mp4" in ids["llava_video_178k"]
    coco = Bank.open(banks / "coco")
    assert [coco.shape(row, 3)[:3] for row in range(len(coco))] == [(1, 9, 9)] * 2
    stvg = Bank.open(banks / "hc_stvg")
    assert [stvg.shape(row, 9)[:3] for row in range(2)] == [(100, 3, 3)] * 2
    # the part of frames 20 to 59 of 10 a second holds these and no other, and lasts 4 seconds
    for folder, id_ in (
        ("vidstg", "0000/2401075277.mp4#2-6"),
        ("st_align_3", "2401075277.mp4#2-6"),
    ):
        bank = Bank.open(banks / folder)
        part = bank.clip(bank.row(id_))
        assert list(part.frame_index) == list(range(20, 60))
        assert part.timestamps - part.start == pytest.approx([k / 10 for k in range(40)])
        assert part.duration == pytest.approx(4)
    assert [stvg.clip(row).duration for row in range(2)] == pytest.approx([20, 20])


def check_stages(runs: Path) -> None:
    """Each stage starts from the one before it, with what that one has learned."""
    logs = {stage.name: (stage / "train.log").read_text() for stage in runs.iterdir()}
    assert len(logs) == len(STAGES)
    assert not (runs / "content" / "lape").exists()
    assert "projector: from the stage (mlp2x_gelu" in logs["content"]
    assert "lape/tables.safetensors: new, runs/llava_st/content has none" in logs["coordinates"]
    assert "projector.safetensors: from runs/llava_st/content" in logs["coordinates"]
    assert "lape/tables.safetensors: from runs/llava_st/coordinates" in logs["instructions"]
    for name in ("charades_sta", "stvg", "refcoco"):
        assert "lape/tables.safetensors: from runs/llava_st/instructions" in logs[name]
    for stage in runs.iterdir():
        lines = (stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines][-1] == 2
    # scored by the benchmarks' own measures
    at = runs / "instructions"
    assert {"iou", "r@0.3", "r@0.5", "r@0.7"} <= scores(at, "charades_sta_test").keys()
    for name in ("hc_stvg_val", "vidstg_test"):
        assert {"viou", "viou@0.3", "viou@0.5", "tiou"} <= scores(at, name).keys()
    for name in ("refcoco_testA", "refcoco_plus_val", "refcocog_test"):
        assert "acc@0.5" in scores(at, name)
