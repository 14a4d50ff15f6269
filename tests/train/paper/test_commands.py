"""The commands in the heads of the presets: taken by the real parsers, with the numbers of the paper.

pytest tests/train/paper/test_commands.py
"""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.commands import Command, understood
from tests.train.paper.heads import FOLDER, PRESETS, ROOT, STAGES, commands_of
from train.data.mixtures import read_mixture
from train.settings.config import TrainConfig, parse


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that runs start from, the Hub's checkpoints too."""
    (tmp_path / "train").symlink_to(ROOT / "train")
    for preset in PRESETS:
        stage = yaml.safe_load(preset.read_text())["stage_path"]
        (tmp_path / stage).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", "data")
    return tmp_path


def config_of(command: Command) -> TrainConfig:
    words = list(command.words)
    flags = words[words.index("train/run.py") + 1 :]
    return parse([word.replace("$DATA", "data") for word in flags], {})


def training(preset: Path) -> Command:
    (found,) = [command for command in commands_of(preset) if "train/run.py" in command.words]
    return found


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_each_command_is_understood(preset: Path, here: Path) -> None:
    found = commands_of(preset)
    for command in found:
        if "train/run.py" in command.words:  # it writes where another one reads: tried elsewhere
            words = [word.replace("runs/", "new/", 1) for word in command.words]
            sharded = "--config_file" in words  # what the launcher sets by its file
            environ = {"ACCELERATE_USE_FSDP": "true"} if sharded else {}
            command = Command(tuple(words), environ)
        understood(command)
    programs = {command.words[0] for command in found}
    assert {"preprocess", "accelerate"} <= programs


def test_no_command_in_a_head_is_passed_over() -> None:
    """Counted in another way: words that only commands have."""
    for preset in PRESETS:
        head = "".join(x for x in preset.read_text().splitlines() if x.startswith("#"))
        for word in ("preprocess encode $DATA", "train/run.py", "train.convert ", "evaluate.py"):
            said = sum(word in " ".join(command.words) for command in commands_of(preset))
            assert head.count(word) == said, (preset, word)


ROWS_OF_A_STEP = {
    "content_alignment": 384,  # 4 x 2 on each of 48 devices
    "coordinate_alignment": 192,  # 2 x 2 on each of 48
    "instruction_tuning": 192,
    "charades_sta": 64,
    "stvg": 192,
    "refcoco": 192,
    "llava_video_178k": 256,
}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_a_step_has_the_rows_that_its_head_says(preset: Path, here: Path) -> None:
    command = training(preset)
    config = config_of(
        replace(command, words=tuple(w.replace("runs/", "new/") for w in command.words))
    )
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert rows * config.plan_devices == ROWS_OF_A_STEP[preset.stem]
    if preset in STAGES:
        # 9 x 9 and 3 x 3 cells of 27 x 27 patches, of 100 frames every fifth slow
        strides = config.mm_spatial_pool_stride, config.fast_stride
        assert (27 // strides[0], 27 // strides[1], config.slow_frame_ratio) == (9, 3, "0.2")
        assert (config.max_frames_num, config.loss_weight) == (100, 0)
        assert config.enable_lape == (preset.stem != "content_alignment")
        assert config.tune_llm == ("lora" if config.enable_lape else "frozen")


@pytest.mark.parametrize("preset", STAGES[1:], ids=lambda preset: preset.stem)
def test_a_stage_starts_where_an_earlier_one_ends(preset: Path) -> None:
    outs = {}
    for stage in STAGES:
        words = training(stage).words
        outs[words[words.index("--output_dir") + 1]] = stage
    start = outs[yaml.safe_load(preset.read_text())["stage_path"]]
    assert STAGES.index(start) == min(STAGES.index(preset) - 1, 2)


@pytest.mark.parametrize("name", ["llava_st", "llava_video_178k"])
def test_every_dataset_of_a_mixture_is_made_or_published(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Records are what the heads' commands write, or files of the dataset; banks what they encode."""
    monkeypatch.setenv("DATA", "$DATA")
    written = {
        word
        for preset in PRESETS
        for command in commands_of(preset)
        for flag, word in zip(command.words, command.words[1:], strict=False)
        if flag == "--out"
    }
    file = FOLDER / "data" / f"{name}.yaml"
    names = yaml.safe_load(file.read_text())
    for dataset, entry in names.items():
        if isinstance(entry, list):
            assert set(entry) <= names.keys()
        elif name == "llava_st":
            assert entry["banks"] in {word.replace("$DATA", "${DATA}") for word in written}
            published = entry["records"] == "${DATA}/ST-Align-Dataset/stage1"
            assert published or entry["records"].replace("${DATA}", "$DATA") in written
        else:
            assert Path(entry["records"]).parent.name in (entry.get("media_dir"), dataset)
    problems: list[str] = []
    monkeypatch.delenv("DATA")
    read_mixture(str(file), "", problems)
    entries = sum(isinstance(entry, dict) for entry in names.values())
    assert sum("${DATA}: no such variable" in problem for problem in problems) == entries
    assert len(problems) == entries
