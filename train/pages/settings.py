"""What the runs have in common, and the settings in which they differ."""

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from shards.signed import Json
from train.pages.read.runs import Run
from train.settings.config import TrainConfig

WHERE = ("output_dir", "plan")
"""Settings that every run has its own of, and that say nothing."""


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the names of the settings that are not the same in all runs, in their own order."""
    configs = [whole(run) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    return [
        name
        for name in names
        if name not in WHERE and any(c.get(name) != configs[0].get(name) for c in configs)
    ]


def whole(run: Run) -> Json:
    """Return a run's settings; one that it did not know yet is as its default is."""
    return asdict(TrainConfig()) | run.config


def section(runs: Sequence[Run]) -> str:
    """Return the table of what differs, of what the runs said of themselves, and of all settings."""
    parts = []
    # what differs first: it is what several runs are compared for
    if len(runs) > 1:
        names = differing(runs)
        if names:
            parts.append("<h3>Settings that differ</h3>" + table(runs, names))
        else:
            parts.append("<p>The runs have the same settings.</p>")
    words = dict.fromkeys(word for run in runs for word in run.said)
    rows = [
        (word, [run.said.get(word, "") for run in runs])
        for word in words
        # warnings have a place of their own, among what fails
        if word not in ("note", "warning")
    ]
    if rows:
        parts.append(
            f"<details{' open' * (len(runs) == 1)}><summary>What each run said of itself when it "
            "began</summary>"
            f"{grid(runs, rows, code=False)}</details>"
        )
    defaults = asdict(TrainConfig())
    own = [n for n in whole(runs[0]) if any(whole(r).get(n) != defaults.get(n) for r in runs)]
    parts.append(
        f"<details><summary>Settings that are not the defaults ({len(own)})</summary>"
        f"{table(runs, own)}</details>"
    )
    return "".join(parts)


def table(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = [(name, [shown(whole(run).get(name)) for run in runs]) for name in names]
    return grid(runs, rows, code=True)


def grid(runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[str]]], *, code: bool) -> str:
    """Return names and what each run has of them as a table that scrolls by itself."""
    heads = "".join(f"<th scope=col>{escape(run.name)}</th>" for run in runs)
    tag = ("<code>", "</code>") if code else ("", "")
    body = "".join(
        f"<tr><th scope=row>{tag[0]}{escape(name)}{tag[1]}</th>"
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for name, values in rows
    )
    return scrolled(
        f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table>", "Settings"
    )


def scrolled(table: str, name: str) -> str:
    """Return a table that scrolls by itself where it is wider than the page, by keys too."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}">{table}</div>'


def shown(value: Any) -> str:
    """Return a setting as a configuration has it."""
    if value is None or value in ("", []):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
