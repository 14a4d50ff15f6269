"""The recorded settings of a run, and their differences from the present ones in words.

`run.json` holds the settings of the weights beside it. A run that goes on with other ones keeps
those before: `{"config": ..., "since_step": 700, "before": [{"config": ..., "since_step": 0}]}`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.config import VLMConfig
from shards.errors import UserError
from shards.signed import write_atomic
from train.settings.config import LlmSettings
from train.settings.output import RUN

Json = dict[str, Any]

OTHER = {
    "tower_digest": "the bank is of another tower: other weights, or another config.json",
    "tokenizer": "the LLM that stage_path names has another tokenizer",
    "stage": "the weights that stage_path names are others",
    "clips": "the bank holds other times or features of the records' clips: it was encoded again",
}
"""Facts of which only a digest is recorded -> their names in messages."""
MODEL_DEFAULTS = asdict(VLMConfig()) | {"lora_experts": LlmSettings.lora_experts}
CHECKPOINT = "checkpoint.json"
"""The file in a checkpoint-N that also holds the settings its weights were trained with."""
FREE = ("resume", "plan")
"""Settings that say nothing about weights."""


def write_run(folder: Path, config: Mapping[str, Any], since: int) -> None:
    """Write down that the weights in a folder are trained with these settings from a step on."""
    path = folder / RUN
    ours: Json = {"config": dict(config), "since_step": since}
    if since and path.exists():
        last: Json = json.loads(path.read_text())
        # runs of before it was recorded
        last.setdefault("since_step", 0)
        # a resume from an earlier checkpoint drops the parts after it, whose steps are taken once more
        parts = [old for old in [*last.pop("before", []), last] if old["since_step"] < since]
        # with the settings of the steps before them, these are no part of their own
        if parts and not was_now(parts[-1]["config"], ours["config"]):
            ours = parts.pop()
        ours |= {"before": parts} if parts else {}
    write_atomic(path, json.dumps(ours, indent=2).encode() + b"\n")


def token_limit(config: Mapping[str, Any]) -> int:
    """Return the tokens of a record at most, by a run's max_tokens and pack_tokens; 0 for no limit."""
    given = (config.get("max_tokens", 0), config.get("pack_tokens", 0))
    return min((limit for limit in given if limit), default=0)


def trained_with(folder: Path) -> Json | None:
    """Return the settings that a model was trained with; None in a folder that no run has written."""
    # a checkpoint-N has its own: the run above it may have gone on with others
    path = next((folder / name for name in (CHECKPOINT, RUN) if (folder / name).is_file()), None)
    return None if path is None else settings_in(path)


def settings_in(path: Path) -> Json:
    """Return the settings in a run.json or checkpoint.json; UserError for another file."""
    try:
        config = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError):
        config = None
    if not isinstance(config, dict):
        raise UserError("holds no settings of a run", where=path, fix="copy it from the run again")
    return config


def limit_of_run(folder: Path) -> int:
    """Return the tokens of a record at most that a model was trained with; UserError if nothing says."""
    config = trained_with(folder)
    if config is None:
        raise UserError(
            f"no {RUN} here, which says how long records were in training (max_tokens, pack_tokens)",
            where=folder,
            fix="name the run's own folder, or say it: --max_tokens N, 0 for no limit",
        )
    return token_limit(config)


def was_now(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return `setting was X, is now Y` of each that differs, nested ones by dotted name."""
    lines = []
    for name in sorted({*before, *now} - {*FREE}):
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += was_now(a, b, f"{prefix}{name}.")
        elif _plain(a) != _plain(b):
            words = f"{prefix}{name} was {_shown(a)}, is now {_shown(b)}"
            lines.append(OTHER.get(name, words))
    return lines


def facts_changed(before: Mapping[str, Json], now: Mapping[str, Json]) -> list[str]:
    """Return in words which facts of a run differ: of its model, bank and plan.

    The plan's `records` are `{"0 train.jsonl": "<digest> <records> x <times>"}`: their names are for
    these words, a file is known by its bytes.
    """
    plans = [dict(facts.get("plan", {})) for facts in (before, now)]
    records = [plan.pop("records", {}) for plan in plans]
    lines = files_changed(*records)
    if lines:  # other records, other clips
        for plan in plans:
            plan.pop("clips", None)
    for subject in ("model", "bank"):
        prefix = "bank " if subject == "bank" else ""
        # a setting that an older run did not know was as its default is
        was, is_now = before.get(subject, {}), now.get(subject, {})
        if subject == "model" and was:
            was = {name: MODEL_DEFAULTS[name] for name in MODEL_DEFAULTS.keys() & is_now} | was
        lines += was_now(was, is_now, prefix)
    return lines + was_now(plans[0], plans[1])


def files_changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return in words how the record files of two runs differ; another name is no difference."""
    old, new = _files(before), _files(now)
    # without names: bytes, count and repeats are what is trained on
    if [file[1:] for file in old] == [file[1:] for file in new]:
        return []
    if sorted(file[1:] for file in old) == sorted(file[1:] for file in new):
        orders = [", ".join(name for name, *_ in files) for files in (old, new)]
        return [f"the order of the record files was {orders[0]}, is now {orders[1]}"]
    lines = []
    by_bytes, by_name = ({file[key]: file for file in new} for key in (1, 0))
    for name, digest, count, times in old:
        now_called, _, now_count, now_times = by_bytes.get(digest, (None, "", "", ""))
        if now_called is None and name in by_name:
            lines.append(
                f"record file {name} has changed (it gave {count} records, now {by_name[name][2]})"
            )
        elif now_called is None:
            lines.append(f"record file {name} ({count} records) is missing now")
        elif now_count != count:
            lines.append(f"of record file {now_called} {count} records were taken, now {now_count}")
        elif now_times != times:
            lines.append(f"record file {now_called} was taken x {times}, is now x {now_times}")
    known_bytes, known_names = ({file[key] for file in old} for key in (1, 0))
    return lines + [
        f"record file {name} ({count} records) is new"
        for name, digest, count, _ in new
        if digest not in known_bytes and name not in known_names
    ]


def _files(written: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    """Return (name, digest, records, times) in the order of the run."""
    found = []
    for key, value in written.items():
        place, _, name = key.partition(" ")
        digest, count, _, times = value.split(" ")
        # by number, as JSON objects that were sorted by key have lost the order
        found.append((int(place), (name, digest, count, times)))
    return [file for _, file in sorted(found)]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))  # a checkpoint's tuples have become lists


def _shown(value: Any) -> str:
    return "not set" if value is None or value == "" else json.dumps(value)
