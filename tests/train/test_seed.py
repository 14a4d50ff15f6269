"""MIGRATING.md's tables for users of other scripts are true: what they name is here, with that default.

The guides' own command lines, as they are written there, are tried too.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from preprocess.cli.main import main as preprocess
from train.loop.metrics import FIELDS
from train.settings.config import TrainConfig, parse
from train.settings.foreign import ENVIRONMENT, unknown

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {field.name: field for field in fields(TrainConfig)}
ENCODE = {name: o for o in preprocess.commands["encode"].params for name in o.opts}  # type: ignore[attr-defined]
TABLES = (ROOT / "train" / "MIGRATING.md").read_text().partition("## LLaVA-NeXT and LLaVA-ST")[2]
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in TABLES.partition("## Every other key")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| in the ")
]
NAME = re.compile(r"`([^`]+)`")
GUIDES = {
    "sft_with_lape.sh": """
        --deepspeed --model_name_or_path --data_mixture --vision_tower --mm_vision_select_feature
        --mm_projector --tune_vision_tower --tune_mm_projector --tune_language_model
        --mm_vision_select_layer --mm_use_im_start_end --mm_use_im_patch_token --image_aspect_ratio
        --bf16 --output_dir --num_train_epochs --per_device_train_batch_size
        --gradient_accumulation_steps --evaluation_strategy --save_strategy --save_steps
        --save_total_limit --learning_rate --weight_decay --warmup_ratio --lr_scheduler_type
        --logging_steps --model_max_length --gradient_checkpointing --dataloader_num_workers
        --vflan_no_system_prompt --report_to --enable_lape --num_spatial_tokens --num_temporal_tokens
        ENABLE_LAPE NUM_SPATIAL_TOKENS NUM_TEMPORAL_TOKENS GRADIENT_ACCUMULATION_STEPS
        lape_warmup_steps lape_lr_multiplier spatial_pos_weight temporal_pos_weight lape_init_strategy""",
    "fast_slow_autoregressive.yaml": """
        data_path mm_spatial_pool_stride frame_sampling_strategy slow_frame_ratio loss_weight
        per_device_train_batch_size gradient_accumulation_steps learning_rate max_frames_num
        gradient_checkpointing output_hidden_states dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers bf16 tf32 fp16 train.log logs/ checkpoint-* autoregressive_loss""",
}


def default_of(name: str) -> str:
    """Return a setting's default as the table writes it."""
    value = SETTINGS[name].default
    if value is MISSING or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}".replace("e-05", "e-5") if isinstance(value, float) else str(value)


