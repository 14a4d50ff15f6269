"""What a run checks about itself: that it learns where it should, and that its largest pack fits.

A group that lost its gradient, or a frozen weight that moved, would train for days without a word;
a pack that does not fit would be met hours in.
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
from train.cost import LlmShape, memory_bytes
from train.settings.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.loop.gradients import LossOf, Reduction


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digests(tensors: Iterable[Tensor]) -> Tensor:
    """Return an int64 `(n,)` of the tensors' bits added up: equal where no bit changed."""
    sums = []
    for tensor in tensors:
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a rank's shard
        bits = own.detach().contiguous().view(-1).view(BITS[own.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


class UpdateCheck:
    """Watches the first steps: each trained part must move, nothing else may."""

    def __init__(self, model: VLM, accelerator: "Accelerator") -> None:
        self.accelerator = accelerator
        self.model = model
        self.waiting = model.parts()
        """The parts that have not been seen to move."""
        self.before = {name: digests(part) for name, part in self.waiting.items()}
        self.frozen = _frozen(model)
        self.frozen_before = digests(self.frozen.values())

    def check(self, step: int, *, frames: bool, warming_up: bool) -> None:
        """Raise UserError where a part that this step should have moved has not, or a frozen one has.

        frames: whether the step's records have transitions, without which only the LLM is sure of a
        gradient; warming_up: whether the LLM's was dropped. Every rank calls this after the step;
        once all parts have moved it costs nothing.
        """
        due = {name for name in self.waiting if (not warming_up if name == "llm" else frames)}
        if not due:
            return
        frozen = digests(self.frozen.values()) != self.frozen_before
        counts = []
        for name, part in self.waiting.items():
            # weight decay moves what has no gradient too
            pulled = torch.stack([_any(p.grad) for p in part]).to(self.accelerator.device)
            changed = (digests(part) != self.before[name]).to(self.accelerator.device)
            counts.append((changed & pulled).sum().reshape(1))
        moved = self.accelerator.reduce(torch.cat(counts), reduction="sum").tolist()
        still = [name for name, count in zip(self.waiting, moved, strict=True) if not count]
        lost = [n for n, one in zip(self.frozen, frozen.tolist(), strict=True) if one]
        if lost:
            raise UserError(
                f"step {step + 1}: weights that are not trained have changed: {some(lost, 5)}; "
                "this is a defect of the model's code, the run would not be what it says"
            )
        stuck = [name for name in still if name in due]
        if stuck:
            raise UserError(
                f"step {step + 1}: no weight of {', '.join(stuck)} has moved, though trained: it gets "
                "no gradient, or its rate is lost in rounding; raise its rate, or freeze it"
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
    """Run the heaviest pack forward and backward and forget it: it fits now, or never.

    accumulated: whether gradients of other packs lie in memory meanwhile. Weights, optimizer state
    and random numbers are afterwards as they were.
    """
    device = model.visual.frame_end.device
    # past DDP's wrapper, whose buckets would take these gradients for a step's
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if accumulated:
            reduction.hold_gradients()
        loss_of(model, 0, to_device(batch, device)).backward()
    reduction.drop_gradients()


@dataclass(frozen=True)
class PackMemory:
    """What is known of the memory that the plan's heaviest pack takes."""

    places: int
    """Of its rows, padding included."""
    shape: LlmShape | None
    tower_width: int

    @classmethod
    def of(cls, plan: RunPlan, model: VLM) -> "PackMemory":
        return cls(
            int(plan.pack_slots.max()), LlmShape.of(model.llm.config.to_dict()), model.tower_width
        )

    def ways_out(self, config: TrainConfig) -> list[tuple[float, str]]:
        """Return (bytes that it saves, what to change), the greatest saving first."""
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
        for saved, setting in memory.ways_out(config)
    ]
    advice = "; ".join(ways) or "lower per_device_train_batch_size or max_frames_num"
    return (
        f"{where}: out of memory; the run's heaviest pack has {memory.places} tokens. {advice} "
        f"({first_line(error)})"
    )


def name_pack(rows: Tensor, own: Mapping[int, Batch]) -> str:
    """Return which records to look at when a step's loss is no number.

    rows: `(packs, n)` sums of all packs; own: this rank's packs.
    """
    bad = [k for k, row in enumerate(rows.tolist()) if not all(map(_finite, row))]
    names = [id_ for k in bad or own for id_ in (own[k].record_ids if k in own else ())]
    if names:
        return f"records {', '.join(names)}"
    return f"{'packs' if len(bad) > 1 else 'pack'} {', '.join(map(str, bad))}, of another process"


def _finite(value: float) -> bool:
    return value - value == 0


def _any(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.tensor(False)
    own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return own.any().cpu()


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """Return what no step may change: parameters that are not trained, and buffers."""
    named = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return named | dict(model.named_buffers())


def check_counts(plan: RunPlan, step: int, metrics: Json) -> None:
    """Assert that what all ranks counted in a step is what the plan divided by."""
    counted = metrics["supervised_tokens"], metrics["tokens"]
    assert counted == (plan.num_labels[step], plan.per_step(plan.tokens)[step]), (step, metrics)
    if metrics["transitions"]:  # none without a frame head
        assert metrics["transitions"] == plan.num_transitions[step], (step, metrics)
