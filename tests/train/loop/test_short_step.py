"""The last step of an epoch, on one process and on several: its gradient, and who waits for whom.

pytest tests/train/loop/test_short_step.py
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]

GRADIENTS = """
import json, sys, torch
torch.set_num_threads(1)
from dataclasses import replace
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from model.batch import to_device
from train.batches.chat import Chat
from train.batches.loader import Loader, Share
from train.batches.plan import plan_run
from train.data.dataset import open_dataset
from train.loop.gradients import make_reduction
from train.loop.optimizer import make_optimizer
from train.loop.step import Losses
from train.settings.config import TrainConfig
from train.start.stage import build

flags, cases = json.load(open(sys.argv[1]))
config = TrainConfig(**flags)
handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
dataset = open_dataset(config)
torch.manual_seed(0)
model = build(config, dataset, lambda line: None).train()
loader = Loader(dataset, Chat.of(model), model.config)
share = Share(accelerator.process_index, accelerator.num_processes)
reductions = {}
for reduce, size, accumulation, pack_tokens in cases:
    own = replace(config, per_device_train_batch_size=size, pack_tokens=pack_tokens)
    plan = plan_run(own, dataset, size * accumulation * share.world)
    for step in range(plan.num_steps):
        # one batch of all records, both means over it
        model.zero_grad()
        rows = [row for k in range(plan.num_packs[step]) for row in plan.pack(step, k)]
        whole = [[(dataset.records[k], int(plan.frames[k])) for k in row] for row in rows]
        batch = loader.rows(whole, False)
        out = model(batch)
        transitions = max(1, batch.num_transitions)
        (out["ce"] / len(batch.labels) + 0.5 * out["ar"].sum() / transitions).backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()

        if reduce not in reductions:
            reductions[reduce] = make_reduction(reduce, accelerator, model, make_optimizer(model, config))
        losses = Losses(0, 0.5, plan, step, accelerator)
        batches = loader.packs(plan, share, step)
        idle = share.idles(plan, step)
        batches += [loader.idle(plan, step)] if idle else []
        reductions[reduce].gradients(len(losses.sums), batches, losses)
        worst = max(float((p.grad - expected[n]).norm() / (expected[n].norm() + 1e-4))
                    for n, p in model.named_parameters())
        print(json.dumps([plan.records(step), int(plan.num_rows[step]), bool(idle), worst]), flush=True)
    print(json.dumps(None), flush=True)
accelerator.end_training()
"""
CASES = [
    (reduce, size, accumulation, pack_tokens)
    for reduce in ("fast", "exact")
    for size, accumulation, pack_tokens in (
        (1, 1, 0), (2, 1, 0), (1, 2, 0), (3, 1, 0), (4, 2, 0), (1, 1, 600), (1, 2, 600),
    )
]  # fmt: skip
"""Reduction, rows of a pack, packs of a step and rank, tokens of a row."""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def torchrun(world: int, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
    return subprocess.run(
        [*command, "--master_port", free_port(), *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_each_record_counts_once_and_the_gradient_is_that_of_one_batch(
    run_settings: dict[str, Any], toy: Path, tmp_path: Path, world: int
) -> None:
    records = tmp_path / "five.jsonl"
    lines = (toy / "train.jsonl").read_text().splitlines(keepends=True)[:5]
    records.write_text("".join(lines))
    flags = {
        "stage_path": str(run_settings["stage_path"]),
        "bank": [str(run_settings["bank"])],
        "data_path": [str(records)],
        "num_temporal_tokens": 20,
        "num_spatial_tokens": 20,
        "max_frames_num": 4,
        "num_train_epochs": 2,
    }
    (tmp_path / "job.json").write_text(json.dumps([flags, CASES]))
    (tmp_path / "job.py").write_text(GRADIENTS)
    done = torchrun(
        world, "--redirects", "3", "--log_dir", str(tmp_path / "logs"),
        str(tmp_path / "job.py"), str(tmp_path / "job.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = sorted((tmp_path / "logs").rglob("stdout.log"))
    assert len(outputs) == world
    idled = 0
    for path in outputs:
        cases: list[list[Any]] = [[]]
        for line in path.read_text().splitlines():
            found = json.loads(line)
            cases = [*cases, []] if found is None else [*cases[:-1], [*cases[-1], found]]
        assert len(cases) == len(CASES) + 1
        for case, steps in zip(CASES, cases, strict=False):
            uses = [record for own, *_ in steps for record in own]
            first, second = uses[:5], uses[5:]
            assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4], case
            assert max(worst for *_, worst in steps) < 2e-4, (case, steps)
            idled += sum(idle for _, _, idle, _ in steps)
    assert idled > 0, "no rank was without a pack"