@pytest.mark.parametrize(("seed", "theirs", "here", "default"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_names_what_there_is_with_its_default(
    seed: str, theirs: str, here: str, default: str, trained_run: Path
) -> None:
    assert NAME.search(seed) or " " in seed
    names = NAME.findall(here)
    first = names[0] if names else ""
    if here.startswith("—"):
        assert len(here) > 10, "a dash comes with its reason"
        first = first if first in SETTINGS else ""
    elif first in SETTINGS or first in ENVIRONMENT:
        # what follows a colon explains
        for name in NAME.findall(here.partition(":")[0]):
            assert default_of(ENVIRONMENT.get(name, name)) == default, name
        assert all(name in SETTINGS for name in names if "_" in name and name.islower())
        return
    elif first.startswith("preprocess encode "):
        for name in names:
            option = ENCODE[name.removeprefix("preprocess encode ")]
            if default:
                assert str(option.default) == default
        return
    elif first.startswith("metrics.jsonl: "):
        name = first.removeprefix("metrics.jsonl: ")
        lines = (trained_run / "metrics.jsonl").read_text().splitlines()
        assert name in FIELDS
        assert name in json.loads(lines[0])
        return
    else:
        assert (ROOT / first).exists() or (trained_run / first).exists(), first
        return
    assert (default_of(first) if first else "") == default


@pytest.mark.parametrize("guide", GUIDES)
def test_every_name_of_a_guide_has_a_row(guide: str) -> None:
    known = {word for row in ROWS for name in NAME.findall(row[0]) for word in name.split()}
    assert not set(GUIDES[guide].split()) - known


def test_every_name_of_the_tables_is_a_setting_or_answered_by_name() -> None:
    names = {name.strip("-") for row in ROWS[:-9] for name in NAME.findall(row[0])}
    words = {name.split()[0] for name in names if "." not in name}
    assert len(words) > 50
    lower = {word.lower() for word in words if word not in ENVIRONMENT}
    assert not [n for n in lower if n not in SETTINGS and "unknown" in unknown(n, SETTINGS)]


def two_sets(tmp_path: Path, run_settings: Mapping[str, Any]) -> Path:
    """Write the YAML that names the data sets of a mixture and the bank; return a run's YAML."""
    records = run_settings["data_path"]
    (tmp_path / "sets.yaml").write_text(f"a: {{records: {records}}}\nb: {{records: {records}}}\n")
    names = ("num_temporal_tokens", "num_spatial_tokens", "max_frames_num", "max_steps")
    lines = [f"{name}: {run_settings[name]}" for name in names]
    lines += [f"bank: {run_settings['bank']}", f"data_config: {tmp_path / 'sets.yaml'}"]
    (tmp_path / "x.yaml").write_text("\n".join(lines) + "\n")
    return tmp_path / "x.yaml"


def run(
    *words: str, environ: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environ or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_three_words_of_the_script_are_stage_mixture_and_output(
    run_settings: dict[str, Any], tmp_path: Path
) -> None:
    stage, config = str(run_settings["stage_path"]), two_sets(tmp_path, run_settings)
    words = [stage, "a+b*2", str(tmp_path / "out")]
    for count in (1, 2, 3):
        flags = ["--stage_path", stage, "--data_mixture", "a+b*2", "--output_dir", words[2]]
        argv = [*words[:count], *flags[2 * count :], "--config", str(config)]
        parsed = parse(argv, {"ENABLE_LAPE": "false"})
        assert [parsed.stage_path, parsed.data_mixture, parsed.output_dir] == words
        assert not parsed.enable_lape
    # a flag of the same name wins, as it does over everything
    assert (
        parse([*words, "--output_dir", "other", "--config", str(config)], {}).output_dir == "other"
    )


def test_a_fourth_word_is_refused(
    run_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([str(run_settings["stage_path"]), "a", str(tmp_path), "more"], {})
    assert stop.value.code == 2
    assert "'more': expected --setting value" in capsys.readouterr().err


@pytest.mark.slow
def test_both_guides_command_lines_train(
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
) -> None:
    config = two_sets(tmp_path, run_settings)
    stage, out = str(run_settings["stage_path"]), tmp_path / "lape"
    words = ("train/run.py", stage, "a+b", str(out), "--config", str(config))
    environ = {"ENABLE_LAPE": "true", "NUM_SPATIAL_TOKENS": "50", "NUM_TEMPORAL_TOKENS": "200"}
    done = run(*words, environ=environ)
    assert done.returncode == 0, done.stderr
    saved = json.loads((out / "config.json").read_text())["model"]
    assert (saved["num_spatial_tokens"], saved["num_temporal_tokens"]) == (50, 200)
    with open(config, "a") as file:
        file.write(f"stage_path: {stage}\noutput_dir: {tmp_path / 'slowfast'}\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    done = run(*launch, "-m", "train.run", "--config", str(config))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "slowfast" / "train.log").read_text()
    assert "2 processes" in text
    metrics = (tmp_path / "slowfast" / "metrics.jsonl").read_text()
    assert "autoregressive_loss" in metrics
    assert list((tmp_path / "slowfast" / "logs").iterdir())
    assert (tmp_path / "slowfast" / "checkpoint-4").is_dir()
