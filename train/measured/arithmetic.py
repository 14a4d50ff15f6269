"""`bf16: auto`: whether a run's steps are clearly faster in bfloat16, measured once when it begins.

config, note = with_arithmetic(config, dataset, on_cpu=True)     # bf16 is now true or false

The choice is stored in run.json and in each checkpoint as the run's bf16, and a resumed run keeps it: a
second measurement could choose differently, and change the weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from model.batch import Batch
from model.cpu.matrix_units import least_seconds, matrix_units
from model.cpu.threads import cpu_threads
from model.vlm import VLM
from train.batches.chat import Chat
from train.batches.loader import Loader
from train.batches.plan import plan_run, rows_per_step
from train.data.dataset import Dataset
from train.loop.checkpoint import find_resume
from train.settings.config import TrainConfig
from train.settings.recorded import token_limit, trained_with
from train.start.prepare_llm import admit_llm, prepare_llm
from train.start.stage import build

CLEAR = 1.25
"""Least speed-up by bfloat16: less is noise, and not worth its rounding. With AMX real LLMs train twice
as fast in it, with AVX-512-BF16 alone a third slower than in float32."""


def with_arithmetic(config: TrainConfig, dataset: Dataset, on_cpu: bool) -> tuple[TrainConfig, str]:
    """Return the settings with bf16 decided, the same on all processes, and why in a line."""
    state = PartialState(cpu=on_cpu)
    found: list[tuple[bool, str] | None] = [None]
    if state.is_main_process:
        # the device of the run: `accelerate launch --cpu` takes the CPU beside an accelerator, too
        found = [decide(config, dataset, state.device.type == "cpu")]
    # one process measures: several would each find another time, and could decide differently
    ((bf16, why),) = broadcast_object_list(found)
    return replace(config, bf16=bf16), f"bf16 {str(bf16).lower()} (auto): {why}"


def decide(config: TrainConfig, dataset: Dataset, on_cpu: bool) -> tuple[bool, str]:
    """Return whether to take bfloat16, and why."""
    # -- from what costs nothing to what costs seconds
    before = recorded(config)
    if before is not None:
        return before, "as the run began"
    if not on_cpu:
        return True, "an accelerator is here"
    # without such units each number is converted to float32 and back, which is slower than float32
    if not matrix_units():
        return False, "torch has no products of it on this CPU"
    pace = measure(config, dataset)
    why = f"a step's first pack takes {pace[False]:.3g} CPU s in float32, {pace[True]:.3g} in bfloat16"
    return is_clear(pace), why


def is_clear(pace: Mapping[bool, float]) -> bool:
    """Return whether bfloat16 is faster by more than `CLEAR`; pace: bf16 -> CPU seconds."""
    return pace[False] > CLEAR * pace[True]


def recorded(config: TrainConfig) -> bool | None:
    """Return the choice of the run that is resumed; None where a run begins."""
    folder = Path(config.output_dir)
    if config.resume == "none":
        return None
    bf16 = (trained_with(find_resume(folder, config.resume) or folder) or {}).get("bf16")
    return bf16 if isinstance(bf16, bool) else None


def measure(config: TrainConfig, dataset: Dataset) -> dict[bool, float]:
    """Return the CPU seconds, forward and backward, of the run's first pack, without and with bfloat16.

    On a model that is discarded; the least of several rounds, alternating.
    """
    # with the run's threads, which decide how much the units gain; and then as it was found
    # the model that is measured draws weights: the run's own must be the same whether it was
    # measured or not
    with (
        cpu_threads(config.num_threads or torch.get_num_threads()),
        torch.random.fork_rng(devices=[]),
    ):
        model, batch = first_pack(replace(config, bf16=False), dataset)
        return least_seconds((False, True), lambda bf16: step(model, batch, bf16))


def first_pack(config: TrainConfig, dataset: Dataset) -> tuple[VLM, Batch]:
    """Return the run's model, as for its first step, and the first pack that it would see."""
    world = PartialState().num_processes
    plan = plan_run(config, dataset, rows_per_step(config, world, {}))
    # in silence: the run says the same lines when it builds its own
    model = build(config, dataset, lambda line: None)
    longest, apart = int(plan.tokens.max()), dataset.independent
    attention, _ = admit_llm(model, config, "cpu", longest, torch.device("cpu"), apart=apart)
    prepare_llm(model, config, attention, torch.device("cpu"))
    loader = Loader(dataset, Chat.of(model), model.config, limit=token_limit(vars(config)))
    return model, loader.pack(plan, 0, 0)


def step(model: VLM, batch: Batch, bf16: bool) -> None:
    """Run a batch forward and backward, and drop the gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(batch)
    # sums, without denominators: only the arithmetic counts here
    loss = out["ce"] + (out["ar"].sum() if "ar" in out else 0.0)
    loss.backward()
    model.zero_grad(set_to_none=True)
