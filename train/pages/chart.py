"""Curves and bars as SVG inside the page, in the colours of its style sheet.

matplotlib draws; each colour is then replaced by the style sheet's variable of that name, so that a page
has one palette and a dark mode. Text stays text.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.errors import UserError
from shards.signed import digest
from train.pages.read.metrics import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.4, 2.6)  # inches, of which the page shows 72 points as about 90 pixels
COLOURS = tuple(f"run-{k}" for k in range(12))
"""Names of variables in page.css, one for each run."""
NAMES = ("ink", "faint", "grid", "good", "bad", *COLOURS)
# matplotlib takes no CSS variables: each name has a colour that no drawing uses,
# and is put back in the text
HEX = {name: f"#0e{k:02x}0f" for k, name in enumerate(NAMES, start=16)}
"""Colours that stand for the variables until the drawing is text."""
MOST_NAME = 22
"""Letters of a run's name beside an axis, its last ones."""
DASHES: dict[str, str | tuple[float, tuple[float, ...]]] = {
    "line": "-",
    "dashed": (0, (4, 2)),
    "dotted": (0, (1, 1.6)),
    "dashdot": (0, (5, 1.5, 1, 1.5)),
}


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    name: str
    curve: Curve
    colour: str
    """A name of `NAMES`."""
    style: str = "line"
    """line, dashed, dotted, dashdot; or dots, each with its own place."""
    band: bool = False
    """Whether the range within each point's steps is shaded."""

    @property
    def kind(self) -> str:
        """How it is drawn: a curve of one point is a dot."""
        return self.style if len(self.curve) > 1 else "dots"


def colour_of(number: int) -> str:
    """Return the colour of a run by its place; beyond twelve they come again."""
    return COLOURS[number % len(COLOURS)]


