"""Answers in pictures, the worst and the best: spans over the true ones below frames, boxes on frames.

Of several runs on one test set the same questions are shown, the answers of all runs below each.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from shards.annotations.forms import MEDIA_TAG
from shards.signed import Json
from train.data.markup import MARKUP
from train.pages.chart import colour_of
from train.pages.read.footage import Footage, Look
from train.pages.read.runs import Run, TestSet
from train.pages.scores import KINDS, Kind
from train.pages.settings import scrolled
from train.scores.pointed import pointed

SHOWN = 10
"""The worst of a kind, and as many of the best."""
FRAMES = 6
"""Of a clip, above a time line."""
MOST_NAME = 14
"""Letters of a run's name before its bar; what is longer is cut, and whole below."""
SAME = ("record", "turn", "media", "question", "reference")
"""Fields by which two runs' answers are to one question."""
TIMED = ("span", "windows", "time", "tube")
PLACED = ("point", "box")


@dataclass(frozen=True)
class Question:
    """A question of a test set, and what each run answered."""

    row: Json
    """As the first run has it."""
    said: tuple[tuple[Run, Json], ...]
    """Of each run, its line of predictions-NAME.jsonl."""
    score: float
    """The mean over runs, large where they are good."""

    @property
    def text(self) -> str:
        """Without tags, its markup written out; lines stay lines, as of lettered choices."""
        lines = MEDIA_TAG.sub("", self.row["question"]).strip().splitlines()
        return "\n".join(map(in_words, lines))

    @property
    def clip(self) -> str:
        return str(self.row["media"][0]) if self.row["media"] else ""


def questions_of(own: Sequence[tuple[Run, TestSet]], name: str) -> list[Question]:
    """Return the questions of a kind that every run has answered, the worst first."""
    kind = KINDS[name]
    # so that large is good for errors, too
    sign = -1.0 if kind.errs else 1.0
    by_run = [
        {tuple(str(row[field]) for field in SAME): row for row in test.rows if row["kind"] == name}
        for _, test in own
    ]
    found = []
    # only what all have answered: runs may have been scored with another --max_records, or before
    # the records changed
    for key, row in by_run[0].items() if by_run else ():
        if all(key in rows for rows in by_run):
            said = tuple((run, rows[key]) for (run, _), rows in zip(own, by_run, strict=True))
            values = [sign * answer["scores"][kind.metric] for _, answer in said]
            found.append(Question(row, said, sum(values) / len(values)))
    return sorted(found, key=lambda q: q.score)


def answers_of(
    runs: Sequence[Run], own: Sequence[tuple[Run, TestSet]], footage: Footage
) -> list[str]:
    """Return a section for each kind of answer that a test set asks for."""
    sections = []
    for name in KINDS:
        if questions := questions_of(own, name):
            sections.append(kind_section(runs, name, questions, footage))
    return sections


def kind_section(
    runs: Sequence[Run], name: str, questions: Sequence[Question], footage: Footage
) -> str:
    kind = KINDS[name]
    worst = questions[:SHOWN]
    # of the rest: few questions would be among the worst and the best
    best = questions[SHOWN:][::-1][:SHOWN]
    parts = [f"<h4>{escape(name.capitalize())}: {escape(kind.asks)}</h4>"]
    if name == "span":
        parts.append(overview(runs, questions))
    for title, some, is_open in (("The worst", worst, True), ("The best", best, False)):
        if some:
            shown = "".join(card(runs, name, kind, question, footage) for question in some)
            title += f" {len(some)} of {len(questions):,}"
            parts.append(
                f"<details{' open' * is_open}><summary>{title}</summary>"
                f'<div class="cards">{shown}</div></details>'
            )
    return f'<section class="kind">{"".join(parts)}</section>'


# -- one answer


