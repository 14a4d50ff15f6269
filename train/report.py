"""A table over finished runs and their test sets: what differed, what they cost, what they reached.

python -m train.report runs/a runs/b     # runs on one bank
"""

import json
import sys
from pathlib import Path

from shards.errors import UserError
from shards.signed import Json
from train.scores.results import CONTROLS, PREFIX, read_report
from train.settings.exits import command


@command
def main(argv: list[str]) -> None:
    """Print the table of some runs."""
    print(compare([Path(run) for run in argv]))  # noqa: T201


def compare(runs: list[Path]) -> str:
    """Return a table of finished runs: what differed, what they cost, what they reached."""
    header = [
        "run",
        "pattern",
        "LAPE",
        "steps",
        "train s",
        "test set",
        "ce_loss",
        "ar_loss",
        "strongest baseline",
        "ar_skill",
        "span mIoU",
    ]
    header += ["untrained", "shuffled", "probe", "constant"]
    rows = [header]
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            raise UserError(
                "no metrics.jsonl", where=str(run), fix="name the output_dir of a finished run"
            )
        config = json.loads((run / "run.json").read_text())["config"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["kind"] == "train"]
        trained = [
            str(run),
            f"{config['frame_sampling_strategy']} {config['slow_frame_ratio']}",
            "on" if config["enable_lape"] else "off",
            str(steps[-1]["step"]),
            f"{sum(line['seconds'] for line in steps):.0f}",
        ]
        rows += [[*trained, *own] for own in _scores(run)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _scores(run: Path) -> list[list[str]]:
    """Return the columns of each test set that a run's folder has scores of; of none, one without."""
    reports: dict[str, dict[str, Json]] = {}
    for path in sorted(run.glob(f"{PREFIX}*.json")):
        report = read_report(path)
        if "test_set" in report:
            control = next((name for name in CONTROLS if report.get(name)), "")
            reports.setdefault(report["data_path"], {})[control] = report
    out = []
    for own in reports.values() or [{}]:
        scored, controls = own.get("", {}), [own.get(name, {}) for name in CONTROLS]
        losses = scored.get("losses", {})
        out.append(
            [
                next((r["test_set"] for r in (scored, *controls) if r), "-"),
                _number(losses.get("ce_loss")),
                _number(losses.get("autoregressive_loss")),
                _strongest(losses),
                _number(losses.get("ar_skill")),
                *(
                    _number(r.get("tasks", {}).get("span", {}).get("iou"))
                    for r in (scored, *controls)
                ),
                _number(scored.get("constant_span_miou")),
            ]
        )
    return out


def _strongest(losses: Json) -> str:
    """Return the lowest loss of those that `ar_skill` is read against, and whose it is."""
    if "ar_skill" not in losses:
        return "-"
    loss, name = min((losses[f"ar_{name}_baseline"], name) for name in ("copy", "affine", "ridge"))
    return f"{loss:.3f} {name}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main(sys.argv[1:])
