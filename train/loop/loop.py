"""A run from its plan to its saved model: plan, model, rehearsal, steps, save.

`train()` is the story; its steps share a `Run` and a `Learner`. A run that resumes takes the same way:
its checkpoint is chosen in `make_run` and loaded in `make_learner`, and its steps begin at `Run.first`.
"""

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.batch import Batch, to_device
from model.fsdp.save import is_sharded
from model.vlm import VLM
from shards.signed import Json
from train.batches.chat import Chat
from train.batches.loader import Loader, Share
from train.batches.plan import all_drops, plan_run, rows_per_step
from train.batches.run_plan import RunPlan
from train.data.dataset import Dataset
from train.data.drops import LIST, write_drops
from train.loop.checkpoint import (
    changed_settings,
    choose_checkpoint,
    facts_of,
    kept_rows,
    prune,
    read_state,
    refuse_other_run,
    save_checkpoint,
    save_model,
    save_sharded,
    set_aside,
)
from train.loop.checks import PackMemory, UpdateCheck, check_counts, out_of_memory_advice, rehearse
from train.loop.floor import Floor, floor_of_run
from train.loop.gradients import Reduction, make_reduction, pin_threads
from train.loop.held_out import best_before, held_out_loss, lowest
from train.loop.log import RunLog, banner, closing, line_of
from train.loop.metrics import gammas_of
from train.loop.optimizer import allocate, load_optimizer, make_optimizer, rates_of, set_rates
from train.loop.signals import StopSignals
from train.loop.speed import StepTimer, make_timer
from train.loop.step import Losses, Step, run_step
from train.settings.config import TrainConfig
from train.settings.output import RUN
from train.settings.recorded import token_limit, write_run
from train.start.prepare_llm import admit_llm, choose_attention, llm_dtype, prepare_llm
from train.start.stage import build, llm_base

if TYPE_CHECKING:
    from accelerate import Accelerator

COPY_EVERY = 10
"""Steps between measurements of the baselines, which read every frame in both streams: twice the bytes,
150 kB a frame of SigLIP in place of 75 at a slow ratio of a half."""
CALIBRATED = 8
"""Records from which LAPE's gamma is set: the run's first ones with media."""
CHECKED = 3
"""First steps whose counts are compared with the plan's."""


def train(
    config: TrainConfig, dataset: Dataset, accelerator: "Accelerator", signals: StopSignals
) -> signal.Signals | None:
    """Take all steps of a run and save its model; every rank calls this.

    Returns the signal that ended the run before its last step, after a checkpoint, or None.
    Raises UserError where the run cannot begin or go on.
    """
    # -- plan: which records each step learns from, before any weight is loaded
    run = make_run(config, dataset, accelerator)
    plan, total, log = run.plan, run.plan.num_steps, run.log

    # -- model: built or resumed, with its loader, reduction and optimizer
    learner = make_learner(run)

    # -- rehearsal: the heaviest pack first, so that memory runs out now or never, not hours in
    memory = PackMemory.of(plan, learner.model)
    if config.rehearsal and run.first < total:
        rehearse_heaviest(run, learner, memory)

    # -- steps
    updates = UpdateCheck(learner.model, accelerator)
    began = time.monotonic()
    timer = start_timer(run, learner.model)
    metrics: Json = {}
    best = best_before(run.state, run.dataset.held_out, log.say)
    for step, batches in learner.loader.steps(
        plan, run.share, run.first, copy_every=COPY_EVERY, prefetch=config.prefetch
    ):
        timer.data_ready()
        set_rates(learner.optimizer, step, total, config.warmup_ratio)
        with out_of_memory_advice(f"step {step + 1}", memory, config):
            taken = take_step(run, learner, batches, step, signals)
        check_step(run, updates, step, taken.metrics)
        done = step + 1
        metrics = log_step(run, learner, timer, done, taken.metrics)
        if dataset.held_out and (done == total or is_due(config.eval_steps, done)):
            best = evaluate(run, learner, done, best)
            timer.pause_over()
        improved = config.eval_steps > 0 and best is not None and best["step"] == done
        asked = taken.stopped_by is not None or taken.save
        if done == total or is_due(config.save_steps, done) or improved or asked:
            save(run, learner, done, best)
            signals.saved()
            timer.pause_over()
        if taken.stopped_by is not None and done < total:
            log.say(
                f"stopped by {signals.cause or taken.stopped_by.name} after step {done} of {total}; "
                f"checkpoint-{done} is saved, the same command with resume: auto goes on from it"
            )
            log.close()
            return taken.stopped_by

    # -- save: the model itself, beside its checkpoints
    save_model(learner.model, run.output_dir, log.say, trained=bool(metrics))
    log.say(closing(learner.model, run.output_dir, time.monotonic() - began, metrics, best))
    log.close()
    return None


