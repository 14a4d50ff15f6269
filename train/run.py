"""Train LAPE, projector and LLM on banked features: no video and no tower is touched.

    accelerate launch train/run.py --config train/presets/toy.yaml --output_dir runs/a
    accelerate launch --multi_gpu --num_processes 2 train/run.py --config ...   # also on CPU
    torchrun --nproc_per_node 2 -m train.run --config ...

The story: settings -> banks and records -> plan -> model -> steps -> checkpoints. Everything that
can be refused is refused before torch is imported. `--plan` stops after the plan and prints it.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError
from train.data.dataset import Dataset, open_dataset
from train.loop.signals import Requests
from train.settings.config import TrainConfig, parse, refuse
from train.start.stage import bank_problem, build, llm_base, model_config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.batches.plan import RunPlan
    from train.loop.metrics import Json

COPY_EVERY = 10
"""Steps between readings of the copy baseline, which needs both streams of a clip."""
CALIBRATED = 8
"""Records of the first step that set the scale of LAPE's positions, however the step is cut."""
CHECKED = 3
"""First steps whose counts are compared with those of the plan."""


def main(argv: list[str]) -> None:
    config = parse(argv)
    problem = silent_single_process(os.environ) or unsupported(config, os.environ)
    if problem:
        refuse([problem])
    dataset = open_dataset(config)
    if problem := bank_problem(config, dataset):
        refuse([problem])
    if config.plan:
        show_plan(config, dataset, int(os.environ.get("WORLD_SIZE", "1")))
        return

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the loader's
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes on the CPU do not find each other
        mixed_precision="bf16" if config.bf16 else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    try:
        with Requests() as requests:
            train(config, dataset, accelerator, requests)
    except UserError as error:
        refuse([str(error)])
    accelerator.end_training()


def show_plan(config: TrainConfig, dataset: Dataset, world: int) -> None:
    """Print what the run would be on so many devices: from lengths alone, without torch."""
    from train.batches.plan import plan_run
    from train.estimate import table

    try:
        plan = plan_run(config, dataset, rows_per_step(config, world, {}))
    except UserError as error:
        refuse([str(error)])
    print(table(config, dataset, plan, world))  # noqa: T201


