"""Where a command may write: a new folder or a run's own, never a model, a bank, or somebody's data."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from model.config import READ, outdated
from shards.signed import Json

RUN = "run.json"
"""The file in a run's folder with the settings that its weights were trained with."""
WRITTEN = re.compile(
    r"(llm|lape|logs|wandb|(run|config|sweep)\.json|(metrics|dropped)\.jsonl|train\.log|checkpoint-\d+.*|"
    r"(projector|visual|frame_causal|floor)\.safetensors)"
)
"""Files and folders that a run writes in its folder, and may replace."""
BANK = re.compile(r"bank\.json|plan\.json|index\.zarr")
MODEL = re.compile(
    r"config\.json|.*\.safetensors(\.index\.json)?|.*\.(gguf|pth)|pytorch_model.*\.bin|"
    r"adapter_(config\.json|model\.bin)|tokenizer(_config)?\.(json|model)"
)
DATA = re.compile(
    r".*\.(jsonl|parquet|arrow|csv|tsv|tar|zip|gz|mp4|webm|mkv|avi|mov|gif)|dataset_(info|dict)\.json",
    re.IGNORECASE,
)
STAGE_PARTS = ("llm", "mm_projector", "vision_tower")
UNEXPANDED = re.compile(r"^~[\w.-]*(?=/|$)|\$(\{\w+\}|\w+)")
"""What a shell would have replaced: a `~` behind `=` or in a YAML, a variable in quotes or in a YAML."""


def folder_problem(folder: Path) -> str | None:
    """Return why nothing can be written in a folder, which may not exist yet; None if it can."""
    if "://" in str(folder) or re.match(r"[a-z0-9]+:/[^/]", str(folder)):  # Path joins the slashes
        return f"{folder}: a URL; name a local folder"
    if (found := UNEXPANDED.search(str(folder))) and not folder.exists():
        return (
            f"{folder}: {found[0]} is a shell's, and stands for nothing here; write the whole path"
        )
    # up to the nearest folder that exists: what is above it is made by the run
    for place in (folder, *folder.absolute().parents):
        if place.is_symlink() and not place.exists():
            return (
                f"{place}: a link to {os.readlink(place)}, which is not there; correct or remove it"
            )
        if not place.exists():
            continue
        if not place.is_dir():
            return f"{place}: a file; name a folder"
        if not os.access(place, os.W_OK | os.X_OK):
            return f"{place}: not writable by this user; name another folder"
        break
    return None


def file_problem(path: Path) -> str | None:
    """Return why a file cannot be written, checked before the work whose result it holds; or None."""
    if path.is_dir():
        return f"{path}: a folder; name a file"
    if not path.parent.is_dir():
        return f"{path}: its folder is not there; make {path.parent}"
    if path.exists() and not os.access(path, os.W_OK):
        return f"{path}: not writable by this user; name another file"
    return folder_problem(path.parent)


def output_problem(folder: Path, inputs: Mapping[str, Sequence[str]]) -> str | None:
    """Return why a run may not write in a folder, if so.

    inputs: setting -> the paths that it names, which the run reads.
    """
    if problem := folder_problem(folder):
        return problem
    fix = "name a new folder, or the folder of a run to go on with"
    for setting, paths in inputs.items():
        for path in filter(os.path.exists, paths):
            if is_overwritten(Path(path), folder):
                return f"{folder}: the run would write over its own {setting} {path}; {fix}"
    # not "is it empty": logs of a scheduler and notes are in the folders of new runs
    found = foreign(folder) if folder.exists() else None
    return f"{folder}: {found}, which a run would write into; {fix}" if found else None


def is_overwritten(path: Path, folder: Path) -> bool:
    """Return whether a run in a folder would overwrite the file or folder at a path."""
    here, there = folder.resolve(), path.resolve()
    if there == here:
        return True
    inside = there.is_relative_to(here)
    return inside and WRITTEN.fullmatch(there.relative_to(here).parts[0]) is not None


def foreign(folder: Path) -> str | None:
    """Return the kind of a folder that is not a run's, such as `a model (config.json)`; else None."""
    if name := _first(folder, BANK.fullmatch):
        return f"a bank ({name})"
    if (folder / "checkpoint.json").exists():
        return "a checkpoint of a run (checkpoint.json)"
    if name := _first(folder, lambda name: (folder / name / "trainer_state.json").exists()):
        return f"another trainer's output ({name}/trainer_state.json)"
    # before the patterns of models: a run's folder holds files that look like one
    if is_run(folder):
        config = folder / "config.json"
        # without a config the run was stopped before its model was saved
        if not config.exists():
            return None
        facts = read_object(config)
        if outdated(facts):
            return f"a run of an older framebank, model format {facts['format']} (config.json)"
        return (
            None
            if facts.get("format") in READ
            else "a model that no run of ours wrote (config.json)"
        )
    if name := _first(folder, MODEL.fullmatch):
        return f"a model ({name})"
    for part in STAGE_PARTS:
        if (folder / part / "config.json").exists():
            return f"a model ({part}/config.json)"
    if name := _first(folder, lambda name: _is_data(folder / name)):
        return f"a dataset ({name})"
    return None


def is_run(folder: Path) -> bool:
    """Return whether a run has written in a folder."""
    if isinstance(read_object(folder / RUN).get("config"), dict):
        return True
    return _first(folder, lambda name: (folder / name / "checkpoint.json").exists()) is not None


def _is_data(path: Path) -> bool:
    if WRITTEN.fullmatch(path.name):
        return False
    if DATA.fullmatch(path.name):
        return True
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    # 64 bytes: a file of records may be gigabytes
    with open(path, "rb") as file:
        return file.read(64).lstrip().startswith(b"[")  # a list is records, a mapping settings


def _first(folder: Path, fits: Callable[[str], object]) -> str | None:
    # scandir: stops at the first, a folder of videos may have a million files
    with os.scandir(folder) as entries:
        return next((entry.name for entry in entries if fits(entry.name)), None)


def read_object(path: Path) -> Json:
    """Return the JSON object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
