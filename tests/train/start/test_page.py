"""`model/README.md`, which checkpoint with which commands: all lines are parsed, the exact ones run."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

import train.ask
import train.run
from preprocess.cli.main import main as preprocess
from preprocess.cli.options import make_sampling
from shards.format.features import FeatureConfig
from tests.train.start.tiny import (
    PATCH,
    SIDE,
    next_video,
    onevision,
    qwen2_5,
    qwen3,
    save_llava,
    save_qwen,
)
from train.settings.config import parse
from train.start.stage_files import stage_problem

PAGE = Path(__file__).resolve().parents[3] / "model" / "README.md"
CLIP = "train/clip-00000.mp4"


def sections() -> dict[str, list[list[str]]]:
    """Return the commands of each section, as words."""
    found = {}
    for part in PAGE.read_text().split("\n### ")[1:]:
        title, blocks = part.partition("\n")[0], re.findall(r"```sh\n(.*?)```", part, re.DOTALL)
        commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
        if commands:
            found[title] = commands
    return found


SECTIONS = sections()
LINES = [(title, words) for title, commands in SECTIONS.items() for words in commands]


def test_each_section_encodes_trains_and_asks() -> None:
    assert len(SECTIONS) == 10
    for title, commands in SECTIONS.items():
        first = [" ".join(words[:2]) for words in commands]
        assert first == ["preprocess encode", "accelerate launch", "python train/ask.py"], title


@pytest.mark.parametrize(("title", "words"), LINES, ids=lambda x: x if isinstance(x, str) else x[0])
def test_every_line_is_understood(
    title: str,
    words: list[str],
    features: FeatureConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there are records, and a folder of the stage's name."""
    monkeypatch.chdir(tmp_path)
    encode, launch, _ = SECTIONS[title]
    if words is encode:
        command = preprocess.commands["encode"]  # type: ignore[attr-defined]
        flags = command.make_context("encode", words[2:]).params
        sampling = make_sampling(flags["frames"], flags["fps"], flags["max_frames"])
        names = ("layer", "strides", "pool")
        FeatureConfig(**{**vars(features), "sampling": sampling, **{n: flags[n] for n in names}})
    elif words is launch:
        assert words[:3] == ["accelerate", "launch", "train/run.py"]
        Path("train.json").touch()
        Path(launch[launch.index("--stage_path") + 1]).mkdir(parents=True)
        config = parse(words[3:], {})
        assert config.bank == [encode[encode.index("--out") + 1]]
    else:
        args = train.ask.arguments().parse_args(words[2:])
        assert str(args.model) == launch[launch.index("--output_dir") + 1]


def qwen_stage(make: Callable[[bool], Any]) -> Callable[[Path, Path], None]:
    return lambda root, toy: save_qwen(root / "stage", lambda: make(False), toy)


def llava_stage(make: Callable[..., Any], processor: Any) -> Callable[[Path, Path], None]:
    def save(root: Path, toy: Path) -> None:
        theirs = make()
        save_llava(root / "stage", theirs, toy)
        theirs.model.vision_tower.save_pretrained(root / "tower")
        processor.save_pretrained(root / "tower")

    return save


SQUARE = {"height": SIDE * PATCH, "width": SIDE * PATCH}
CLIP_PIXELS = CLIPImageProcessorPil(size={"shortest_edge": SIDE * PATCH}, crop_size=SQUARE)
STAND_INS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "Qwen2-VL and Qwen2.5-VL": (qwen_stage(qwen2_5), "positions: frames at their time"),
    "Qwen3-VL": (qwen_stage(qwen3), "DeepStack: 2 layers of the tower"),
    "LLaVA-OneVision, in transformers' form": (
        llava_stage(onevision, SiglipImageProcessorPil(size=SQUARE)),
        "features are pooled as there",
    ),
    "LLaVA-NeXT-Video, in transformers' form": (
        llava_stage(next_video, CLIP_PIXELS),
        "features are pooled as there",
    ),
}
"""Section -> what saves a stage (and its tower) in a folder, and what a run says of it."""


@pytest.mark.slow
@pytest.mark.parametrize("title", STAND_INS)
def test_the_exact_ones_run(
    title: str,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save, said = STAND_INS[title]
    save(tmp_path, toy)
    (tmp_path / "videos").symlink_to(toy / "videos")
    (tmp_path / "clip.mp4").symlink_to(toy / "videos" / CLIP)
    (tmp_path / "train.json").write_text((toy / "train.jsonl").read_text())
    monkeypatch.chdir(tmp_path)
    encode, launch, ask = (
        [re.sub(r"^\S+/\S+(-Instruct|-hf)$|^5,11,17,", stand_in, word) for word in words]
        for words in SECTIONS[title]
    )
    assert not CliRunner().invoke(preprocess, encode[1:], catch_exceptions=False).exit_code
    AcceleratorState._reset_state(reset_partial_state=True)
    train.run.main([*launch[3:], "--max_steps", "1"])
    AcceleratorState._reset_state(reset_partial_state=True)
    out = launch[launch.index("--output_dir") + 1]
    assert said in (tmp_path / out / "train.log").read_text()
    capsys.readouterr()
    train.ask.main([*ask[2:], "--max_new_tokens", "2"])
    assert capsys.readouterr().out


def stand_in(match: re.Match[str]) -> str:
    """Return the tiny checkpoint in the place of a published one, and the layers of its tower."""
    return "0,1," if match.group().startswith("5") else "stage"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("qwen3_vl_moe", "a Qwen3-VL without experts"),
        ("qwen2_5_omni", "start from Qwen2-VL, Qwen2.5-VL"),
        ("perception_lm", "is not taken out; start from an LLM alone"),
        ("internvl", "is not taken out; start from an LLM alone"),
    ],
)
def test_what_the_page_calls_refused_is(kind: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}", "text_config": {{}}}}')
    problem = stage_problem(str(tmp_path))
    assert problem is not None
    assert why in problem
    assert len(problem.splitlines()) == 1
