"""Checkpoints: written aside, synced, hashed, renamed; `resume: auto` takes the newest that verifies.

`checkpoint-N` is a model folder (see `model.vlm`) with `optimizer.pt`, `state.json` and
`hashes.json`, the digests of all other files, in it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from model.vlm import VLM
from shards.writer import file_facts

Json = dict[str, Any]


def save_checkpoint(
    output_dir: Path, step: int, model: VLM, optimizer: torch.optim.Optimizer, state: Json
) -> Path:
    """Write `checkpoint-step` so that it exists whole or not at all; returns its folder."""
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f"checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save(temporary)
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps(state | {"step": step}, indent=2) + "\n")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    hashes = {path.relative_to(temporary).as_posix(): file_facts(path)["sha256"] for path in files}
    (temporary / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n")
    for path in [*files, temporary / "hashes.json"]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _sync(output_dir)
    return final


def verifies(folder: Path) -> bool:
    """Tell whether a checkpoint is whole: every file there, with the digest it was written with."""
    try:
        hashes = json.loads((folder / "hashes.json").read_text())
        return all(file_facts(folder / name)["sha256"] == value for name, value in hashes.items())
    except (OSError, ValueError):
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
        raise ValueError(
            f"resume {resume}: files are missing or damaged; choose another checkpoint"
        )
    return Path(resume)


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
    return dict(json.loads((folder / "state.json").read_text()))


def prune(output_dir: Path, limit: int, best: str | None) -> None:
    """Remove all but the newest `limit` checkpoints; the best one stays."""
    for folder in checkpoints(output_dir)[limit:]:
        if folder.name != best:
            shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
