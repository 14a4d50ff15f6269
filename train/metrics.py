"""What a step's sums mean, how fast it was, and where both are written: metrics.jsonl, train.log, logs/.

`FIELDS` documents every field of metrics.jsonl, besides `step` and `kind` (train or eval).
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.frame_causal import PAIRS, skill
from train.config import TrainConfig
from train.flops import MFU_IS, LlmShape, mfu, peak_flops, step_flops
from train.records import TASKS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model.batch import Batch
    from model.vlm import VLM

Json = dict[str, Any]
FIELDS = {
    "loss": "ce_loss + loss_weight x autoregressive_loss",
    "ce_loss": "cross-entropy per supervised token",
    **{f"ce_{task}": f"the same over answers that are a {task}" for task in TASKS},
    "coordinate_ce": "the same over coordinate tokens (LAPE)",
    "autoregressive_loss": "error of predicting the next frame's features, per transition",
    "autoregressive_loss_weighted": "times loss_weight",
    **{f"ar_{pair}": f"the same over transitions {pair[0]} -> {pair[1]}" for pair in PAIRS},
    "ar_copy_baseline": "error of repeating the last frame, where it was measured",
    "ar_skill": "1 - autoregressive_loss / ar_copy_baseline; above 0 beats repeating",
    "tokens": "of the step, over all ranks, without padding",
    "supervised_tokens": "those of them that are predicted",
    "pairs": "(query, key) pairs that the mask allows, without padding",
    "transitions": "from frame to frame",
    "learning_rate": "of the LLM",
    "grad_norm": "before clipping",
    "seconds": "from the end of the last step to the end of this one",
    "data_wait": "share of them spent waiting for data",
    "tokens_per_second": "all ranks",
    "supervised_per_second": "all ranks",
    "mfu": "model FLOPs utilisation; left out where a device's peak is not known",
    "memory_gb": "most memory of rank 0 so far: allocated on its GPU, else resident",
    "eta_seconds": "at the mean pace since the start",
}
CLOCK = FIELDS.keys() & {
    "seconds",
    "data_wait",
    "tokens_per_second",
    "supervised_per_second",
    "mfu",
    "memory_gb",
    "eta_seconds",
}
"""Fields that a repeated run does not repeat."""
SCALARS = ("ce", "coordinate_ce", "supervised", "coordinates", "tokens", "pairs")
VECTORS = ("ar", "ar_count", "ar_copy", "ar_copy_count")
BY_TASK = ("task_ce", "task_count")
NUM_SUMS = len(SCALARS) + len(PAIRS) * len(VECTORS) + len(TASKS) * len(BY_TASK)


def sums_of(out: "dict[str, Tensor]", batch: "Batch") -> "Tensor":
    """Return one flat fp64 tensor of a forward's sums and counts, to be added over the step."""
    import torch

    real, tokens = batch.mask_end - batch.mask_start, batch.lengths.sum()
    padding = real.numel() - tokens  # each of which sees itself alone
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
    sizes = dict.fromkeys(SCALARS, 1) | dict.fromkeys(VECTORS, len(PAIRS))
    parts = [
        values[name].detach().reshape(size) if name in values else torch.zeros(size)
        for name, size in (sizes | dict.fromkeys(BY_TASK, len(TASKS))).items()
    ]
    return torch.cat([part.double().to(out["ce"].device) for part in parts])


def summarise(sums: "Tensor", loss_weight: float) -> Json:
    """Return the metrics that global sums mean; a mean over nothing is left out.

    `autoregressive_loss` weighs every transition the same; `ar_skill` = 1 - loss / copy baseline,
    above 0 where the prediction beats repeating the last frame.
    """
    scalars, vectors, tasks = sums.tensor_split(
        [len(SCALARS), len(SCALARS) + len(VECTORS) * len(PAIRS)]
    )
    values = dict(zip(SCALARS, scalars.tolist(), strict=True))
    ar, count, copy, copy_count = vectors.view(len(VECTORS), len(PAIRS)).tolist()
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
    if transitions and sum(copy_count) == transitions and sum(copy) > 0:
        out["ar_copy_baseline"] = sum(copy) / transitions
        out["ar_skill"] = skill(sum(ar), sum(copy))
    return {"loss": loss, **out}