@dataclass(frozen=True)
class Run:
    """A run that may begin: its settings, its plan, and the checkpoint that it goes on from."""

    config: TrainConfig
    dataset: Dataset
    accelerator: "Accelerator"
    output_dir: Path
    resumed: Path | None
    """The checkpoint that the run goes on from."""
    state: Json
    """The manifest of that checkpoint, empty without one."""
    share: Share
    plan: RunPlan
    facts: dict[str, Json]
    """The facts that must be equal to go on from a checkpoint, by subject and name."""
    log: RunLog

    @property
    def first(self) -> int:
        """The first step to take, from 0."""
        return int(self.state.get("step", 0))


@dataclass(frozen=True)
class Learner:
    """The model, prepared for this device and all processes, with its loader and optimizer."""

    model: VLM
    loader: Loader
    reduction: Reduction
    optimizer: torch.optim.Optimizer
    floor: Floor | None
    """The baselines of the frame-causal loss; None without that loss."""


# -- plan


def make_run(config: TrainConfig, dataset: Dataset, accelerator: "Accelerator") -> Run:
    """Choose the checkpoint to go on from, make the plan, open the logs.

    UserError where the checkpoint is of another run, or the plan does not suit the processes.
    """
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    resumed, passed_over = choose_checkpoint(output_dir, config.resume, accelerator)
    state = read_state(resumed) if resumed else {}
    pin_threads(config.num_threads, config.reduce, state, accelerator.num_processes)
    share = Share(accelerator.process_index, accelerator.num_processes)
    with accelerator.local_main_process_first():  # the other processes then find lengths cached
        plan = plan_run(config, dataset, rows_per_step(config, share.world, state))
    longest = int(plan.tokens.max())
    # refuses a back-end that cannot run these rows, before weights are loaded
    choose_attention(config, accelerator.device.type, longest, apart=dataset.independent)
    facts = facts_of(config, dataset, plan)
    if resumed:
        refuse_other_run(resumed, state, facts)
    settings = asdict(config)
    is_main = accelerator.is_main_process
    log = RunLog(output_dir, state.get("step", 0), is_main, settings if config.wandb else None)
    for line in passed_over:
        log.say(line)
    has_weights = resumed is not None or (output_dir / "config.json").exists()
    # a run.json beside weights describes these, and stays
    if is_main and not (has_weights and (output_dir / RUN).exists()):
        write_run(output_dir, state.get("config", settings), 0)
    if resumed:
        changed = changed_settings(resumed, state, plan.num_steps, settings)
        for line in filter(None, (changed, kept_rows(state, settings, share.world))):
            log.say(line)
    if is_main:
        write_drops(output_dir / LIST, all_drops(dataset, plan))
    return Run(
        config=config,
        dataset=dataset,
        accelerator=accelerator,
        output_dir=output_dir,
        resumed=resumed,
        state=state,
        share=share,
        plan=plan,
        facts=facts,
        log=log,
    )


# -- model


def make_learner(run: Run) -> Learner:
    """Build the model or load it from a checkpoint, print the banner, and prepare for training."""
    config, accelerator, log = run.config, run.accelerator, run.log
    if run.resumed:
        model = VLM.load(run.resumed, llm_dtype(config), llm_base(config))
    else:
        model = build(config, run.dataset, log.say)
    if accelerator.is_main_process:
        set_aside(run.output_dir, run.first)
    longest = int(run.plan.tokens.max())
    # FSDP moves the model to the device itself, a layer at a time
    device = None if accelerator.is_fsdp2 else accelerator.device
    kind, apart = accelerator.device.type, run.dataset.independent
    attention, reason = admit_llm(model, config, kind, longest, device, apart=apart)
    prepare_llm(model, config, attention, accelerator.device)
    loader = make_loader(run, model, compiled=attention == "flex_attention" or config.compile)
    ratio = math.nan
    if not model.calibrated:
        ratio = calibrate(run, model, loader)

    log.say(banner(config, run.dataset, model, run.plan, run.share.world, ratio, run.resumed))
    log.say(f"attention {attention}: {reason}")
    floor = floor_of_run(run.output_dir, run.plan, loader, accelerator, log.say)
    reduction = make_reduction(config.reduce, accelerator, model, make_optimizer(model, config))
    optimizer = reduction.optimizer.optimizer
    allocate(optimizer)
    if run.resumed:
        load_optimizer(optimizer, model, run.resumed)
    return Learner(model, loader, reduction, optimizer, floor)


def calibrate(run: Run, model: VLM, loader: Loader) -> float:
    """Calibrate a fresh model on the run's first records with media; return `VLM.calibrate`'s ratio."""
    records = run.plan.first_with_media(CALIBRATED)
    if records:
        whole = run.config.max_frames_num  # gamma must not depend on max_tokens
        batch = loader.rows([[(run.dataset.record(k), whole)] for k in records], False)
        # on the model's own device, to which FSDP moves it only later
        return model.calibrate(to_device(batch, model.visual.frame_end.device))
    learns = model.lape is not None and model.lape.preset == "plus"
    if learns and model.config.lape_positions:
        run.log.say(
            "LAPE      no record has a picture or a clip: the strength of positions (gamma) stays at 1; "
            "the first run from this model whose records have some sets it"
        )
    return math.nan