def train(
    config: TrainConfig, dataset: Dataset, accelerator: "Accelerator", requests: Requests
) -> None:
    import torch

    from model.family.conformance import admit
    from model.vlm import VLM
    from train.batches.chat import Chat
    from train.batches.loader import Loader, Share
    from train.batches.plan import plan_run
    from train.loop.checkpoint import (
        changed_settings,
        prune,
        read_state,
        refuse_other_run,
        save_checkpoint,
        set_aside,
    )
    from train.loop.checks import Heaviest, Movement, fits, rehearse
    from train.loop.fsdp import Whole
    from train.loop.gradients import make_reduction
    from train.loop.held_out import held_out_loss
    from train.loop.log import RunLog, line_of
    from train.loop.optimizer import allocate, load_optimizer, make_optimizer, rate
    from train.loop.speed import make_pace
    from train.loop.step import Losses, run_step
    from train.report import banner, closing
    from train.start.attention import choose_attention
    from train.start.prepare_llm import llm_dtype, prepare_llm

    on_cuda = accelerator.device.type == "cuda"
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    resumed = chosen_checkpoint(output_dir, config.resume, accelerator)
    state = read_state(resumed) if resumed else {}
    pin_threads(config, state, accelerator.num_processes)
    share = Share(accelerator.process_index, accelerator.num_processes)
    with accelerator.local_main_process_first():  # the others then find the lengths cached
        plan = plan_run(config, dataset, rows_per_step(config, share.world, state))
    if accelerator.is_fsdp2 and plan.packs_per_step % share.world:
        raise UserError(
            f"FSDP needs as many micro-batches on each process: {plan.packs_per_step} of a step do not "
            f"divide among {share.world}; use a divisor of {plan.packs_per_step} processes"
        )
    total = plan.num_steps
    longest = int(plan.tokens.max())
    attention, reason = choose_attention(config, accelerator.device.type, longest)
    facts = facts_of(config, dataset, plan)
    if resumed:
        refuse_other_run(resumed, state, facts)
    log = RunLog(
        output_dir,
        state.get("step", 0),
        accelerator.is_main_process,
        wandb=asdict(config) if config.wandb else None,
    )
    if accelerator.is_main_process:
        (output_dir / "run.json").write_text(
            json.dumps({"config": asdict(config)}, indent=2) + "\n"
        )

    if resumed:
        model = VLM.load(resumed, llm_dtype(config), llm_base(config))
    else:
        model = build(config, dataset, log.say)
    if accelerator.is_main_process:
        set_aside(output_dir, state.get("step", 0))
    if not accelerator.is_fsdp2:  # which moves it a layer at a time
        model.to(accelerator.device)
    auto, packed = config.attn == "auto", bool(config.pack_tokens)
    attention, reason = admit(model, attention, reason, auto=auto, packed=packed)
    prepare_llm(model, config, attention, accelerator.device)
    chat = Chat(model.tokenizer, model.lape.tokens if model.lape else None)
    # what is compiled is compiled for one length of rows; flex_attention cuts it into blocks of 128
    compiled = attention == "flex_attention" or config.compile
    row_length = -(-config.pack_tokens // 128) * 128 if compiled else 0
    loader = Loader(dataset, chat, model.config, row_length=row_length, pin=on_cuda)
    ratio = math.nan
    if not model.calibrated:
        ratio = model.calibrate(
            loader.batch([dataset.records[k] for k in plan.records(0)[:CALIBRATED]])
        )
    log.say(banner(config, dataset, model, plan, share.world, ratio, resumed))
    if resumed and (changed := changed_settings(resumed, state, asdict(config))):
        log.say(changed)
    log.say(f"attention {attention}: {reason}")

    whole = Whole(model, accelerator)
    reduction = make_reduction(config.reduce, accelerator, model, make_optimizer(model, config))
    optimizer = reduction.optimizer.optimizer
    allocate(optimizer)
    if resumed:
        load_optimizer(optimizer, model, resumed)
    first = state.get("step", 0)
    heaviest = Heaviest.of(plan, model)
    if config.rehearsal and first < total:
        at, pack = plan.heaviest
        with fits("the heaviest pack, tried before the first step", heaviest, config):
            rehearse(
                reduction,
                model,
                loader.pack(plan, at, pack, with_copy=True),
                Losses(config, plan, at, accelerator),
                accumulated=plan.packs_per_step > share.world,
            )
    movement = Movement(model, accelerator)
    started, best = time.monotonic(), state.get("best")
    pace = make_pace(config, model, accelerator.device, share.world, first, total)
    log.say(pace.legend)
    metrics: Json = {}
    for step, batches in loader.steps(
        plan, share, first, copy_every=COPY_EVERY, prefetch=config.prefetch
    ):
        pace.ready()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, total, config.warmup_ratio)
        with fits(f"step {step + 1}", heaviest, config):
            taken = run_step(reduction, accelerator, model, batches, plan, step, config, requests)
        metrics = taken.metrics
        movement.check(
            step,
            frames=bool(plan.num_transitions[step]),
            warming_up=step < config.lape_warmup_steps,
        )
        if step < first + CHECKED:
            check_counts(plan, step, metrics)
        done = step + 1
        metrics |= {"learning_rate": optimizer.param_groups[0]["lr"]}
        metrics |= pace.done(done, metrics)
        log.record(done, metrics)
        if done % config.logging_steps == 0 or done in (first + 1, total):
            log.say(line_of(done, total, metrics))
        if dataset.held_out and (done == total or _every(config.eval_steps, done)):
            held = held_out_loss(
                model,
                loader,
                dataset.held_out,
                config.per_device_train_batch_size,
                accelerator,
            )
            log.record(done, held, kind="eval")
            log.say(f"held out: {line_of(done, total, held)}")
            if best is None or held["loss"] < best["loss"]:
                best = {"loss": held["loss"], "step": done}
            pace.rest()
        better = best is not None and best["step"] == done and config.eval_steps > 0
        asked = taken.stop or taken.save
        if done == total or _every(config.save_steps, done) or better or asked:
            saved = whole.gather(optimizer)
            if accelerator.is_main_process:
                state = {"best": best, "global_batch": plan.rows_per_step, "facts": facts}
                state |= {"plan": plan.fingerprint, "config": asdict(config)}
                state |= {"threads": torch.get_num_threads(), "processes": share.world}
                save_checkpoint(output_dir, done, *saved, state)
                keep = f"checkpoint-{best['step']}" if best else None
                prune(output_dir, config.save_total_limit, keep)
            accelerator.wait_for_everyone()
            pace.rest()
        if taken.stop and done < total:
            log.say(
                f"stopped by SIGTERM after step {done} of {total}; checkpoint-{done} is saved, the "
                "same command with resume: auto goes on from it"
            )
            log.close()
            return
    saved = whole.gather(optimizer)
    if accelerator.is_main_process:
        saved[0].save(output_dir)
    log.say(closing(config, model, output_dir, time.monotonic() - started, metrics, best))
    log.close()


