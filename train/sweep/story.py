"""`train/run.py --sweep`: read, check, list, train what is not finished, evaluate, compare."""

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.errors import UserError
from shards.stopping import end_by
from shards.text import counted, duration
from shards.write.lock import folder_lock
from train.scores.results import distinct_names, report_name
from train.settings.ancestors import holders
from train.settings.config import DataSettings
from train.settings.output import read_object
from train.sweep.inputs import Inputs
from train.sweep.record import Record, changes, is_begun, record_of
from train.sweep.runs import Run, runs_of
from train.sweep.start import HERE, Children, Launcher
from train.sweep.table import write_tables

REPORT = "report.html"
"""The page of all runs, in the folder of the sweep."""
SHOWN = 160
RECORD_FLAGS = (
    *("media_dir", "strip_prefix", "on_bad_record", "times_past_end", "bad_record_limit"),
    *("ignore_fields", "allow_outside"),
)
"""Settings of a run that its test set is read with."""


def run_sweeps(
    argv: Sequence[str], environ: Mapping[str, str], launched: Sequence[str] | None
) -> None:
    """Train and evaluate all runs of the sweeps that a command line names, and compare them.

    Exits with 1 where some failed, with 128 + its number where a signal stopped it.
    """
    if int(environ.get("RANK", "0")) > 0:
        return  # the first process starts all, by the same launcher
    # -- everything that can be refused, of all runs, before the first one trains
    launcher, holding = Launcher.here(launched), holders()
    runs = runs_of(argv, environ, launched)
    inputs = Inputs()
    check_all(runs, inputs)
    say(listing(runs))
    if any(run.config.plan for run in runs):
        return
    # OUTPUT_DIR of OUTPUT_DIR/NAME/seed-N
    top = Path(runs[0].config.output_dir).parents[1]
    command = shlex.join(["train/run.py", *argv])
    # -- one sweep in a folder at a time; each run locks its own besides
    with folder_lock(top, command[:SHOWN]), Children(launcher, holding) as children:
        failed = take_all(runs, inputs, children)
    # also after a stop or a failure: what is finished can be read
    asked = [inputs.asked(run) for run in runs]
    for path in write_tables(runs, asked, command, failed, top):
        say(f"{path.read_text()}\nwritten: {path}")
    # who stopped it waits for it to end
    if not children.stopped:
        draw(runs, top / REPORT, launcher)
    if failed:
        say("\n".join(f"failed: {name}: {why}" for name, why in failed.items()))
    if children.stopped:
        say(f"stopped by {children.stopped.name}; the same command goes on")
        end_by(children.stopped)
    if failed:
        raise SystemExit(1)


def check_all(runs: Sequence[Run], inputs: Inputs) -> None:
    """Raise UserError with all that is wrong with inputs, or with what is in the runs' folders."""
    problems: list[str] = []
    for run in runs:
        try:
            now = inputs.of(run)
        except UserError as error:
            problems += error.problems
            continue
        if lines := changes(run, now):
            problems.append(other_run(run, lines))
    if problems:
        raise UserError.of(dict.fromkeys(problems))


def other_run(run: Run, lines: Sequence[str]) -> str:
    return str(
        UserError(
            f"the run {run.name} was made with other settings or inputs: {'; '.join(lines)}",
            where=run.folder,
            fix="give it another name or output_dir, or remove that folder",
        )
    )


def draw(runs: Sequence[Run], place: Path, launcher: Launcher) -> None:
    """Write the page of all runs that are finished, by the command: drawing may read videos."""
    done = [str(run.folder) for run in first_of_each(runs).values() if record_of(run.folder)]
    if done:
        words = [sys.executable, str(HERE / "report.py"), *done, "--output", str(place)]
        # without the launcher: a page needs no ranks; a page that fails does not fail the sweep
        subprocess.run(words, env=launcher.environ, check=False)


# -- what there is to do


def listing(runs: Sequence[Run]) -> str:
    """Return the runs in order, how far each is, and what it costs in CPU-hours."""
    measured = {run.name: record_of(run.folder) for run in runs}
    rows, left, known = [], 0.0, True
    for name, run in first_of_each(runs).items():
        record, hours = measured[name], hours_of(run, runs, measured)
        state = "finished" if record else "begun" if is_begun(run.folder) else "to do"
        shown = f"{hours:.2f} CPU-h" if hours else "?"
        rows.append(f"  {run.sweep.name:12} {name:44} {state:9} {shown:>11}".rstrip())
        if not record:
            # of unknown ones nothing is added, which the word "at least" says
            left, known = left + hours, known and hours > 0
    done = sum(record is not None for record in measured.values())
    last = f"{counted(len(rows), 'run')}: {done} finished, {len(rows) - done} to do"
    if left:
        last += f", {'about' if known else 'at least'} {left:.1f} CPU-hours"
    return "\n".join([*rows, last])


