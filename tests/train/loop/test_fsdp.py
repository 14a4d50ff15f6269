"""FSDP2: the configuration files, what is refused, and a run on two processes of the CPU.

Over gloo, see `tests.fsdp_on_cpu`. Nothing of this has met several GPUs.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from model.fsdp.parts import PARTS
from model.vlm import VLM
from train.loop.optimizer import allocate, load_optimizer
from train.settings.launcher import wishes

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted((ROOT / "train" / "presets").glob("fsdp2_*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration_files(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.num_processes == 8 * config.num_machines
    known = {action.dest for action in launch_command_parser()._actions}
    assert config.fsdp_config.keys() <= known


def test_the_settings_reach_the_plugin(
    monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., VLM]
) -> None:
    """Through the environment, as `accelerate launch` hands them to the processes."""
    (path,) = (path for path in PRESETS if path.stem == "fsdp2_8gpu")
    args = launch_command_parser().parse_args(["--config_file", str(path), "train/run.py"])
    for name, value in load_config_from_file(str(path)).fsdp_config.items():
        setattr(args, name, str(value).lower() if isinstance(value, bool) else value)
    args.use_fsdp, args.num_processes, args.num_machines = True, 8, 1
    args.mixed_precision, args.main_process_port, args.gpu_ids = "no", 29500, "all"
    args.dynamo_backend = "no"
    environ = prepare_multi_gpu_env(args)
    for name in [name for name in environ if name.startswith(("FSDP", "ACCELERATE"))]:
        monkeypatch.setenv(name, environ[name])
    assert wishes(environ).problems == []
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading
    plugin.set_auto_wrap_policy(make_model())
    assert plugin.transformer_cls_names_to_wrap == ["Qwen2DecoderLayer"]


@pytest.mark.slow
def test_two_sharded_processes_train_save_and_resume_like_one(
    run_settings: dict[str, Any],
    as_flags: Callable[..., list[str]],
    train_here: Callable[..., Path],
    toy: Path,
    tmp_path: Path,
) -> None:
    # five records in steps of two: in the third step one process has no pack
    records = tmp_path / "five.jsonl"
    records.write_text("".join((toy / "train.jsonl").read_text().splitlines(keepends=True)[:5]))
    # a held-out loss before each save: a forward pass alone leaves some parameters whole
    shared = {
        "data_path": records,
        "save_steps": 2,
        "eval_steps": 2,
        "eval_path": toy / "test.jsonl",
    }
    one = train_here(
        tmp_path / "one",
        **shared,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    tokens = [line["supervised_tokens"] for line in lines_of(one) if line["kind"] == "train"]
    assert tokens[2] < min(tokens[:2])
    two = tmp_path / "two"
    settings = run_settings | shared | {"output_dir": two, "per_device_train_batch_size": 1}

    def launch(**more: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--master_port", str(port), "-m", "tests.fsdp_on_cpu", "train.run"]
        command += as_flags(settings | more)
        environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    launch()
    first = (two / "metrics.jsonl").read_text()
    compare(one, two)
    # from the checkpoint of two halves on, as if the last two steps had not been
    for path in two.glob("checkpoint-4"):
        path.rename(two / "gone")
    launch()
    assert (two / "metrics.jsonl").read_text() != first  # its clock
    compare(one, two)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(one: Path, two: Path) -> None:
    """Assert that two runs took the same steps to the same weights and moments."""
    for ours, theirs in zip(lines_of(one), lines_of(two), strict=True):
        assert ours["kind"] == theirs["kind"]
        for name in ("loss", "grad_norm", "ce_loss", "autoregressive_loss"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert len(list((two / "checkpoint-4").rglob(PARTS))) >= 4
    expected, found = (state_of(run / "checkpoint-4") for run in (one, two))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4, msg=name)


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights and moments."""
    model = VLM.load(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters())
    allocate(optimizer)
    load_optimizer(optimizer, model, checkpoint)
    named = model.named_parameters()
    moments = {f"{n}/{what}": v for n, p in named for what, v in optimizer.state[p].items()}
    return model.state_dict() | moments
