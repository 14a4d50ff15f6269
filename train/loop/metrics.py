"""A step's sums, and the metrics that are computed from them.

`FIELDS` documents every field of metrics.jsonl, besides `step` and `kind` (train or eval).
"""

from typing import TYPE_CHECKING

from model.frame_causal import PAIRS, skill
from model.lape.tokens import AXES
from shards.signed import Json
from train.data.records import TASKS

if TYPE_CHECKING:
    from torch import Tensor

    from model.batch import Batch
    from model.vlm import VLM

PARTS = ("projector", "visual", "frame_causal", "lape")
"""Of a model, beside the LLM; as `VLM.parts` names them."""
FIELDS = {
    "loss": "ce_loss + loss_weight x autoregressive_loss",
    "ce_loss": "cross-entropy per supervised token",
    **{f"ce_{task}": f"the same over answers that are a {task}" for task in TASKS},
    "coordinate_ce": "the same over coordinate tokens (LAPE)",
    "autoregressive_loss": "error of predicting the next frame's features, per transition",
    "autoregressive_loss_weighted": "times loss_weight",
    **{f"ar_{pair}": f"the same over transitions {pair[0]} -> {pair[1]}" for pair in PAIRS},
    "ar_copy_baseline": "error of repeating the last frame, where it was measured",
    "ar_affine_baseline": "of the best mix of last frame and cell mean, fitted on training clips",
    "ar_ridge_baseline": "of a ridge regression from the last frame, fitted on training clips",
    "ar_skill": "1 - autoregressive_loss / the lowest of these three; above 0 beats them all",
    **{
        f"ar_skill_{pair}": f"of transitions {pair[0]} -> {pair[1]}, by their lowest"
        for pair in PAIRS
    },
    "tokens": "of the step, over all ranks, without padding",
    "supervised_tokens": "those of them that are predicted",
    "pairs": "(query, key) pairs that the mask allows, without padding",
    "transitions": "from frame to frame",
    **{
        f"gamma_{axis}": f"how strong LAPE's positions are, {axis}; every logging_steps"
        for axis in AXES
    },
    "learning_rate": "of the LLM",
    **{f"learning_rate_{part}": f"of the {part}, where it has its own" for part in PARTS},
    "grad_norm": "before clipping",
    "seconds": "from the end of the last step to the end of this one",
    "data_wait": "share of them spent waiting for data",
    "tokens_per_second": "all ranks",
    "supervised_per_second": "all ranks",
    "mfu": "model FLOPs utilisation; left out where a device's peak is not known",
    "memory_gb": "most memory of rank 0 so far: allocated on its GPU, else resident",
    "eta_seconds": "at the mean pace since the start",
}
SCALARS = ("ce", "coordinate_ce", "supervised", "coordinates", "tokens", "pairs")
VECTORS = ("ar", "ar_count", "ar_copy", "ar_copy_count", "ar_affine", "ar_ridge")
BASELINES = ("copy", "affine", "ridge")
"""Baselines of the frame-causal loss, see `train/loop/floor.py`."""
BY_TASK = ("task_ce", "task_count")
NUM_SUMS = len(SCALARS) + len(PAIRS) * len(VECTORS) + len(TASKS) * len(BY_TASK)