def check_counts(plan: "RunPlan", step: int, metrics: "Json") -> None:
    """Assert that what all ranks counted in a step is what the plan divided by."""
    counted = metrics["supervised_tokens"], metrics["tokens"]
    assert counted == (plan.num_labels[step], plan.per_step(plan.tokens)[step]), (step, metrics)
    if metrics["transitions"]:  # none without a frame head
        assert metrics["transitions"] == plan.num_transitions[step], (step, metrics)


def rows_per_step(config: TrainConfig, world: int, state: "Json") -> int:
    """Return the rows of a step over all ranks; a resumed run keeps its own on any world size.

    The packs need not divide by the number of processes, but each must have one.
    """
    size = config.per_device_train_batch_size
    rows = state.get("global_batch") or size * config.gradient_accumulation_steps * world
    if rows % size:
        raise UserError(
            f"the run's global batch of {rows} rows does not divide into micro-batches of {size}; "
            "set per_device_train_batch_size to a divisor of it"
        )
    if rows // size < world:
        raise UserError(
            f"the run's global batch of {rows} rows gives {rows // size} micro-batches of {size} to "
            f"{world} processes; use at most {rows} processes, and per_device_train_batch_size "
            f"{max(1, rows // world)} or a smaller divisor of {rows}"
        )
    return int(rows)


def facts_of(config: TrainConfig, dataset: Dataset, plan: "RunPlan") -> "dict[str, Json]":
    """Return what must be the same to go on from a checkpoint, by subject and name."""
    from shards.read.banks import joint

    model = asdict(model_config(config, dataset))
    adapter = ("lora_r", "lora_alpha") if config.tune_llm == "lora" else ()
    return {
        "model": model | {name: getattr(config, name) for name in ("tune_llm", *adapter)},
        "bank": joint(dataset.banks.config),
        "plan": {k: v for k, v in plan.facts.items() if k not in model and k != "bank"},
    }


def chosen_checkpoint(output_dir: Path, resume: str, accelerator: "Accelerator") -> Path | None:
    """Return the checkpoint to go on from: one process reads them through, all take the same."""
    from accelerate.utils import broadcast_object_list

    from train.loop.checkpoint import find_resume

    chosen = [find_resume(output_dir, resume) if accelerator.is_main_process else None]
    return broadcast_object_list(chosen)[0]


def pin_threads(config: TrainConfig, state: "Json", processes: int) -> None:
    """Set torch's threads: as asked, or as the run began, whose sums they cut into parts."""
    import torch

    as_before = config.reduce == "exact" or state.get("processes") == processes
    threads = config.num_threads or (state.get("threads") if as_before else None)
    if threads:
        torch.set_num_threads(threads)


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


def unsupported(config: TrainConfig, environ: Mapping[str, str]) -> str | None:
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
    if config.reduce == "exact":
        return "reduce exact adds up whole gradients, which FSDP2 never has; use reduce: fast"
    return None


def _every(steps: int, done: int) -> bool:
    return steps > 0 and done % steps == 0


if __name__ == "__main__":
    main(sys.argv[1:])
