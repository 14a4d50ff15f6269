"""Which matrices of an LLM a LoRA adapter is added to: all that its decoder multiplies tokens with.

These are the linear layers and, where a family keeps its experts in one stack, each of the stacks;
`lora_experts: false` leaves experts out. PEFT's own `all-linear` depends on the family: it passes over
most stacks (gpt-oss, Llama 4, Granite), and where it takes them (Qwen3 MoE, DeepSeek V3) it drops the
dense layers and shared experts of the same names.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shards.errors import UserError, first_line

LEFT = {"gate", "router", "router_gate", "dt_proj"}
"""Names of what stays as it is: a router chooses experts, and its class decides what it returns; the
weight of Mamba's `dt_proj` is read past its module, where no adapter would have any effect."""
RENAMED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names that PEFT takes for experts of older checkpoints in an LLM with experts: a module of such a name
can be adapted by its weight alone."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Lora:
    """A run's settings of its adapter."""

    lora_r: int
    lora_alpha: int
    lora_experts: bool = True
    """Whether the routed experts of an LLM have one, too; shared ones, which all tokens pass, do."""


def add_adapter(llm: Any, decoder: Any, lora: Lora) -> Any:
    """Return a PEFT model around a causal LM; UserError where some matrix can have no adapter.

    decoder: that of the LLM, see `model.family.head.decoder_of`.
    """
    # peft is an extra: only those who train adapters need it
    from peft import LoraConfig, get_peft_model

    linears, stacks = linear_layers(llm, decoder), expert_stacks(llm, decoder)
    # also where the stacks have no adapter: PEFT goes by the family
    renamed = RENAMED if stacks else ()
    if not lora.lora_experts:
        linears, stacks = [name for name in linears if not _is_of_expert(name)], []
    by_weight = [n for n in linears if n.rpartition(".")[2] in renamed]
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        target_modules=[name for name in linears if name not in by_weight],
        target_parameters=[*stacks, *(f"{name}.weight" for name in by_weight)] or None,
    )
    wanted = {*stacks, *(f"{name}.weight" for name in linears)}
    try:
        adapted = get_peft_model(llm, config)  # its matrices are fp32, whatever the LLM's are
    except ValueError as error:  # Mamba's layers, whose fast path passes over an adapter
        raise _refused(llm, first_line(error).partition(". ")[0]) from None
    if wrong := wanted ^ adapted_weights(adapted):
        raise _refused(llm, f"peft leaves out or adds {', '.join(sorted(wrong)[:3])}")
    return in_order(adapted)


def in_order(adapted: Any) -> Any:
    """Return a PEFT model whose config is written as the same bytes by every process: without sets."""
    made = adapted.peft_config["default"]
    for name in ("target_modules", "target_parameters"):
        if isinstance(value := getattr(made, name, None), set | list):
            setattr(made, name, sorted(value))
    return adapted


def linear_layers(llm: Any, decoder: Any) -> list[str]:
    """Return the names of the decoder's linear layers, in order; routers are none of them."""
    inner, head = {id(m) for m in decoder.modules()}, llm.get_output_embeddings()
    return [
        name
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and id(module) in inner
        and module is not head
        and LEFT.isdisjoint(name.split("."))
    ]


def expert_stacks(llm: Any, decoder: Any) -> list[str]:
    """Return the names of the decoder's parameters that hold a matrix for each expert, in order."""
    inner = {id(m) for m in decoder.modules()}
    return [
        f"{name}.{own}"
        for name, module in llm.named_modules()
        if id(module) in inner and not isinstance(module, CONVOLUTIONS)
        for own, weight in module.named_parameters(recurse=False)
        # not a vector for each channel, such as RWKV's mixtures
        if weight.ndim == 3 and min(weight.shape[1:]) > 1 and LEFT.isdisjoint(name.split("."))
    ]


def expert_weights(llm: Any, decoder: Any) -> set[str]:
    """Return the names, without PEFT's own parts, of the weights of a PEFT model's routed experts."""
    base = llm.get_base_model()
    linears = [f"{n}.weight" for n in linear_layers(base, decoder) if _is_of_expert(n)]
    names = [*expert_stacks(base, decoder), *linears]
    return {name.replace(".base_layer", "") for name in names if "lora_" not in name}


def _is_of_expert(name: str) -> bool:
    return "experts" in name.split(".")  # not `shared_experts`


def adapted_weights(llm: Any) -> set[str]:
    """Return the names, without PEFT's own parts, of a PEFT model's weights that have an adapter."""
    found = set()
    for name, module in llm.get_base_model().named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            # a layer's own weight, or the one of several parameters that this part of a nest adapts
            own = getattr(module, "parameter_name", "weight")
            found.add(f"{name.replace('.base_layer', '')}.{own}")
    return found


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapted LLM's weights without the adapter, by the names that they have without it."""
    # PEFT wraps each adapted layer: under the names without it, transformers alone can load them
    return {
        name.replace(".base_layer", ""): value
        for name, value in state.items()
        if "lora_" not in name
    }


def saved_name(name: str) -> str:
    """Return the name in an adapter's file of one of its tensors in a PEFT model."""
    return re.sub(r"(\.lora_[AB])\.default\.", r"\1.", name)


def check_adapter(llm: Any, decoder: Any, lora: Lora) -> None:
    """Raise UserError where an LLM's LoRA adapter is another one than the run's settings make."""
    made, wanted = llm.peft_config["default"], asdict(lora)
    found = {"lora_r": made.r, "lora_alpha": made.lora_alpha}
    if experts := expert_weights(llm, decoder):
        found["lora_experts"] = not experts.isdisjoint(adapted_weights(llm))
    if any(wanted[name] != value for name, value in found.items()):
        raise UserError(
            f"the adapter that the run starts from has {_shown(found, ' ')}",
            expected=_shown({name: wanted[name] for name in found}, " "),
            fix=f"set {_shown(found, ': ')}, or merge it first: "
            "python -m train.export hf RUN OUT --merge_lora",
        )


def _shown(values: Mapping[str, int], between: str) -> str:
    return ", ".join(f"{name}{between}{str(value).lower()}" for name, value in values.items())


def _refused(llm: Any, why: str) -> UserError:
    return UserError(
        f"tune_llm lora: {type(llm).__name__} cannot have an adapter: {why}",
        fix="set tune_llm: full or frozen",
    )
