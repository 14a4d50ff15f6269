"""What runs reached on test sets: each kind of answer beside what it has to beat, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape

from shards.signed import Json
from train.pages.chart import colour_of, interval_chart
from train.pages.guesses import fixed_guess
from train.pages.read.runs import Run, TestSet
from train.pages.settings import scrolled
from train.scores.spread import Metric, difference_interval, mean_interval

Interval = tuple[float, float]
Tests = Mapping[str, Sequence[tuple[Run, TestSet]]]
"""Scored test sets by the path of their records, each with the runs that have it."""


@dataclass(frozen=True)
class Kind:
    """How a kind of answer is scored, in words."""

    metric: str
    asks: str
    """What such a question asks for."""
    says: str
    """What the score is."""
    errs: bool = False
    """Whether the score is an error, and small ones are good."""
    unit: str = "%"


KINDS = {
    "span": Kind("iou", "from when to when", "overlap with the right span"),
    "windows": Kind("map", "all times when", "mean average precision"),
    "time": Kind("error", "when", "seconds off", errs=True, unit=" s"),
    "point": Kind("error", "where, as a point", "distance, of the frame's side", errs=True),
    "box": Kind("iou", "where, as a box", "overlap with the right box"),
    "tube": Kind("viou", "when and where", "overlap with the right boxes in time"),
    "mixed": Kind("iou", "times and places", "overlap with the right ones"),
    "number": Kind("exact", "how many", "right to the digit"),
    "choice": Kind("exact", "which letter", "right letters"),
    "order": Kind("exact", "in which order", "right orders"),
    "text": Kind("exact", "a few words", "right to the word"),
    "caption": Kind("rouge_l", "a sentence", "words in common (ROUGE-L)"),
}
NONE = "-"
LEARNED, PERHAPS, NOT = "yes", "perhaps", "no"


@dataclass(frozen=True)
class Reached:
    """What one run reached at one kind of answer of a test set."""

    run: Run
    test: TestSet
    name: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def metric(self) -> Metric:
        return self.name, self.kind.metric

    @property
    def entry(self) -> Json:
        return dict(self.test.tasks[self.name])

    @property
    def value(self) -> float:
        return float(self.entry[self.kind.metric])

    @cached_property
    def interval(self) -> Interval | None:
        """The interval of 95 % of 2,000 draws of the test clips; None where answers were not kept."""
        answers = self.test.answers
        # of one clip every draw is the same: an interval of no width would look sure
        if answers is None or self.metric not in answers.totals or len(answers.clips) < 2:
            return None
        return mean_interval([answers], self.metric)

    @cached_property
    def guess(self) -> float | None:
        """The best fixed answer's score."""
        # evaluate has computed it already, over all its answers
        if self.name == "span" and "constant_span_miou" in self.test.report:
            return float(self.test.report["constant_span_miou"])
        rows = [row for row in self.test.rows if row["kind"] == self.name]
        return fixed_guess(self.name, self.kind.metric, rows)

    def control(self, name: str) -> float | None:
        """Return the score of a control: untrained, shuffled, probe."""
        entry = self.test.controls.get(name, {}).get("tasks", {}).get(self.name, {})
        found = entry.get(self.kind.metric)
        return None if found is None else float(found)

    def shown_control(self, name: str) -> str:
        """Return the score of a control as people read it, or that no answer could be scored.

        An answer that does not say what was asked has the worst score, of an error the whole range: 100 %
        of an untrained model looks like a perfect score then.
        """
        entry = self.test.controls.get(name, {}).get("tasks", {}).get(self.name, {})
        shown = "no answer" if entry.get("parsed") == 0 else self.shown(self.control(name))
        return shown if self.asked_as(name) else f"{shown} <small>(other questions)</small>"

    def asked_as(self, name: str) -> bool:
        """Return whether a control was asked the same: records may have changed since, or been fewer."""
        return self.test.asks_as(self.test.controls.get(name, {}), self.name)

    @property
    def beats(self) -> dict[str, float]:
        """What a run that has learned from the videos is better than, by what it is called."""
        # what needs no look at the video, or no training: each is a way to a
        # score without having learned
        named = {
            "a fixed guess": self.guess,
            **{
                words: self.control(name)
                for name, words in (
                    ("shuffled", "other clips' features"),
                    ("untrained", "no training"),
                )
                if self.asked_as(name)
            },
        }
        return {name: value for name, value in named.items() if value is not None}

    @property
    def verdict(self) -> str:
        """Whether it has learned this kind: LEARNED, PERHAPS or NOT; empty where nothing is beside it."""
        if not self.beats:
            return ""
        sign = -1 if self.kind.errs else 1
        # the strongest of them: a model that beats two of three has not shown that it looks
        bar = max(sign * value for value in self.beats.values())
        if sign * self.value <= bar:
            return NOT
        # learned only if the whole interval is beyond the bar
        worst = min(sign * end for end in self.interval) if self.interval else sign * self.value
        return LEARNED if worst > bar else PERHAPS

    def shown(self, value: float | None) -> str:
        """Return a score as people read it: a share in percent, an error in its unit."""
        if value is None:
            return NONE
        return f"{100 * value:.1f} %" if self.kind.unit == "%" else f"{value:.2f}{self.kind.unit}"


def reached(run: Run, test: TestSet) -> list[Reached]:
    """Return what a run reached, a kind after the other, as KINDS has them."""
    return [
        Reached(run, test, name)
        for name, kind in KINDS.items()
        if kind.metric in test.tasks.get(name, {})
    ]


