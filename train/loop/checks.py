"""A run's checks of itself: that the right parameters learn, and that its largest pack fits in memory.

A part that gets no gradient, or a frozen weight that moves, would train for days without an error; a
pack that does not fit would end the run hours in, when the largest one is drawn.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.batch import Batch, to_device
from model.vlm import VLM
from shards.errors import UserError, first_line
from shards.signed import Json
from shards.text import some
from train.batches.run_plan import RunPlan
from train.flops import LlmShape, memory_bytes
from train.settings.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.loop.gradients import LossOf, Reduction


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the integer type that its bits are read as."""


def digests(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of each tensor's bits, read as integers: int64 `(n,)`, equal if no bit changed."""
    sums = []
    for tensor in tensors:
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a rank's shard
        # bits, not values: a float sum may hide a small change, and NaN never equals itself
        bits = own.detach().contiguous().view(-1).view(BITS[own.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


class UpdateCheck:
    """Checks the first steps: each trained part must move, and nothing else may.

    It finds what no loss shows: bfloat16 weights of 0.05 under AdamW at 1e-5 did not move in 50 steps.
    """

    def __init__(self, model: VLM, accelerator: "Accelerator") -> None:
        self.accelerator = accelerator
        self.model = model
        self.waiting = model.parts()
        """The parts that have not moved yet."""
        self.before = {name: digests(part) for name, part in self.waiting.items()}
        self.frozen = _frozen(model)
        self.frozen_before = digests(self.frozen.values())

    def check(self, step: int, *, frames: bool, warming_up: bool) -> None:
        """Raise UserError where a part that this step should have moved has not, or a frozen one has.

        frames: whether the step's records have transitions, without which only the LLM is certain to
        have a gradient. warming_up: whether the LLM's was dropped. Every rank calls this after the step;
        once all parts have moved it costs nothing.
        """
        # text moves the LLM alone; projector, marks, tables and predictor learn from frames
        due = {name for name in self.waiting if (not warming_up if name == "llm" else frames)}
        if not due:
            return
        frozen = digests(self.frozen.values()) != self.frozen_before
        counts = []
        for name, part in self.waiting.items():
            # a change alone is no proof: weight decay moves a parameter with zero gradient too
            pulled = torch.stack([_any(p.grad) for p in part]).to(self.accelerator.device)
            changed = (digests(part) != self.before[name]).to(self.accelerator.device)
            counts.append((changed & pulled).sum().reshape(1))
        moved = self.accelerator.reduce(torch.cat(counts), reduction="sum").tolist()
        still = [name for name, count in zip(self.waiting, moved, strict=True) if not count]
        lost = [n for n, one in zip(self.frozen, frozen.tolist(), strict=True) if one]
        if lost:
            raise UserError(
                f"step {step + 1}: weights that are not trained have changed: {some(lost, 5)}; "
                "this is a defect of the model's code: the run would not follow its settings"
            )
        stuck = [name for name in still if name in due]
        if stuck:
            raise UserError(
                f"step {step + 1}: no weight of {', '.join(stuck)} has moved, though trained: it gets "
                "no gradient, or its updates are lost in rounding; raise its rate, or freeze it"
            )
        self.waiting = {name: self.waiting[name] for name in still}
        self.before = {name: self.before[name] for name in still}


def drop_llm_gradients(model: VLM) -> None:
    """Skip the LLM's update: AdamW changes neither a weight without gradient nor its moments."""
    for p in model.llm.parameters():
        p.grad = None


def rehearse(
    reduction: "Reduction", model: VLM, batch: Batch, loss_of: "LossOf", *, accumulated: bool
) -> None:
    """Run the heaviest pack forward and backward and drop its gradients: it fits now, or never.

    accumulated: whether gradients of other packs are in memory meanwhile. Weights, optimizer state and
    random state are unchanged afterwards.
    """
    device = model.visual.frame_end.device
    # the bare model, not DDP's wrapper, whose buckets would count these gradients as a step's
    # dropout draws here what step 1 is to draw: the run's own random state is put back
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # later packs of a step find the gradients of earlier ones in memory: the rehearsal must, too
        if accumulated:
            reduction.hold_gradients()
        loss_of(model, 0, to_device(batch, device)).backward()
    reduction.drop_gradients()


@dataclass(frozen=True)
class PackMemory:
    """The size of the plan's heaviest pack, for advice when memory runs out."""

    places: int
    """Tokens of its rows, padding included."""
    shape: LlmShape | None
    tower_width: int

    @classmethod
    def of(cls, plan: RunPlan, model: VLM) -> "PackMemory":
        """Return that of a plan's heaviest pack."""
        return cls(
            int(plan.pack_slots.max()), LlmShape.of(model.llm.config.to_dict()), model.tower_width
        )

    def savings(self, config: TrainConfig) -> list[tuple[float, str]]:
        """Return (bytes saved, setting to change), the greatest saving first."""
        if self.shape is None:
            return []
        now = memory_bytes(config, self.shape, self.tower_width, self.places)
        half = config.per_device_train_batch_size // 2
        fewer: tuple[str, int] = ("max_frames_num", config.max_frames_num // 2)
        if half:
            fewer = "per_device_train_batch_size", half
        elif config.pack_tokens:
            fewer = "pack_tokens", config.pack_tokens // 2
        settings: list[tuple[str, Any, int]] = [
            # in any order: they are sorted by what they save, and one that is set already saves nothing
            ("gradient_checkpointing", "full", self.places),
            ("bf16", True, self.places),
            ("tune_llm", "lora", self.places),
            (*fewer, self.places // 2),
        ]
        ways = []
        for name, value, places in settings:
            changed = replace(config, **{name: value})
            less = memory_bytes(changed, self.shape, self.tower_width, places)
            ways.append((now - less, f"{name} {str(value).lower()}"))
        return sorted([(saved, way) for saved, way in ways if saved > 0], reverse=True)


@contextmanager
def out_of_memory_advice(where: str, memory: PackMemory, config: TrainConfig) -> Iterator[None]:
    """Turn an out-of-memory error into one line that says which setting to change."""
    try:
        yield
    except RuntimeError as error:
        # the CPU's allocator raises no error of its own kind
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(_out_of_memory(where, memory, config, error)) from error
        raise


def _out_of_memory(
    where: str, memory: PackMemory, config: TrainConfig, error: BaseException
) -> str:
    ways = [
        f"{setting} saves about {saved / 2**30:.1f} GiB"
        for saved, setting in memory.savings(config)
    ]
    advice = "; ".join(ways) or "lower per_device_train_batch_size or max_frames_num"
    return (
        f"{where}: out of memory; the run's heaviest pack has {memory.places} tokens. {advice} "
        f"({first_line(error)})"
    )


def suspects(rows: Tensor, own: Mapping[int, Batch]) -> list[str]:
    """Return the records of this process to look at when a step's loss is NaN or infinite.

    rows: `(packs, n)` sums of all packs; own: this rank's packs.
    """
    bad = [k for k, row in enumerate(rows.tolist()) if not all(map(_finite, row))]
    # a NaN that shows in the gradient alone marks no pack: then any record may be the one
    return [id_ for k in bad or own if k in own for id_ in own[k].record_ids]


def _finite(value: float) -> bool:
    # false for NaN and both infinities
    return value - value == 0


def _any(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.tensor(False)
    own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return own.any().cpu()


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that no step may change: parameters that are not trained, and buffers."""
    named = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return named | dict(model.named_buffers())


def check_counts(plan: RunPlan, step: int, metrics: Json) -> None:
    """Assert that the counts of a step over all ranks are those by which the plan divides."""
    counted = metrics["supervised_tokens"], metrics["tokens"]
    assert counted == (plan.num_labels[step], plan.per_step(plan.tokens)[step]), (step, metrics)
    if metrics["transitions"]:  # none without a frame head
        assert metrics["transitions"] == plan.num_transitions[step], (step, metrics)