def make_loader(run: Run, model: VLM, *, compiled: bool) -> Loader:
    """Return the loader; compiled: rows of one length, as each other one is compiled on its own."""
    chat = Chat.of(model)
    # flex_attention cuts a row into blocks of 128
    row_length = -(-run.config.pack_tokens // 128) * 128 if compiled else 0
    on_cuda = run.accelerator.device.type == "cuda"
    limit = token_limit(asdict(run.config))  # for held-out records, which no plan cuts
    return Loader(run.dataset, chat, model.config, row_length=row_length, pin=on_cuda, limit=limit)


# -- rehearsal


def rehearse_heaviest(run: Run, learner: Learner, memory: PackMemory) -> None:
    """Try the plan's heaviest pack forward and backward; UserError with advice if it does not fit."""
    config, plan = run.config, run.plan
    step, pack = plan.heaviest
    with out_of_memory_advice("the heaviest pack, tried before the first step", memory, config):
        rehearse(
            learner.reduction,
            learner.model,
            learner.loader.pack(plan, step, pack, with_copy=True),
            Losses(config.seed, config.loss_weight, plan, step, run.accelerator, learner.floor),
            accumulated=plan.packs_per_step > run.share.world,
        )


# -- steps


def take_step(
    run: Run, learner: Learner, batches: Sequence[Batch], step: int, signals: StopSignals
) -> Step:
    """Take one optimizer step on this process's batches."""
    config = run.config
    losses = Losses(config.seed, config.loss_weight, run.plan, step, run.accelerator, learner.floor)
    if run.share.idles(run.plan, step):
        batches = [*batches, learner.loader.idle(run.plan, step)]
    return run_step(
        learner.reduction,
        run.accelerator,
        learner.model,
        batches,
        losses,
        signals,
        max_grad_norm=config.max_grad_norm,
        llm_waits=step < config.lape_warmup_steps,
    )


def start_timer(run: Run, model: VLM) -> StepTimer:
    """Start the clock, and print the definition of MFU in this run."""
    timer = make_timer(
        model,
        run.config.tune_llm,
        run.config.device_flops,
        run.accelerator.device,
        run.share.world,
        run.first,
        run.plan.num_steps,
    )
    run.log.say(timer.legend)
    return timer


def check_step(run: Run, updates: UpdateCheck, step: int, metrics: Json) -> None:
    """Check that the first steps move the trained parts, and count the tokens of the plan."""
    updates.check(
        step,
        frames=bool(run.plan.num_transitions[step]),
        warming_up=step < run.config.lape_warmup_steps,
    )
    if step < run.first + CHECKED:
        check_counts(run.plan, step, metrics)


def log_step(run: Run, learner: Learner, timer: StepTimer, done: int, metrics: Json) -> Json:
    """Write a step's metrics down, print them every `logging_steps`, and return them."""
    total, every = run.plan.num_steps, run.config.logging_steps
    is_due = done % every == 0 or done in (1, total)
    metrics = metrics | rates_of(learner.optimizer) | timer.rates(done, metrics)
    # not where this process began: a resumed run writes the lines of one that never stopped
    metrics |= gammas_of(learner.model) if is_due else {}
    run.log.record(done, metrics)
    run.log.show(done, total, metrics, line=is_due or done == run.first + 1)
    return metrics


def evaluate(run: Run, learner: Learner, done: int, best: Json | None) -> Json:
    """Measure the held-out loss; return the lowest so far, with its step."""
    held = held_out_loss(
        learner.model,
        learner.loader,
        run.dataset.held_out,
        run.config.per_device_train_batch_size,
        run.accelerator,
        learner.floor,
    )
    run.log.record(done, held, kind="eval")
    run.log.say(f"held out: {line_of(done, run.plan.num_steps, held)}")
    return lowest(best, held["loss"], done, run.dataset.held_out)


# -- save


def save(run: Run, learner: Learner, done: int, best: Json | None) -> None:
    """Write `checkpoint-done` and remove old ones; every rank waits until that is done."""
    keep = f"checkpoint-{best['step']}" if best else None
    is_main = run.accelerator.is_main_process
    if is_main:
        # first make room, where an earlier limit was higher; the newest, which verified, is kept
        prune(run.output_dir, run.config.save_total_limit, keep)
    state = {
        "best": best,
        "global_batch": run.plan.rows_per_step,
        "facts": run.facts,
        "plan": run.plan.fingerprint,
        "config": asdict(run.config),
        "threads": torch.get_num_threads(),
        "processes": run.share.world,
    }
    sharded = is_sharded(learner.model)
    if sharded or is_main:
        write = save_sharded if sharded else save_checkpoint
        write(run.output_dir, done, learner.model, learner.optimizer, state)
    if is_main:
        write_run(run.output_dir, asdict(run.config), run.first)
        prune(run.output_dir, run.config.save_total_limit, keep)
    run.accelerator.wait_for_everyone()


def is_due(steps: int, done: int) -> bool:
    """Return whether a thing that is due every `steps` steps is due now; 0: never."""
    return steps > 0 and done % steps == 0
