"""The words around a run: its banner, its closing summary, and a table over several runs.

python -m train.report runs/a runs/b     # compares finished runs on one bank
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.dataset import Dataset
from train.settings.config import TrainConfig, refuse

if TYPE_CHECKING:
    from model.vlm import VLM
    from train.batches.plan import RunPlan

Json = dict[str, Any]


def banner(
    config: TrainConfig,
    dataset: Dataset,
    model: "VLM",
    plan: "RunPlan",
    world: int,
    ratio: float,
    resumed: Path | None,
) -> str:
    """Return what a run is about to do, in the words of its settings."""
    from model.slow_fast import draw_pattern, slow_frames

    bank = dataset.banks.banks[0]
    units = -(-bank.config.sampling.most_frames // int(bank.columns["frames_per_unit"][0]))
    frames = min(units, config.max_frames_num)
    pattern = slow_frames(config.frame_sampling_strategy, config.slow_frame_ratio, frames)
    cells = {
        stride: bank.shape(0, stride)[1:3] for stride in {dataset.slow_stride, dataset.fast_stride}
    }
    slow, fast = (
        rows * cols for rows, cols in (cells[dataset.slow_stride], cells[dataset.fast_stride])
    )
    tokens = sum((slow if is_slow else fast) + 1 for is_slow in pattern)
    parts = {name: sum(p.numel() for p in group) for name, group in model.parts().items()}
    clips = sum(len(b) for b in dataset.banks.banks)
    lines = [
        f"bank      {', '.join(b.where for b in dataset.banks.banks)}: {clips} clips, "
        f"fingerprint {bank.config.fingerprint[:12]}",
        f"records   {len(dataset.records)} to train on, {len(dataset.held_out)} held out, "
        f"{dropped_line(plan.dropped)}",
        f"frames    {draw_pattern(pattern)} (S: stride {dataset.slow_stride}, "
        f"{'x'.join(map(str, cells[dataset.slow_stride]))} cells; F: stride {dataset.fast_stride}, "
        f"{'x'.join(map(str, cells[dataset.fast_stride]))}), {tokens} tokens of a clip"
        + (", and the time before each frame" if config.frame_time == "text" else ""),
        f"steps     {plan.num_steps} of {plan.rows_per_step} {rows_line(plan)}: "
        f"{plan.rows_per_pack} x {plan.packs_per_step} micro-batches on {world} "
        f"process{'es' if world > 1 else ''}",
        f"plan      {plan.per_step(plan.tokens).mean():,.0f} tokens a step, "
        f"{plan.num_labels.mean():,.0f} of them supervised; {plan.efficiency:.1%} of the places hold "
        f"one; fingerprint {plan.fingerprint[:12]}",
        f"trained   {sum(parts.values()):,} parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in parts.items()),
        f"losses    language + {config.loss_weight:g} x frame-causal ({config.predictor}, "
        f"{config.frame_attention} attention)",
    ]
    if model.lape is not None:
        extra = parts.get("lape", 0) * 12 / 1e6
        lines.append(
            f"LAPE      on: {config.num_temporal_tokens} temporal, {config.num_spatial_tokens} spatial "
            f"tokens, preset {config.lape_preset}; tables, gradients and moments take {extra:.1f} MB more"
        )
        if ratio == ratio:
            lines.append(f"          positions / features by RMS at gamma 1: {ratio:.2f}")
    else:
        lines.append("LAPE      off")
    if resumed:
        lines.append(f"resumed   from {resumed}")
    return "\n".join(lines)


def dropped_line(dropped: Mapping[str, int]) -> str:
    """Return how many records were left out, and why."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    return f"{sum(dropped.values())} dropped" + (f" ({reasons})" if reasons else "")


def rows_line(plan: "RunPlan") -> str:
    return f"rows of up to {plan.pack_tokens} tokens" if plan.pack_tokens else "records"


def closing(
    config: TrainConfig,
    model: "VLM",
    output_dir: Path,
    seconds: float,
    last: Json,
    best: Json | None,
) -> str:
    """Return what a run did, and where it left its results."""
    lines = [f"done in {seconds:.0f} s; LAPE {'on' if model.lape else 'off'}"]
    shown = ("ce_loss", "autoregressive_loss", "ar_skill")
    lines.append("last step: " + "  ".join(f"{n} {last[n]:.4f}" for n in shown if n in last))
    if best:
        lines.append(f"best held-out loss {best['loss']:.4f} at step {best['step']}")
    lines.append(f"model {output_dir}; curves: tensorboard --logdir {output_dir / 'logs'}")
    return "\n".join(lines)


def compare(runs: list[Path]) -> str:
    """Return a table of finished runs: what differed, what they cost, what they reached."""
    header = [
        "run",
        "pattern",
        "LAPE",
        "steps",
        "train s",
        "ce_loss",
        "ar_loss",
        "ar_skill",
        "span mIoU",
    ]
    header += ["untrained", "constant"]
    rows = [header]
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            refuse([f"{run}: no metrics.jsonl; name the output_dir of a finished run"])
        config = json.loads((run / "run.json").read_text())["config"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["kind"] == "train"]
        scored, before = _read(run / "eval.json"), _read(run / "eval-untrained.json")
        losses = scored.get("losses", {})
        rows.append(
            [
                str(run),
                f"{config['frame_sampling_strategy']} {config['slow_frame_ratio']}",
                "on" if config["enable_lape"] else "off",
                str(steps[-1]["step"]),
                f"{sum(line['seconds'] for line in steps):.0f}",
                _number(losses.get("ce_loss")),
                _number(losses.get("autoregressive_loss")),
                _number(losses.get("ar_skill")),
                _number(scored.get("tasks", {}).get("span", {}).get("iou")),
                _number(before.get("tasks", {}).get("span", {}).get("iou")),
                _number(scored.get("constant_span_miou")),
            ]
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _read(path: Path) -> Json:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    print(compare([Path(run) for run in sys.argv[1:]]))  # noqa: T201
