"""The table of runs for a terminal: what differed, what they cost, what they reached."""

from collections.abc import Sequence

from shards.signed import Json
from train.pages.read.runs import Run, TestSet
from train.scores.results import CONTROLS

TRAINED = ("run", "pattern", "LAPE", "steps", "train s")
REACHED = ("test set", "ce_loss", "ar_loss", "strongest baseline", "ar_skill", "span mIoU")
BESIDE = (*CONTROLS, "constant")


def table(runs: Sequence[Run]) -> str:
    """Return a row for each test set of each run; of a run without any, one row."""
    rows = [[*TRAINED, *REACHED, *BESIDE]]
    for run in runs:
        config = run.config
        trained = [
            str(run.folder),
            f"{config['frame_sampling_strategy']} {config['slow_frame_ratio']}",
            "on" if config["enable_lape"] else "off",
            str(run.metrics.last["step"]),
            f"{run.metrics.seconds:.0f}",
        ]
        rows += [[*trained, *cells(test)] for test in run.tests or [None]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *other_questions(runs)])


def other_questions(runs: Sequence[Run]) -> list[str]:
    """Return a line for each test set, or control, with other questions than the first of its path."""
    first: dict[str, tuple[Run, TestSet]] = {}
    lines = []
    for run in runs:
        for test in run.tests:
            lines += [
                f"note: {run.folder}: {name} of {test.name} was asked other questions "
                f"({report.get('answers', 0):,}, the run {test.report.get('answers', 0):,})"
                for name, report in test.controls.items()
                # a probe answers what can be read off frames, and leaves the rest out
                if name != "probe" and not test.asks_as(report)
            ]
            if not test.report:
                continue
            base, theirs = first.setdefault(test.data_path, (run, test))
            if not theirs.sees_as(test.report):
                lines.append(
                    f"note: {run.folder} and {base.folder}: in {test.name} the questions of a record see "
                    "those before them, and their right answers, in one of the two alone; evaluate both "
                    "with the same --turns"
                )
            elif not theirs.asks_as(test.report):
                lines.append(
                    f"note: {run.folder} and {base.folder}: {test.name} was not the same questions: its "
                    "records changed, or were fewer, between the scorings; score both again"
                )
    return lines


def cells(test: TestSet | None) -> list[str]:
    """Return the columns of a test set."""
    if test is None:
        return ["-"] * (len(REACHED) + len(BESIDE))
    losses = test.losses
    spans = [
        report.get("tasks", {}).get("span", {}).get("iou")
        for report in (test.report, *(test.controls.get(name, {}) for name in CONTROLS))
    ]
    return [
        test.name,
        number(losses.get("ce_loss")),
        number(losses.get("autoregressive_loss")),
        strongest(losses),
        number(losses.get("ar_skill")),
        *map(number, spans),
        number(test.report.get("constant_span_miou")),
    ]


def strongest(losses: Json) -> str:
    """Return the lowest loss of those that `ar_skill` is read against, and whose it is."""
    if "ar_skill" not in losses:
        return "-"
    # read as the skill is: against the lowest of the three
    loss, name = min((losses[f"ar_{name}_baseline"], name) for name in ("copy", "affine", "ridge"))
    return f"{loss:.3f} {name}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
