"""One optimizer step on the packs of a plan, the same on any number of processes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.batch import Batch, to_device
from model.vlm import VLM
from shards.errors import UserError
from train.batches.plan import RunPlan
from train.loop.checks import drop_llm_gradients, name_pack
from train.loop.gradients import Reduction, pack_seed, sum_in_order
from train.loop.metrics import NUM_SUMS, Json, summarise, sums_of
from train.loop.signals import Requests
from train.settings.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Step:
    """What a step gave, the same on every rank."""

    metrics: Json
    stop: bool
    """Whether some process was asked to stop, or to save, before the step's end."""
    save: bool


class Losses:
    """The loss of a step's packs, and their sums as they come."""

    def __init__(
        self, config: TrainConfig, plan: RunPlan, step: int, accelerator: "Accelerator"
    ) -> None:
        self.config, self.step, self.accelerator = config, step, accelerator
        self.num_labels = max(1, int(plan.num_labels[step]))
        self.num_transitions = max(1, int(plan.num_transitions[step]))
        self.sums = torch.zeros(
            plan.packs_per_step, NUM_SUMS, dtype=torch.float64, device=accelerator.device
        )
        """fp64 `(packs, sums)`; zero for the packs of other ranks."""

    def __call__(self, model: Any, pack: int, batch: Batch) -> Tensor:
        """Return a pack's share of the step's loss: sums divided by the whole step's counts.

        So the gradient does not depend on how the step was cut.
        """
        torch.manual_seed(pack_seed(self.config.seed, self.step, pack))
        with self.accelerator.autocast():
            out = model(batch)
        self.sums[pack] = sums_of(out, batch)
        loss: Tensor = out["ce"] / self.num_labels
        if "ar" in out:
            loss = loss + self.config.loss_weight * out["ar"].sum() / self.num_transitions
        return loss


def run_step(
    reduction: Reduction,
    accelerator: "Accelerator",
    model: VLM,
    batches: Sequence[Batch],
    plan: RunPlan,
    step: int,
    config: TrainConfig,
    requests: Requests,
) -> Step:
    """Take one optimizer step; UserError names the records where the loss is no number."""
    own = dict(
        zip(
            range(accelerator.process_index, plan.packs_per_step, accelerator.num_processes),
            [to_device(batch, accelerator.device) for batch in batches],
            strict=True,
        )
    )
    losses = Losses(config, plan, step, accelerator)
    reduction.gradients(plan.packs_per_step, list(own.values()), losses)
    if step < config.lape_warmup_steps:
        drop_llm_gradients(model)
    asked = torch.tensor(requests.take(), dtype=torch.float64)
    sums, asked = sum_in_order(accelerator, losses.sums, asked.to(accelerator.device))
    metrics = summarise(sums.sum(dim=0), config.loss_weight)
    norm = float(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
        raise UserError(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {norm} with the "
            f"{name_pack(sums, own)}. Lower learning_rate, or look at these records"
        )
    reduction.optimizer.step()
    stop, save = (bool(count) for count in asked.tolist())
    return Step(metrics | {"grad_norm": norm}, stop, save)
