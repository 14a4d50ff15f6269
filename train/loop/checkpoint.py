"""Checkpoints: written under a temporary name, synced, hashed, renamed, verified; and how to resume.

`checkpoint-N` is a model folder (see `model.vlm`) in which an LLM that is not trained is named by path
and digest, with the optimizer's state beside it and `checkpoint.json`: the step, the facts that
decide whether a run may go on from it, settings, versions, and the digest of every other file.
Of a model that FSDP2 has cut, every process writes and hashes its own parts of the LLM's weights and
of the optimizer's state; they are read whole, or by any number of processes (`model.fsdp`).

`resume: auto` takes the newest checkpoint that verifies, so a crash during a save changes nothing.
`loop.make_run` chooses it and compares the facts, `loop.make_learner` loads weights and optimizer from
it, and the steps begin at `Run.first`. No random state is stored: order and dropout are functions of
seed, step and pack.
"""

import math
import os
import platform
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from model.fsdp.parts import files_of, write_parts
from model.fsdp.save import llm_state, save_cut, save_whole
from model.fsdp.together import is_first, on_all, on_first, own_rank
from model.vlm import VLM
from shards.errors import UserError
from shards.format.manifest import installed
from shards.read.banks import joint
from shards.signed import Json, file_facts, read_signed_json, signed_json
from shards.text import some
from train.batches.run_plan import RunPlan
from train.data.dataset import Dataset
from train.loop.optimizer import PARTS, save_optimizer, save_parts
from train.scores.results import set_scores_aside
from train.settings.config import TrainConfig
from train.settings.recorded import facts_changed, was_now
from train.start.stage import model_config

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "checkpoint.json"
CONFIG = "config.json"
"""Of a model folder: settings of the model."""
Digests = dict[str, str]
"""A file's path in its checkpoint -> sha256."""


def save_checkpoint(
    output_dir: Path, step: int, model: VLM, optimizer: torch.optim.Optimizer, state: Json
) -> Path:
    """Write `checkpoint-step` so that it exists whole or not at all; return its folder.

    Raises UserError where it cannot be written; earlier checkpoints are then unchanged.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary = _make_room(final)
    try:
        model.save(temporary, whole=False)
        save_optimizer(optimizer, model, temporary)
        _complete(temporary, final, state | {"step": step})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _not_written(final, error) from error
    # read back now: a disk that loses bytes is found while the run still has the weights
    if not verifies(final):
        raise _not_as_written(final)
    return final


def save_sharded(
    output_dir: Path, step: int, model: VLM, optimizer: torch.optim.Optimizer, state: Json
) -> Path:
    """Write a checkpoint like `save_checkpoint`, of a model that FSDP2 has cut; all processes call it.

    Each writes, hashes and reads back its own parts, file by file; the first one adds the rest and
    renames. Raises UserError on all of them where one fails; earlier checkpoints are then unchanged.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary = final.with_name(f"{final.name}.tmp")
    try:
        on_first(lambda: _make_room(final))
        save_cut(model, temporary, whole=False)
        if model.base is None:
            write_parts(temporary / "llm", llm_state(model))
        save_parts(optimizer, model, temporary)
        own = on_all(lambda: _own_digests(temporary))
        theirs = {name: digest for digests in own[1:] for name, digest in digests.items()}
        facts = state | {"step": step}
        on_first(lambda: _complete(temporary, final, facts, theirs))
    except OSError as error:  # on every process
        if is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        raise _not_written(final, error) from error
    damage = on_all(
        lambda: damage_of(final, theirs) if is_first() else _differing(final, own[own_rank()])
    )
    if any(damage):
        raise _not_as_written(final)
    return final


def save_model(model: VLM, output_dir: Path, say: Callable[[str], None], *, trained: bool) -> None:
    """Write a run's model; all processes call it. trained: whether it is another one than before.

    Raises UserError where it cannot be written.
    """
    if is_first():
        # written last, and read first: without it parts of two models are not taken for one, wherever
        # the save dies
        (output_dir / CONFIG).unlink(missing_ok=True)
    try:
        save_whole(model, output_dir)
    except (OSError, SafetensorError) as error:
        raise _not_written(output_dir, error, "newest checkpoint") from error
    # a report beside the weights is read as theirs
    if trained and is_first() and (names := set_scores_aside(output_dir)):
        say(f"scores    of the model that was here before ({some(names)}) are now NAME.old")


