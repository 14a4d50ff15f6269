"""The runs of a sweep side by side: the settings that differ, what they cost, what they reached."""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shards.signed import Json, write_atomic
from shards.text import counted
from train.scores.results import asked_as, distinct_names, predictions_beside, report_name
from train.scores.spread import Answers, Metric, difference_interval, mean_interval, read_answers
from train.settings.output import read_object
from train.sweep.record import Record, plain, record_of
from train.sweep.runs import Run
from train.sweep.written import Sweep

METRICS: dict[Metric, str] = {
    ("span", "iou"): "span mIoU",
    ("span", "r@0.7"): "R@0.7",
    ("windows", "map"): "windows mAP",
    ("time", "error"): "time error",
    ("point", "error"): "point error",
    ("box", "iou"): "box IoU",
    ("tube", "viou"): "vIoU",
    ("mixed", "iou"): "mixed IoU",
    ("number", "exact"): "number exact",
    ("choice", "exact"): "choice exact",
    ("order", "exact"): "order exact",
    ("text", "exact"): "text exact",
    ("caption", "rouge_l"): "ROUGE-L",
}
"""The scores of a table, and what stands above them; errors are better small."""
NONE = "-"


@dataclass(frozen=True)
class Scored:
    """A finished run and its scores on one test set."""

    run: Run
    record: Record
    test: str
    asked: Json
    """What its scores are to be of; those of other records are none."""

    @cached_property
    def report(self) -> Json:
        return self.read("")

    def read(self, control: str) -> Json:
        """Return the report of a control, or without one (""); empty where it is of other records."""
        # a test set that has changed is scored run by run, and a stop leaves some with the old one
        fits = self.record.scored.get(control) == self.asked
        return read_object(self.place(control)) if fits else {}

    @cached_property
    def answers(self) -> Answers:
        return read_answers(predictions_beside(self.place("")))

    def place(self, control: str) -> Path:
        return self.run.folder / report_name(self.test, control)

    def control(self, name: str, metric: Metric) -> float | None:
        return score_of(self.read(name), metric)


def score_of(report: Json, metric: Metric) -> float | None:
    kind, name = metric
    found = report.get("tasks", {}).get(kind, {}).get(name)
    return None if found is None else float(found)


def write_tables(
    runs: Sequence[Run],
    asked: Sequence[Json],
    command: str,
    failed: Mapping[str, str],
    folder: Path,
) -> list[Path]:
    """Write `SWEEP.md` for each sweep of some runs; return their paths.

    asked: what the scores of each run are to be of, see `Inputs.asked`.
    """
    paths = []
    for sweep in {run.sweep.path: run.sweep for run in runs}.values():
        pairs = zip(runs, asked, strict=True)
        own = [(run, facts) for run, facts in pairs if run.sweep.path == sweep.path]
        path = folder / f"{sweep.name}.md"
        write_atomic(path, page(sweep, own, command, failed).encode())
        paths.append(path)
    return paths


def page(
    sweep: Sweep, own: Sequence[tuple[Run, Json]], command: str, failed: Mapping[str, str]
) -> str:
    """Return the Markdown of a sweep; own: its runs, and what their scores are to be of."""
    runs = [run for run, _ in own]
    records = {run.name: record_of(run.folder) for run in runs}
    done = [run for run in runs if records[run.name]]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [f"# {sweep.name}", "", *([sweep.about, ""] if sweep.about else [])]
    lines += [f"- {v.name}: {v.about}" for v in sweep.variants if v.about]
    lines += [""] * any(v.about for v in sweep.variants)
    lines += [f"{today}: {len(done)} of {len(runs)} runs. `{command}`", ""]
    for test in distinct_names(sweep.test_path) if sweep.test_path else []:
        scored = [
            one
            for run, asked in own
            if (record := records[run.name]) and (one := Scored(run, record, test, asked)).report
        ]
        if scored:
            lines += tables_of(sweep, test, scored, runs)
    if not sweep.test_path:
        lines += [grid_of([["run", "settings", "train s"], *trained_rows(done, runs, sweep)]), ""]
    lines += [f"- {name} failed: {why}" for name, why in failed.items() if name in records]
    return "\n".join(lines).rstrip() + "\n"


def tables_of(sweep: Sweep, test: str, scored: Sequence[Scored], runs: Sequence[Run]) -> list[str]:
    """Return the tables of a test set: means over seeds, differences from the baseline, each run."""
    metrics = [
        metric
        for metric in METRICS
        if any(score_of(one.report, metric) is not None for one in scored)
    ]
    # -- means over the seeds of each run
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.run.variant.name, []).append(one)
    differ = settings_of(runs, sweep)
    clips = len(scored[0].answers.clips)
    header = ["", "settings", "seeds", *(METRICS[m] for m in metrics), "ar_skill", "train s"]
    rows = [header]
    for name, own in groups.items():
        seconds = sum(trained_seconds(one.run.folder) for one in own) / len(own)
        skills = [one.report["losses"].get("ar_skill") for one in own]
        skill = spread_of([s for s in skills if s is not None])
        row = [name, differ[name], str(len(own)), *(cell(own, m) for m in metrics)]
        rows.append([*row, skill, f"{seconds:.0f}"])
    lines = [
        f"Test set {test}, {counted(clips, 'clip')}: mean over seeds ± standard deviation between them, "
        "[95 % of 2,000 draws of the clips].",
        "",
        grid_of(rows),
        "",
    ]
    # -- differences: seeds and clips are the same on both sides, so what varies between them cancels
    rows = [["", *(METRICS[m] for m in metrics)]]
    for name, own in groups.items():
        other = own[0].run.variant.against or sweep.baseline
        if other != name and other in groups:
            cells = [difference(own, groups[other], m) for m in metrics]
            rows.append([f"{name} less {other}", *cells])
    if len(rows) > 1:
        words = "Difference from another run on the same clips and seeds [95 % of the draws]."
        lines += [words, "", grid_of(rows), ""]
    return [*lines, "Each run.", "", grid_of(each_run(sweep, scored, metrics)), ""]


