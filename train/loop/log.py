"""What a run says and writes down: lines, train.log, metrics.jsonl, TensorBoard."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from train.loop.metrics import Json

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
