"""The page: its sections in order, in one file that fetches nothing."""

import datetime
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from pathlib import Path

from train.pages import answers, curves, foreseen, lape, settings, story, tokens
from train.pages.chart import colour_of
from train.pages.read.footage import Footage, banks_of
from train.pages.read.runs import Run, read_config_features
from train.pages.scores import Tests, same_tests, scores_of

STYLE = Path(__file__).with_name("page.css")
GLOSSARY = Path(__file__).with_name("words.html")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Of the browser: that nothing is fetched is not only said."""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    body: str
    """HTML; a section without any is left out."""


def page(runs: Sequence[Run], *, refresh: int = 0) -> str:
    """Return the page of some runs.

    refresh: seconds after which a browser loads it again, 0 for never.
    """
    # videos are read while sections are made: the readers end with them
    with ExitStack() as stack:
        album = Album.of(runs, stack)
        sections = [s for s in sections_of(runs, album) if s.body]
    return document(runs, sections, [*album.problems, *sampled_note(runs)], refresh)


@dataclass(frozen=True)
class Album:
    """The clips of each run's banks: two banks may have another clip each of one name."""

    of_banks: dict[tuple[Path, ...], Footage]
    problems: list[str]

    @classmethod
    def of(cls, runs: Sequence[Run], stack: ExitStack) -> "Album":
        found: dict[tuple[Path, ...], Footage] = {}
        problems: list[str] = []
        for run in runs:
            banks = banks_of(run.config, run.folder)
            # runs of one bank share its footage: its videos are decoded once
            if banks not in found:
                footage, why = Footage.of(banks, read_config_features(run.folder))
                found[banks] = stack.enter_context(footage)
                problems += why
        return cls(found, problems)

    def __getitem__(self, run: Run) -> Footage:
        return self.of_banks[banks_of(run.config, run.folder)]


def sections_of(runs: Sequence[Run], album: Album) -> list[Section]:
    tests = same_tests(runs)
    return [
        Section("short", "In short", story.sentences(runs)),
        Section("settings", "What was run", settings.section(runs)),
        Section("losses", "Losses, and what they have to beat", charts(curves.losses(runs))),
        Section("scores", "Scores on test sets", scores_section(runs, tests)),
        Section("answers", "Answers, the worst and the best", answers_section(runs, tests, album)),
        Section(
            "next",
            "The next frame, predicted",
            foreseen.section([(run, album[run]) for run in runs]),
        ),
        Section("lape", "What LAPE has learned", lape.section(runs)),
        Section("tokens", "Where a clip's tokens come from", tokens_section(runs, album)),
        Section("speed", "Speed", charts(curves.speed(runs))),
        Section("rates", "Learning rates and gradients", charts(curves.rates(runs))),
        Section("words", "Words", GLOSSARY.read_text("utf-8")),
    ]


def charts(drawn: Sequence[str]) -> str:
    shown = "".join(drawn)
    return f'<div class="charts">{shown}</div>' if shown else ""


def scores_section(runs: Sequence[Run], tests: Tests) -> str:
    parts = []
    for own in tests.values():
        test = own[0][1]
        records = test.report.get("records")
        about = (
            f"{records:,} records, {test.report.get('answers', 0):,} answers; " if records else ""
        )
        parts.append(
            f"<h3>Test set <code>{escape(test.name)}</code></h3>"
            f"<p>{about}<code>{escape(test.data_path)}</code></p>" + scores_of(runs, own)
        )
    return "".join(parts)


def answers_section(runs: Sequence[Run], tests: Tests, album: Album) -> str:
    parts = []
    for own in tests.values():
        if found := answers.answers_of(runs, own, album[own[0][0]]):
            title = (
                f"<h3>Test set <code>{escape(own[0][1].name)}</code></h3>" if len(tests) > 1 else ""
            )
            parts.append(title + "".join(found))
    if not parts:
        return ""
    key = (
        '<ul class="key"><li><i class="swatch" style="--colour:var(--good)"></i>right</li>'
        + "".join(
            f'<li><i class="swatch" style="--colour:var(--{colour_of(k)})"></i>'
            f"{escape(run.name)}</li>"
            for k, run in enumerate(runs)
        )
        + "</ul>"
    )
    whose = "" if len(runs) == 1 else " Sorted by the mean score of the runs."
    says = (
        "What was asked, what is right, and what was said. Frames are those that the model saw, the "
        "nearest to the moment asked about; x counts from the left, y from the top, in percent of the "
        "frame."
    )
    return f"<p>{says}{whose}</p>{key}" + "".join(parts)


def tokens_section(runs: Sequence[Run], album: Album) -> str:
    """Return the layout of one clip's tokens for each run that has its own."""
    shown, known = [], set()
    for run in runs:
        clip = example_clip(run, album[run])
        body = tokens.section(run, album[run], clip) if clip else ""
        # runs that lay out tokens alike are shown once, whatever they are called
        layout = body.replace(escape(run.name), "")
        if body and layout not in known:
            shown.append(f"<h4>{escape(run.name)}</h4>{body}" if len(runs) > 1 else body)
            known.add(layout)
    return "".join(shown)


def example_clip(run: Run, footage: Footage) -> str:
    """Return a clip to show: of a test set, else the banks' first."""
    asked = (row["media"][0] for test in run.tests for row in test.rows if row["media"])
    # a clip that answers are about is more telling than the bank's first
    clip = next((clip for clip in asked if footage.place(clip)), "")
    return clip or next((bank.ids[0] for bank in footage.banks if len(bank)), "")


def sampled_note(runs: Sequence[Run]) -> list[str]:
    return [
        f"Curves of {run.name} are drawn from {len(run.metrics.rows):,} of its "
        f"{run.metrics.steps:,} steps."
        for run in runs
        if run.metrics.sampled
    ]


def document(
    runs: Sequence[Run], sections: Sequence[Section], notes: Sequence[str], refresh: int
) -> str:
    # whatever stands in names, answers and paths is text: it must not become a part of the page
    title = escape(story.heading(runs))
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    live = "<p class='live' role='status'>Still training; this page loads itself again.</p>" * (
        refresh > 0
    )
    links = "".join(f'<li><a href="#{s.id}">{escape(s.title)}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{s.id}" aria-labelledby="{s.id}-title">'
        f'<h2 id="{s.id}-title">{escape(s.title)}</h2>{s.body}</section>'
        for s in sections
    )
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    shown = "".join(f"<p class='note'>{escape(note)}</p>" for note in notes)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{again}'
        f"<title>{title}</title><style>{STYLE.read_text('utf-8')}</style></head><body>"
        f'<a class="skip" href="#short">To the text</a>'
        f"<header><p>Report of a training run</p><h1>{title}</h1><p>Made {now}.</p>{live}{shown}</header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{unbroken(body)}</main></body></html>\n'
    )


def unbroken(text: str) -> str:
    """Return text in which no line ends between a number and its percent sign."""
    return re.sub(r"(?<=\d) %", "\u00a0%", text)