def card(runs: Sequence[Run], name: str, kind: Kind, question: Question, footage: Footage) -> str:
    """Return a question with its picture and what was answered."""
    # a video is opened only for answers that point at something in it
    look = footage.look(question.clip) if name in (*TIMED, *PLACED) else None
    picture = ""
    if name in TIMED:
        picture = time_line(runs, question, look)
    elif name in PLACED and look:
        picture = places(runs, question, look)
    lines = [f'<li class="true"><b>right</b> {escape(in_words(question.row["reference"]))}</li>']
    for run, row in question.said:
        who = escape(run.name) if len(runs) > 1 else "said"
        style = f'style="--colour:var(--{colour_of(runs.index(run))})"'
        lines.append(
            f'<li class="said" {style}><b>{who}</b> {escape(in_words(row["answer"]) or "nothing")} '
            f"<small>{score_words(kind, row)}</small></li>"
        )
    return (
        f'<article class="card"><h5>{escape(question.text)}</h5>{picture}'
        f'<ul class="said">{"".join(lines)}</ul><p class="from">{escape(question.clip)}</p></article>'
    )


def score_words(kind: Kind, row: Json) -> str:
    value = row["scores"][kind.metric]
    if not row["scores"].get("parsed", 1):
        return "not an answer to this"
    if kind.metric == "exact":
        return "right" if value else "wrong"
    shown = f"{100 * value:.0f} %" if kind.unit == "%" else f"{value:.2f}{kind.unit}"
    return f"{shown} {'off' if kind.errs and kind.unit == '%' else ''}".strip()


def in_words(text: str) -> str:
    """Return an answer with its markup written out: times in seconds, places in percent."""
    return " ".join(MARKUP.sub(mark_in_words, text).split())


def mark_in_words(match: re.Match[str]) -> str:
    letter, number = match[1], match[2]
    if not letter:  # an anchor by its name
        return match[0]
    return f"{float(number):.2f} s" if letter == "t" else f"{letter} {100 * float(number):.0f} % "


def time_line(runs: Sequence[Run], question: Question, look: Look | None) -> str:
    """Return a clip's frames, evenly spaced, above bars of the right span and of those said."""
    duration = question.row["duration"] or (look.info.duration if look else 0.0)
    if duration <= 0:
        return ""
    strip = frames_strip(look, question.clip) if look else ""
    bars = [bar("right", "good", spans_of(question.row["reference"], question), duration)]
    for run, row in question.said:
        who = run.name if len(runs) > 1 else "said"
        bars.append(
            bar(who, colour_of(runs.index(run)), spans_of(row["answer"], question), duration)
        )
    scale = f'<p class="scale"><span>0 s</span><span>{duration:.1f} s</span></p>'
    width = min(max(len(run.name) for run, _ in question.said), MOST_NAME) if len(runs) > 1 else 5
    style = f'style="--label:{0.5 * width + 0.6:.1f}rem"'
    return f'<div class="timeline" {style}>{strip}{"".join(bars)}{scale}</div>'


def spans_of(text: str, question: Question) -> Sequence[tuple[float, float]]:
    return pointed(text, question.row["question"]).spans


def frames_strip(look: Look, clip: str) -> str:
    """Return pictures at the middles of equal parts of the clip."""
    duration = look.info.duration
    count = min(FRAMES, len(look.pictures))
    pictures = []
    for k in range(count):
        # the middle of a part stands above that part of the time line
        number = look.near((k + 0.5) * duration / count)
        words = f"{look.what} at {look.times[number]:.2f} s of {clip}"
        pictures.append(f'<img src="{look.pictures[number]}" alt="{escape(words)}" {sized(look)}>')
    return f'<div class="strip">{"".join(pictures)}</div>'


def sized(look: Look) -> str:
    """Return the shape of a picture, so that a page does not jump; cells are enlarged as they are."""
    height, width = look.info.display_size
    kind = "" if look.of_video else ' class="cells"'
    return f'width="{width}" height="{height}"{kind}'


