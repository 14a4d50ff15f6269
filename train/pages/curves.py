"""The curves of runs: losses against what they have to beat, rates, speed."""

from collections.abc import Sequence

import numpy as np

from train.pages.chart import Line, colour_of, line_chart
from train.pages.read.metrics import Curve
from train.pages.read.runs import Run

BASELINES = (
    ("ar_copy_baseline", "the last frame again", "dashed"),
    ("ar_affine_baseline", "a mix of last frame and average", "dotted"),
    ("ar_ridge_baseline", "a linear map of the last frame", "dashdot"),
)
PAIRS = {
    "SS": "fine to fine",
    "SF": "fine to coarse",
    "FS": "coarse to fine",
    "FF": "coarse to coarse",
}
"""Of two frames in a row, which has the finer grid (S, slow) or the coarser one (F, fast)."""


def losses(runs: Sequence[Run]) -> list[str]:
    """Return the charts of what the runs learned from."""
    return [
        language_chart(runs),
        *kinds_charts(runs),
        frames_chart(runs),
        skill_chart(runs),
        *pairs_charts(runs),
    ]


def language_chart(runs: Sequence[Run]) -> str:
    lines = by_run(runs, "ce_loss")
    for k, run in enumerate(runs):
        held = held_out(run, "ce_loss")
        lines.append(Line(f"{run.name}, on held-out records", held, colour_of(k), "dots"))
        for test in run.tests:
            if "ce_loss" in test.losses:
                curve = point(run.metrics.last["step"], test.losses["ce_loss"])
                lines.append(
                    Line(f"{run.name}, on test set '{test.name}'", curve, colour_of(k), "dots")
                )
    return line_chart(
        "Answers",
        lines,
        unit="loss per token",
        says="How badly the right answers are predicted, word by word: lower is better, and 0 would be "
        "knowing them all. Dots are records that were not trained on.",
    )


def kinds_charts(runs: Sequence[Run]) -> list[str]:
    """Return a chart of the loss by kind of answer, for a run alone."""
    if len(runs) > 1:
        return []
    # by kind of answer; ce_loss is the loss of all
    names = sorted(n for n in runs[0].metrics.names if n.startswith("ce_") and n != "ce_loss")
    lines = [
        Line(name[3:], runs[0].metrics.curve(name), colour_of(k)) for k, name in enumerate(names)
    ]
    says = "The same by what is asked for. A kind whose curve stays high is not learned."
    chart = line_chart("Answers by kind", lines, unit="loss per token", says=says)
    return [chart] if len(names) > 1 else []


def frames_chart(runs: Sequence[Run]) -> str:
    lines = by_run(runs, "autoregressive_loss")
    first = runs[0].metrics
    for name, words, style in BASELINES:
        # of the first run alone, as the text says: three lines more for each run would be too many
        lines.append(Line(words, first.curve(name), "ink", style))
    return line_chart(
        "The next frame",
        lines,
        unit="mean square error",
        says="How far the prediction of the next frame's features is off, beside three guesses that need "
        "no model"
        + (f" (those of {runs[0].name})." if len(runs) > 1 else ".")
        + " Lower is better.",
    )


def skill_chart(runs: Sequence[Run]) -> str:
    return line_chart(
        "Skill at the next frame",
        by_run(runs, "ar_skill"),
        zero="as good as the best guess",
        percent=True,
        says="How much smaller the error is than that of the best of the three guesses. Below 0 a guess "
        "is better.",
    )


def pairs_charts(runs: Sequence[Run]) -> list[str]:
    """Return, for a run alone, skill (or, of an older run, error) by the grids of the two frames."""
    if len(runs) > 1:
        return []
    metrics = runs[0].metrics
    prefix = "ar_skill_" if any(f"ar_skill_{pair}" in metrics.names for pair in PAIRS) else "ar_"
    lines = [
        Line(f"{pair}: {words}", metrics.curve(f"{prefix}{pair}"), colour_of(k))
        for k, (pair, words) in enumerate(PAIRS.items())
    ]
    is_skill = prefix == "ar_skill_"
    says = "By the grids of the two frames: fine frames have more cells, and more to get wrong."
    if not is_skill:
        says += " The run did not log the guesses apart, so this is the error itself."
    return [
        line_chart(
            "Skill by kind of step" if is_skill else "Error by kind of step",
            lines,
            says=says,
            zero="as good as the best guess" if is_skill else "",
            percent=is_skill,
        )
    ]


def rates(runs: Sequence[Run]) -> list[str]:
    """Return the charts of how the runs were driven: learning rates and gradients."""
    lines = by_run(runs, "learning_rate")
    if len(runs) == 1:
        metrics = runs[0].metrics
        others = sorted(n for n in metrics.names if n.startswith("learning_rate_"))
        if others:
            # the plain name is the LLM's rate, as soon as other parts have one of their own
            lines = [Line("LLM", metrics.curve("learning_rate"), colour_of(0))]
        lines += [
            Line(name.removeprefix("learning_rate_"), metrics.curve(name), colour_of(k))
            for k, name in enumerate(others, start=1)
        ]
    rate = line_chart(
        "Learning rate",
        lines,
        says="How large the steps are: up in the warm-up, then down to nothing.",
    )
    norm = line_chart(
        "Gradient norm",
        by_run(runs, "grad_norm"),
        # norms of a run can differ by powers of ten, and a peak would flatten everything else
        log=True,
        says="How strongly the weights are pulled, before clipping. Sudden peaks mean trouble.",
    )
    return [rate, norm]


def speed(runs: Sequence[Run]) -> list[str]:
    """Return the charts of how fast the runs were, and what they waited for."""
    return [
        line_chart(
            "Throughput",
            by_run(runs, "tokens_per_second"),
            unit="tokens per second",
            says="All processes together, padding not counted.",
        ),
        line_chart(
            "Waiting for data",
            by_run(runs, "data_wait"),
            percent=True,
            says="The share of a step's time in which the model waited for features from the bank.",
        ),
        line_chart(
            "Memory",
            by_run(runs, "memory_gb"),
            unit="GB",
            says="The most that the first process has held so far.",
        ),
        line_chart(
            "Use of the device",
            by_run(runs, "mfu"),
            percent=True,
            says="Of the arithmetic that the device could do, how much the model needed (MFU).",
        ),
    ]


def by_run(runs: Sequence[Run], name: str) -> list[Line]:
    return [
        Line(run.name, run.metrics.curve(name), colour_of(k), band=len(runs) == 1)
        for k, run in enumerate(runs)
    ]


def held_out(run: Run, name: str) -> Curve:
    """Return a number on held-out records, over steps."""
    found = [(row["step"], row[name]) for row in run.metrics.held_out if name in row]
    both = np.asarray(found, float).reshape(-1, 2)
    return Curve(both[:, 0], both[:, 1], both[:, 1], both[:, 1])


def point(step: float, value: float) -> Curve:
    one = np.asarray([value])
    return Curve(np.asarray([float(step)]), one, one, one)
