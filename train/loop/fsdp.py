"""FSDP2: each process holds a part of every tensor; to be saved they are made whole on the first."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from model.vlm import VLM

if TYPE_CHECKING:
    from accelerate import Accelerator


class Whole:
    """The way from a prepared model and optimizer to ones that can be saved."""

    def __init__(self, model: VLM, accelerator: "Accelerator") -> None:
        """Made before the model is prepared; a twin of it holds no memory until it is needed."""
        self.model, self.main = model, accelerator.is_main_process
        self.twin: VLM | None = None
        if accelerator.is_fsdp2:
            # the dtype of arithmetic is autocast's affair; FSDP would round LAPE's tables as well
            accelerator.state.fsdp_plugin.mixed_precision_policy = None
            meta = {
                id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
                for p in model.parameters()
            }
            self.twin = copy.deepcopy(model, memo={**meta, id(model.tokenizer): model.tokenizer})

    def gather(self, optimizer: torch.optim.Optimizer) -> tuple[VLM, torch.optim.Optimizer]:
        """Return model and optimizer as one process would have them; every rank calls this.

        With FSDP2 they lie on the CPU and are filled on the first process alone: 12 bytes for each
        trained parameter, which are freed when the result is.
        """
        if self.twin is None:
            return self.model, optimizer
        model = copy.deepcopy(self.twin, memo={id(self.model.tokenizer): self.model.tokenizer})
        own = dict(model.named_parameters(remove_duplicate=False))
        filled: dict[int, nn.Parameter] = {}
        states = {}
        for name, p in self.model.named_parameters():
            value = _on_cpu(p, self.main)
            parameter = nn.Parameter(value, requires_grad=p.requires_grad)
            filled[id(own[name])] = parameter
            states[parameter] = {
                what: _on_cpu(held, self.main) for what, held in optimizer.state.get(p, {}).items()
            }
        for module in model.modules():  # a tied parameter has several places
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, filled[id(p)])
        trained = [p for p in filled.values() if p.requires_grad]
        plain = torch.optim.AdamW(trained, lr=0.0)
        plain.state.update({p: state for p, state in states.items() if state})
        return model, plain


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into one that may be a part of it."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, target.placements)
    target.copy_(value)


def _on_cpu(value: Tensor, keep: bool) -> Tensor:
    whole = value.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.cpu() if keep else whole.new_empty(0, device="cpu")
