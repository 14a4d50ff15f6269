"""What a run will cost (`--plan`), as a table: from lengths and two config.json, without weights.

Memory counts 4 bytes of each trained weight and 12 of its gradient and moments, and 34 activations of
the LLM's width per place and layer in 2 or 4 bytes (Korthikanti et al., arXiv 2205.05198, without
attention scores, which no implementation here keeps): an estimate.
"""

from pathlib import Path

import numpy as np

from model.config import ModelSettings
from model.tower_kinds import frame_flops
from shards.text import duration, some
from train.batches.run_plan import RunPlan
from train.data.dataset import Dataset, drawn_line
from train.flops import (
    LlmShape,
    forward_flops,
    memory_bytes,
    step_flops,
)
from train.settings.config import DEVICES, TrainConfig
from train.start.stage import llm_name, read_config


def table(config: TrainConfig, dataset: Dataset, plan: RunPlan, world: int) -> str:
    """Return the table of a run's records, steps, memory and time."""
    rows_of = f"rows of {plan.pack_tokens} tokens" if plan.pack_tokens else "rows of one record"
    # -- what the plan knows from lengths alone
    step_tokens = plan.per_step(plan.tokens)
    # records that the data drops are in no plan; only those that lengths drop are subtracted
    records = len(plan.frames) - sum(
        count for reason, count in plan.dropped.items() if reason not in dataset.dropped
    )
    step, number = plan.heaviest
    pack = plan.pack(step, number)
    names = [dataset.record(k).id for row in pack for k in row]
    shown = some(names)
    # a pack is a rectangle: each of its rows is padded to the longest
    widest = max(int(plan.tokens[row].sum()) for row in pack)
    lines = [
        ("records", f"{records} kept{drawn_line(dataset)}, {plan.dropped_line}"),
        (
            "packs",
            f"{len(plan.pack_start)} of {plan.rows_per_pack} {rows_of}, "
            f"{len(plan.uses)} uses of records; {plan.efficiency:.2%} of the places hold a token",
        ),
        (
            "steps",
            f"{plan.num_steps} of {plan.packs_per_step} packs on {world} "
            f"process{'es' if world > 1 else ''}{plan.short_line}",
        ),
        (
            "tokens",
            f"{step_tokens.mean():,.0f} a step, {plan.num_labels.mean():,.0f} of them supervised, "
            f"{plan.num_transitions.mean():,.0f} transitions",
        ),
        (
            "heaviest",
            f"step {step + 1}, pack {number}: {len(pack)} x {widest} places, {shown}",
        ),
    ]
    if plan.frames_line:
        lines.insert(1, ("frames", plan.frames_line))
    lines += [("note", note) for note in dataset.notes]
    # -- what takes the LLM's sizes: read from its config.json, as no weights are loaded for a plan
    shape = LlmShape.of(read_config(llm_name(config.stage_path)) or {})
    if shape is None:
        lines.append(("model", "its config.json is of another family: no FLOPs, memory and time"))
    else:
        lines += costs(config, dataset, plan, world, shape, widest * len(pack))
    lines.append(("plan", plan.fingerprint))
    return "\n".join(f"{name:<10}{text}" for name, text in lines)


def costs(
    config: TrainConfig,
    dataset: Dataset,
    plan: RunPlan,
    world: int,
    shape: LlmShape,
    places: int,
) -> list[tuple[str, str]]:
    """Return the lines that depend on the LLM's sizes; places: tokens of the heaviest pack."""
    # only with block attention does a frame's token see the later ones of its frame
    whole_frames = plan.frame_pairs if config.frame_attention == "block" else 0
    pairs = plan.causal_pairs + whole_frames
    flops = step_flops(
        shape, plan.tokens, pairs, plan.supervised, config.tune_llm
    )  # of each record
    per_step = float(plan.per_step(flops).mean())
    peak = peak_of(config)
    speed = world * peak * config.assumed_mfu
    seconds = per_step / speed
    memory = memory_bytes(config, shape, dataset.banks.manifest.tower_width, places)
    read = float(plan.per_step(read_bytes(config, dataset, plan)).mean())
    # no tokens and no pairs: what is left is the head
    head = float(plan.per_step(forward_flops(shape, 0, 0, plan.supervised)).mean())
    at = f"at {config.assumed_mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s a device"
    return [
        (
            "model",
            f"{teraflops(per_step)} TFLOPs a step ({config.tune_llm}; the head's forward "
            f"{teraflops(head)}, on supervised rows only)",
        ),
        ("encoder", encoder_line(dataset, plan, per_step)),
        (
            "memory",
            f"about {memory / 2**30:,.1f} GiB a device at its peak, in the heaviest pack",
        ),
        ("read", f"{read / seconds / world / 1e6:,.1f} MB/s a device {at}"),
        ("time", f"{duration(seconds * plan.num_steps)}, {seconds:,.3f} s a step {at}"),
        ("hours", hours_line(config, seconds * plan.num_steps, world)),
        *encoding_lines(config, dataset, world),
    ]


