"""The files of a test set's scores: a report, and beside it every answer.

`eval-NAME.json` and `predictions-NAME.jsonl`; NAME is that of the file of records.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.signed import Json
from train.settings.output import file_problem, read_object

PREFIX = "eval-"
CONTROLS = {"untrained": "-untrained", "shuffled": "-shuffled", "probe": "-probe"}
"""Control -> ending of its files' names: the model before its first step, the trained one with other
clips' features, or spans that are read from the frames without a model."""
ENDINGS = re.compile(r"\.(jsonl?|csv|tsv|parquet|ya?ml)$", re.IGNORECASE)


@dataclass(frozen=True)
class Results:
    """The files of a test set."""

    name: str
    """The test set's name."""
    data_path: str
    report: Path

    @property
    def predictions(self) -> Path:
        """The file of answers."""
        return predictions_beside(self.report)

    def set_aside(self) -> list[Path]:
        """Rename files of this name that hold the scores of other records; return their new names."""
        other = read_object(self.report).get("data_path", self.data_path)
        if other == self.data_path:
            return []
        ending = next((e for e in CONTROLS.values() if self.report.stem.endswith(e)), "")
        # the first is the name itself, which the present records take; the others are free, or hold
        # the same records' scores from an earlier time
        places = [self.report.with_name(f"{PREFIX}{n}{ending}.json") for n in longer_names(other)]
        free = [p for p in places[1:] if read_object(p).get("data_path", other) == other]
        report = [*free, places[-1]][0]
        moved = {self.report: report, self.predictions: predictions_beside(report)}
        for old, new in moved.items():
            if old.exists():
                os.replace(old, new)
        return [new for new in moved.values() if new.exists()]


def results_of(
    model: Path, paths: Sequence[str], output: Path | None, *, control: str = ""
) -> list[Results]:
    """Return the files of each test set; UserError where they cannot be written.

    control: one of `CONTROLS`, if one is scored.
    """
    if output is not None and len(paths) > 1:
        raise UserError(
            f"--output names one file, and there are {len(paths)} test sets",
            where=output,
            fix="leave it out: each gets an eval-NAME.json in the model's folder",
        )
    found = [
        Results(name, absolute(path), output or model / report_name(name, control))
        for name, path in zip(distinct_names(paths), paths, strict=True)
    ]
    problems = [
        problem
        for own in found
        if (problem := report_problem(own.report) or predictions_problem(own.predictions))
    ]
    if problems:
        raise UserError.of(problems)
    return found


def set_scores_aside(folder: Path) -> list[str]:
    """Rename a folder's scores to `NAME.old`, as its model is another now; return their test sets."""
    found = []
    for report in sorted(folder.glob(f"{PREFIX}*.json"), key=lambda path: path.stem):
        written = read_object(report)
        if "test_set" not in written:  # somebody's own file
            continue
        dropped = report.with_suffix(".dropped.jsonl")
        for place in (report, predictions_beside(report), foreseen_beside(report), dropped):
            if place.exists():
                os.replace(place, place.with_name(f"{place.name}.old"))
        found.append(report.stem.removeprefix(PREFIX))
    return found


def report_name(test_set: str, control: str = "") -> str:
    """Return the file name of a test set's report; control: one of `CONTROLS`, if one is scored."""
    return f"{PREFIX}{test_set}{CONTROLS.get(control, '')}.json"


def asked_as(report: Json) -> str:
    """Return how a report's records of several questions asked these; empty without such records.

    One of `TURNS`, or mixed. In dialogues the right answers before a question are in its prompt, and may
    give its own away.
    """
    # earlier reports name the setting, whether a record had several questions or not
    return str(report.get("turns", "")) * (report.get("answers", 0) > report.get("records", 0))


def predictions_beside(report: Path) -> Path:
    """Return the file of a report's answers: predictions-NAME.jsonl of eval-NAME.json."""
    return report.with_name(f"predictions-{report.stem.removeprefix(PREFIX)}.jsonl")


def foreseen_beside(report: Path) -> Path:
    """Return the file with the frames of a test set: eval-NAME.json has foreseen-NAME.npz."""
    return report.with_name(f"foreseen-{report.stem.removeprefix(PREFIX)}.npz")


def lines_of(predictions: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of a file of answers."""
    # not splitlines: answers may hold U+2028 and others, at which it splits, too
    for number, line in enumerate(predictions.read_text("utf-8").split("\n"), start=1):
        if line:
            yield number, line


def report_beside(predictions: Path) -> Path:
    """Return the report of a file of answers."""
    name = predictions.stem.removeprefix("predictions-")
    return predictions.with_name(f"{PREFIX}{name}.json")


def absolute(path: str) -> str:
    """Return a test set's identity: an absolute path; a URL as it is."""
    return path if "://" in path else os.path.abspath(path)


def longer_names(path: str) -> list[str]:
    """Return names for a test set, from that of its file to one with all folders above it."""
    parts = ENDINGS.sub("", path).replace("\\", "/").split("/")
    # letters, digits and . = - alone: what every file system takes
    words = [word for part in parts if (word := re.sub(r"[^\w.=-]+", "-", part).strip("-."))]
    return ["-".join(words[k:]) for k in range(len(words) - 1, -1, -1)] or ["records"]


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each test set: that of its file, with folders above it where two are alike."""
    absolutes = [absolute(path) for path in paths]
    if twice := [path for path, count in Counter(absolutes).items() if count > 1]:
        raise UserError("is given twice", where=f"--data_path {twice[0]}", fix="leave one out")
    choices = [longer_names(path) for path in absolutes]
    names = [own[0] for own in choices]
    for length in range(1, max(map(len, choices))):
        # file systems of macOS and Windows take A.json and a.json for one file
        counts = Counter(name.casefold() for name in names)
        names = [
            own[min(length, len(own) - 1)] if counts[name.casefold()] > 1 else name
            for name, own in zip(names, choices, strict=True)
        ]
    counts = Counter(name.casefold() for name in names)
    return [
        name if counts[name.casefold()] == 1 else f"{name}-{k}"
        for k, name in enumerate(names, start=1)
    ]


def report_problem(path: Path) -> str | None:
    """Return why a report may not be written to a file, checked before scoring; None if it may."""
    if (problem := file_problem(path)) or not path.exists():
        return problem
    # a report is replaced by a newer one; anything else is somebody's own file
    is_report = "tasks" in read_object(path)
    return None if is_report else f"{path}: holds something else than a report; name another file"


def predictions_problem(path: Path) -> str | None:
    """Return why answers may not be written to a file, checked before generating; None if they may."""
    if (problem := file_problem(path)) or not path.exists():
        return problem
    with open(path, "rb") as file:
        try:
            is_answer = {"reference", "answer"} <= set(json.loads(file.readline()))
        except (ValueError, TypeError):
            is_answer = False
    return (
        None if is_answer else f"{path}: holds something else than answers; name another --output"
    )