def each_run(sweep: Sweep, scored: Sequence[Scored], metrics: Sequence[Metric]) -> list[list[str]]:
    """Return the rows of a table with every run by itself, its controls beside the first score."""
    first = metrics[0]
    # controls of the first score alone, or the table would be too wide to read
    header = ["run", *(METRICS[m] for m in metrics), "ar_skill"]
    header += [f"{METRICS[first]}, {control}" for control in sweep.controls]
    header += ["train s", "CPU-h"]
    rows = [header]
    for one in scored:
        row = [one.run.name, *(number(score_of(one.report, m)) for m in metrics)]
        row += [number(one.report["losses"].get("ar_skill"))]
        row += [number(one.control(control, first)) for control in sweep.controls]
        row += [f"{trained_seconds(one.run.folder):.0f}", f"{one.record.cpu_seconds / 3600:.3f}"]
        rows.append(row)
    return rows


def trained_rows(done: Sequence[Run], runs: Sequence[Run], sweep: Sweep) -> list[list[str]]:
    differ = settings_of(runs, sweep)
    return [
        [run.name, differ[run.variant.name], f"{trained_seconds(run.folder):.0f}"] for run in done
    ]


# -- cells


def cell(own: Sequence[Scored], metric: Metric) -> str:
    """Return a score as `0.709 ±0.012 [0.680, 0.735]`."""
    values = [value for one in own if (value := score_of(one.report, metric)) is not None]
    if not values:
        return NONE
    # draws are of clips: runs that were scored on different ones have no draw in common
    if not alike(own):
        return spread_of(values)
    low, high = mean_interval([one.answers for one in own], metric)
    return f"{spread_of(values)} [{low:.3f}, {high:.3f}]"


def alike(scored: Sequence[Scored]) -> bool:
    """Return whether runs were asked about the same clips in the same way, and may be drawn together."""
    return len({(one.answers.clips, asked_as(one.report)) for one in scored}) == 1


def difference(own: Sequence[Scored], base: Sequence[Scored], metric: Metric) -> str:
    """Return how much the mean differs from the baseline's, over the seeds that both have."""
    # a run with fewer seeds is compared over these: another seed's luck would count as a difference
    both = {one.run.config.seed for one in own} & {one.run.config.seed for one in base}
    ours, theirs = ([one for one in group if one.run.config.seed in both] for group in (own, base))
    lists = [[score_of(one.report, metric) for one in group] for group in (ours, theirs)]
    if not both or any(value is None for values in lists for value in values):
        return NONE
    if not alike([*ours, *theirs]):
        return "other questions"
    means = [math.fsum(v for v in values if v is not None) / len(values) for values in lists]
    low, high = difference_interval(
        [one.answers for one in ours], [one.answers for one in theirs], metric
    )
    return f"{means[0] - means[1]:+.3f} [{low:+.3f}, {high:+.3f}]"


def spread_of(values: Sequence[float]) -> str:
    """Return the mean of some values, and their standard deviation where there are several."""
    if not values:
        return NONE
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    # of a sample: n - 1, as few seeds stand for all
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.3f} ±{deviation:.3f}"


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def settings_of(runs: Sequence[Run], sweep: Sweep) -> dict[str, str]:
    """Return, by run, the settings in which it differs from the one that it is compared with.

    Of the baseline those in which the others do, where they are few. A run that starts from another
    one's model says so.
    """
    configs: dict[str, Json] = {}
    for run in runs:
        config = plain(asdict(run.config)) | {"stage_path": run.variant.stage or "the stage"}
        configs.setdefault(run.variant.name, config)
    against = {run.variant.name: run.variant.against or sweep.baseline for run in runs}
    out = {}
    for name, config in configs.items():
        own = differing(config, [configs[against[name]]])
        # 4: the baseline's row says what the others change, as long as that is a few
        if name == against[name] and len(few := differing(config, list(configs.values()))) <= 4:
            own = few
        out[name] = ", ".join(f"{setting} {shown(config[setting])}" for setting in own)
    return out


def differing(config: Json, others: Sequence[Json]) -> list[str]:
    """Return the settings that any of some others has otherwise; the seed is none."""
    return [
        name
        for name in config
        if name != "seed" and any(other[name] != config[name] for other in others)
    ]


def shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(shown(item) for item in value) or "none"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    # paths are too long for a cell, and differ from machine to machine
    return Path(text).name if "/" in text else text


def trained_seconds(folder: Path) -> float:
    """Return the seconds of a run's steps, those before a stop too."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # steps alone: loading, compiling and saving would hide what a setting costs
    return math.fsum(row["seconds"] for row in rows if row["kind"] == "train")


def grid_of(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the header first, as a Markdown table whose columns line up as text, too."""
    widths = [max(3, *(len(row[k]) for row in rows)) for k in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(rows[0]), line(["-" * w for w in widths]), *map(line, rows[1:])])