def _make_room(final: Path) -> Path:
    """Remove what killed saves have left; return where a new one is written."""
    assert not final.exists(), f"{final}: `set_aside` removes checkpoints beyond a run's step"
    for left in final.parent.glob("checkpoint-*.tmp"):
        shutil.rmtree(left)
    return final.with_name(f"{final.name}.tmp")


def _own_digests(folder: Path) -> Digests:
    """Return the digests of the parts that this process has written."""
    parts = [files_of(folder / name, own_rank()) for name in ("llm", PARTS)]
    return {_name(file, folder): file_facts(file)["sha256"] for files in parts for file in files}


def _complete(temporary: Path, final: Path, state: Json, known: Digests | None = None) -> None:
    """Seal a checkpoint and give it its name; known: digests of other processes' files."""
    seal(temporary, state | {"versions": versions()}, known or {})
    os.replace(temporary, final)
    _sync(final.parent)


def _not_written(final: Path, error: Exception, last: str = "checkpoint before it") -> UserError:
    return UserError(
        f"cannot be written ({error})",
        where=final,
        fix=f"make room, then run the same command to go on from the {last}",
    )


def _not_as_written(final: Path) -> UserError:
    return UserError("does not read back as it was written", where=final, fix="check the disk")


def seal(folder: Path, state: Json, known: Digests) -> None:
    """Write the manifest that lists the files' digests, and sync all files and folders to disk.

    known: digests of files that are hashed already.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {_name(path, folder): path for path in files}
    rest = {name: file_facts(names[name])["sha256"] for name in names if name not in known}
    (folder / MANIFEST).write_bytes(signed_json(state | {"files": rest | known}))
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def verifies(folder: Path) -> bool:
    """Return whether a checkpoint is whole: every file is there, with the digest it was written with."""
    return not damage_of(folder)


def damage_of(folder: Path, known: Collection[str] = ()) -> str:
    """Return what is wrong with a checkpoint, empty if it is whole; known: files that are not read."""
    try:
        digests = read_signed_json(folder / MANIFEST)["files"]
    except (OSError, UserError) as error:
        return str(error)
    return _differing(folder, {n: digest for n, digest in digests.items() if n not in known})


def _differing(folder: Path, digests: Digests) -> str:
    """Return what is wrong with the first damaged one of some files, empty if none is."""
    try:
        for name, digest in digests.items():
            if file_facts(folder / name)["sha256"] != digest:
                return f"{name} has other bytes than were written"
    except OSError as error:
        return str(error)
    return ""


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first."""
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=step_of, reverse=True)