def check_drawing() -> None:
    """Raise UserError where the library that draws is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fix = "pip install 'framebank[report]'"
        raise UserError("no page: matplotlib, which draws it, is not installed", fix=fix) from None


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    says: str,
    unit: str = "",
    x: str = "step",
    zero: str = "",
    percent: bool = False,
    log: bool = False,
) -> str:
    """Return a figure of curves with its legend; nothing where none has a point.

    says: what it shows, for those who cannot see it, and below the title. zero: what a line at 0
    means, drawn where it is given. percent: the numbers are shares.
    """
    # older runs, and runs without LAPE or frame loss, did not log everything: their curves are empty
    drawn = [line for line in lines if len(line.curve)]
    if not drawn:
        return ""
    figure, axes = new_figure()
    for line in drawn:
        draw_line(axes, line)
    if zero:
        axes.axhline(0, color=HEX["ink"], linewidth=0.8)
    if log:
        axes.set_yscale("log")
    # losses are read from 0, or a small difference would look like a large one
    elif min(float(line.curve.low.min()) for line in drawn) >= 0 and not zero:
        axes.set_ylim(bottom=0)
    if zoom(axes, drawn, log):
        says += " The first steps are beyond the edge."
    axes.set_xlabel(x)
    axes.margins(x=0.01)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    else:
        axes.yaxis.set_major_formatter(short_number)
        # a log axis over less than a decade would label its minor ticks, too
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    if drawn[0].style != "dots":
        axes.xaxis.set_major_formatter(short_number)
    key = [legend(line.name, line.colour, line.kind) for line in drawn]
    if zero:
        key.append(legend(f"0: {zero}", "ink", "line"))
    return framed(title, unit, says, svg_of(figure, says), key if len(key) > 1 else [])


def draw_line(axes: "Axes", line: Line) -> None:
    curve, colour = line.curve, HEX[line.colour]
    if line.kind == "dots":
        axes.plot(curve.steps, curve.mean, "o", color=colour, markersize=4, clip_on=False)
        return
    # the band of one run alone: those of several would cover each other
    if line.band and (curve.high > curve.low).any():
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.14, linewidth=0)
    axes.plot(curve.steps, curve.mean, color=colour, linewidth=1.5, linestyle=DASHES[line.style])


def zoom(axes: "Axes", lines: Sequence[Line], log: bool) -> bool:
    """Cut off what the first few steps alone reach, and return whether there was any.

    A curve is read by its other nine tenths.
    """
    # the first tenth is left out: losses fall from where the weights were drawn, by far more than later
    ends = [line.curve.mean[len(line.curve) // 10 :] for line in lines]
    late = np.concatenate(ends)
    low, high = float(late.min()), float(late.max())
    whole = axes.get_ylim()
    # a curve that never changes has no height of its own
    room = 0.12 * (high - low) or abs(high) or 1.0
    above = not log and whole[1] > high + 4 * room
    below = not log and whole[0] < min(low - 4 * room, 0)
    if above:
        axes.set_ylim(top=high + room)
    if below:
        axes.set_ylim(bottom=low - room)
    return above or below


def interval_chart(
    title: str,
    rows: Sequence[tuple[str, str, float, tuple[float, float] | None]],
    marks: Sequence[tuple[str, str, float]],
    *,
    most: float,
    says: str,
    unit: str = "",
    percent: bool = False,
) -> str:
    """Return a figure of scores, one below the other, with their intervals and some marks.

    rows: (name, colour, score, interval or None). marks: (name, colour, score), vertical lines.
    most: the end of the axis, which begins at 0.
    """
    # 0.019 of the width a letter, at this size of text
    longest = max(len(name) for name, *_ in rows)
    left = min(0.06 + 0.019 * longest, 0.5)
    figure, axes = new_figure(0.42 + 0.3 * len(rows), left, labelled=False)
    for k, (_, colour, value, interval) in enumerate(rows):
        if interval:
            axes.plot(interval, (k, k), color=HEX[colour], linewidth=2.5, solid_capstyle="butt")
        axes.plot(value, k, "o", color=HEX[colour], markersize=6)
    # not by colour alone: marks are distinct in print, and by those who do not see colours
    styles = ("dashed", "dotted", "dashdot")
    for (_, colour, value), style in zip(marks, styles * len(marks), strict=False):
        axes.axvline(value, color=HEX[colour], linewidth=1.2, linestyle=DASHES[style])
    axes.set_yticks(range(len(rows)), [name[-MOST_NAME:] for name, *_ in rows])
    # upside down: the first row is the uppermost
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, most)
    if percent:
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    key = [
        legend(name, colour, style)
        for (name, colour, _), style in zip(marks, styles * len(marks), strict=False)
    ]
    return framed(title, unit, says, svg_of(figure, says), key)


def new_figure(
    height: float = SIZE[1], left: float = 0.13, *, labelled: bool = True
) -> "tuple[Figure, Axes]":
    """Return an empty figure in the style of the page.

    height: in inches; left: the share of the width for what stands beside the axis; labelled: whether
    something stands below the numbers of the axis.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # text stays text, in the page's font: it can be searched, read out and scaled
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(SIZE[0], height))
    below = (
        0.44 if labelled else 0.26
    )  # inches; a layout that is solved for takes longer than drawing
    axes = figure.add_axes((left, below / height, 0.95 - left, 1 - (below + 0.08) / height))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(HEX["faint"])
    axes.tick_params(colors=HEX["faint"], labelcolor=HEX["ink"], labelsize=9)
    axes.xaxis.label.set(color=HEX["ink"], size=9)
    axes.grid(color=HEX["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def short_number(value: float, _: Any = None) -> str:
    """Return 20000.0 as 20k, 0.25 as 0.25."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def svg_of(figure: "Figure", says: str) -> str:
    """Return a drawing as an element of a page: ids of its own, colours by name, nothing behind it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib's rules for all lines and joins: in a page they would hold for every other drawing
    text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    # matplotlib names the parts of every drawing alike (axes_1, line2d_1), and an id counts for the page
    own = f"c{digest(text.encode(), size=4)}-"  # of all drawings of a page
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{own}", text)
    for name, colour in HEX.items():
        text = text.replace(colour, f"var(--{name})")
    # the size stays, the font is the page's
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", text)
    view = re.search(r'viewBox="[^"]+"', text)
    assert view
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} role="img" '
    return f'{head}aria-label="{escape(says)}">{text[text.index(">") + 1 :]}'


def legend(name: str, colour: str, kind: str) -> str:
    """Return an entry of a legend, drawn as its line is."""
    mark = '<circle cx="13" cy="4" r="3.5" fill="var(--colour)" stroke="none"/>'
    if kind != "dots":
        dashes = DASHES[kind]
        pattern = " ".join(str(2 * d) for d in dashes[1]) if isinstance(dashes, tuple) else "none"
        mark = f'<path d="M0 4H26" stroke-dasharray="{pattern}"/>'
    return (
        f'<li style="--colour:var(--{colour})"><svg viewBox="0 0 26 8" aria-hidden="true">{mark}</svg>'
        f"{escape(name)}</li>"
    )


def framed(title: str, unit: str, says: str, svg: str, key: Sequence[str]) -> str:
    """Return a drawing with its title, what it shows, and its legend."""
    of = f" <small>{escape(unit)}</small>" if unit else ""
    keys = f'<ul class="key">{"".join(key)}</ul>' if key else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{of}'
        f"<p>{escape(says)}</p></figcaption>{keys}{svg}</figure>"
    )
