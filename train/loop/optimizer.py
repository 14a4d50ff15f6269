"""AdamW over the model's parts, its state by name, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from model.fsdp.parts import read_into, shapes_in, write_parts
from model.fsdp.save import reshard
from model.llm import open_as_folder
from model.vlm import VLM
from shards.errors import UserError
from train.settings.config import OptimizerSettings

PARTS = "optimizer"
"""The folder of a checkpoint that holds the state in parts, by FSDP2's processes."""
MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 4 * 2**30
"""Size of an optimizer file: a save holds so much of the moments in memory twice, not all."""


def parameter_groups(model: VLM, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Return the optimizer's groups: every trained parameter in exactly one, vectors never decayed.

    Vectors are parameters of one dimension and, outside the LLM, rows of tables: LAPE's anchors, frame
    marks and streams. Each row stands for itself, and one that few records use would decay to nothing.
    LAPE's rate is by default 10 times the LLM's: its tables are new.
    """
    vectors = {id(p) for p in model.vectors()}
    head_rate = settings.projector_lr or settings.learning_rate
    rates = {"llm": settings.learning_rate, "lape": settings.lape_lr or 10 * settings.learning_rate}
    groups = []
    for part, parameters in model.parts().items():
        for decay in (True, False):
            chosen = [p for p in parameters if (id(p) not in vectors) == decay]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "name": part,
                        "peak": rates.get(part, head_rate),
                        "weight_decay": settings.weight_decay if decay else 0.0,
                    }
                )
    return groups


def make_optimizer(model: VLM, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return AdamW over `parameter_groups`; `set_rates` sets its rates before each step."""
    groups = parameter_groups(model, settings)
    # 0 until `set_rates`: a step that forgot it would change nothing, which `UpdateCheck` finds
    # fused: one pass over weights, gradients and moments, where torch's own choice makes ten
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, settings.adam_beta2), fused=True)


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that AdamW would give it at its first step.

    Before the rehearsal, so that this measures the memory of a real step, and for `load_optimizer`.
    """
    for group in optimizer.param_groups:
        # torch's own rule for where AdamW keeps its step counter (`_init_group`)
        on_device = group["fused"] or group["capturable"]
        for p in group["params"]:
            state: dict[str, Tensor] = optimizer.state[p]
            state["step"] = torch.zeros((), device=p.device if on_device else "cpu")
            for name in MOMENTS:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Write the state as `optimizer-N.safetensors`, tensors named `<parameter>/<moment>`."""
    held: dict[str, Tensor] = {}
    number = 0
    for name, value in _named_state(optimizer, model):
        held[name] = value.detach().cpu().contiguous()
        if sum(tensor.nbytes for tensor in held.values()) >= FILE_BYTES:
            save_file(held, folder / f"optimizer-{number}.safetensors")
            held, number = {}, number + 1
    save_file(held, folder / f"optimizer-{number}.safetensors")
    for file in folder.glob("optimizer-*.safetensors"):
        open_as_folder(file)


def save_parts(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Write each process' own parts of the state, by the same names; every process calls this."""
    reshard(model)
    write_parts(folder / PARTS, dict(_named_state(optimizer, model)))


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Copy a saved state, whole or in parts, into an allocated one that may be cut otherwise.

    A whole one is read tensor by tensor through the CPU; of parts a process reads what it needs.
    Raises UserError that names the parameters which only one of the two has.
    """
    ours = dict(_named_state(optimizer, model))
    if (folder / PARTS).is_dir():
        _load_parts(ours, folder)
        return
    for file in sorted(folder.glob("optimizer-*.safetensors")):
        with safe_open(file, framework="pt", device="cpu") as saved:
            for name in saved.keys():  # noqa: SIM118 - a safetensors file is not iterable
                if name not in ours:
                    raise _not_trained(file, name)
                _copy_into(ours.pop(name), saved.get_tensor(name))
    if ours:
        raise _not_saved(folder, ours)


def _load_parts(ours: dict[str, Tensor], folder: Path) -> None:
    saved = shapes_in(folder / PARTS)
    for name, shape in saved.items():
        if name not in ours:
            raise _not_trained(folder, name)
        # a scalar, such as AdamW's count of steps, is saved with one row
        if shape != (tuple(ours[name].shape) or (1,)):
            raise UserError(f"{folder}: parts of {name} are missing; copy all of the folder again")
    if absent := ours.keys() - saved.keys():
        raise _not_saved(folder, absent)
    read_into(folder / PARTS, ours)


def _not_trained(place: Path, name: str) -> UserError:
    return UserError(f"{place}: {name}: not trained here; use the same settings")


def _not_saved(folder: Path, names: Iterable[str]) -> UserError:
    return UserError(f"{folder}: no optimizer state of {', '.join(sorted(names))}")


def _named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """Yield the state's own tensors, by name and in the order of the model."""
    # by name: AdamW numbers its parameters by group, so another freeze would shift all numbers
    for name, p in model.named_parameters():
        for what, value in optimizer.state.get(p, {}).items():
            yield f"{name}/{what}", value


def _copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into one that may be a part of it."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, target.placements)
    target.copy_(value)


def set_rates(optimizer: torch.optim.Optimizer, step: int, total: int, warmup_ratio: float) -> None:
    """Set the learning rate of each group of parameters for a step.

    A function of the step alone, so nothing is saved: Accelerate's prepared schedulers step once for
    each process.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate(step, total, warmup_ratio)


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of the first group, and by name those of others that have their own."""
    first, *others = optimizer.param_groups
    own = {f"learning_rate_{g['name']}": g["lr"] for g in others if g["lr"] != first["lr"]}
    return {"learning_rate": first["lr"]} | own


def rate(step: int, total: int, warmup_ratio: float) -> float:
    """Return the learning rate at a step as a share of its peak: linear warm-up, then cosine."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        # from 1 / warmup: a first step at rate 0 would be a batch for nothing
        return (step + 1) / warmup
    # half a cosine from 1 to 0: SGDR without restarts (Loshchilov and Hutter, arXiv 1608.03983)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