def find_resume(output_dir: Path, resume: str) -> Path | None:
    """Return the checkpoint to go on from, None to start from scratch.

    resume: `none`, `auto` or a folder. Raises UserError for a folder that does not verify.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return next((folder for folder in checkpoints(output_dir) if verifies(folder)), None)
    if not verifies(Path(resume)):
        raise UserError(
            "files are missing or damaged",
            where=f"resume {resume}",
            fix="choose another checkpoint",
        )
    return Path(resume)


def passed_over(output_dir: Path, chosen: Path | None) -> list[str]:
    """Return a line for each checkpoint newer than the chosen one: its damage, and what the run does."""
    newer = checkpoints(output_dir)
    if chosen in newer:
        newer = newer[: newer.index(chosen)]
    instead = f"goes on from {chosen.name}" if chosen else "starts from scratch"
    return [f"damaged   {path}: {damage_of(path)}; the run {instead}" for path in newer]


def choose_checkpoint(
    output_dir: Path, resume: str, accelerator: "Accelerator"
) -> tuple[Path | None, list[str]]:
    """Return (the checkpoint to go on from, lines about newer ones that are damaged).

    The main process reads and verifies them, and all take its choice.
    """
    found: tuple[Path | None, list[str]] = (None, [])
    if accelerator.is_main_process:
        chosen = find_resume(output_dir, resume)
        found = chosen, passed_over(output_dir, chosen) if resume == "auto" else []
    return tuple(broadcast_object_list(list(found)))


def facts_of(config: TrainConfig, dataset: Dataset, plan: RunPlan) -> dict[str, Json]:
    """Return the facts that must be equal to go on from a checkpoint: subject -> name -> value."""
    model = asdict(model_config(config, dataset))
    del model["turns"]  # the plan has it, for each dataset
    adapter = ("lora_r", "lora_alpha", "lora_experts") if config.tune_llm == "lora" else ()
    return {
        "model": model | {name: getattr(config, name) for name in ("tune_llm", *adapter)},
        "bank": joint(dataset.banks.config),
        "plan": {k: v for k, v in plan.facts.items() if k not in model and k != "bank"},
    }


def refuse_other_run(folder: Path, state: Json, facts: Mapping[str, Json]) -> None:
    """Raise UserError that names each fact in which a checkpoint's run differs from this one.

    facts: of this run, see `facts_of`.
    """
    if lines := facts_changed(state["facts"], facts):
        raise UserError(
            f"this run differs from the one that it would go on with: {'; '.join(lines)}",
            where=folder,
            fix="use the earlier settings and files, another output_dir, or resume: none, which "
            "starts from scratch",
        )


def changed_settings(folder: Path, state: Json, total: int, config: Json) -> str:
    """Return a notice of the settings that differ from the checkpoint's, empty if there are none.

    These are settings that a run may change: a rate, a number of steps. Where all steps (`total`) are
    taken already, they have no effect, which the notice says.
    """
    changed = "; ".join(was_now(state["config"], config))
    if state["step"] < total:
        return f"changed   since {folder.name}: {changed}" if changed else ""
    text = (
        f"finished  nothing is trained: {folder} has {state['step']} steps, {total} are asked for"
    )
    if changed:
        text += f"\n          its weights were trained without the new settings: {changed}"
    return (
        f"{text}\n          to train on, raise max_steps or num_train_epochs; to train with other "
        "settings, name another output_dir, or resume: none"
    )


def kept_rows(state: Json, config: Json, world: int) -> str:
    """Return a notice where changed settings ask for steps of other rows than the run's, or nothing.

    A run keeps the rows of its steps, so that `changed_settings` names values which have no effect.
    """
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    sizes = [config[name] for name in names]
    rows, asked = state["global_batch"], math.prod([*sizes, world])
    if asked == rows or sizes == [state["config"].get(name) for name in names]:
        return ""
    said = " x ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
    return (
        f"kept      a step has {rows} rows, as the run began with, not {asked} ({said} x "
        f"{world} process{'es' * (world > 1)}); for those name another output_dir"
    )


def set_aside(output_dir: Path, step: int) -> None:
    """Rename each checkpoint beyond the step that a run goes on from, to `checkpoint-N.old`.

    It is damaged, or of a run that is not continued: `resume: auto` must not take it, nor `prune` keep
    it in place of this run's own.
    """
    for folder in checkpoints(output_dir):
        if step_of(folder) > step:
            old = folder.with_name(f"{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)


def read_state(folder: Path) -> Json:
    """Return a checkpoint's manifest, `checkpoint.json`."""
    return read_signed_json(folder / MANIFEST)


def prune(output_dir: Path, limit: int, best: str | None) -> None:
    """Remove all but the newest `limit` checkpoints; the best one stays."""
    for folder in checkpoints(output_dir)[limit:]:
        if folder.name != best:
            shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    """Return the N of `checkpoint-N`."""
    return int(folder.name.removeprefix("checkpoint-"))


def versions() -> Json:
    """Return the versions of Python and the libraries; recorded, never compared."""
    names = ("framebank", "torch", "transformers", "accelerate")
    return {"python": platform.python_version()} | {name: installed(name) for name in names}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
