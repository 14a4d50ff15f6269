"""The table of a planned run: its numbers against what the batches of the run really hold."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from model.lape.tokens import LapeTokens
from preprocess.encode.run import EncodeOptions, encode
from shards.read.bank import Bank
from train.batches.chat import Chat
from train.batches.loader import Loader, Share
from train.batches.plan import plan_run
from train.data.dataset import Dataset, open_dataset
from train.estimate import read_bytes, table
from train.flops import LlmShape, memory_bytes
from train.run import main
from train.settings.config import TrainConfig
from train.start.stage import read_config
from train.start.templates import load_with_template


@pytest.fixture(scope="module")
def config(toy: Path, toy_bank: Path) -> TrainConfig:
    return TrainConfig(
        stage_path=str(toy / "llm"),
        bank=[str(toy_bank)],
        data_path=[str(toy / "train.jsonl")],
        max_frames_num=6,
        pack_tokens=600,
        max_steps=3,
        per_device_train_batch_size=1,
    )


@pytest.fixture(scope="module")
def dataset(config: TrainConfig) -> Dataset:
    return open_dataset(config)


def lines_of(text: str) -> dict[str, str]:
    return {line.split()[0]: line[10:] for line in text.splitlines()}


def number(text: str, pattern: str) -> float:
    found = re.search(pattern.replace("#", r"([\d,.]+)"), text)
    assert found, text
    return float(found.group(1).replace(",", ""))


def test_tokens_pairs_and_bytes_are_those_of_the_batches(
    config: TrainConfig, dataset: Dataset
) -> None:
    from model.vlm import VLMConfig

    plan = plan_run(config, dataset, 4)
    chat = Chat(load_with_template(config.stage_path, ""), LapeTokens((100, 100, 100)))
    loader = Loader(dataset, chat, VLMConfig(max_frames_num=6))
    batches = [b for step in range(3) for b in loader.packs(plan, Share(0, 1), step)]
    read = sum(group.features.nbytes for batch in batches for group in batch.groups)
    assert plan.per_step(read_bytes(config, dataset, plan)).sum() == read
    places = sum(int(((b.mask_end - b.mask_start)[0, : b.lengths[0]]).sum()) for b in batches)
    causal = plan.tokens * (plan.tokens + 1) // 2
    # a token also sees what lies before it alone of its own record
    assert places == plan.per_step(causal + plan.frame_pairs).sum()
    text = lines_of(table(config, dataset, plan, 1))
    tokens = sum(int(batch.lengths.sum()) for batch in batches) / 3
    assert number(text["tokens"], r"# a step") == round(tokens)
    assert number(text["packs"], r"# of 1 rows of 600 tokens") == len(batches) == 6
    assert text["steps"] == "3 of 4 packs on 1 process; 3 short at the end of an epoch (2 rows)"
    step, pack = plan.heaviest
    assert f"step {step + 1}, pack {pack}: 1 x {max(plan.row_tokens)} places" in text["heaviest"]


def test_an_int8_bank_is_read_in_its_own_bytes(
    config: TrainConfig, toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    encode([str(toy / "videos")], tmp_path / "bank", replace(toy_options, codec="int8"))
    config = replace(config, bank=[str(tmp_path / "bank")])
    dataset = open_dataset(config)
    plan = plan_run(config, dataset, 4)
    assert plan.clips.tolist() == [1] * 6
    bank = Bank.open(tmp_path / "bank")
    # each record's frames as they are read: slow and fast ones take turns
    for k, expected in enumerate(read_bytes(config, dataset, plan).tolist()):
        row = bank.row(dataset.record(k).clips[0])
        frames = range(int(plan.transitions[k]) + 1)
        parts = [bank.read_int8(row, 4, frames[::2]), bank.read_int8(row, 8, frames[1::2])]
        assert expected == sum(p.values.nbytes + p.token_scale.nbytes for p in parts)


def test_time_and_reads_follow_from_the_stated_speed(config: TrainConfig, dataset: Dataset) -> None:
    plan = plan_run(config, dataset, 4)
    slow = replace(config, device_flops=1e8, assumed_mfu=0.5)
    text = lines_of(table(slow, dataset, plan, 1))
    twice = lines_of(table(replace(slow, assumed_mfu=0.25), dataset, plan, 1))
    two = lines_of(table(slow, dataset, plan, 2))
    seconds = number(text["time"], r"# s a step at 50%")
    assert number(twice["time"], r"# s a step at 25%") == pytest.approx(2 * seconds, rel=1e-3)
    assert number(two["time"], r"# s a step") == pytest.approx(seconds / 2, rel=1e-3)
    assert seconds == pytest.approx(number(text["model"], "# TFLOPs") * 1e12 / 5e7, rel=0.5)
    assert text["model"].count("full") == 1


def test_hours_are_of_a_named_device_and_say_what_is_assumed(
    config: TrainConfig, dataset: Dataset
) -> None:
    plan = plan_run(config, dataset, 4)
    hopper = lines_of(table(config, dataset, plan, 2))
    assert re.fullmatch(r"about \S+ hours on 2 x H100 at 40% MFU \(assumed\)", hopper["hours"])
    ampere = lines_of(table(replace(config, plan_device="A100"), dataset, plan, 2))
    assert ampere["hours"].endswith(" hours on 2 x A100 at 40% MFU (assumed)")
    seconds = [number(text["time"], "# s a step") for text in (ampere, hopper)]
    # of so small a model the seconds are printed to the millisecond: a slower device shows more of them
    slow = replace(config, device_flops=3.6e6, assumed_mfu=0.5)
    text = lines_of(table(slow, dataset, plan, 1))
    hours = number(text["hours"], r"about # hours on 1 x a device of 3.6e-06 TFLOP/s at 50% MFU")
    assert hours == pytest.approx(number(text["time"], "# s a step") * 3 / 3600, rel=0.06)
    assert seconds[0] >= seconds[1]
    frames = sum(len(bank.clip(row).timestamps) for bank in dataset.banks.banks for row in range(9))
    assert frames == 72
    assert text["encoding"].startswith(f"{frames} banked frames: about ")
    assert text["encoding"].endswith(" at 50% MFU (assumed), once; decoding not counted")


def test_memory_falls_with_everything_that_saves_it(config: TrainConfig) -> None:
    shape = LlmShape.of(read_config(config.stage_path) or {})
    assert shape is not None
    full = memory_bytes(config, shape, 64, 8192)
    for saving in (
        {"tune_llm": "frozen"},
        {"tune_llm": "lora", "lora_r": 2},
        {"bf16": True},
        {"gradient_checkpointing": "full"},
    ):
        assert memory_bytes(replace(config, **saving), shape, 64, 8192) < full  # type: ignore[arg-type]
    assert memory_bytes(config, shape, 64, 4096) < full


def test_a_model_of_another_family_has_a_plan_all_the_same(
    config: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(config.stage_path, tmp_path / "llm")
    (tmp_path / "llm" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    other = replace(config, stage_path=str(tmp_path / "llm"))
    chat = Chat(load_with_template(config.stage_path, ""), None)
    chat.tokenizer.save_pretrained(tmp_path / "llm")
    plan = plan_run(other, dataset, 4)
    text = lines_of(table(other, dataset, plan, 1))
    assert text["model"].startswith("its config.json is of another family")
    assert "time" not in text


def test_what_cannot_be_run_is_refused_before_a_plan_is_shown(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--stage_path", config.stage_path, "--bank", *config.bank, "--plan"]
    flags += ["--data_path", *config.data_path, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--max_tokens", "5"])
    assert stop.value.code == 2
    assert "no record fits 5 tokens; raise max_tokens" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    main([*flags, "--gradient_accumulation_steps", "2"])
    assert "6 packs on 3 processes" in capsys.readouterr().out
    main([*flags, "--gradient_accumulation_steps", "2", "--plan_devices", "8"])
    out = capsys.readouterr().out
    assert "16 packs on 8 processes" in out
    assert " hours on 8 x H100 at 40% MFU (assumed)" in out
    assert not (tmp_path / "out").exists()