def sums_of(out: "dict[str, Tensor]", batch: "Batch") -> "Tensor":
    """Return a forward's sums and counts, to be added over the step: fp64 `(NUM_SUMS,)`.

    fp64, so that counts are exact and sums over a large step lose nothing.
    """
    import torch

    real, tokens = batch.mask_end - batch.mask_start, batch.lengths.sum()
    if batch.others is not None:
        real = real - (batch.others[1] - batch.others[0])
    padding = real.numel() - tokens  # each padding token sees itself: one pair
    counts = {
        "supervised": torch.tensor(float(len(batch.labels))),
        "coordinates": (batch.label_axis >= 0).sum(),
        "tokens": tokens,
        "pairs": real.sum(dtype=torch.int64) - padding,
    }
    if batch.label_task is not None and "token_ce" in out:
        losses, task = out["token_ce"].detach().double(), batch.label_task.to(out["ce"].device)
        zeros = losses.new_zeros(len(TASKS))
        counts["task_ce"] = zeros.index_add(0, task, losses)
        counts["task_count"] = zeros.index_add(0, task, torch.ones_like(losses))
    values = {**out, **counts}
    # one flat vector in a fixed order, so that one reduction adds up all metrics of a step
    sizes = dict.fromkeys(SCALARS, 1) | dict.fromkeys(VECTORS, len(PAIRS))
    parts = [
        values[name].detach().reshape(size) if name in values else torch.zeros(size)
        for name, size in (sizes | dict.fromkeys(BY_TASK, len(TASKS))).items()
    ]
    return torch.cat([part.double().to(out["ce"].device) for part in parts])


def summarise(sums: "Tensor", loss_weight: float) -> Json:
    """Return the metrics of sums over all ranks; a mean over nothing is left out.

    `autoregressive_loss` counts each transition the same; `ar_skill` = 1 - loss / the strongest
    baseline's loss, above 0 where the model beats all of them, left out unless all were measured.
    """
    scalars, vectors, tasks = sums.tensor_split(
        [len(SCALARS), len(SCALARS) + len(VECTORS) * len(PAIRS)]
    )
    values = dict(zip(SCALARS, scalars.tolist(), strict=True))
    ar, count, copy, copy_count, *fits = vectors.view(len(VECTORS), len(PAIRS)).tolist()
    task_ce, task_count = tasks.view(len(BY_TASK), len(TASKS)).tolist()
    supervised, transitions = values["supervised"], sum(count)
    out: Json = {"tokens": int(values["tokens"]), "supervised_tokens": int(supervised)}
    out |= {"pairs": int(values["pairs"]), "transitions": int(transitions)}
    loss = 0.0
    if supervised:
        out["ce_loss"] = values["ce"] / supervised
        loss += out["ce_loss"]
    out |= {
        f"ce_{task}": task_ce[k] / task_count[k] for k, task in enumerate(TASKS) if task_count[k]
    }
    if values["coordinates"]:
        out["coordinate_ce"] = values["coordinate_ce"] / values["coordinates"]
    if transitions:
        out["autoregressive_loss"] = sum(ar) / transitions
        out["autoregressive_loss_weighted"] = loss_weight * out["autoregressive_loss"]
        loss += out["autoregressive_loss_weighted"]
        out |= {f"ar_{pair}": ar[k] / count[k] for k, pair in enumerate(PAIRS) if count[k]}
    # only where baselines were computed for all transitions: a skill over some would compare two sets
    if transitions and sum(copy_count) == transitions and sum(copy) > 0:
        found = {"copy": sum(copy), **dict(zip(BASELINES[1:], map(sum, fits), strict=True))}
        out |= {f"ar_{name}_baseline": s / transitions for name, s in found.items() if s > 0}
        if all(found.values()):
            # the least of three sums, not the sum of the least: one baseline predicts all transitions
            out["ar_skill"] = skill(sum(ar), min(found.values()))
            floors = [min(sums) for sums in zip(copy, *fits, strict=True)]
            out |= {
                f"ar_skill_{pair}": skill(ar[k], floors[k])
                for k, pair in enumerate(PAIRS)
                if count[k] and floors[k] > 0
            }
    return {"loss": loss, **out}


def gammas_of(model: "VLM") -> Json:
    """Return how strong the positions of each axis are that a model has; every rank asks at once."""
    if model.lape is None or not model.config.lape_positions:
        return {}
    gamma = model.lape.gamma.detach()
    whole = gamma.full_tensor() if hasattr(gamma, "full_tensor") else gamma  # FSDP holds a part
    return {f"gamma_{AXES[axis]}": float(whole[axis]) for axis in model.lape.tokens.axes}
