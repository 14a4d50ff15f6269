"""A run's output: banner, progress lines, train.log, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import math
import os
import secrets
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.slow_fast import draw_pattern, slow_frames
from shards.errors import UserError, first_line, naming
from shards.signed import Json, write_atomic
from shards.text import duration
from train.data.dataset import Dataset, drawn_line
from train.settings.config import TrainConfig

if TYPE_CHECKING:
    from model.vlm import VLM
    from train.batches.run_plan import RunPlan

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
    """Return a step's progress line: `step 120/4000 ce 1.92 ar 0.41 ... | ETA 1h12m`."""
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


WANDB_ID = "wandb-id.txt"


class RunLog:
    """The run's logs; only the main process (`active`) writes.

    wandb: the settings to show at W&B, None where it is not used.
    """

    def __init__(
        self, output_dir: Path, first_step: int, active: bool, wandb: Json | None = None
    ) -> None:
        self.active = active
        self._wandb: Any = None
        self._bar: Any = None
        if not active:
            return
        # here, so that ranks that write nothing do without it
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = output_dir / "metrics.jsonl"
        # steps after the checkpoint are taken a second time: their lines go, TensorBoard's by purge_step
        keep_until(self._metrics, first_step)
        self._text = open(output_dir / "train.log", "a", encoding="utf-8")  # noqa: SIM115
        self._boards = output_dir / "logs"
        threading.excepthook = _unless_raised_here
        with naming(self._boards):
            self._board = SummaryWriter(self._boards, purge_step=first_step + 1)
        if wandb is not None:
            self._wandb = wandb_run(output_dir, first_step, wandb)

    def say(self, text: str) -> None:
        """Print, and write to train.log."""
        if self.active:
            try:
                if self._bar is not None:
                    self._bar.clear()
                print(text, file=sys.stderr, flush=True)  # noqa: T201
            except OSError:
                _drop_stderr()
            with naming(self._text.name):
                self._text.write(text + "\n")
                self._text.flush()

    def show(self, step: int, total: int, metrics: Json, *, line: bool) -> None:
        """Show a step: on a terminal the bar moves; line: whether a line is printed, too."""
        if self.active and sys.stderr.isatty():
            self._move(step, total, metrics)
        if line:
            self.say(line_of(step, total, metrics))

    def _move(self, step: int, total: int, metrics: Json) -> None:
        from tqdm import tqdm

        try:
            if self._bar is None:
                first = step - 1
                self._bar = tqdm(
                    total=total, initial=first, unit="step", leave=False, file=sys.stderr
                )
            words = [shown.format(metrics[name]) for name, shown in LINE[0][:3] if name in metrics]
            self._bar.set_postfix_str(" ".join(words), refresh=False)
            self._bar.update(step - self._bar.n)
        except OSError:
            _drop_stderr()

    def record(self, step: int, metrics: Json, kind: str = "train") -> None:
        """Append a line to metrics.jsonl, the source of truth, and copy it to TensorBoard and W&B."""
        if not self.active:
            return
        # opened for each line: what was written survives a kill, and `--watch`
        # reads it while the run goes on
        with naming(self._metrics), open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")
        numbers = {f"{kind}/{n}": v for n, v in metrics.items() if isinstance(v, int | float)}
        with naming(self._boards):
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        # W&B has the steps between the checkpoint and a crash already, with the same values
        if self._wandb is not None and step >= getattr(self._wandb, "starting_step", 0):
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self.active:
            if self._bar is not None:
                self._bar.close()
            with naming(self._boards):
                self._board.close()
            self._text.close()
            if self._wandb is not None:
                self._wandb.finish()


