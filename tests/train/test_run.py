"""Whole runs on a toy bank: what they write, what they leave alone, and that they resume exactly."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoTokenizer

from model.vlm import VLM
from preprocess.encode.run import EncodeOptions, encode
from shards.format.features import Sampling
from shards.read.banks import Banks
from train.batches.chat import Chat
from train.batches.loader import Loader
from train.batches.plan import order
from train.data.dataset import open_dataset
from train.evaluate import untrained
from train.loop.checkpoint import read_state, save_checkpoint
from train.loop.floor import floor_of_model
from train.loop.held_out import held_out_loss
from train.loop.optimizer import parameter_groups, rate
from train.loop.speed import CLOCK
from train.settings.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]
WATCH = """
import atexit, os, sys
def note():
    if sys.argv[0].endswith("run.py"):
        with open(os.environ["MODULES_AT_EXIT"], "w") as file:
            file.write("\\n".join(sys.modules))
atexit.register(note)
"""


def lines_of(out: Path, kind: str = "train") -> list[Json]:
    """Return the metrics of a run's steps, without what the clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in (*CLOCK, "kind")}
        for line in lines
        if line["kind"] == kind
    ]


def losses(out: Path) -> list[list[float]]:
    names = ("loss", "ce_loss", "autoregressive_loss", "grad_norm")
    return [[line[name] for name in names] for line in lines_of(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a model by file and name."""
    return {
        f"{path.relative_to(out)}:{name}": tensor
        for path in sorted(out.rglob("*.safetensors"))
        if not str(path.relative_to(out)).startswith(("checkpoint-", "optimizer-", "floor."))
        for name, tensor in load_file(path).items()
    }


def equal_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours
    assert set(ours) == set(theirs)
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def launch(*arguments: str, expect: int = 0, **environ: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [str(Path(sys.executable).with_name("accelerate")), "launch", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
    )
    assert (done.returncode == 0) == (expect == 0), done.stdout + done.stderr
    return done


def two_processes() -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        *("--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"),
        *("--main_process_port", str(port)),
    ]


@pytest.fixture(scope="module")
def launched(
    toy: Path,
    toy_options: EncodeOptions,
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder around `out`, a launched run whose videos and tower were gone before it began."""
    home = tmp_path_factory.mktemp("launched")
    shutil.copytree(toy, home / "toy")
    options = EncodeOptions(
        tower=str(home / "toy" / "tower"),
        strides=toy_options.strides,
        sampling=toy_options.sampling,
    )
    encode([str(home / "toy" / "videos")], home / "bank", options)
    shutil.rmtree(home / "toy" / "videos")
    shutil.rmtree(home / "toy" / "tower")
    (home / "watch").mkdir()
    (home / "watch" / "sitecustomize.py").write_text(WATCH)
    settings = run_settings | {
        "stage_path": home / "toy" / "llm",
        "bank": home / "bank",
        "data_path": home / "toy" / "train.jsonl",
        "eval_path": home / "toy" / "test.jsonl",
        "logging_steps": 1,
        "output_dir": home / "out",
    }
    launch(
        "train/run.py",
        *as_flags(settings),
        PYTHONPATH=os.pathsep.join([str(home / "watch"), str(ROOT)]),
        MODULES_AT_EXIT=str(home / "modules.txt"),
    )
    return home


@pytest.fixture(scope="module")
def plain(train_here: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with checkpoints at 3 and 6. Read it only."""
    return train_here(tmp_path_factory.mktemp("plain") / "out", max_steps=6, save_steps=3)


def test_a_launched_run_writes_its_logs_checkpoint_and_model(launched: Path) -> None:
    out = launched / "out"
    lines = lines_of(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        for name in ("loss", "ce_loss", "coordinate_ce", "autoregressive_loss", "grad_norm"):
            assert math.isfinite(line[name]), (line["step"], name)
        assert line["ce_loss"] > 0
    assert lines[-1]["ce_loss"] < lines[0]["ce_loss"]
    (held_out,) = lines_of(out, "eval")
    assert math.isfinite(held_out["ar_skill"])
    text = (out / "train.log").read_text()
    assert text.count(" ar ") >= 5
    assert "step 4/4" in text
    assert "LAPE      on: 20 temporal, 20 spatial" in text
    assert list((out / "logs").glob("events.out.tfevents.*"))
    assert json.loads((out / "run.json").read_text())["config"]["max_steps"] == 4
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4"}
    model = VLM.load(out)
    assert model.lape is not None
    assert equal_bits(weights(out), weights(out / "checkpoint-4"))


def test_a_run_touches_no_video_and_no_tower(launched: Path) -> None:
    modules = (launched / "modules.txt").read_text().split("\n")
    assert "train.batches.loader" in modules, "the list is of the training process"
    roots = {"decord", "av", "preprocess", "cv2"}
    assert not {name for name in modules if name.partition(".")[0] in roots}
    assert not [name for name in modules if name.startswith("model.tower.")]
    assert not (launched / "toy" / "videos").exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    train_here: Callable[..., Path],
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    toy: Path,
    tmp_path: Path,
) -> None:
    shared = {"per_device_train_batch_size": 1, "max_steps": 3, "eval_path": toy / "test.jsonl"}
    settings = run_settings | shared | {"output_dir": tmp_path / "two"}
    launch(*two_processes(), "train/run.py", *as_flags(settings))
    train_here(tmp_path / "one", **shared, gradient_accumulation_steps=2)
    for kind in ("train", "eval"):
        two, one = lines_of(tmp_path / "two", kind), lines_of(tmp_path / "one", kind)
        assert len(two) == len(one) == (3 if kind == "train" else 1)
        for ours, theirs in zip(two, one, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    assert "2 processes" in (tmp_path / "two" / "train.log").read_text()


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_for_two_is_found_out(
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
) -> None:
    settings = as_flags(run_settings | {"output_dir": tmp_path / "out"})
    done = launch("--cpu", "--num_processes", "2", "train/run.py", *settings, expect=2)
    assert "error: accelerate launch was asked for several processes and started one" in done.stderr
    assert "accelerate launch --multi_gpu --num_processes 2 train/run.py" in done.stderr
    assert "returned non-zero exit status 2" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_equals_one_that_never_stopped(
    train_here: Callable[..., Path], plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(plain / "checkpoint-3", out / "checkpoint-3")
    # what a killed run leaves behind: lines beyond its checkpoint, and a half-written save
    lines = (plain / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    shutil.copytree(plain / "checkpoint-6" / "llm", out / "checkpoint-6.tmp" / "llm")
    train_here(out, max_steps=6, save_steps=3)
    assert lines_of(out) == lines_of(plain)
    assert equal_bits(weights(out), weights(plain))
    assert f"resumed   from {out / 'checkpoint-3'}" in (out / "train.log").read_text()


def test_a_damaged_newest_checkpoint_is_passed_over(
    train_here: Callable[..., Path], plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    (out / "checkpoint-6" / "projector.safetensors").write_bytes(b"")
    train_here(out, max_steps=6, save_steps=5, save_total_limit=1)
    damaged = out / "checkpoint-6"
    said = f"damaged   {damaged}: projector.safetensors has other bytes than were written; the run goes"
    assert f"{said} on from checkpoint-3\n" in (out / "train.log").read_text()
    assert lines_of(out) == lines_of(plain)
    assert equal_bits(weights(out), weights(plain))
    # the damaged one is out of the way, and did not push out what was written since
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-6.old"}


def test_without_a_whole_checkpoint_a_run_starts_anew_and_says_so(
    train_here: Callable[..., Path], plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    (out / "checkpoint-6" / "visual.safetensors").unlink()
    (out / "checkpoint-3" / "checkpoint.json").write_bytes(b"{}")
    train_here(out, max_steps=6, save_steps=3)
    said = [x for x in (out / "train.log").read_text().splitlines() if x.startswith("damaged ")]
    assert len(said) == 2
    assert all(line.endswith("; the run starts from scratch") for line in said)
    assert equal_bits(weights(out), weights(plain))


def test_checkpoints_come_by_the_clock_and_change_nothing(
    train_here: Callable[..., Path], plain: Path, tmp_path: Path
) -> None:
    out = train_here(
        tmp_path / "out", max_steps=6, save_steps=3, save_minutes=1e-9, save_total_limit=9
    )
    assert {path.name for path in out.glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in range(1, 7)
    }
    assert lines_of(out) == lines_of(plain)
    assert equal_bits(weights(out), weights(plain))
    text = (out / "train.log").read_text()
    assert "saves     every 1e-09 minutes, every 3 steps and at the end; the newest 9 are" in text
    assert "saves     every 30 minutes, every 3 steps" in (plain / "train.log").read_text()


def test_a_lower_limit_makes_room_before_the_next_checkpoint_is_written(
    train_here: Callable[..., Path], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train_here(tmp_path / "out", max_steps=8, save_steps=1, save_total_limit=9)
    shutil.rmtree(out / "checkpoint-8")
    (out / "checkpoint-7" / "visual.safetensors").write_bytes(b"")
    seen = []

    def watched(folder: Path, *args: Any) -> Path:
        seen.append(sorted(path.name for path in folder.glob("checkpoint-*")))
        return save_checkpoint(folder, *args)

    monkeypatch.setattr("train.loop.loop.save_checkpoint", watched)
    train_here(out, max_steps=8, save_steps=1, save_total_limit=1)
    # the newest whole one stays until the next is written, and read back
    assert seen == [["checkpoint-6", "checkpoint-7.old"], ["checkpoint-7", "checkpoint-7.old"]]
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-7.old"}


def test_a_finished_run_started_again_changes_nothing(
    train_here: Callable[..., Path], plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    train_here(out, max_steps=6, save_steps=3)
    assert lines_of(out) == lines_of(plain)
    assert equal_bits(weights(out), weights(plain))


def test_a_finished_run_asked_with_other_settings_says_that_it_trains_nothing(
    train_here: Callable[..., Path], plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    before = (out / "run.json").read_bytes()
    train_here(out, max_steps=6, save_steps=3, learning_rate=0.5)
    said = (out / "train.log").read_text()[len((plain / "train.log").read_text()) :]
    assert said.startswith(
        f"finished  nothing is trained: {out / 'checkpoint-6'} has 6 steps, 6 are asked for\n"
        "          its weights were trained without the new settings: learning_rate was 0.001, is now "
        "0.5; output_dir was "
    )
    assert "to train on, raise max_steps or num_train_epochs; to train with other settings" in said
    assert "done in" not in said
    assert (out / "run.json").read_bytes() == before
    assert equal_bits(weights(out), weights(plain))
    # it goes on with other settings: those of the first steps are kept too
    train_here(out, max_steps=7, save_steps=3, learning_rate=0.5)
    told = json.loads((out / "run.json").read_text())
    (first,) = told["before"]
    assert (told["config"]["learning_rate"], told["since_step"]) == (0.5, 6)
    assert (first["config"]["learning_rate"], first["since_step"]) == (0.001, 0)


def test_a_run_goes_on_when_a_record_file_has_another_name_and_place(
    train_here: Callable[..., Path],
    plain: Path,
    run_settings: dict[str, Any],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    out, records = tmp_path / "out", tmp_path / "elsewhere" / "records.jsonl"
    out.mkdir()
    shutil.copytree(plain / "checkpoint-3", out / "checkpoint-3")
    records.parent.mkdir()
    shutil.copy(run_settings["data_path"], records)
    train_here(out, max_steps=6, save_steps=3, data_path=records)
    assert lines_of(out) == lines_of(plain)[3:]
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[1:]))
    line = refused(train_here, out, max_steps=6, save_steps=3, data_path=records)
    assert line == (
        f"error: {out / 'checkpoint-6'}: this run differs from the one that it would go on with: record "
        f"file records.jsonl has changed (it gave {len(lines)} records, now {len(lines) - 1}); use the "
        "earlier settings and files, another output_dir, or resume: none, which starts from scratch"
    )


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(
    train_here: Callable[..., Path],
    run_settings: dict[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
) -> None:
    shared = {"max_steps": 60, "save_steps": 2}
    settings = run_settings | shared | {"output_dir": tmp_path / "killed"}
    process = subprocess.Popen(
        [sys.executable, "-m", "train.run", *as_flags(settings)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "killed" / "checkpoint-6").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoint-60").exists()
    train_here(tmp_path / "killed", **shared)
    train_here(tmp_path / "straight", **shared)
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "straight")
    assert equal_bits(weights(tmp_path / "killed"), weights(tmp_path / "straight"))


def test_the_cut_into_micro_batches_does_not_change_what_is_learned(
    train_here: Callable[..., Path], tmp_path: Path
) -> None:
    whole = train_here(tmp_path / "a", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    parts = train_here(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert len(losses(whole)) == 4
    for ours, theirs in zip(losses(whole), losses(parts), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_gradient_is_that_of_both_means_over_the_global_batch(
    train_here: Callable[..., Path], run_settings: dict[str, Any], tmp_path: Path
) -> None:
    shared = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    out = train_here(tmp_path / "out", **shared, loss_weight=0.5)
    dataset = open_dataset(
        TrainConfig(bank=[str(run_settings["bank"])], data_path=[str(run_settings["data_path"])])
    )
    model = untrained(out)
    chat = Chat.of(model)
    loader = Loader(dataset, chat, model.config)
    batch = loader.batch([dataset.records[k] for k in order(0, 0, len(dataset.records))[:4]])
    model.calibrate(batch)
    parts = model.train()(batch)
    transitions = 4 * (run_settings["max_frames_num"] - 1)
    loss = parts["ce"] / len(batch.labels) + 0.5 * parts["ar"].sum() / transitions
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    (line,) = lines_of(out)
    assert (line["loss"], line["grad_norm"]) == pytest.approx((loss.item(), norm.item()), rel=1e-4)


def test_another_pattern_on_the_same_bank_is_another_run(
    train_here: Callable[..., Path], plain: Path, toy_bank: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in toy_bank.rglob("*")}
    out = train_here(tmp_path / "b", frame_sampling_strategy="first_slow", slow_frame_ratio="0.25")
    assert before == {path: path.stat().st_mtime_ns for path in toy_bank.rglob("*")}
    ours, theirs = lines_of(out), lines_of(plain)
    assert all(math.isfinite(line["loss"]) for line in ours)
    # the same records at each step, in fewer tokens
    for a, b in zip(ours, theirs, strict=False):
        assert a["supervised_tokens"] == b["supervised_tokens"]
        assert a["tokens"] < b["tokens"]
    assert "ar_FS" not in ours[0]
    assert "ar_FS" in theirs[0]


def test_a_frozen_llm_keeps_every_bit_while_the_rest_learns(
    train_here: Callable[..., Path], toy: Path, tmp_path: Path
) -> None:
    out = train_here(tmp_path / "out", tune_llm="frozen")
    assert equal_bits(
        load_file(out / "llm" / "model.safetensors"), load_file(toy / "llm" / "model.safetensors")
    )
    before, after = untrained(out), VLM.load(out)
    for part in ("projector", "visual", "lape", "frame_causal"):
        old = dict(getattr(before, part).named_parameters())
        for name, value in getattr(after, part).named_parameters():
            assert not torch.equal(value, old[name]), f"{part}.{name} did not move"


def test_every_trained_parameter_moves(plain: Path) -> None:
    before, after = dict(untrained(plain).named_parameters()), VLM.load(plain)
    stuck = [name for name, value in after.named_parameters() if torch.equal(value, before[name])]
    assert stuck == []


def in_memory_loss(folder: Path, settings: dict[str, Any], toy: Path) -> Json:
    """Return the held-out loss of a saved model, loaded anew."""
    dataset = open_dataset(
        TrainConfig(
            bank=[str(settings["bank"])],
            data_path=[str(toy / "train.jsonl")],
            eval_path=[str(toy / "test.jsonl")],
        )
    )
    model = VLM.load(folder)
    chat = Chat.of(model)
    loader = Loader(dataset, chat, model.config)
    floor = floor_of_model(folder, model.config)
    return held_out_loss(model, loader, dataset.held_out, 2, Accelerator(), floor)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_saved_model_says_what_the_trained_one_said(
    train_here: Callable[..., Path],
    run_settings: dict[str, Any],
    toy: Path,
    tmp_path: Path,
    tune: str,
) -> None:
    out = train_here(tmp_path / "out", tune_llm=tune, eval_path=toy / "test.jsonl")
    (line,) = lines_of(out, "eval")
    again = in_memory_loss(out, run_settings, toy)
    assert {name: line[name] for name in again} == pytest.approx(again, rel=1e-6)


def test_lora_leaves_the_llm_alone_and_resumes(
    train_here: Callable[..., Path], toy: Path, tmp_path: Path
) -> None:
    shared = {"tune_llm": "lora", "lora_r": 4, "lora_alpha": 8, "save_steps": 2, "max_steps": 4}
    out = train_here(tmp_path / "straight", **shared)
    base = load_file(toy / "llm" / "model.safetensors")
    assert equal_bits(load_file(out / "llm" / "model.safetensors"), base)
    adapter = load_file(out / "llm" / "lora" / "adapter_model.safetensors")
    raised = [name for name in adapter if "lora_B" in name]
    assert len(raised) == 3 * 7, "all linear layers of three blocks"
    assert all(adapter[name].any() for name in raised), "B starts at zero"
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(out / "checkpoint-2", resumed / "checkpoint-2")
    train_here(resumed, **shared)
    assert lines_of(resumed) == lines_of(out)[2:]
    assert equal_bits(weights(resumed), weights(out))


def test_without_lape_there_is_no_token_and_no_parameter_of_it(
    train_here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENABLE_LAPE", "false")
    out = train_here(tmp_path / "out")
    assert not (out / "lape").exists()
    tokenizer = AutoTokenizer.from_pretrained(out / "llm")
    assert not [t for t in tokenizer.get_vocab() if t.startswith(("<TEMP", "<HEIGHT", "<WIDTH"))]
    assert not [name for name in weights(out) if "lape" in name]
    assert "LAPE      off" in (out / "train.log").read_text()
    assert all("coordinate_ce" not in line for line in lines_of(out))


def test_checkpointed_activations_change_no_loss(
    train_here: Callable[..., Path], plain: Path, tmp_path: Path
) -> None:
    out = train_here(tmp_path / "out", max_steps=6, save_steps=3, gradient_checkpointing=True)
    for ours, theirs in zip(losses(out), losses(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("tune", ["full", "frozen"])
def test_bf16_runs_and_keeps_trained_weights_in_fp32(
    train_here: Callable[..., Path], plain: Path, tmp_path: Path, tune: str
) -> None:
    out = train_here(tmp_path / "out", bf16=True, tune_llm=tune, max_steps=2)
    assert losses(out)[0][0] == pytest.approx(losses(plain)[0][0], rel=0.05)
    assert losses(out)[0][0] != losses(plain)[0][0]
    kinds = {tensor.dtype for name, tensor in weights(out).items() if not name.startswith("llm")}
    assert kinds == {torch.float32}
    llm = {tensor.dtype for name, tensor in weights(out).items() if name.startswith("llm")}
    assert llm == {torch.float32 if tune == "full" else torch.bfloat16}


def test_dropout_is_the_same_each_time_and_is_on(
    train_here: Callable[..., Path], toy: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy / "llm", tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    shared = {"stage_path": tmp_path / "llm", "max_steps": 4, "save_steps": 2}
    first = train_here(tmp_path / "first", **shared)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(first / "checkpoint-2", resumed / "checkpoint-2")
    torch.manual_seed(12345)  # whatever came before
    train_here(resumed, **shared)
    assert lines_of(resumed) == lines_of(first)[2:]
    without = train_here(tmp_path / "without", max_steps=4, save_steps=2)
    assert losses(without)[0] != losses(first)[0]


def test_the_best_checkpoint_by_held_out_loss_is_kept(
    train_here: Callable[..., Path], trained_run: Path, toy: Path, tmp_path: Path
) -> None:
    # what was learned is undone at a rate that rises all the way
    out = train_here(
        tmp_path / "out",
        stage_path=trained_run,
        max_steps=8,
        eval_steps=2,
        save_total_limit=1,
        learning_rate=1e-1,
        warmup_ratio=1,
        eval_path=toy / "test.jsonl",
    )
    held_out = {line["step"]: line["loss"] for line in lines_of(out, "eval")}
    assert set(held_out) == {2, 4, 6, 8}
    best = min(held_out, key=lambda step: held_out[step])
    assert best != 8, held_out
    assert {path.name for path in out.glob("checkpoint-*")} == {
        f"checkpoint-{best}",
        "checkpoint-8",
    }
    text = (out / "train.log").read_text()
    assert f"best held-out loss {held_out[best]:.4f} at step {best}" in text
    state = read_state(out / "checkpoint-8")
    assert state["best"].items() >= {"loss": held_out[best], "step": best}.items()


def test_a_resumed_run_compares_no_loss_with_that_of_other_held_out_records(
    train_here: Callable[..., Path], trained_run: Path, toy: Path, tmp_path: Path
) -> None:
    lines = (toy / "test.jsonl").read_text().splitlines(keepends=True)
    held_out = tmp_path / "held.jsonl"
    out, settings = tmp_path / "out", {"eval_steps": 1, "save_total_limit": 1, "max_steps": 1}
    settings |= {"stage_path": trained_run, "eval_path": held_out}
    # the one it does well at first, then (in the same file) what it has not seen the likes of
    held_out.write_text("".join(lines[:4]))
    train_here(out, **settings)
    text = [json.loads(line) for line in lines[:4]]
    for row in text:
        row["conversations"][1]["value"] = "zebra quilt vixen jumbled foxglove"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in text))
    train_here(out, **settings | {"max_steps": 3})
    found = {line["step"]: line["loss"] for line in lines_of(out, "eval")}
    assert found[1] < min(found[2], found[3]), found
    best = read_state(out / "checkpoint-3")["best"]
    assert best["step"] == min((2, 3), key=lambda step: found[step])
    assert "does not compare, and checkpoint-1" in (out / "train.log").read_text()
    # the same ones again: nothing to say, and the best one stays
    train_here(out, **settings | {"max_steps": 4})
    assert (out / "train.log").read_text().count("does not compare") == 1


def test_scores_of_weights_that_a_run_has_replaced_are_set_aside(
    train_here: Callable[..., Path], toy_bank: Path, toy: Path, tmp_path: Path
) -> None:
    out = train_here(tmp_path / "out", max_steps=1)
    names = ["eval-t.json", "predictions-t.jsonl", "foreseen-t.npz", "eval-t-untrained.json"]
    report = {"test_set": "t", "data_path": "/t.jsonl", "tasks": {}, "answers": 0}
    for name in names:
        (out / name).write_text(json.dumps(report))
    (out / "eval-notes.json").write_text("[]")
    # nothing is trained: the scores are of these weights
    train_here(out, max_steps=1)
    assert all((out / name).exists() for name in names)
    train_here(out, max_steps=2)
    assert not any((out / name).exists() for name in names)
    assert all((out / f"{name}.old").exists() for name in names)
    assert (out / "eval-notes.json").exists()
    assert (
        "scores    of the model that was here before (t, t-untrained)"
        in (out / "train.log").read_text()
    )


OTHER = [
    ({"enable_lape": False}, "enable_lape was true, is now false"),
    ({"slow_frame_ratio": "0.25"}, 'slow_frame_ratio was "0.5", is now "0.25"'),
    ({"num_temporal_tokens": 30}, "num_temporal_tokens was 20, is now 30"),
    ({"predictor": "xattn"}, 'predictor was "resample", is now "xattn"'),
]


@pytest.mark.parametrize(("changes", "expected"), OTHER)
def test_another_models_checkpoint_is_refused_by_field(
    train_here: Callable[..., Path],
    plain: Path,
    refused: Callable[..., str],
    changes: dict[str, Any],
    expected: str,
) -> None:
    before = (plain / "metrics.jsonl").read_text(), sorted(plain.iterdir())
    line = refused(train_here, plain, max_steps=6, save_steps=3, **changes)
    assert expected in line
    assert str(plain / "checkpoint-6") in line
    assert before == ((plain / "metrics.jsonl").read_text(), sorted(plain.iterdir()))


def test_another_banks_checkpoint_is_refused_by_field(
    train_here: Callable[..., Path],
    plain: Path,
    toy: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    options = EncodeOptions(
        tower=str(toy / "tower"), strides=(2, 4, 8), sampling=Sampling(num_frames=8)
    )
    encode([str(toy / "videos")], tmp_path / "bank", options)
    line = refused(train_here, plain, max_steps=6, bank=tmp_path / "bank", mm_spatial_pool_stride=4)
    assert "bank strides was [4, 8], is now [2, 4, 8]" in line


def test_a_global_batch_that_does_not_divide_is_refused_on_resume(
    train_here: Callable[..., Path], plain: Path, refused: Callable[..., str]
) -> None:
    line = refused(train_here, plain, max_steps=6, per_device_train_batch_size=3)
    assert "global batch of 2 rows does not divide into micro-batches of 3" in line


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_records(
    train_here: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = refused(train_here, tmp_path / "out", learning_rate=1e30, warmup_ratio=0)
    assert "step 2: loss " in line
    assert "train/clip-0000" in line
    assert "Lower learning_rate, or look at these records" in line
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_rate_rises_and_falls_as_the_table_says() -> None:
    table = [0.5, 1.0, 1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]
    assert [rate(step, 10, 0.2) for step in range(10)] == pytest.approx(table, abs=1e-6)
    assert [rate(step, 4, 0.0) for step in range(4)] == pytest.approx(
        [1.0, 0.853553, 0.5, 0.146447], abs=1e-6
    )
    # a share that is no whole step is rounded up, so that a run's first step is never at 0
    assert rate(0, 100, 0.001) == 1.0


def test_a_run_steps_at_the_rates_of_the_table(plain: Path) -> None:
    # 3 % of six steps is one step of warm-up
    shares = [1.0, 1.0, 0.904508, 0.654508, 0.345492, 0.095492]
    found = [line["learning_rate"] for line in lines_of(plain)]
    assert found == pytest.approx([1e-3 * share for share in shares], rel=1e-5)


def test_each_trained_parameter_is_in_one_group_with_its_own_rate(
    make_model: Callable[..., VLM],
) -> None:
    config = TrainConfig(learning_rate=1e-4, projector_lr=1e-3, lape_lr=5e-3, weight_decay=0.1)
    model = make_model()
    groups = parameter_groups(model, config)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
    rates = {(group["name"], group["peak"]) for group in groups}
    assert rates == {
        ("llm", 1e-4),
        ("projector", 1e-3),
        ("visual", 1e-3),
        ("frame_causal", 1e-3),
        ("lape", 5e-3),
    }
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        alone = name.startswith(("lape", "visual")) or name == "frame_causal.stream.weight"
        matrix = parameter.ndim >= 2 and not alone
        assert decay[id(parameter)] == (0.1 if matrix else 0.0), name
    by_default = parameter_groups(model, TrainConfig(learning_rate=1e-4))
    peaks = {group["name"]: group["peak"] for group in by_default}
    assert peaks["lape"] == pytest.approx(1e-3)
    assert peaks["projector"] == 1e-4


def test_a_second_stage_starts_from_what_the_first_one_learned(
    train_here: Callable[..., Path], plain: Path, tmp_path: Path
) -> None:
    out = train_here(tmp_path / "out", stage_path=plain, max_steps=1, learning_rate=1e-9)
    ours, theirs = weights(out), weights(plain)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


REAL = {
    "bunny_720p.mp4": "mp4",
    "hiker_vp9_720p.webm": "webm",
    "mpeg4_bframes.avi": "avi",
    "av1_360p.mkv": "mkv",
}


def test_real_clips_can_be_banked_and_trained_on(
    train_here: Callable[..., Path], toy: Path, tmp_path: Path
) -> None:
    folder = os.environ.get("FRAMEBANK_CLIPS")
    if not folder:
        pytest.skip("FRAMEBANK_CLIPS names no folder of real clips")
    (tmp_path / "videos").mkdir()
    for name in REAL:
        shutil.copy(Path(folder) / name, tmp_path / "videos" / name)
    options = EncodeOptions(
        tower=str(toy / "tower"), strides=(4, 8), sampling=Sampling(num_frames=6)
    )
    summary = encode([str(tmp_path / "videos")], tmp_path / "bank", options)
    assert (summary.clips, [e["error"] for e in summary.failures]) == (4, [])
    banks = Banks.open([tmp_path / "bank"])
    records = []
    for name in REAL:
        clip = banks.clip(name)
        info = clip.info
        assert clip.read(4, range(6)).shape == (6, 2, 2, 64)
        assert clip.read(8, range(6)).shape == (6, 1, 1, 64)
        times = info.timestamps
        assert times[0] == pytest.approx(0, abs=0.05)
        assert (times[1:] > times[:-1]).all()
        # the last frame stops being shown at the end
        assert times[-1] < info.end < times[-1] + 0.2
        middle = info.duration / 2
        said = f"it ends after <t:{info.duration:.3f}>, half of it after <t:{middle:.3f}>"
        talk = [("human", "<video>\nHow long is it?"), ("gpt", said), ("human", "Where?")]
        talk.append(("gpt", "<x:0.5><y:0.5>"))
        turns = [{"from": speaker, "value": text} for speaker, text in talk]
        records.append({"id": name, "video": name, "conversations": turns})
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    out = train_here(
        tmp_path / "out", bank=tmp_path / "bank", data_path=path, eval_path=path, max_steps=4
    )
    assert all(math.isfinite(line["loss"]) for line in lines_of(out))
    (held_out,) = lines_of(out, "eval")
    assert math.isfinite(held_out["ar_skill"])
    assert held_out["transitions"] == 4 * 5