def first_of_each(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the runs by name, one that several sweeps have where it comes first."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run.name, run)
    return found


def hours_of(run: Run, runs: Sequence[Run], measured: Mapping[str, Record | None]) -> float:
    """Return the CPU-hours of a run: its own, those of the same one with other seeds, or as written.

    0 where nothing says them.
    """
    own = measured[run.name]
    alike = [
        record.cpu_seconds
        for other in runs
        if other.variant == run.variant and (record := measured[other.name]) is not None
    ]
    if own is not None:
        return own.cpu_seconds / 3600
    return sum(alike) / len(alike) / 3600 if alike else run.variant.cpu_hours


# -- doing it


def take_all(runs: Sequence[Run], inputs: Inputs, children: Children) -> dict[str, str]:
    """Train and evaluate each run that is not finished; return those that failed, and why.

    Stops early where a signal asks for it.
    """
    failed: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        # two sweeps may share a run: it is not tried twice
        if run.name in failed:
            continue
        why = None
        stage = f"{run.variant.stage}/seed-{run.config.seed}"
        if run.stage and stage in failed:
            why = f"not started: the run that it starts from, {stage}, failed"
        else:
            say(f"--- {number} of {len(runs)}: {run.name}")
            why = take(run, inputs, children)
        # told to end, which is no failure: the same command goes on
        if children.stopped:
            break
        if why:
            failed[run.name] = why
            say(f"--- failed: {run.name}: {why}")
    return failed


def take(run: Run, inputs: Inputs, children: Children) -> str | None:
    """Train a run and score it, as far as that is not done; return why it failed, if it did."""
    # looked at now, not when the sweep began: a stage that an earlier run has made
    # since is known by its weights
    now = inputs.of(run)
    record = record_of(run.folder)
    if record is None:
        began = time.monotonic()
        ended = children.run("run.py", run.words)
        if ended.code or children.stopped:
            return f"exit {ended.code}: {ended.last_error}"
        # a preset is read again by each run: one that was written to since would be another run
        if lines := changes(run, now):
            return other_run(run, lines)
        record = Record(
            inputs={name: now[name] for name in ("bank", "plan")},
            seconds=time.monotonic() - began,
            cpu_seconds=ended.cpu_seconds,
        )
        # before the scoring: if that fails, the training is not done a second time
        record.write(run.folder)
    else:
        say(f"    finished before, in {duration(record.seconds)}")
    for control in ("", *run.sweep.controls) if run.sweep.test_path else ():
        asked = inputs.asked(run)
        # both: scores of other records, or files that were removed, are made again
        if record.scored.get(control) == asked and all_scored(run, control):
            continue
        # none while they are made: `evaluate` leaves a sweep's finished scores alone
        for facts in (record.scored, record.reports):
            facts.pop(control, None)
        record.write(run.folder)
        ended = children.run("evaluate.py", evaluation(run, control))
        if ended.code or children.stopped:
            return f"evaluation {control or 'as it is'}, exit {ended.code}: {ended.last_error}"
        record.scored[control] = asked
        record.reports[control] = reports_of(run, control)
        record.cpu_seconds += ended.cpu_seconds
        record.write(run.folder)
    return None


def evaluation(run: Run, control: str) -> list[str]:
    """Return the command line of `train/evaluate.py` for a run; control: one of CONTROLS, or none."""
    config, default = run.config, DataSettings()
    words = ["--model", str(run.folder), "--bank", *config.bank]
    words += ["--data_path", *run.sweep.test_path]
    for name in RECORD_FLAGS:
        value = getattr(config, name)
        # only what differs: a command line in a log is read by people
        if value != getattr(default, name):
            # a switch has no value
            items = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *items]
    if run.sweep.max_records:
        words += ["--max_records", str(run.sweep.max_records)]
    return (
        words + {"": [], "shuffled": ["--shuffle_features"], "untrained": ["--untrained"]}[control]
    )


def all_scored(run: Run, control: str) -> bool:
    """Return whether the scores of each test set are there."""
    return all(read_object(run.folder / name) for name in reports_of(run, control))


def reports_of(run: Run, control: str) -> list[str]:
    """Return the name of each test set's file of scores."""
    return [report_name(name, control) for name in distinct_names(run.sweep.test_path)]


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201
