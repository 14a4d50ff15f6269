"""Train LAPE, projector and LLM on banked features: no video and no tower is touched.

    accelerate launch train/run.py --config train/presets/toy.yaml --output_dir runs/a
    accelerate launch --multi_gpu --num_processes 2 train/run.py --config ...   # also on CPU
    torchrun --nproc_per_node 2 -m train.run --config ...

Settings -> banks and records -> the run itself (`train/loop/loop.py`). Everything that can be
refused is refused before torch is imported. `--plan` prints what the run would be, and stops.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from shards.errors import UserError
from shards.write.lock import folder_lock
from train.data.dataset import Dataset, open_dataset
from train.settings.config import TrainConfig, parse
from train.settings.exits import command
from train.start.stage import bank_problem
from train.start.stage_files import stage_problem

SHOWN = 160
"""Characters of a command that others are told of, who may not start theirs beside it."""


@command
def main(argv: list[str]) -> None:
    config = parse(argv)
    problem = silent_single_process(os.environ) or unsupported(config.reduce, os.environ)
    if problem:
        raise UserError(problem)
    dataset = open_inputs(config)
    if config.plan:
        show_plan(config, dataset, int(os.environ.get("WORLD_SIZE", "1")))
    else:
        with only_run_in(config.output_dir, argv):
            start(config, dataset)


def open_inputs(config: TrainConfig) -> Dataset:
    """Open banks and records; UserError with every problem of them and of the stage."""
    stage = stage_problem(config.stage_path)
    problems = [stage] if stage else []
    try:
        dataset = open_dataset(config)
        problems += filter(None, [bank_problem(config, dataset)])
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError.of(problems)
    return dataset


def show_plan(config: TrainConfig, dataset: Dataset, world: int) -> None:
    """Print what the run would be on so many devices: from lengths alone, without torch."""
    from train.batches.plan import plan_run, rows_per_step
    from train.estimate import table

    plan = plan_run(config, dataset, rows_per_step(config, world, {}))
    print(table(config, dataset, plan, world))  # noqa: T201


def start(config: TrainConfig, dataset: Dataset) -> None:
    """Train. A run that a signal ended exits with 128 + its number: 143 or 130."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the loader's
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from train.loop.loop import train
    from train.loop.signals import StopSignals

    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes on the CPU do not find each other
        mixed_precision="bf16" if config.bf16 else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    with StopSignals() as signals:
        stopped_by = train(config, dataset, accelerator, signals)
    accelerator.end_training()
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)


def only_run_in(output_dir: str, argv: Sequence[str]) -> AbstractContextManager[None]:
    """Keep a second run out of the output folder; of several processes the first one does."""
    if int(os.environ.get("RANK", "0")) > 0:
        return nullcontext()
    command = shlex.join(["train/run.py", *argv])
    return folder_lock(
        Path(output_dir),
        command if len(command) <= SHOWN else f"{command[:SHOWN]} ...",
        fix="wait for its end, end it, or name another output_dir",
    )


def silent_single_process(environ: Mapping[str, str]) -> str | None:
    """Return what to run instead where Accelerate was asked for processes and started only one.

    `accelerate launch --cpu --num_processes 2` (1.15) sets MASTER_ADDR, which it does for two and
    more, and then starts the script once, without WORLD_SIZE.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environ
    if launched and "MASTER_ADDR" in environ and "WORLD_SIZE" not in environ:
        return (
            "accelerate launch was asked for several processes and started one (it does so with "
            "--cpu). Run `accelerate launch --multi_gpu --num_processes 2 train/run.py ...` (works "
            "on CPU too) or `torchrun --nproc_per_node 2 -m train.run ...`"
        )
    return None


def unsupported(reduce: str, environ: Mapping[str, str]) -> str | None:
    """Return why Accelerate's way of sharing the model over processes is refused, if it is."""
    asked = {name: environ.get(name, "false").lower() for name in environ}
    if asked.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return (
            "DeepSpeed is not supported: it scales, clips and accumulates by itself, and this "
            "trainer does so over exact counts. Use DDP, or FSDP2: "
            "accelerate launch --config_file train/presets/fsdp2_8gpu.yaml train/run.py ..."
        )
    if asked.get("ACCELERATE_USE_FSDP") != "true":
        return None
    if environ.get("FSDP_VERSION", "1") != "2":
        return "FSDP 1 is not supported; set fsdp_version: 2, as train/presets/fsdp2_8gpu.yaml does"
    if reduce == "exact":
        return "reduce exact adds up whole gradients, which FSDP2 never has; use reduce: fast"
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
