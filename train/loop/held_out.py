"""The loss on held-out records, while training."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shards.signed import Json
from train.data.records import Record, records_digest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from model.vlm import VLM
    from train.batches.loader import Loader
    from train.loop.floor import Floor


def lowest(best: Json | None, loss: float, step: int, records: Sequence[Record]) -> Json:
    """Return the lower of the best loss so far and a step's, with its step and records."""
    # no number is lower than NaN, which would stay the best for good
    if best is None or math.isnan(best["loss"]) or loss < best["loss"]:
        return {"loss": loss, "step": step, "records": records_digest(records)}
    return best


def best_before(state: Json, records: Sequence[Record], say: Callable[[str], None]) -> Json | None:
    """Return the lowest held-out loss up to a checkpoint, None without one, see `lowest`.

    None, too, where it is of other records, whose losses do not compare. state: the checkpoint's.
    """
    best: Json | None = state.get("best")
    # without held-out records nothing is compared with it; an older checkpoint does not name its records
    if not best or not records or best.get("records") in (None, records_digest(records)):
        return best
    say(
        f"held out  other records than those up to step {state['step']}: their lowest loss, "
        f"{best['loss']:.4f} at step {best['step']}, does not compare, and checkpoint-{best['step']} "
        "is no longer kept as the best"
    )
    return None


def held_out_loss(
    model: "VLM",
    loader: "Loader",
    records: Sequence[Record],
    size: int,
    accelerator: "Accelerator",
    floor: "Floor | None" = None,
) -> Json:
    """Return the metrics of records that are not trained on, `size` to a batch; ranks divide the batches.

    floor: the baselines of `ar_skill`; without them there is none.
    """
    import torch

    from model.batch import to_device
    from train.loop.metrics import NUM_SUMS, summarise, sums_of

    floor = floor and floor.to(accelerator.device)
    was_training = model.training
    model.eval()
    # a row for each batch: the sums are then added in the same order on any number of ranks
    sums = torch.zeros(-(-len(records) // size), NUM_SUMS, dtype=torch.float64)
    sums = sums.to(accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    for first in range(0, len(records), size * world):
        begin = first + rank * size
        # a rank without a batch passes with the first one: with FSDP all wait for each other in a pass
        own = begin if begin < len(records) else 0
        # with_copy: evaluations are few, so that reading both streams costs little here
        batch = loader.batch(records[own : own + size], with_copy=True)
        batch = to_device(batch, accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            beside = floor.losses(batch) if floor else {}
            found = sums_of(model(batch) | beside, batch)
        if begin < len(records):
            sums[begin // size] = found
    model.train(was_training)
    total = accelerator.reduce(sums, reduction="sum").sum(dim=0)
    return summarise(total, model.config.loss_weight)