def same_tests(runs: Sequence[Run]) -> Tests:
    found: dict[str, list[tuple[Run, TestSet]]] = {}
    for run in runs:
        for test in run.tests:
            if test.report:
                # by the path of the records, not by name: two test sets may be called alike
                found.setdefault(test.data_path, []).append((run, test))
    return found


def scores_of(runs: Sequence[Run], own: Sequence[tuple[Run, TestSet]]) -> str:
    """Return the table and the charts of one test set."""
    all_reached = [one for run, test in own for one in reached(run, test)]
    names = [name for name in KINDS if any(one.name == name for one in all_reached)]
    groups = {name: [one for one in all_reached if one.name == name] for name in names}
    charts = [chart_of(runs, group) for group in groups.values()]
    rows = [row for group in groups.values() for row in table_rows(group, several=len(own) > 1)]
    head = "<th scope=col>asked</th><th scope=col>answers</th>"
    head += "<th scope=col>run</th>" * (len(own) > 1)
    head += (
        "<th scope=col>score</th><th scope=col>95 % interval</th><th scope=col>a fixed guess</th>"
    )
    for control, words in CONTROL_WORDS.items():
        if any(control in test.controls for _, test in own):
            head += f"<th scope=col>{words}</th>"
    head += "<th scope=col>learned?</th>"
    table = f"<table class='scores'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return (
        f"{scrolled(table, 'Scores')}"
        f'<div class="charts">{"".join(charts)}</div>{differences(groups)}'
    )


CONTROL_WORDS = {
    "shuffled": "with other clips' features",
    "untrained": "before training",
    "probe": "read off the features, no model",
}


def table_rows(group: Sequence[Reached], *, several: bool) -> list[str]:
    first = group[0]
    shown = [name for name in CONTROL_WORDS if any(name in one.test.controls for one in group)]
    rows = []
    for place, one in enumerate(group):
        about = (
            f"<th scope=rowgroup rowspan={len(group)}>{escape(first.name)} "
            f"<small>{escape(first.kind.asks)}; {escape(first.kind.says)}</small></th>"
        )
        cells = [
            *([] if place else [about]),
            f"<td>{one.entry['count']:,}</td>",
            *([f"<td>{escape(one.run.name)}{unlike(one, first)}</td>"] if several else []),
            f"<td><b>{one.shown(one.value)}</b></td>",
            f"<td>{between(one)}</td>",
            f"<td>{one.shown(one.guess)}</td>",
            *(f"<td>{one.shown_control(name)}</td>" for name in shown),
            f"<td>{chip(one.verdict)}</td>",
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return rows


def unlike(one: Reached, first: Reached) -> str:
    """Return a word where a run was asked other questions than the first of a table; else nothing."""
    same = first.test.asks_as(one.test.report, one.name)
    return "" if same else f" <small>(other questions than {escape(first.run.name)})</small>"


def between(one: Reached) -> str:
    return " to ".join(one.shown(end) for end in one.interval) if one.interval else NONE


def chip(verdict: str) -> str:
    return f'<span class="chip {verdict}">{verdict}</span>' if verdict else NONE


def chart_of(runs: Sequence[Run], group: Sequence[Reached]) -> str:
    """Return the chart of a kind: a dot and its interval for each run, lines for what is to be beaten."""
    first = group[0]
    rows = [
        (one.run.name, colour_of(runs.index(one.run)), one.value, one.interval) for one in group
    ]
    # of the first run, as the text says: guesses are the same for all, controls are a run's own
    marks = [(name, "ink", value) for name, value in first.beats.items()]
    probe = first.control("probe")
    if probe is not None:
        marks.append(("read off the features, without a model", "good", probe))
    most = 1.0
    marks = [mark for mark in marks if first.kind.errs or mark[2] > 0]  # at 0 it hides in the axis
    if first.kind.errs:  # from 0 to what is at hand: without training all is at the far end
        ends = [end for one in group for end in (one.value, *(one.interval or ()))]
        most = 1.2 * max([*ends, first.guess or 0.0]) or 1.0
        marks = [mark for mark in marks if mark[2] <= most]
    direction = "smaller is better" if first.kind.errs else "larger is better"
    whose = f" (of {first.run.name})" if len(group) > 1 and marks else ""
    return interval_chart(
        f"{first.name.capitalize()}: {first.kind.asks}",
        rows,
        marks,
        most=most,
        says=f"{first.kind.says.capitalize()}; {direction}. Bars: 95 % intervals over the test clips; "
        f"lines: what has to be beaten{whose}.",
        percent=first.kind.unit == "%",
    )


def differences(groups: dict[str, list[Reached]]) -> str:
    """Return how later runs differ from the first one on the same clips, with intervals."""
    items = []
    for group in groups.values():
        base, *others = group
        for one in others:
            if not base.test.asks_as(one.test.report, one.name):
                continue
            # draws are of clips: other clips cannot be paired
            if not (a := one.test.answers) or not (b := base.test.answers) or a.clips != b.clips:
                continue
            low, high = difference_interval([a], [b], one.metric)
            by = one.value - base.value
            sign = -1 if one.kind.errs else 1
            word = "better" if sign * by > 0 else "worse"
            sure = "" if low > 0 or high < 0 else ", which may be chance"
            scale = (100, " points") if one.kind.unit == "%" else (1, one.kind.unit)
            spread = f"{scale[0] * low:+.1f} to {scale[0] * high:+.1f}"
            items.append(
                f"<li>{escape(one.name)}: <b>{escape(one.run.name)}</b> is {scale[0] * abs(by):.1f}"
                f"{scale[1]} {word} than {escape(base.run.name)} (95 %: {spread}){sure}</li>"
            )
    if not items:
        return ""
    return f"<h4>Side by side, on the same clips</h4><ul>{''.join(items)}</ul>"
