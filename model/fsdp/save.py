"""The model folder of a model that FSDP2 has cut, written by the first process from all parts.

Tensors are gathered one by one and written file by file: the first process holds one file's at a time,
the others none. What is too large for that, the weights of an LLM that is trained, a checkpoint holds
in parts (`llm_state`, see `model.fsdp.parts`); a run's last save streams them into files of FILE_BYTES.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from model.adapter.targets import base_state
from model.family.head import plain_llm
from model.fsdp.together import is_first, on_all
from model.llm import open_as_folder, save_reference, save_weights, write_json
from model.vlm import VLM

FILE_BYTES = 4 * 2**30
"""Size of a file of the LLM's weights, unless one layer is larger."""
LAYER = re.compile(r".*?\.\d+\.")
"""A weight's name up to the number of its layer: `model.layers.7.`"""


@dataclass(frozen=True)
class Piece:
    """What is written at once: live tensors, and a function that takes them whole, on the CPU."""

    state: Mapping[str, Tensor]
    write: Callable[[dict[str, Tensor]], None]


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 has cut a model."""
    return isinstance(model, FSDPModule)


def save_whole(model: VLM, folder: Path) -> None:
    """Write a model folder that is complete by itself, of a cut model or not; every process calls this.

    Raises OSError where the disk fails the first one, on every process if the model is cut.
    """
    if is_sharded(model):
        save_cut(model, folder, whole=True)
    elif is_first():
        model.save(folder)


def save_cut(model: VLM, folder: Path, *, whole: bool) -> None:
    """Write the model folder; every process calls this.

    whole: with all the LLM's weights, in Hugging Face form; else an LLM that is trained lacks its
    weights, and one that is not trained is referred to. Raises OSError on every process where the disk
    fails the first one.
    """
    reshard(model)
    failed: list[Exception] = []
    for piece in pieces(model, folder, whole):
        tensors = gathered(piece.state)
        if is_first() and not failed:  # after an error the others still wait to give their parts
            try:
                piece.write(tensors)
            except (OSError, SafetensorError) as error:
                failed.append(error)
        del tensors  # before the next ones are gathered
    on_all(partial(_raise_first, failed))


def llm_state(model: VLM) -> dict[str, Tensor]:
    """Return the LLM's live tensors by name, a tied one once."""
    reshard(model)
    # the parameters themselves: without keep_vars each entry is an object of its own, tied or not
    own = model.llm.state_dict(keep_vars=True)
    # reversed: of a tied tensor's names the first one is set last, and stays
    first = {id(value): name for name, value in reversed(own.items())}
    return {name: value.detach() for name, value in own.items() if first[id(value)] == name}


def reshard(model: nn.Module) -> None:
    """Put every parameter back into its parts: after a forward pass alone some are whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors on the CPU of the first process, tied ones as one; the others give parts."""
    whole: dict[int, Tensor] = {}
    for value in state.values():
        if id(value) not in whole:
            full = value
            if isinstance(value, DTensor):  # with FSDP's offloading its parts are on the CPU
                there = cast(DTensor, value.detach().to(value.device_mesh.device_type))
                full = there.full_tensor()
            # all processes have it whole by now, as full_tensor gathers on each; one keeps it
            whole[id(value)] = full.detach().cpu() if is_first() else torch.empty(0)
    return {name: whole[id(value)] for name, value in state.items()}


def pieces(model: VLM, folder: Path, whole: bool) -> list[Piece]:
    """Return what `save_cut` writes, in order."""
    llm, base, path = model.llm, model.base, folder / "llm"
    found = []
    if whole:
        found += _whole_llm(llm, path)
    elif base is not None:
        found.append(Piece({}, lambda _: save_reference(llm, path, base)))
    else:
        found.append(Piece({}, lambda _: _save_configs(llm, path)))
    if hasattr(llm, "peft_config"):
        adapter = {name: value for name, value in llm.state_dict().items() if "lora_" in name}
        found.append(Piece(adapter, partial(_save_adapter, llm, path / "lora")))
    for file, module in model.modules_on_disk():
        found.append(Piece(module.state_dict(), partial(_save_part, folder / file)))
    # the tokenizer last: it goes into llm/, which is put into place as a whole before
    return [*found, Piece({}, lambda _: model.save_facts(folder))]


