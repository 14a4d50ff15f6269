"""The LLM made ready: how it attends, what of it is trained, what it keeps, what is compiled."""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from model.family.conformance import admit
from model.llm import check_adapter
from model.vlm import VLM
from shards.errors import UserError, first_line
from train.settings.config import LlmSettings, TrainConfig, checkpoint_every


def choose_attention(
    config: TrainConfig, device: str, longest: int, *, apart: bool = False
) -> tuple[str, str]:
    """Return (implementation, reason); raises UserError where the asked one cannot work here.

    device: `cuda`, `cpu`, ... longest: tokens of the longest record. apart: whether turns of some records
    do not see each other. A mask of intervals costs
    flex_attention only the blocks that are attended, SDPA the whole square of a row; without a mask
    SDPA has its fastest kernels.
    """
    asked, pack_tokens, frame_attention = config.attn, config.pack_tokens, config.frame_attention
    if asked == "flex_attention" and device != "cuda":
        raise UserError(
            "attn flex_attention needs CUDA (it cannot train on the CPU); use attn: auto or sdpa"
        )
    if apart and asked.startswith("flash"):
        raise UserError(
            f"attn {asked}: it would let questions see each other that are independent",
            fix="use attn: auto, or turns: dialogue",
        )
    if asked != "auto":
        chosen, reason = asked, "as asked"
    elif device == "cuda" and pack_tokens:
        chosen, reason = "flex_attention", "packed rows on CUDA: only attended blocks are computed"
    elif pack_tokens:
        chosen = "sdpa"
        reason = "packed rows, with a dense mask (flex_attention trains on CUDA only)"
    elif frame_attention == "block":
        chosen, reason = "sdpa", "frames that see themselves wholly need a dense mask"
    elif apart:
        chosen, reason = "sdpa", "questions that do not see each other need a dense mask"
    else:
        chosen, reason = "sdpa", "one record a row, causal: no mask at all"
    if chosen != "flex_attention" and pack_tokens > 2 * longest:
        reason += (
            f"; a dense mask costs the square of a row, and the longest record has {longest} tokens: "
            f"pack_tokens {2 * longest} or less would be faster than {pack_tokens}"
        )
    return chosen, reason


def admit_llm(
    model: VLM,
    config: TrainConfig,
    kind: str,
    longest: int,
    device: torch.device | None,
    *,
    apart: bool = False,
) -> tuple[str, str]:
    """Return (implementation, reason) of attention under which the LLM is what transformers computes.

    kind: of the device that the run is on. device: where the real weights are tried, None to leave
    them. apart: as of `choose_attention`. UserError, one line, where the run's rows are not right under
    any.
    """
    attention, reason = choose_attention(config, kind, longest, apart=apart)
    if device is not None:
        model.to(device)
    auto, packed = config.attn == "auto", bool(config.pack_tokens)
    return admit(model, attention, reason, auto=auto, packed=packed, apart=apart)


def llm_dtype(settings: LlmSettings) -> torch.dtype:
    """Return the LLM's own type: trained weights are fp32, frozen ones as small as asked."""
    frozen = settings.tune_llm != "full"
    return torch.bfloat16 if frozen and settings.bf16 is True else torch.float32


def prepare_llm(model: VLM, settings: LlmSettings, attention: str, device: torch.device) -> None:
    """Freeze, adapt or free the LLM; set how it attends, what it keeps in memory, what is compiled.

    UserError where layers cannot be compiled here.
    """
    model.llm.set_attn_implementation(attention)
    if settings.tune_llm == "frozen":
        model.llm.requires_grad_(False)
    elif settings.tune_llm == "full":
        model.llm.requires_grad_(True)  # what an adapter was merged into came frozen
    elif hasattr(model.llm, "peft_config"):
        check_adapter(model.llm, settings.lora_r, settings.lora_alpha)
    else:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules="all-linear"
        )
        model.llm = get_peft_model(model.llm, lora)  # its matrices are fp32 whatever the base is
    every = checkpoint_every(settings.gradient_checkpointing)
    assert every is not None
    if every:
        checkpoint_activations(model.llm, every)
    if settings.compile:
        compile_layers(model.llm, device)
    model.train()
    check_trainable(model, settings.tune_llm != "frozen")


def check_trainable(model: VLM, llm: bool) -> None:
    """Assert that each part that is asked for has weights that a step may move; llm: if it is too."""
    asked = {name for name, part in model.named_children() if any(True for _ in part.parameters())}
    unused = {"visual"} if model.config.frame_marks == "none" else set()
    still = asked - unused - set(() if llm else ("llm",)) - model.parts().keys()
    assert not still, f"asked for and not trainable: {', '.join(sorted(still))}"


def checkpoint_activations(llm: Any, every: int) -> None:
    """Let every N-th layer keep its input alone, and compute the rest again in the backward pass."""
    base = llm.get_base_model() if hasattr(llm, "peft_config") else llm
    # the old name is deprecated, the new one is not there before transformers 5.20
    new_name = getattr(base, "activation_checkpointing_enable", None)
    enable = new_name or base.gradient_checkpointing_enable
    # a reentrant one would cut off the gradient of what lies before a frozen LLM
    enable({"use_reentrant": False})
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):  # what `every_n_layers` does, which came late
        layer.gradient_checkpointing = number % every == 0


def compile_layers(llm: Any, device: torch.device) -> None:
    """Compile each decoder layer, not the whole: nearly the same speed, compiled once for all.

    UserError with the compiler's reason where nothing can be compiled.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that is too new
        raise UserError(
            f"compile: torch.compile does not work here: {first_line(error)}; set compile: false"
        ) from None
    for layer in llm.get_decoder().layers:
        layer.compile()
