"""Train LAPE, projector and LLM on banked features: no video and no tower is touched.

    accelerate launch train/run.py --config train/presets/toy.yaml --output_dir runs/a
    accelerate launch --multi_gpu --num_processes 2 train/run.py --config ...   # also on CPU
    torchrun --nproc_per_node 2 -m train.run --config ...

The story: settings -> banks and records -> model -> steps -> checkpoints. Everything that can be
refused is refused before torch is imported.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import TrainConfig, parse, refuse
from train.dataset import Dataset, open_dataset

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from model.batch import Batch
    from model.vlm import VLM
    from train.loader import StepShape
    from train.metrics import Json

COPY_EVERY = 10
"""Steps between readings of the copy baseline, which needs both streams of a clip."""
CALIBRATED = 8
"""Records of the first step that set the scale of LAPE's positions, however the step is cut."""


def main(argv: list[str]) -> None:
    config = parse(argv)
    problem = silent_single_process(os.environ)
    if problem:
        refuse([problem])
    dataset = open_dataset(config)

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
        train(config, dataset, accelerator)
    except ValueError as error:
        refuse([str(error)])
    accelerator.end_training()


def train(config: TrainConfig, dataset: Dataset, accelerator: "Accelerator") -> None:
    from model.batch import to_device
    from model.vlm import VLM
    from train.chat import Chat
    from train.checkpoint import find_resume, prune, read_state, save_checkpoint, set_aside
    from train.evaluate import held_out_loss
    from train.loader import Loader
    from train.metrics import RunLog, line_of
    from train.optimizer import load_optimizer, make_optimizer, rate
    from train.report import banner, closing

    if config.attn == "flex_attention" and accelerator.device.type != "cuda":
        raise ValueError(
            "attn flex_attention needs CUDA (it cannot train on the CPU); use attn: sdpa"
        )
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    resumed = find_resume(output_dir, config.resume)
    state = read_state(resumed) if resumed else {}
    shape = step_shape(config, accelerator, state)
    total = num_steps(config, dataset, shape)
    log = RunLog(output_dir, state.get("step", 0), accelerator.is_main_process)
    if accelerator.is_main_process:
        (output_dir / "run.json").write_text(
            json.dumps({"config": asdict(config)}, indent=2) + "\n"
        )

    model = VLM.load(resumed, llm_dtype(config)) if resumed else build(config, dataset, log.say)
    refuse_other_run(config, dataset, model, resumed)
    accelerator.wait_for_everyone()  # all ranks have chosen their checkpoint
    if accelerator.is_main_process:
        set_aside(output_dir, state.get("step", 0))
    prepare_llm(model, config)
    chat = Chat(model.tokenizer, model.lape.tokens if model.lape else None)
    loader = Loader(dataset, chat, model.config, config.seed)
    ratio = math.nan
    if not model.calibrated:
        chosen = dataset.batch_records(0, shape.records, config.seed)[:CALIBRATED]
        ratio = model.calibrate(loader.batch([dataset.records[k] for k in chosen], with_copy=False))
    log.say(banner(config, dataset, model, shape, total, ratio, resumed))

    optimizer = make_optimizer(model, config)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if resumed:
        load_optimizer(optimizer, resumed)
    started, best = time.monotonic(), state.get("best")
    first = state.get("step", 0)
    waited = time.monotonic()
    metrics: Json = {}
    for step, batches in loader.steps(first, total, shape, COPY_EVERY):
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, total, config.warmup_ratio)
        on_device = [to_device(batch, accelerator.device) for batch in batches]
        metrics = run_step(wrapped, optimizer, on_device, step, shape, config, accelerator)
        done, now = step + 1, time.monotonic()
        metrics |= {
            "learning_rate": optimizer.param_groups[0]["lr"],
            "seconds": now - waited,
            "data_wait": (began - waited) / (now - waited),
            "tokens_per_second": metrics["tokens"] / (now - waited),
            "eta_seconds": (now - started) / (done - first) * (total - done),
        }
        waited = now
        log.record(done, metrics)
        if done % config.logging_steps == 0 or done in (first + 1, total):
            log.say(line_of(done, total, metrics))
        if dataset.held_out and (done == total or _every(config.eval_steps, done)):
            held = held_out_loss(model, loader, dataset.held_out, shape, accelerator)
            log.record(done, held, kind="eval")
            log.say(f"held out: {line_of(done, total, held)}")
            if best is None or held["loss"] < best["loss"]:
                best = {"loss": held["loss"], "step": done}
            waited = time.monotonic()
        better = best is not None and best["step"] == done and config.eval_steps > 0
        if done == total or _every(config.save_steps, done) or better:
            if accelerator.is_main_process:
                state = {"best": best, "global_batch": shape.records, "config": asdict(config)}
                save_checkpoint(output_dir, done, model, optimizer.optimizer, state)
                keep = f"checkpoint-{best['step']}" if best else None
                prune(output_dir, config.save_total_limit, keep)
            accelerator.wait_for_everyone()
            waited = time.monotonic()
    if accelerator.is_main_process:
        model.save(output_dir)
    log.say(closing(config, model, output_dir, time.monotonic() - started, metrics, best))
    log.close()


