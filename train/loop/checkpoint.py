"""Checkpoints: written aside, synced, hashed, renamed, read back; `resume: auto` takes the newest whole.

`checkpoint-N` is a model folder (see `model.vlm`) in which an LLM that is not trained is named by path
and digest, with the optimizer's state beside it and `checkpoint.json`: the step, the facts that
decide whether a run may go on from it, settings, versions, and the digest of every other file.
"""

import json
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from model.vlm import VLM
from shards.errors import UserError
from shards.format.features import differences
from shards.signed import file_facts, read_signed_json, signed_json
from train.loop.optimizer import save_optimizer

Json = dict[str, Any]
MANIFEST = "checkpoint.json"


def save_checkpoint(
    output_dir: Path, step: int, model: VLM, optimizer: torch.optim.Optimizer, state: Json
) -> Path:
    """Write `checkpoint-step` so that it exists whole or not at all; returns its folder.

    UserError where it cannot be written; the checkpoints before it are then as they were.
    """
    final = output_dir / f"checkpoint-{step}"
    assert not final.exists(), f"{final}: what lies beyond a run's step was to be set aside"
    for left in output_dir.glob("checkpoint-*.tmp"):
        shutil.rmtree(left)
    temporary = output_dir / f"{final.name}.tmp"
    try:
        model.save(temporary, whole=False)
        save_optimizer(optimizer, model, temporary)
        seal(temporary, state | {"step": step, "versions": versions()})
        os.replace(temporary, final)
        _sync(output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{final}: cannot be written ({error}); make room, then run the same command to go on "
            "from the checkpoint before it"
        ) from error
    if not verifies(final):
        raise UserError(f"{final}: does not read back as it was written; check the disk")
    return final


def seal(folder: Path, state: Json) -> None:
    """Sync every file and folder, and write the manifest that lists their digests."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): file_facts(path)["sha256"] for path in files}
    (folder / MANIFEST).write_bytes(signed_json(state | {"files": digests}))
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def verifies(folder: Path) -> bool:
    """Tell whether a checkpoint is whole: every file there, with the digest it was written with."""
    try:
        digests = read_signed_json(folder / MANIFEST)["files"]
        return all(file_facts(folder / name)["sha256"] == value for name, value in digests.items())
    except (OSError, UserError):
        return False


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first."""
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=step_of, reverse=True)


def find_resume(output_dir: Path, resume: str) -> Path | None:
    """Return the checkpoint to go on from, None to start anew."""
    if resume == "none":
        return None
    if resume == "auto":
        return next((folder for folder in checkpoints(output_dir) if verifies(folder)), None)
    if not verifies(Path(resume)):
        raise UserError(f"resume {resume}: files are missing or damaged; choose another checkpoint")
    return Path(resume)


def refuse_other_run(folder: Path, state: Json, facts: Mapping[str, Json]) -> None:
    """Raise UserError that names each fact in which a checkpoint's run is not this one.

    facts: model, bank, plan, ... -> what of it must be the same, by name.
    """
    ours = json.loads(json.dumps(facts))
    lines = []
    for subject in ours:
        lines += differences(ours[subject], state["facts"].get(subject, {}), f"{subject} ")
    if lines:
        raise UserError(
            f"{folder} does not fit this run: {'; '.join(lines)}. Use the same settings, another "
            "output_dir, or resume: none"
        )


def changed_settings(folder: Path, state: Json, config: Json) -> str:
    """Return a line on the settings that differ from those of the run so far, empty if none does.

    Those that a run may change: a rate, a number of steps. From here on it is another run.
    """
    ours = json.loads(json.dumps(config)) | {"resume": state["config"]["resume"]}
    lines = differences(ours, state["config"])
    return f"changed   since {folder.name}: {'; '.join(lines)}" if lines else ""


def set_aside(output_dir: Path, step: int) -> None:
    """Rename what lies beyond the step that a run goes on from, to `checkpoint-N.old`.

    It is damaged, or was left by a run that is not continued: neither `resume: auto` may take it nor
    `prune` keep it in place of what this run writes.
    """
    for folder in checkpoints(output_dir):
        if step_of(folder) > step:
            old = folder.with_name(f"{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)


def read_state(folder: Path) -> Json:
    return read_signed_json(folder / MANIFEST)


def prune(output_dir: Path, limit: int, best: str | None) -> None:
    """Remove all but the newest `limit` checkpoints; the best one stays."""
    for folder in checkpoints(output_dir)[limit:]:
        if folder.name != best:
            shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def versions() -> Json:
    """Return what a run was made with; recorded, never compared."""
    names = ("framebank", "torch", "transformers", "accelerate")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
