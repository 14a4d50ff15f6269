"""Sums the gradients of a step's packs, on any number of processes.

`fast`: each rank adds up its own packs, and DDP averages the ranks while the backward pass runs; the
order of the additions depends on the number of processes. `exact`: every pack's gradient is broadcast
as one flat tensor and added in the order of the packs, so that weights are the same bits on 1, 2 or 3
processes, and after a resume on another number of them. It costs memory and traffic, so it is for small
models and for tests.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.batch import Batch
from model.fsdp.parts import refuse_old_torch
from model.vlm import VLM
from shards.errors import UserError
from shards.signed import Json

if TYPE_CHECKING:
    from accelerate import Accelerator


LossOf = Callable[[Any, int, Batch], Tensor]
"""(wrapped model, pack of the step, its batch) -> its share of the step's loss."""


def pin_threads(num_threads: int, reduce: str, state: Json, processes: int) -> None:
    """Set torch's number of threads: that of the settings, else that with which the run began.

    Torch splits a sum into as many parts as there are threads, so another number of threads rounds
    differently, and a resumed run would not repeat the uninterrupted one bit for bit.
    """
    as_before = reduce == "exact" or state.get("processes") == processes
    threads = num_threads or (state.get("threads") if as_before else None)
    if threads:
        torch.set_num_threads(threads)


class Reduction(Protocol):
    """A prepared model and optimizer, with the computation of a step's gradient."""

    optimizer: Any

    def gradients(self, packs: int, batches: Sequence[Batch], loss_of: LossOf) -> None:
        """Leave the gradient of a step's loss over all packs in the parameters of every rank.

        batches: this rank's packs k = rank, rank + world, ... of `packs`, followed by an idle one where
        other ranks have one more.
        """

    def hold_gradients(self) -> None:
        """Allocate the gradients, as they are in the middle of a step."""

    def drop_gradients(self) -> None:
        """Free the gradients."""


def make_reduction(
    kind: str, accelerator: "Accelerator", model: VLM, optimizer: torch.optim.Optimizer
) -> Reduction:
    """Prepare model and optimizer for `fast` or `exact`; UserError where FSDP forbids the latter."""
    if kind == "exact" and accelerator.is_fsdp2:
        raise UserError(
            "adds up whole gradients on every process, and FSDP keeps parts of them",
            where="reduce exact",
            fix="use reduce: fast, or launch without FSDP",
        )
    return (Exact if kind == "exact" else Fast)(accelerator, model, optimizer)


class Fast:
    """Accelerate's own wrapper around the model: DDP, FSDP, or none on one process."""

    def __init__(
        self, accelerator: "Accelerator", model: VLM, optimizer: torch.optim.Optimizer
    ) -> None:
        self.accelerator = accelerator
        if accelerator.is_fsdp2:
            refuse_old_torch()
            # autocast chooses the dtype of each operation; FSDP's policy would round LAPE's fp32 tables
            accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def gradients(self, packs: int, batches: Sequence[Batch], loss_of: LossOf) -> None:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        # a rank with one pass less would leave the others waiting in their all-reduce for ever
        assert len(batches) == -(-packs // world), "every rank must make as many passes"
        self.drop_gradients()
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            # one reduction a step: between packs the ranks' sums stay their own
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                # DDP averages over ranks, the denominators are global already
                loss = loss_of(self.model, rank + place * world, batch) * world
                self.accelerator.backward(loss)

    def hold_gradients(self) -> None:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class Exact:
    """Sums in pack order, without a wrapper: three flat fp32 tensors of all trained parameters.

    Two on one process. fp32 in a fixed order, not fp64 in any: an fp64 sum that rounds to fp32 at a
    boundary would still depend on its order.
    """

    def __init__(
        self, accelerator: "Accelerator", model: VLM, optimizer: torch.optim.Optimizer
    ) -> None:
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        # evaluation_mode: autocast and compilation, but no DDP, whose sums follow its buckets
        self.model = accelerator.prepare_model(model, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert all(p.dtype == torch.float32 for p in self.parameters)
        if accelerator.device.type == "cuda":
            # warn only: some backward kernels on CUDA have no deterministic form
            torch.use_deterministic_algorithms(True, warn_only=True)
        if self.world > 1:
            # DDP would do this: ranks may have drawn or loaded their weights on their own
            for value in [*model.parameters(), *model.buffers()]:
                dist.broadcast(value.data, src=0)
        size = sum(p.numel() for p in self.parameters)
        # Two fp32 copies: a pack's gradient is kept apart until those of lower numbers are added. In one
        # copy a rank's packs would meet first, (0 + 2) + (1 + 3) on two ranks, and round otherwise.
        self.own = torch.zeros(size, device=accelerator.device)
        """The gradient of this rank's pack; the parameters' gradients are views of it."""
        self.total = torch.zeros_like(self.own)
        self.other = torch.empty_like(self.own) if self.world > 1 else self.own

    def gradients(self, packs: int, batches: Sequence[Batch], loss_of: LossOf) -> None:
        self.hold_gradients()
        self.total.zero_()
        # a round is one pack of each rank; the packs of a round are added one after the other, by number
        for place, first in enumerate(range(0, packs, self.world)):
            if first + self.rank < packs:
                self.own.zero_()
                loss_of(self.model, first + self.rank, batches[place]).backward()
            for source in range(min(self.world, packs - first)):
                flat = self.own if source == self.rank else self.other
                if self.world > 1:
                    dist.broadcast(flat, src=source)
                self.total += flat
        self.own.copy_(self.total)

    def hold_gradients(self) -> None:
        views = self.own.split([p.numel() for p in self.parameters])
        for p, view in zip(self.parameters, views, strict=True):
            p.grad = view.view_as(p)

    def drop_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None


def pack_seed(seed: int, step: int, pack: int) -> int:
    """Return the seed of a pack's dropout: from its place in the run, not from a rank's history.

    So a resumed run needs no saved random state, and the number of ranks changes no mask.
    """
    mixed = hashlib.blake2b(f"{seed} {step} {pack}".encode(), digest_size=8)
    # one bit less: a positive int64, which every generator takes
    return int.from_bytes(mixed.digest(), "big") >> 1


def sum_in_order(
    accelerator: "Accelerator", rows: Tensor, requests: Tensor
) -> tuple[Tensor, Tensor]:
    """Return all packs' sums `(packs, n)`, complete on every rank, and the sum of the ranks' requests.

    rows: fp64, zero where a pack is another rank's: only zeros are added to a pack's sums, so they are
    the same bits on any number of processes. One reduction for both saves a round of communication.
    """
    flat = accelerator.reduce(torch.cat([rows.flatten(), requests.to(rows)]), reduction="sum")
    return flat[: rows.numel()].view_as(rows), flat[rows.numel() :]