def peak_of(config: TrainConfig) -> float:
    """Return the peak FLOP/s of the device that a plan is for."""
    return config.device_flops or DEVICES[config.plan_device]


def hours_line(config: TrainConfig, seconds: float, world: int) -> str:
    """Return the hours that so many seconds are, and on what: as a line, with what is assumed."""
    hours = seconds / 3600
    device = config.plan_device
    if config.device_flops:
        device = f"a device of {config.device_flops / 1e12:,g} TFLOP/s"
    number = f"{hours:,.0f}" if hours >= 100 else f"{hours:,.2g}"
    return f"about {number} hours on {world} x {device} at {config.assumed_mfu:.0%} MFU (assumed)"


def encoding_lines(config: TrainConfig, dataset: Dataset, world: int) -> list[tuple[str, str]]:
    """Return the line about the hours in which the banks' frames pass the tower once; none if unknown."""
    frame = tower_flops(dataset)
    if frame is None:
        return []
    frames = sum(len(bank.columns["frame_index"]) for bank in dataset.banks.banks)
    seconds = frames * frame / (world * peak_of(config) * config.assumed_mfu)
    return [
        (
            "encoding",
            f"{frames:,} banked frames: {hours_line(config, seconds, world)}, once; decoding not counted",
        )
    ]


def teraflops(flops: float) -> str:
    """Return FLOPs in units of 10^12, with two significant digits for small models."""
    return f"{flops / 1e12:,.2f}" if flops >= 1e11 else f"{flops / 1e12:.2g}"


def read_bytes(settings: ModelSettings, dataset: Dataset, plan: RunPlan) -> np.ndarray:
    """Return the bytes of features that each record reads; the copy baseline's are left out."""
    width = dataset.banks.manifest.tower_width
    # a clip has one frame more than it has steps from frame to frame
    frames = plan.transitions + plan.clips
    side = settings.finer
    # the cells that are joined, beside those that are predicted, which may be pooled of them
    read = (side**2 if side > 1 else 0) + (not settings.pool_after_projector)
    # of an int8 bank a byte a number, and a float32 a cell: its scale; of others 16 bits a number
    cells = {width + 4 if b.config.codec == "int8" else 2 * width for b in dataset.banks.banks}
    # tokens that close a frame are parameters of the model, not read
    return (plan.visual - frames * settings.closing_tokens) * max(cells) * read


def encoder_line(dataset: Dataset, plan: RunPlan, per_step: float) -> str:
    """Return the FLOPs of encoding each step's frames, which the bank saves, as a line."""
    name = dataset.banks.manifest.provenance.tower
    frame = tower_flops(dataset)
    if frame is None:
        return f"the tower's config.json is not at hand ({Path(name).name or 'no name'})"
    frames = float(plan.per_step(plan.transitions + plan.clips).mean())
    return (
        f"{frames * frame / 1e12:,.2f} TFLOPs a step avoided ({frames:,.0f} frames), "
        f"{frames * frame / per_step:.1f} x the model's"
    )


def tower_flops(dataset: Dataset) -> int | None:
    """Return the FLOPs of a frame in the banks' tower, or None where its config.json is not at hand."""
    name = dataset.banks.manifest.provenance.tower
    config = read_config(name) if name else None
    if not config:
        return None
    # of the first clip, for all: an estimate where grids follow the sizes of the clips
    patches = dataset.banks.banks[0].clip(0).patch_grid
    return frame_flops(config, patches[0] * patches[1], dataset.banks.config.layer)
