"""A run as its folder has it: settings, steps, scores, answers, and whether it still goes on."""

import json
import re
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.signed import Json
from shards.write.lock import WATCHED_SECONDS, lock_path, touched, writer_of
from train.pages.read.metrics import Metrics, read_metrics
from train.scores.results import (
    CONTROLS,
    PREFIX,
    asked_as,
    lines_of,
    longer_names,
    predictions_beside,
    report_name,
)
from train.scores.spread import Answers, read_answers
from train.settings.output import RUN, read_object
from train.settings.recorded import CHECKPOINT, settings_in

METRICS, LOG = "metrics.jsonl", "train.log"
TABLES = "lape/tables.safetensors"
STEP_OF = re.compile(r"^step (\d+)/(\d+) ", re.MULTILINE)
SAID = re.compile(
    r"^(stage|bank|records|frames|steps|plan|trained|rates|losses|LAPE|attention|note|warning) +(.+)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class TestSet:
    """The scores of a run on a test set, and those of its controls."""

    __test__ = False  # pytest takes it for one of its own

    name: str
    data_path: str
    report: Json
    """Empty where only controls were scored."""
    place: Path
    """Of the report."""
    controls: dict[str, Json] = field(default_factory=dict)

    @property
    def losses(self) -> Json:
        return dict(self.report.get("losses", {}))

    @property
    def tasks(self) -> Json:
        return dict(self.report.get("tasks", {}))

    def asks_as(self, other: Json, kind: str = "") -> bool:
        """Return whether another report's questions are these: all, or those of a kind.

        Reports of before they were recorded are taken at their word.
        """
        if not self.sees_as(other):
            return False
        own, theirs = (report.get("questions", {}) for report in (self.report, other))
        if kind:
            own, theirs = own.get(kind), theirs.get(kind)
        return own == theirs or not own or not theirs

    def sees_as(self, other: Json) -> bool:
        """Return whether questions see those before them in their record in both reports, or in none."""
        return len({turns for one in (self.report, other) if (turns := asked_as(one))}) < 2

    @cached_property
    def rows(self) -> list[Json]:
        """The answers, a dict each; none where they were not kept."""
        path = predictions_beside(self.place)
        if not self.report or not path.is_file():
            return []
        return [json.loads(line) for _, line in lines_of(path)]

    @cached_property
    def answers(self) -> Answers | None:
        """Their scores by clip."""
        return read_answers(predictions_beside(self.place)) if self.rows else None


@dataclass(frozen=True)
class Run:
    """A run's folder, read."""

    folder: Path
    name: str
    """Short, and none of the other runs'."""
    config: Json
    metrics: Metrics
    tests: tuple[TestSet, ...]
    log: str
    goes_on: bool
    """Whether a process still trains here."""

    @cached_property
    def said(self) -> dict[str, str]:
        """What the run said of itself when it last began: the first word of a line -> the rest."""
        return dict(SAID.findall(self.log))

    @cached_property
    def warnings(self) -> list[str]:
        # a run that was resumed says the same warnings at each start
        return list(
            dict.fromkeys(line for word, line in SAID.findall(self.log) if word == "warning")
        )

    @cached_property
    def total(self) -> int:
        """Steps that the run is to take; those that it took where nothing says more."""
        # the last one: a run may go on with more steps than it began with
        found = STEP_OF.findall(self.log)
        # no log, or one that was cut: the steps that were taken, at least
        return max(int(found[-1][1]) if found else 0, int(self.metrics.last.get("step", 0)))

    @cached_property
    def began_as(self) -> str:
        """The trained model that it started from, as its settings name it; empty for an LLM alone."""
        stage = str(self.config.get("stage_path") or "")
        places = [Path(stage), *(above / stage for above in self.folder.absolute().parents)]
        files = [place / name for place in places for name in (RUN, CHECKPOINT)]
        return stage if stage and any(file.is_file() for file in files) else ""

    @cached_property
    def tables(self) -> dict[str, np.ndarray]:
        """LAPE's tables, fp32, by name: of the model, else of its newest checkpoint; else none."""
        # a run that goes on, or was stopped, has no model yet, but checkpoints
        places = [self.folder / TABLES, *(c / TABLES for c in reversed(self.checkpoints))]
        found = next((place for place in places if place.is_file()), None)
        return read_tensors(found) if found else {}

    @cached_property
    def checkpoints(self) -> list[Path]:
        """Those in the folder, by step."""
        named = (p for p in self.folder.glob("checkpoint-*") if p.name[11:].isdigit())
        return sorted(named, key=step_of_checkpoint)

    def gammas(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how strong LAPE's positions were: steps `(n,)` and gamma `(n, axes)`, as logged and
        as checkpoints have it."""
        names = [f"gamma_{axis}" for axis in ("time", "height", "width")]
        found = {
            int(row["step"]): [row.get(name, np.nan) for name in names]
            for row in self.metrics.rows
            if not row.keys().isdisjoint(names)
        }
        if not found:  # an older run, which did not log it
            for checkpoint in self.checkpoints:
                if (checkpoint / TABLES).is_file():
                    gamma = read_tensors(checkpoint / TABLES)["gamma"]
                    found[step_of_checkpoint(checkpoint)] = gamma.tolist()
        steps = sorted(found)
        return np.asarray(steps, float), np.asarray([found[s] for s in steps]).reshape(-1, 3)


def step_of_checkpoint(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(path))


def read_runs(folders: list[Path]) -> list[Run]:
    """Read runs; UserError for a folder that is none, with what to name."""
    problems = [str(problem) for folder in folders if (problem := run_problem(folder))]
    if not folders:
        problems = ["name the folders of runs: python -m train.report runs/a runs/b"]
    if problems:
        raise UserError.of(problems)
    return [read_run(f, name) for f, name in zip(folders, short_names(folders), strict=True)]


def run_problem(folder: Path) -> UserError | None:
    """Return why a folder is no run to report on, if so."""
    for name in (METRICS, RUN):
        if not (folder / name).exists():
            fix = "name the output_dir of a run that has taken a step"
            return UserError(f"no {name}", where=str(folder), fix=fix)
    return None


def read_run(folder: Path, name: str) -> Run:
    log = folder / LOG
    return Run(
        folder=folder,
        name=name,
        config=settings_in(folder / RUN),
        metrics=read_metrics(folder / METRICS),
        tests=tuple(test_sets(folder)),
        log=log.read_text("utf-8", errors="replace") if log.is_file() else "",
        goes_on=goes_on(folder),
    )


def read_config_features(folder: Path) -> Json:
    """Return the features that a run's model was trained on; nothing before it is saved."""
    found = read_object(folder / "config.json").get("features")
    return found if isinstance(found, dict) else {}


def test_sets(folder: Path) -> list[TestSet]:
    """Return the test sets that a folder has scores of, by the path of their records."""
    reports = [(path, read_object(path)) for path in sorted(folder.glob(f"{PREFIX}*.json"))]
    written = [(path, report) for path, report in reports if "test_set" in report]
    found: dict[str, dict[str, tuple[Json, Path]]] = {}
    # the last one counts: one that `evaluate --output` was to keep apart, of fewer records perhaps, is
    # shown only where there is none by the name that `evaluate` gives
    for path, report in sorted(written, key=lambda one: is_named_by_records(*one)):
        found.setdefault(report["data_path"], {})[control_of(report)] = (report, path)
    out = []
    for data_path, own in found.items():
        # where only a control was scored, its files tell name and place
        report, place = own.get("", next(iter(own.values())))
        controls = {name: own[name][0] for name in CONTROLS if name in own}
        out.append(
            TestSet(report["test_set"], data_path, report if "" in own else {}, place, controls)
        )
    return out


def control_of(report: Json) -> str:
    """Return the control that a report is of, empty if none."""
    return next((name for name in CONTROLS if report.get(name)), "")


def is_named_by_records(path: Path, report: Json) -> bool:
    """Return whether a report has a name that `evaluate` gives by the path of its records."""
    names = longer_names(report["data_path"])
    return path.name in {report_name(name, control_of(report)) for name in names}


def goes_on(folder: Path) -> bool:
    """Return whether a process trains in a folder: on this machine, or as its lock is touched."""
    writer = writer_of(folder)
    # a process on this machine can be asked for; of one elsewhere only its lock's time of change is seen
    if writer is None or writer.is_here:
        return writer is not None
    when = touched(lock_path(folder))
    # twice: one touch may be late
    return when is not None and time.time() - when / 1e9 < 2 * WATCHED_SECONDS


def short_names(folders: list[Path]) -> list[str]:
    """Return a name for each folder: its last parts, as many as make the names differ."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({k})" for k, folder in enumerate(folders, start=1)]
