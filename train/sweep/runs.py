"""The runs of sweeps as they would be started: settings, command line and folder of each.

Whatever is wrong with any of them is said before the first one trains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shards.errors import UserError
from train.settings.config import TrainConfig, check
from train.settings.launcher import wishes
from train.settings.parse import Origin, merge, obey, read_flags
from train.sweep.written import Setting, Sweep, Variant, read_sweep

Values = dict[str, tuple[Any, Origin]]


@dataclass(frozen=True)
class Run:
    """A run of a sweep, ready to be started."""

    sweep: Sweep
    variant: Variant
    config: TrainConfig
    words: tuple[str, ...]
    """The command line of `train/run.py`."""
    stage: Path | None
    """The folder of the run that it starts from."""

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def name(self) -> str:
        return f"{self.variant.name}/seed-{self.config.seed}"


def runs_of(
    argv: Sequence[str], environ: Mapping[str, str], launched: Sequence[str] | None
) -> list[Run]:
    """Return the runs that a command line with `--sweep` asks for, in order; UserError with all problems.

    launched: the words between `accelerate launch` and the script, None where it started nothing.
    """
    problems: list[str] = []
    words, paths = without_sweeps(argv, problems)
    sweeps = [read_sweep(path, environ, problems) for path in paths]
    asked = wishes(environ, launched)
    # first what is written, then what follows from it: runs of a misread file
    # would only add wrong messages
    problems += asked.problems
    if problems:
        raise UserError.of(dict.fromkeys(problems))
    runs = [
        run
        for sweep in sweeps
        for run in Builder(sweep, words, environ, asked.settings, problems).runs()
    ]
    problems += clashes(runs)
    if problems:
        raise UserError.of(dict.fromkeys(problems))
    return runs


def without_sweeps(argv: Sequence[str], problems: list[str]) -> tuple[list[str], list[str]]:
    """Return (the words of a command line but `--sweep` and its files, those files)."""
    words: list[str] = []
    paths: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word.partition("=")[0] != "--sweep":
            words.append(word)
            continue
        paths += [word.partition("=")[2]] if "=" in word else []
        # as argparse reads a flag with several values: up to the next flag
        while "=" not in word and rest and not rest[0].startswith("--"):
            paths.append(rest.pop(0))
    if not paths:
        problems.append("--sweep: needs a value, the YAML of a sweep")
    return words, paths


@dataclass(frozen=True)
class Builder:
    """Makes the runs of a sweep of its variants."""

    sweep: Sweep
    argv: Sequence[str]
    """The command line without `--sweep`."""
    environ: Mapping[str, str]
    asked: Sequence[tuple[str, str, Origin]]
    """Settings that the launcher was asked for."""
    problems: list[str]

    @property
    def given(self) -> set[str]:
        """The settings that the command line names, for all runs."""
        return {name for name, _, _ in read_flags(TrainConfig, self.argv, [])}

    def runs(self) -> list[Run]:
        # -- the command line speaks for all runs: what a run says too would be overruled without a word
        given = self.given
        if "config" in given and self.sweep.config:
            self.problems.append(f"--config: {self.sweep.path} names one: take one of them out")
        for own in self.sweep.variants:
            names = [(name, where) for name, _, where in own.settings]
            names += [("seed", f"{self.sweep.path} seeds")] * bool(own.seeds)
            self.problems.extend(
                f"--{name}: {where} says it for the run {own.name}: take one of them out"
                for name, where in names
                if name in given
            )
        # -- in order: a run that starts from another one needs that one's folder
        built: dict[tuple[str, str], Run] = {}
        for own, seed in self.sweep.in_order():
            # of the same seed, so that pairs of runs differ in one thing
            stage = built.get((own.stage, seed))
            if own.stage and stage is None:
                self.problems.append(
                    f"{own.origin} {own.name}: {own.stage} has no seed {seed or 'of its own'}"
                )
            if run := self.run(own, seed, stage):
                built[own.name, seed] = run
        return list(built.values())

    def run(self, own: Variant, seed: str, stage: Run | None) -> Run | None:
        """Return a run, None where something is wrong with it."""
        problems: list[str] = []
        where = own.origin or self.sweep.path
        written = [*self.sweep.settings, *own.settings]
        written += [("seed", seed, f"{self.sweep.path} seeds")] if seed else []
        words = [*self.argv, *(w for path in self.sweep.config for w in ("--config", path))]
        # merged as the run itself will merge its words, so that the settings checked
        # here are those that it gets
        values = merge(TrainConfig, words, self.environ, problems, written)
        obey(TrainConfig, values, self.asked, problems)
        below(values, own.name, where)
        if problems:
            self.problems.extend(problems)
            return None
        config = TrainConfig(**{name: value for name, (value, _) in values.items()})
        # each problem names the line of the sweep that it is from
        problems = check(config, {name: place for name, (_, place) in values.items()}, self.environ)
        # as flags, which win over presets; what the command line itself gives stays
        words += flags_of([own for own in written if own[0] not in self.given])
        words += ["--output_dir", config.output_dir]
        # after the check: the stage is made by an earlier run, and is not there yet
        if stage:
            config = replace(config, stage_path=str(stage.folder))
            words += ["--stage_path", config.stage_path]
        if problems:
            self.problems.extend(problems)
            return None
        return Run(self.sweep, own, config, tuple(words), stage.folder if stage else None)


def below(values: Values, name: str, where: Origin) -> None:
    """Give a run the folder of its own below that of all."""
    if "output_dir" in values:
        seed = values["seed"][0] if "seed" in values else TrainConfig().seed
        path = Path(values["output_dir"][0]) / name / f"seed-{seed}"
        values["output_dir"] = str(path), where


def flags_of(settings: Sequence[Setting]) -> list[str]:
    """Return settings as the words of a command line; of one that stands twice the last."""
    words = []
    for name, value in {name: value for name, value, _ in settings}.items():
        items = value if isinstance(value, list) else [value]
        # an empty list is a flag with nothing behind its =
        words += [f"--{name}", *items] if any(items) else [f"--{name}="]
    return words


def clashes(runs: Sequence[Run]) -> list[str]:
    """Return a line for each folder that two runs would write in that differ."""
    lines = []
    first: dict[Path, Run] = {}
    for run in runs:
        # two sweeps may share a run (a baseline): it is trained once, if its settings are the same
        other = first.setdefault(run.folder, run)
        what = "settings" if other.config != run.config else ""
        if run.sweep.test_path and other.sweep.test_path:
            asked = [(own.sweep.test_path, own.sweep.max_records) for own in (run, other)]
            what = what or "test records" * (asked[0] != asked[1])
        if what:
            lines.append(
                f"{run.sweep.path} {run.variant.name}: {other.sweep.path} has a run of this name with "
                f"other {what}, which would write in the same folder; name one of them otherwise"
            )
    return lines
