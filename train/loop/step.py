"""One optimizer step on the packs of a plan, the same on any number of processes."""

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from model.batch import Batch, to_device
from model.vlm import VLM
from shards.errors import UserError
from shards.signed import Json
from shards.text import some
from train.batches.run_plan import RunPlan
from train.loop.checks import drop_llm_gradients, suspects
from train.loop.floor import Floor
from train.loop.gradients import Reduction, pack_seed, sum_in_order
from train.loop.metrics import NUM_SUMS, summarise, sums_of
from train.loop.signals import StopSignals, asked_of_all

if TYPE_CHECKING:
    from accelerate import Accelerator


MOST_NAMED = 20
"""Records named where a step's loss is NaN or infinite."""


@dataclass(frozen=True)
class Step:
    """The result of a step, the same on every rank."""

    metrics: Json
    stopped_by: signal.Signals | None
    """The signal that asked some process to stop before the step's end."""
    save: bool
    """Whether some process was asked for a checkpoint."""


class Losses:
    """Computes the losses of a step's packs, and collects their sums."""

    def __init__(
        self,
        seed: int,
        loss_weight: float,
        plan: RunPlan,
        step: int,
        accelerator: "Accelerator",
        floor: Floor | None = None,
    ) -> None:
        """seed: of the run. loss_weight: of the frame-causal loss. floor: that loss's baselines."""
        self.seed, self.loss_weight, self.floor = seed, loss_weight, floor
        self.step, self.accelerator = step, accelerator
        # a step without an answer (or a transition) has a sum of 0: its loss is then 0, not 0 / 0
        self.num_labels = max(1, int(plan.num_labels[step]))
        self.num_transitions = max(1, int(plan.num_transitions[step]))
        self.sums = torch.zeros(
            int(plan.num_packs[step]), NUM_SUMS, dtype=torch.float64, device=accelerator.device
        )
        """fp64 `(packs, sums)`; zero for the packs of other ranks."""

    def __call__(self, model: Any, pack: int, batch: Batch) -> Tensor:
        """Return a pack's share of the step's loss: sums divided by the whole step's counts.

        A pack number beyond the step's last is an idle one: its loss is zero and is not counted.
        """
        # The denominators are the step's, from the plan, not the pack's: a mean of packs' means would
        # weigh a token by how few its pack has, and change with world size and micro-batches. Two
        # denominators, tokens and transitions, so transformers' num_items_in_batch cannot serve.
        torch.manual_seed(pack_seed(self.seed, self.step, pack))
        with self.accelerator.autocast():
            out = model(batch)
        idle = pack >= len(self.sums)
        if not idle:
            beside = self.floor.losses(batch) if self.floor else {}
            self.sums[pack] = sums_of(out | beside, batch)
        # L = CE / tokens + weight x MSE / transitions, each count over all packs of all ranks
        loss: Tensor = out["ce"] / self.num_labels
        if "ar" in out:
            loss = loss + self.loss_weight * out["ar"].sum() / self.num_transitions
        # times 0, not a new 0: the backward pass must reach every parameter, for which other ranks wait
        return loss * 0 if idle else loss


def run_step(
    reduction: Reduction,
    accelerator: "Accelerator",
    model: VLM,
    batches: Sequence[Batch],
    losses: Losses,
    signals: StopSignals,
    *,
    max_grad_norm: float,
    llm_waits: bool = False,
) -> Step:
    """Take one optimizer step; UserError names the records where the loss is NaN or infinite.

    batches: this rank's packs, and an idle one if other ranks have one more. llm_waits: the LLM is not
    updated in this step (`lape_warmup_steps`).
    """
    packs = len(losses.sums)
    moved = [to_device(batch, accelerator.device) for batch in batches]
    own = dict(
        zip(
            range(accelerator.process_index, packs, accelerator.num_processes),
            moved,
            strict=False,  # an idle pack may follow
        )
    )
    reduction.gradients(packs, moved, losses)
    if llm_waits:
        drop_llm_gradients(model)
    # signals reach ranks at different moments: summed over all, they stop every rank after the same step
    asked = torch.tensor(signals.take(), dtype=torch.float64)
    sums, asked = sum_in_order(accelerator, losses.sums, asked.to(accelerator.device))
    metrics = summarise(sums.sum(dim=0), losses.loss_weight)
    norm = float(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
    # before the update: the weights of the last checkpoint and those in memory are still good
    if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
        # all ranks come here together; the one that speaks for them may have no part in it
        names = gather_object(suspects(sums, own))
        raise UserError(
            f"step {losses.step + 1}: loss {metrics['loss']}, gradient norm {norm} with the records "
            f"{some(names, MOST_NAMED)}. Lower learning_rate, or look at these records"
        )
    reduction.optimizer.step()
    return Step(metrics | {"grad_norm": norm}, *asked_of_all(asked.tolist()))
