"""What LAPE has learned: which anchors of an axis are alike, and how strong positions are."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np

from train.pages.chart import Line, colour_of, line_chart
from train.pages.read.metrics import Curve
from train.pages.read.runs import Run

AXES = ("time", "height", "width")
ENDS = {"time": ("start", "end"), "height": ("top", "bottom"), "width": ("left", "right")}
ROLES = {"input_tables": "read", "output_tables": "written"}
"""Of the tables: what a coordinate is in a question or a frame, and in an answer."""
RAMP = np.asarray([(32, 70, 140), (245, 245, 240), (178, 50, 20)], float)
"""Colours of a similarity of -1, 0 and 1."""


def similarities(rows: np.ndarray) -> np.ndarray:
    """Return the cosines between anchors, without what all have in common: `(n, width)` -> `(n, n)`."""
    # what all anchors share (where rows of the LLM are) would make all of them alike
    own = rows - rows.mean(axis=0)
    own = own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)
    return np.asarray(own @ own.T)


def order(similar: np.ndarray) -> float:
    """Return how far anchors are ordered: the rank correlation, over all pairs, of nearness in place and
    likeness; 1 where nearer ones are always more alike, 0 where place says nothing."""
    # each pair once, without an anchor beside itself
    first, second = np.triu_indices(len(similar), 1)
    near, alike = ranks(-(second - first).astype(float)), ranks(similar[first, second])
    # Spearman's rank correlation: Pearson's, of the ranks. Likeness need not
    # fall in a line with distance.
    return float(np.corrcoef(near, alike)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the mean rank of each value among all: equal ones share theirs."""
    # sorted places 1 .. n; c equal values end at cumsum, so that their mean is (c - 1) / 2 below it
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def section(runs: Sequence[Run]) -> str:
    """Return the maps of each run that has tables, and gamma over time; nothing without any."""
    with_lape = [run for run in runs if run.tables]
    if not with_lape:
        return ""
    parts = [
        "<p>LAPE gives times and places words of their own: a row of numbers, an <em>anchor</em>, for "
        "each of some evenly spaced moments, rows and columns. Each square below compares all anchors of "
        "one axis with each other: <b>red</b> is alike, <b>blue</b> is opposite. A red band along the "
        "diagonal that fades evenly means that neighbours are alike and the order is known. With the "
        "preset <code>plus</code> anchors begin in order, with <code>st</code> all begin alike.</p>"
    ]
    for run in with_lape:
        maps = "".join(
            figure(run, role, axis)
            for role in ROLES
            for axis in range(3)
            # tied tables are saved once
            if f"{role}.{axis}" in run.tables
        )
        parts.append(f"<h4>{escape(run.name)}</h4><div class='maps'>{maps}</div>")
    parts.append(gammas(runs))
    return "".join(parts)


def figure(run: Run, role: str, axis: int) -> str:
    similar = similarities(run.tables[f"{role}.{axis}"])
    name, (first, last) = AXES[axis], ENDS[AXES[axis]]
    words = f"{name}, {ROLES[role]}: {len(similar)} anchors, order {order(similar):.2f}"
    return (
        f'<figure class="map"><img src="{heat(similar)}" width="{len(similar)}" height="{len(similar)}" '
        f'class="cells" alt="{escape(words)} of 1"><figcaption><b>{name}</b>, {ROLES[role]}'
        f'<small class="ends"><span>{first}</span><span>{last}</span></small>'
        f"<small>order {order(similar):.2f} of 1</small></figcaption></figure>"
    )


def heat(values: np.ndarray) -> str:
    """Return values from -1 to 1, `(rows, cols)`, as a picture of a pixel each."""
    from PIL import Image

    places = (values.clip(-1, 1) + 1) / 2
    channels = [np.interp(places, [0, 0.5, 1], RAMP[:, k]) for k in range(3)]
    file = io.BytesIO()
    Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def gammas(runs: Sequence[Run]) -> str:
    """Return how strong the positions of each axis were, of each run over its steps; of a run that did
    not log it in words."""
    charts, words = [], []
    for run in runs:
        steps, gamma = run.gammas()
        # a single point is no curve
        if len(steps) == 1:
            each = ", ".join(
                f"{axis} {value:.2f}" for axis, value in zip(AXES, gamma[0], strict=True)
            )
            words.append(
                f"<p>Strength of positions (gamma) of {escape(run.name)} at its end: {each}.</p>"
            )
            continue
        lines = [
            Line(axis, Curve(steps, gamma[:, k], gamma[:, k], gamma[:, k]), colour_of(k))
            for k, axis in enumerate(AXES)
            if np.isfinite(gamma[:, k]).all()
        ]
        name = f", {run.name}" if len(runs) > 1 else ""
        says = (
            "How strongly the place of a frame's patch is added to what it shows; near 0 an axis is not "
            "used."
        )
        charts.append(line_chart(f"Strength of positions (gamma){name}", lines, says=says))
    return f'<div class="charts">{"".join(charts)}</div>{"".join(words)}'