class Pace:
    """Times the steps of a run: `ready()` when a step's data are there, `done()` when it is taken.

    What lies between two steps and is none - an evaluation, a checkpoint - is left out of `seconds`
    by `rest()`, and counts in the ETA.

    flops: of a step by its metrics, or None; devices, peak: how many there are and FLOP/s of each.
    """

    def __init__(
        self,
        first: int,
        total: int,
        flops: Callable[[Json], float] | None = None,
        devices: int = 1,
        peak: float | None = None,
    ) -> None:
        self.first, self.total = first, total
        self.flops, self.devices, self.peak = flops, devices, peak
        self._started = self._waiting = self._began = time.monotonic()

    @property
    def legend(self) -> str:
        """What MFU means in this run, or why there is none."""
        if self.flops and self.peak:
            return f"{MFU_IS}; peak {self.peak / 1e12:g} TFLOP/s a device"
        missing = "this device's peak" if self.flops else "this LLM's shape"
        return f"no MFU: {missing} is not known" + ("; set device_flops" if self.flops else "")

    def ready(self) -> None:
        self._began = time.monotonic()

    def done(self, step: int, metrics: Json) -> Json:
        """Return the rates of a step, the number of steps taken being `step` now."""
        now = time.monotonic()
        seconds = now - self._waiting
        out: Json = {
            "seconds": seconds,
            "data_wait": (self._began - self._waiting) / seconds,
            "tokens_per_second": metrics["tokens"] / seconds,
            "supervised_per_second": metrics["supervised_tokens"] / seconds,
            "memory_gb": memory_gb(),
            "eta_seconds": (now - self._started) / (step - self.first) * (self.total - step),
        }
        if self.flops and self.peak:
            out["mfu"] = mfu(self.flops(metrics), seconds, self.devices, self.peak)
        self._waiting = now
        return out

    def rest(self) -> None:
        self._waiting = time.monotonic()


def make_pace(
    config: TrainConfig, model: "VLM", device: "torch.device", world: int, first: int, total: int
) -> Pace:
    """Return the pace of a run, with MFU where the LLM's shape and the device's peak are known."""
    import torch

    shape = LlmShape.of(model.llm.config.to_dict())
    peak = config.device_flops or None
    if peak is None and device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device))

    def flops(metrics: Json) -> float:
        assert shape
        tokens, pairs, supervised = (metrics[n] for n in ("tokens", "pairs", "supervised_tokens"))
        return float(step_flops(shape, tokens, pairs, supervised, config.tune_llm))

    return Pace(first, total, flops if shape else None, world, peak)


def memory_gb() -> float:
    """Return the most memory that this process had: on its GPU, or resident where it has none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


LINE: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("ce_loss", "ce {:.4f}"),
        ("autoregressive_loss", "ar {:.4f}"),
        ("ar_skill", "skill {:.3f}"),
        ("learning_rate", "lr {:.2e}"),
        ("grad_norm", "gn {:.2f}"),
    ),
    (("supervised_per_second", "sup {} tok/s"), ("tokens_per_second", "all {} tok/s")),
    (("mfu", "MFU {:.0%}"), ("data_wait", "data-wait {:.0%}"), ("memory_gb", "mem {:.1f} GB")),
    (("eta_seconds", "ETA {}"),),
)


def line_of(step: int, total: int, metrics: Json) -> str:
    """Return a step as people read it."""
    written = metrics | {
        name: (short if name.endswith("per_second") else duration)(metrics[name])
        for name in ("supervised_per_second", "tokens_per_second", "eta_seconds")
        if name in metrics
    }
    groups = [
        " ".join(shown.format(written[name]) for name, shown in group if name in written)
        for group in LINE
    ]
    return " | ".join(group for group in [f"step {step}/{total} {groups[0]}", *groups[1:]] if group)


def short(number: float) -> str:
    """Return 3140.0 as 3.1k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Return 4321.0 as 1h12m."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{left:02}s" if minutes else f"{left}s"


class RunLog:
    """The run's logs; only the main process writes.

    wandb: the settings to show at W&B, or None to leave it alone.
    """

    def __init__(
        self, output_dir: Path, first_step: int, active: bool, wandb: Json | None = None
    ) -> None:
        self.active = active
        self._wandb: Any = None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = output_dir / "metrics.jsonl"
        keep_until(self._metrics, first_step)
        self._text = open(output_dir / "train.log", "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(output_dir / "logs", purge_step=first_step + 1)
        if wandb is not None:
            import wandb as service

            self._wandb = service.init(
                project="framebank", name=output_dir.name, dir=str(output_dir), config=wandb
            )

    def say(self, text: str) -> None:
        """Print, and write to train.log."""
        if self.active:
            print(text, file=sys.stderr, flush=True)  # noqa: T201
            self._text.write(text + "\n")
            self._text.flush()

    def record(self, step: int, metrics: Json, kind: str = "train") -> None:
        """Append a line to metrics.jsonl, the source of truth, and mirror it to the others."""
        if not self.active:
            return
        with open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")
        numbers = {f"{kind}/{n}": v for n, v in metrics.items() if isinstance(v, int | float)}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self.active:
            self._board.close()
            self._text.close()
            if self._wandb is not None:
                self._wandb.finish()


def keep_until(path: Path, step: int) -> None:
    """Cut a metrics file back to a step, so that a resumed run's lines follow on once each."""
    if path.exists():
        # what follows the last newline was torn by a crash
        lines = path.read_text().split("\n")[:-1]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
