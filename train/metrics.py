"""What a step's sums mean, and where they are written: metrics.jsonl, train.log, logs/."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.frame_causal import PAIRS, skill

if TYPE_CHECKING:
    from torch import Tensor

    from model.batch import Batch

Json = dict[str, Any]
SCALARS = ("ce", "coordinate_ce", "supervised", "coordinates", "tokens")
VECTORS = ("ar", "ar_count", "ar_copy", "ar_copy_count")
NUM_SUMS = len(SCALARS) + 4 * len(VECTORS)


def sums_of(out: "dict[str, Tensor]", batch: "Batch") -> "Tensor":
    """Return one flat fp64 tensor of a forward's sums and counts, to be added over the step."""
    import torch

    counts = {
        "supervised": torch.tensor(float(len(batch.labels))),
        "coordinates": (batch.label_axis >= 0).sum(),
        "tokens": batch.lengths.sum(),
    }
    nothing = torch.zeros(4)
    parts = [{**out, **counts}[name].detach().reshape(1) for name in SCALARS]
    parts += [out.get(name, nothing).detach() for name in VECTORS]
    return torch.cat([part.double().to(out["ce"].device) for part in parts])


def summarise(sums: "Tensor", loss_weight: float) -> Json:
    """Return the metrics that global sums mean; a mean over nothing is left out.

    `autoregressive_loss` weighs every transition the same; `ar_skill` = 1 - loss / copy baseline,
    above 0 where the prediction beats repeating the last frame.
    """
    values = dict(zip(SCALARS, sums[: len(SCALARS)].tolist(), strict=True))
    tail = sums[len(SCALARS) :].view(len(VECTORS), 4)
    ar, count, copy, copy_count = (row.tolist() for row in tail)
    supervised, transitions = values["supervised"], sum(count)
    out: Json = {"tokens": int(values["tokens"]), "supervised_tokens": int(supervised)}
    out["transitions"] = int(transitions)
    loss = 0.0
    if supervised:
        out["ce_loss"] = values["ce"] / supervised
        loss += out["ce_loss"]
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


def line_of(step: int, total: int, metrics: Json) -> str:
    """Return a step as people read it."""
    parts = [f"step {step}/{total}"]
    for name, shown in (
        ("ce_loss", "ce_loss {:.4f}"),
        ("autoregressive_loss", "autoregressive_loss {:.4f}"),
        ("ar_skill", "ar_skill {:.3f}"),
        ("learning_rate", "lr {:.2e}"),
        ("grad_norm", "grad_norm {:.2f}"),
        ("tokens_per_second", "{:.0f} tok/s"),
        ("data_wait", "data wait {:.0%}"),
        ("eta_seconds", "ETA {:.0f} s"),
    ):
        if name in metrics:
            parts.append(shown.format(metrics[name]))
    return "  ".join(parts)


class RunLog:
    """The run's three logs; only the main process writes."""

    def __init__(self, output_dir: Path, first_step: int, active: bool) -> None:
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = output_dir / "metrics.jsonl"
        keep_until(self._metrics, first_step)
        self._text = open(output_dir / "train.log", "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(output_dir / "logs", purge_step=first_step + 1)

    def say(self, text: str) -> None:
        """Print, and write to train.log."""
        if self.active:
            print(text, file=sys.stderr, flush=True)  # noqa: T201
            self._text.write(text + "\n")
            self._text.flush()

    def record(self, step: int, metrics: Json, kind: str = "train") -> None:
        """Append a line to metrics.jsonl, the source of truth, and mirror it to TensorBoard."""
        if self.active:
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self.active:
            self._board.close()
            self._text.close()


def keep_until(path: Path, step: int) -> None:
    """Cut a metrics file back to a step, so that a resumed run's lines follow on once each."""
    if path.exists():
        # what follows the last newline was torn by a crash
        lines = path.read_text().split("\n")[:-1]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