def run_step(
    model: Any,
    optimizer: Any,
    batches: "list[Batch]",
    step: int,
    shape: "StepShape",
    config: TrainConfig,
    accelerator: "Accelerator",
) -> "Json":
    """Take one optimizer step on a global batch; return its metrics, summed over all ranks.

    Both losses are sums divided by global counts, over every rank and micro-batch, so that the
    gradient does not depend on how the batch was cut.
    """
    import torch

    from train.metrics import summarise, sums_of

    counts = torch.tensor(
        [sum(len(b.labels) for b in batches), sum(b.num_transitions for b in batches)],
        dtype=torch.float64,
        device=accelerator.device,
    )
    num_labels, num_transitions = accelerator.reduce(counts, reduction="sum").clamp(min=1).tolist()
    totals = []
    for k, batch in enumerate(batches):
        # dropout depends on where the micro-batch stands in the run, not on the rank's history
        torch.manual_seed(hash((config.seed, step, shape.rank + k * shape.world)) % 2**63)
        last = k == len(batches) - 1
        with _no_sync(accelerator, model, last):
            with accelerator.autocast():
                out = model(batch)
            loss = out["ce"] / num_labels
            if "ar" in out:
                loss = loss + config.loss_weight * out["ar"].sum() / num_transitions
            # DDP averages over ranks, the denominators are global already
            accelerator.backward(loss * accelerator.num_processes)
        totals.append(sums_of(out, batch))
    metrics = summarise(
        accelerator.reduce(torch.stack(totals).sum(dim=0), reduction="sum"), config.loss_weight
    )
    norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    if not math.isfinite(metrics["loss"]) or not math.isfinite(float(norm)):
        names = [id_ for batch in batches for id_ in batch.record_ids]
        raise ValueError(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {float(norm)}; this rank had the "
            f"records {', '.join(names)}. Lower learning_rate, or look at these records"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics | {"grad_norm": float(norm)}


def build(config: TrainConfig, dataset: Dataset, say: Callable[[str], None]) -> "VLM":
    """Return a fresh model for a run on these banks."""
    manifest = dataset.banks.manifest
    return assemble(
        config,
        asdict(model_config(config, dataset)),
        manifest["tower_width"],
        dataset.banks.config.to_json(),
        manifest["provenance"]["tower"],
        say,
    )


def assemble(
    config: TrainConfig,
    facts: "Json",
    width: int,
    features: "Json",
    tower: str,
    say: Callable[[str], None],
) -> "VLM":
    """Return a model over the LLM of the stage path, taking over the parts of a framebank run."""
    import torch
    from transformers import AutoTokenizer

    from model.folder import load_llm
    from model.vlm import VLM, VLMConfig

    torch.manual_seed(config.seed)
    stage = Path(config.stage_path)
    is_run = (stage / "projector.safetensors").exists()
    llm_path = stage / "llm" if is_run else config.stage_path
    llm = load_llm(llm_path, llm_dtype(config))
    if hasattr(llm, "peft_config") and config.tune_llm != "lora":
        llm = llm.merge_and_unload()
    model = VLM.assemble(
        VLMConfig(**facts),
        llm,
        AutoTokenizer.from_pretrained(llm_path),
        width=width,
        features=features,
        tower=tower,
    )
    for line in model.adopt(stage) if is_run else []:
        say(f"stage     {line}")
    return model


def llm_dtype(config: TrainConfig) -> "torch.dtype":
    """Return the LLM's own type: trained weights are fp32, frozen ones as small as asked."""
    import torch

    frozen = config.tune_llm != "full"
    return torch.bfloat16 if frozen and config.bf16 else torch.float32


def model_config(config: TrainConfig, dataset: Dataset) -> Any:
    """Return what of the settings stays with the model."""
    from dataclasses import fields

    from model.vlm import VLMConfig

    own = {field.name for field in fields(VLMConfig)} - {"slow_stride", "fast_stride"}
    return VLMConfig(
        slow_stride=dataset.slow_stride,
        fast_stride=dataset.fast_stride,
        **{name: getattr(config, name) for name in own},
    )


def prepare_llm(model: "VLM", config: TrainConfig) -> None:
    """Freeze, adapt or free the LLM, and set how it attends and what it keeps in memory."""
    llm = model.llm
    llm.set_attn_implementation(config.attn)
    if config.tune_llm == "frozen":
        llm.requires_grad_(False)
    elif config.tune_llm == "lora" and not hasattr(llm, "peft_config"):
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear"
        )
        model.llm = get_peft_model(llm, lora)
    if config.gradient_checkpointing:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def step_shape(config: TrainConfig, accelerator: "Accelerator", state: "Json") -> "StepShape":
    """Return how a global batch is cut; a resumed run keeps its global batch on any world size."""
    from train.loader import StepShape

    size, world = config.per_device_train_batch_size, accelerator.num_processes
    records = state.get("global_batch") or size * config.gradient_accumulation_steps * world
    if records % (size * world):
        raise ValueError(
            f"the run's global batch of {records} records does not divide into micro-batches of "
            f"{size} on {world} processes; set per_device_train_batch_size to a divisor of "
            f"{records // world if records % world == 0 else records}"
        )
    return StepShape(size, records // size, accelerator.process_index, world)


def num_steps(config: TrainConfig, dataset: Dataset, shape: "StepShape") -> int:
    """Return the run's steps: as asked, or whole global batches that the epochs give (one at least)."""
    if config.max_steps:
        return config.max_steps
    return max(1, int(config.num_train_epochs * len(dataset.records) / shape.records))


def refuse_other_run(
    config: TrainConfig, dataset: Dataset, model: "VLM", resumed: Path | None
) -> None:
    """Raise ValueError where a checkpoint was made with another model or bank than asked for."""
    from shards.reader import joint
    from shards.schema import FeatureConfig, differences

    if resumed is None:
        return
    lines = differences(asdict(model_config(config, dataset)), asdict(model.config))
    theirs = FeatureConfig.from_json(model.features)
    lines += differences(joint(dataset.banks.config), joint(theirs), "bank ")
    if lines:
        raise ValueError(
            f"{resumed} does not fit this run: {'; '.join(lines)}. Use the same settings, another "
            "output_dir, or resume: none"
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


def _every(steps: int, done: int) -> bool:
    return steps > 0 and done % steps == 0


def _no_sync(accelerator: "Accelerator", model: Any, last: bool) -> Any:
    from contextlib import nullcontext

    return nullcontext() if last else accelerator.no_sync(model)


if __name__ == "__main__":
    main(sys.argv[1:])