def bar(who: str, colour: str, spans: Sequence[tuple[float, float]], duration: float) -> str:
    """Return a time line with spans filled; a single time is a thin mark."""
    marks = []
    for start, end in spans:
        left = min(max(100 * start / duration, 0), 100)
        # 0.8: a moment is a mark that can still be seen
        width = max(min(100 * end / duration, 100) - left, 0.8)
        marks.append(f'<i style="left:{min(left, 99.2):.2f}%;width:{width:.2f}%"></i>')
    said = ", ".join(f"{a:.2f} to {b:.2f} s" for a, b in spans) or "none"
    words = escape(f"{who}: {said}")
    return (
        f'<div class="bar" role="img" aria-label="{words}" title="{words}" '
        f'style="--colour:var(--{colour})"><b>{escape(who)}</b><span>{"".join(marks)}</span></div>'
    )


def places(runs: Sequence[Run], question: Question, look: Look) -> str:
    """Return the frame that a question asks about with the right place and those said."""
    text = question.row["question"]
    true = pointed(question.row["reference"], text).places
    times = next((seen for seen, _ in true if seen), ())
    # without a time in the answer nothing says which frame is meant: the one in the middle
    number = look.near(times[0]) if times else len(look.pictures) // 2
    # thick below the thin ones: where an answer is right both are seen
    shapes = [shape(place, "good", 5) for _, place in true]
    for run, row in question.said:
        for _, place in pointed(row["answer"], text).places:
            shapes.append(shape(place, colour_of(runs.index(run)), 2.5))
    words = f"{look.what} at {look.times[number]:.2f} s of {question.clip}, with the places in it"
    return (
        f'<div class="shot"><div><img src="{look.pictures[number]}" alt="{escape(words)}" {sized(look)}>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(shapes)}</svg></div><small>{look.times[number]:.2f} s</small></div>"
    )


def shape(place: Sequence[float], colour: str, width: float) -> str:
    """Return a box, or a point as a cross, given as fractions of the frame; white around, to be seen on
    any ground."""
    at = [100 * value for value in place]
    if len(at) == 2:
        x, y = at
        line = f"M{x - 5:.1f} {y:.1f}h10M{x:.1f} {y - 5:.1f}v10"
    else:
        x1, y1, x2, y2 = at
        line = f"M{x1:.1f} {y1:.1f}H{x2:.1f}V{y2:.1f}H{x1:.1f}Z"
        if x1 > x2 or y1 > y2:
            return ""  # there is no such box
    inks = (("#fff", width + 2), (f"var(--{colour})", width))
    return "".join(
        f'<path d="{line}" style="stroke:{ink};stroke-width:{thick}px"/>' for ink, thick in inks
    )


# -- all spans


def overview(runs: Sequence[Run], questions: Sequence[Question]) -> str:
    """Return how the overlaps of all spans are spread, a row of ten classes for each run."""
    edges = [k / 10 for k in range(11)]
    rows = []
    for place, run in enumerate(runs):
        values = [row["scores"]["iou"] for q in questions for who, row in q.said if who is run]
        if not values:
            continue
        counts = [
            # the last class has its upper end: a perfect overlap is no eleventh class
            sum(low <= v < high or (high == 1.0 and v == 1.0) for v in values)
            for low, high in pairwise(edges)
        ]
        most = max(counts)
        cells = "".join(
            f'<td><i style="height:{100 * n / most:.0f}%"></i><span>{n}</span></td>' for n in counts
        )
        colour = f'style="--colour:var(--{colour_of(place)})"'
        rows.append(f"<tr {colour}><th scope=row>{escape(run.name)}</th>{cells}</tr>")
    heads = "".join(
        f"<th scope=col>{round(100 * low)} to {round(100 * high)} %</th>"
        for low, high in pairwise(edges)
    )
    return scrolled(
        '<table class="spread"><caption>How many spans overlap the right one by how much</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>",
        "Overlaps",
    )
