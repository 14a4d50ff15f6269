"""What is known of a run of a sweep by its folder: not begun, begun, or finished and how scored.

A finished run has a `sweep.json`: what it learned from (digests of records and clips), its seconds,
and what it was scored on. Its settings are those of `run.json`. A run of other settings or inputs
is refused, with the difference.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shards.signed import Json, write_atomic
from train.settings.config import TrainConfig
from train.settings.output import RUN, read_object
from train.settings.recorded import facts_changed, was_now
from train.start.stage import as_its_stage
from train.sweep.runs import Run

MARK = "sweep.json"
IDLE = (
    *("output_dir", "resume", "plan", "assumed_mfu", "device_flops", "wandb", "logging_steps"),
    *("plan_device", "plan_devices"),
    *("save_steps", "save_minutes", "save_total_limit", "prefetch", "rehearsal", "num_threads"),
)
"""Settings that a finished run may differ in: they say nothing about its weights."""
PATHS = ("bank", "data_path", "data_config", "splice_path", "eval_path", "stage_path", "media_dir")
"""Settings that name places, in whatever way: the contents are compared, not the names."""


@dataclass
class Record:
    """What a finished run has in its folder beside the model."""

    inputs: Json
    """What it learned from: {"bank": ..., "plan": {"records": ..., "clips": ...}}."""
    seconds: float = 0.0
    """Of its training, from its last start to its end, loading and saving too."""
    cpu_seconds: float = 0.0
    """Of all its processes and threads in that time, and in its evaluations."""
    scored: dict[str, Json] = field(default_factory=dict)
    """Control (empty: none) -> what the scores are of."""
    reports: dict[str, list[str]] = field(default_factory=dict)
    """Control -> the files of these scores; a hand-run evaluation writes none of them."""

    def write(self, folder: Path) -> None:
        # written last: a run without it is not finished, whatever else lies there
        write_atomic(folder / MARK, json.dumps(asdict(self), indent=2).encode() + b"\n")


def record_of(folder: Path) -> Record | None:
    """Return what a finished run left; None where it is not finished."""
    try:
        return Record(**json.loads((folder / MARK).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def problem_of_report(path: Path) -> str | None:
    """Return why a report may not be written by hand: a sweep's table is read from it; None if it may.

    While the sweep itself scores a run, its scores are none.
    """
    record = record_of(path.parent)
    if record is None or not any(path.name in names for names in record.reports.values()):
        return None
    return (
        f"{path}: the scores that a sweep has made and compares with those of its other runs; name "
        "another file: --output FILE"
    )


def is_begun(folder: Path) -> bool:
    """Return whether a run has written a checkpoint or its settings here."""
    return (folder / RUN).exists() or any(folder.glob("checkpoint-*"))


def changes(run: Run, inputs: Json) -> list[str]:
    """Return `setting was X, is now Y` for what a run in this folder was begun with, or learned from.

    Empty where nothing was begun. inputs: what it would learn from now.
    """
    lines: list[str] = []
    written = read_object(run.folder / RUN)
    # a run that went on with other settings was trained with several: one that
    # differs makes it another run
    for number, part in enumerate([written, *written.get("before", [])]):
        if isinstance(part.get("config"), dict):
            theirs, ours = plain(part["config"]), plain(asdict(as_its_stage(run.config)))
            if ours["bf16"] == "auto":  # a run writes down what it measured
                ours["bf16"] = theirs["bf16"]
            lines += was_now(theirs, ours)
        # the present ones differ: that is the message, and earlier ones would only repeat it
        if number == 0 and lines:
            break
    record = record_of(run.folder)
    if record and not lines:
        if run.stage and record_of(run.stage) is None:  # it is trained again first
            inputs = inputs | {"plan": inputs["plan"] | {"stage": record.inputs["plan"]["stage"]}}
        # facts that came after the run cannot be compared
        told = {name: now for name, now in inputs["plan"].items() if name in record.inputs["plan"]}
        lines += facts_changed(record.inputs, inputs | {"plan": told})
    return list(dict.fromkeys(lines))


def plain(config: Mapping[str, Any]) -> Json:
    """Return settings as they are compared: without idle ones, with the real paths of places."""
    # a setting that came after the run was as its default now is
    found = asdict(TrainConfig()) | dict(config)
    return {
        name: real(value) if name in PATHS else value
        for name, value in found.items()
        if name not in IDLE
    }


def real(value: Any) -> Any:
    """Return where a path, or each of a list, really leads; what is none stays as it is."""
    if isinstance(value, list):
        return [real(item) for item in value]
    # a link, a relative path and an absolute one to the same place are the same input
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value
