"""Train LAPE, projector and LLM on banked features, without videos or a vision tower.

    accelerate launch train/run.py --config train/presets/toy.yaml --output_dir runs/a
    accelerate launch --multi_gpu --num_processes 2 train/run.py --config ...   # also on CPU
    torchrun --nproc_per_node 2 -m train.run --config ...
    accelerate launch train/run.py --sweep sweep.yaml --output_dir runs   # many, see train/sweep

Settings -> banks and records -> the run itself (`train/loop/loop.py`). Everything that can be
refused is refused before torch is imported. `--plan` prints the run's plan and cost, and stops.
"""

import gc
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.stopping import end_by
from shards.write.lock import folder_lock
from train.data.dataset import Dataset, open_dataset
from train.settings.ancestors import Process, accelerate_words, holders
from train.settings.config import TrainConfig, parse
from train.settings.exits import command
from train.start.stage import as_its_stage, bank_problem
from train.start.stage_files import stage_problem
from train.sweep.story import run_sweeps

SHOWN = 160
"""Characters of this run's command in the message to a second run in the same folder."""

if TYPE_CHECKING:
    from accelerate import Accelerator


@command
def main(argv: list[str]) -> None:
    # a sweep has settings of many runs: it parses them itself, and starts each as a process of its own
    if any(word.partition("=")[0] == "--sweep" for word in argv):
        run_sweeps(argv, os.environ, accelerate_words(argv))
        return
    holding = holders()  # before minutes of loading, in which they may end
    config = parse(argv, os.environ, accelerate_words(argv))
    with no_garbage():
        dataset = open_inputs(config)
        # `auto` settings become those of the stage, which decide how many tokens a clip has: a plan
        # has to count them as the run would
        config = as_its_stage(config)
        if config.plan:
            launched = int(os.environ.get("WORLD_SIZE", "1"))
            show_plan(config, dataset, config.plan_devices or launched)
    if not config.plan:
        # after everything that can be refused: a refused command leaves no folder and no lock behind
        with only_run_in(config.output_dir, argv):
            start(config, dataset, holding)


@contextmanager
def no_garbage() -> Iterator[None]:
    """Collect none: records stay, and looking for garbage among them takes a fifth of reading them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def open_inputs(config: TrainConfig) -> Dataset:
    """Open banks and records; UserError with every problem of them and of the stage."""
    # stage and records are looked at both, so that one attempt names everything that is wrong
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
    # only --plan needs these here; a run plans once it knows its processes
    from train.batches.plan import plan_run, rows_per_step
    from train.estimate import table

    plan = plan_run(config, dataset, rows_per_step(config, world, {}))
    for warning in dataset.warnings:
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201
    print(table(config, dataset, plan, world))  # noqa: T201


def start(config: TrainConfig, dataset: Dataset, holding: Sequence[Process]) -> None:
    """Train. A run that a signal ended exits with 128 + its number: 143, 130 or 129.

    holding: the processes whose end is to end the run.
    """
    # -- before torch is imported: it reads both variables while it loads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the loader's
    # DDP warns where it finds no unused parameter: a later pack may have some
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    from train.loop.loop import train
    from train.loop.signals import StopSignals
    from train.measured.arithmetic import with_arithmetic

    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    on_cpu = not torch.accelerator.is_available()
    # decided before the Accelerator is made, whose mixed precision cannot be changed afterwards
    if config.bf16 == "auto":
        config, note = with_arithmetic(config, dataset, on_cpu)
        dataset = replace(dataset, notes=(*dataset.notes, note))
    # -- one Accelerator: the processes find each other, and learn in which precision
    accelerator = Accelerator(
        cpu=on_cpu,  # else processes on the CPU do not find each other
        mixed_precision="bf16" if config.bf16 else "no",
        # ours alone, which have taken in what the launcher was asked for
        dynamo_backend="no",
        # Accelerate divides each loss by num_steps; ours are divided by the whole step's
        # denominators already
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # a pack without frames gives the frame predictor no gradient, and DDP would wait for it for
        # ever. It also keeps the buckets as they are: DDP otherwise rearranges them after its first
        # step, so that a resumed run would sum in another order than one that never stopped.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    # only now is it known what Accelerate made of the launcher's wish
    refuse_lost_fsdp(accelerator, os.environ)
    # one clock decides: processes that each looked at their own would not save at the same step
    save_seconds = 60 * config.save_minutes if accelerator.is_main_process else 0
    with StopSignals(holding, save_seconds) as signals:
        stopped_by = train(config, dataset, accelerator, signals)
    accelerator.end_training()
    if stopped_by is not None:
        # as shells report a process that died of a signal, so that schedulers see which one it was
        end_by(stopped_by)


def refuse_lost_fsdp(accelerator: "Accelerator", environ: Mapping[str, str]) -> None:
    """Raise UserError where FSDP was asked for and Accelerate has made plain processes of it."""
    if environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not accelerator.is_fsdp2:
        raise UserError(
            f"FSDP was asked for, and Accelerate shards on GPUs alone: here it would run "
            f"{accelerator.distributed_type.value} on {accelerator.device.type}",
            where="ACCELERATE_USE_FSDP",
            fix="launch without FSDP (leave the FSDP file out), or on GPUs",
        )


def only_run_in(output_dir: str, argv: Sequence[str]) -> AbstractContextManager[None]:
    """Keep a second run out of the output folder; of several processes the first one does."""
    # processes of one run would lock each other out
    if int(os.environ.get("RANK", "0")) > 0:
        return nullcontext()
    command = shlex.join(["train/run.py", *argv])
    return folder_lock(
        Path(output_dir),
        command if len(command) <= SHOWN else f"{command[:SHOWN]} ...",
        fix="wait for its end, end it, or name another output_dir",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