def _unless_raised_here(what: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, as Python does, but not TensorBoard's of a full disk: the next call of
    its writer raises that error once more."""
    writes = type(what.thread).__name__ == "_AsyncWriterThread"
    if not (writes and isinstance(what.exc_value, OSError)):
        threading.__excepthook__(what)


def _drop_stderr() -> None:
    """Discard stderr from now on: the terminal is closed, or `| tee` ended by the same Ctrl-C."""
    # by the descriptor: libraries below Python write there, too
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stderr.fileno())
    os.close(nowhere)


def wandb_run(output_dir: Path, first_step: int, settings: Json) -> Any:
    """Return the run at W&B: one for a folder, by an id that is stored in it, however often resumed.

    W&B's own variables decide project, name, folder and a new run's id where they are set.
    Raises UserError where W&B refuses it: an invalid key, a server that cannot be reached.
    """
    import wandb

    # the id is kept in the folder: a resumed run goes on in the same curves
    path = output_dir / WANDB_ID
    if not (first_step and path.exists()):
        path.write_text(f"{os.environ.get('WANDB_RUN_ID') or secrets.token_hex(4)}\n")
    try:
        # what `init` is given wins over W&B's variables, without a word
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "framebank",
            name=os.environ.get("WANDB_NAME") or output_dir.name,
            dir=os.environ.get("WANDB_DIR") or str(output_dir),
            config=settings,
            id=path.read_text().strip(),
            resume="allow",
        )
    except wandb.Error as error:
        fix = "set WANDB_MODE=offline to send the run later, or wandb: false"
        raise UserError(f"wandb does not take the run: {first_line(error)}", fix=fix) from None


def keep_until(path: Path, step: int) -> None:
    """Cut a metrics file back to a step, so that a resumed run's lines follow on once each."""
    if path.exists():
        # a crash may have cut the last line: it has no newline
        lines = path.read_text().split("\n")[:-1]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_atomic(path, "".join(line + "\n" for line in kept).encode())


def banner(
    config: TrainConfig,
    dataset: Dataset,
    model: "VLM",
    plan: "RunPlan",
    world: int,
    ratio: float,
    resumed: Path | None,
) -> str:
    """Return the text printed before the first step; ratio: that of `VLM.calibrate`, or NaN."""
    bank = dataset.banks.banks[0]
    units = -(-bank.config.sampling.most_frames // int(bank.columns["frames_per_unit"][0]))
    frames = min(units, config.max_frames_num)
    pattern = slow_frames(config.frame_sampling_strategy, config.slow_frame_ratio, frames)
    strides = dataset.slow_stride, dataset.fast_stride
    cells = {s: [-(-side // config.pooled) for side in bank.shape(0, s)[1:3]] for s in strides}
    slow, fast = (math.prod(cells[stride]) for stride in strides)
    closing, newline = config.closing_tokens, config.newline_tokens
    tokens = sum([(slow if is_slow else fast) + closing for is_slow in pattern], start=newline)
    parts = {name: sum(p.numel() for p in group) for name, group in model.parts().items()}
    banks = dataset.banks.banks
    lines = [
        f"bank      {', '.join(b.where for b in banks)}: {sum(map(len, banks))} clips, "
        f"fingerprint {bank.config.fingerprint[:12]}",
        f"records   {dataset.count} to train on{drawn_line(dataset)}, {len(dataset.held_out)} held "
        f"out, {plan.dropped_line}",
        f"frames    {draw_pattern(pattern)} (S: stride {dataset.slow_stride}, "
        f"{'x'.join(map(str, cells[dataset.slow_stride]))} cells; F: stride {dataset.fast_stride}, "
        f"{'x'.join(map(str, cells[dataset.fast_stride]))}), {tokens} tokens of a clip"
        + (", and the time before each frame" if config.time_form else ""),
        *([f"          {plan.frames_line}"] if plan.frames_line else []),
        f"steps     {plan.num_steps} of {plan.rows_per_step} {rows_line(plan)}: "
        f"{plan.rows_per_pack} x {plan.packs_per_step} micro-batches on {world} "
        f"process{'es' if world > 1 else ''}{plan.short_line}",
        f"plan      {plan.per_step(plan.tokens).mean():,.0f} tokens a step, "
        f"{plan.num_labels.mean():,.0f} of them supervised; {plan.efficiency:.1%} of the places hold "
        f"one; fingerprint {plan.fingerprint[:12]}",
        f"trained   {sum(parts.values()):,} parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in parts.items()),
        f"rates     {rates_line(model, config)}",
        f"losses    language + {config.loss_weight:g} x frame-causal ({config.predictor}, "
        f"{config.frame_attention} attention)",
    ]
    lines.append(f"saves     {saves_line(config)}")
    if model.lape is not None:
        extra = parts.get("lape", 0) * 16 / 1e6
        lines.append(
            f"LAPE      on: {config.num_temporal_tokens} temporal, {config.num_spatial_tokens} spatial "
            f"tokens, preset {config.lape_preset}; tables, gradients and moments take {extra:.1f} MB more"
        )
        # NaN, which is unequal to itself: nothing was measured
        if ratio == ratio:
            lines.append(f"          positions / features by RMS at gamma 1: {ratio:.2f}")
    else:
        lines.append("LAPE      off")
    lines += notes_lines(dataset)
    if resumed:
        lines.append(f"resumed   from {resumed}")
    return "\n".join(lines)


def notes_lines(dataset: Dataset) -> list[str]:
    """Return the notes and warnings about the records, a line each."""
    kinds = (("note", dataset.notes), ("warning", dataset.warnings))
    return [f"{name:<10}{line}" for name, lines in kinds for line in lines]


def saves_line(config: TrainConfig) -> str:
    """Return in words when a run saves checkpoints, and how many it keeps."""
    minutes, steps = config.save_minutes, config.save_steps
    whens = [f"every {minutes:g} minutes"] if minutes else []
    whens += [f"every {steps} steps"] if steps else []
    if not whens:
        return "at the end alone: a crash before it leaves nothing (save_minutes, save_steps)"
    return f"{', '.join(whens)} and at the end; the newest {config.save_total_limit} are kept"


def rates_line(model: "VLM", config: TrainConfig) -> str:
    """Return in words the peak learning rate of each trained part, and the weight decay."""
    from train.loop.optimizer import parameter_groups

    peaks = {group["name"]: group["peak"] for group in parameter_groups(model, config)}
    shown = ", ".join(f"{name} {peak:g}" for name, peak in peaks.items())
    decay = f"; weight decay {config.weight_decay:g}, of matrices" if config.weight_decay else ""
    return f"at their peak: {shown}{decay}"


def rows_line(plan: "RunPlan") -> str:
    return f"rows of up to {plan.pack_tokens} tokens" if plan.pack_tokens else "records"


def closing(
    model: "VLM",
    output_dir: Path,
    seconds: float,
    last: Json,
    best: Json | None,
) -> str:
    """Return the text that is printed after the last step: losses, and the places of the results."""
    if not last:
        return f"nothing was trained; model {output_dir} is as it was"
    lines = [f"done in {seconds:.0f} s; LAPE {'on' if model.lape else 'off'}"]
    shown = ("ce_loss", "autoregressive_loss", "ar_skill")
    lines.append("last step: " + "  ".join(f"{n} {last[n]:.4f}" for n in shown if n in last))
    if best:
        lines.append(f"best held-out loss {best['loss']:.4f} at step {best['step']}")
    lines.append(f"model {output_dir}; curves: tensorboard --logdir {output_dir / 'logs'}")
    return "\n".join(lines)