def _whole_llm(llm: Any, path: Path) -> list[Piece]:
    """Return the LLM file by file, and the piece that puts them into place at last."""
    plain = plain_llm(llm)
    state = plain.state_dict(keep_vars=True)
    state = base_state(state) if plain is not llm else state
    aside = path.with_name(f"{path.name}.tmp")
    files = [
        Piece({name: state[name] for name in names}, partial(_save_file, plain, aside / str(k)))
        for k, names in enumerate(_in_files(state))
    ]
    # files of a save that was killed would count as this one's
    begin = Piece({}, lambda _: shutil.rmtree(aside, ignore_errors=True))
    return [begin, *files, Piece({}, lambda _: _put_into_place(aside, path))]


def _in_files(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of each file's tensors; those of a layer, and tied ones, stay together.

    Some families publish several of a layer's weights as one, or one as several.
    """
    units: dict[str, list[str]] = {}
    unit_of: dict[int, str] = {}
    for name, value in state.items():
        layer = LAYER.match(name)
        unit = unit_of.setdefault(id(value), layer.group() if layer else name)
        units.setdefault(unit, []).append(name)
    files: list[list[str]] = [[]]
    held = 0
    for names in units.values():
        size = sum(state[name].numel() * state[name].element_size() for name in names)
        if held and held + size > FILE_BYTES:
            files.append([])
            held = 0
        files[-1] += names
        held += size
    return files


def _save_file(plain: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    # transformers' own function, which knows tied weights and the published names
    plain.save_pretrained(folder, state_dict=tensors)


def _put_into_place(aside: Path, path: Path) -> None:
    """Make one LLM folder of the files that are each in a folder of their own."""
    # by number: as texts 10 would stand before 2
    made = sorted(aside.iterdir(), key=lambda folder: int(folder.name))
    weight_map: dict[str, str] = {}
    size = 0
    for number, folder in enumerate(made, start=1):
        name = f"model-{number:05d}-of-{len(made):05d}.safetensors"
        file = aside / (name if len(made) > 1 else "model.safetensors")
        os.replace(folder / "model.safetensors", file)
        open_as_folder(file)
        size += file.stat().st_size
        with safe_open(file, framework="pt") as saved:
            weight_map |= dict.fromkeys(saved.keys(), name)
    # save_pretrained has written the configs beside each file: one copy of them is kept
    for file in made[0].iterdir():
        os.replace(file, aside / file.name)
    for folder in made:
        shutil.rmtree(folder)
    if len(made) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(aside / "model.safetensors.index.json", index)
    # an earlier LLM goes only now that the new one is whole
    shutil.rmtree(path, ignore_errors=True)
    os.replace(aside, path)


def _save_configs(llm: Any, path: Path) -> None:
    """Write what an LLM's folder holds beside weights and tokenizer."""
    path.mkdir(parents=True)
    # FSDP2 gives the module a class of its own, named FSDP and the old name, which no library knows
    llm.config.architectures = [type(llm).__name__.removeprefix("FSDP")]
    llm.config.save_pretrained(path)
    if llm.can_generate():
        llm.generation_config.save_pretrained(path)


def _save_adapter(llm: Any, path: Path, tensors: dict[str, Tensor]) -> None:
    llm.save_pretrained(path, state_dict=tensors)
    open_as_folder(path / "adapter_model.safetensors")


def _save_part(path: Path, tensors: dict[str, Tensor]) -> None:
    save_weights(tensors, path)


def _raise_first(failed: list[Exception]) -> None:
    for error in failed:
        raise error
