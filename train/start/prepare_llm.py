"""Prepares the LLM: attention back-end, trained weights and their dtype, checkpointing, compilation."""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from model.adapter.targets import Lora, add_adapter, check_adapter
from model.family.conformance import admit
from model.family.head import decoder_of, layers_of, plain_llm
from model.vlm import VLM
from shards.errors import UserError, first_line
from train.settings.config import LlmSettings, TrainConfig, checkpoint_every


def choose_attention(
    config: TrainConfig, device: str, longest: int, *, apart: bool = False
) -> tuple[str, str]:
    """Return (implementation, reason); UserError where the one that is asked for cannot work here.

    device: `cuda`, `cpu`, ... longest: tokens of the longest record. apart: whether some records have
    independent turns.
    """
    # flex_attention computes only the blocks that a mask needs, SDPA with a mask the whole square of a
    # row; without one SDPA has its fastest kernels, and rows of one record need none if frames are
    # causal. 4,096 tokens on a CPU: bucketed rows without a mask 3.8 s, a packed row's square 10.0 s.
    # So a CPU takes packed rows sample by sample (`model.cpu.by_sample`), compiled layers apart.
    # flex_attention's backward pass is not implemented on CPUs (pytorch#148752). eager only if asked:
    # it materialises all scores.
    asked, pack_tokens, frame_attention = config.attn, config.pack_tokens, config.frame_attention
    apiece = device == "cpu" and not config.compile
    if asked == "flex_attention" and device != "cuda":
        raise UserError(
            "attn flex_attention needs CUDA (it cannot train on the CPU); use attn: auto or sdpa"
        )
    if apart and asked.startswith("flash"):
        raise UserError(
            f"attn {asked}: takes no mask, so independent questions would see each other",
            fix="use attn: auto, or turns: dialogue",
        )
    if asked != "auto":
        chosen, reason = asked, "as asked"
    elif device == "cuda" and pack_tokens:
        chosen, reason = "flex_attention", "packed rows on CUDA: only attended blocks are computed"
    elif pack_tokens and apiece:
        chosen, reason = (
            "sdpa",
            "packed rows, record by record (flex_attention trains on CUDA only)",
        )
    elif pack_tokens:
        chosen = "sdpa"
        reason = "packed rows, with a dense mask (flex_attention trains on CUDA only)"
    elif frame_attention == "block":
        chosen, reason = "sdpa", "frames that see themselves wholly need a dense mask"
    elif apart:
        chosen, reason = "sdpa", "questions that do not see each other need a dense mask"
    else:
        chosen, reason = "sdpa", "one record a row, causal: no mask at all"
    if (
        chosen != "flex_attention"
        and pack_tokens > 2 * longest
        and not (apiece and chosen == "sdpa")
    ):
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
    """Return (implementation, reason) of an attention back-end that passes `conformance.admit`.

    kind: of the run's device. device: where the real weights are checked, None to leave them in place.
    apart: as in `choose_attention`. Raises UserError where no back-end is right for the run's rows.
    """
    attention, reason = choose_attention(config, kind, longest, apart=apart)
    if device is not None:
        model.to(device)
    auto, packed = config.attn == "auto", bool(config.pack_tokens)
    return admit(model, attention, reason, auto=auto, packed=packed, apart=apart)


def llm_dtype(settings: LlmSettings) -> torch.dtype:
    """Return the dtype of the LLM's weights: fp32 if they are trained, bfloat16 if frozen under bf16."""
    # AdamW at 1e-5 moved bfloat16 weights of 0.05 by nothing in 50 steps (fp32: 5e-4): each update is
    # below half a spacing of bfloat16, and its moments would be bfloat16 too
    frozen = settings.tune_llm != "full"
    return torch.bfloat16 if frozen and settings.bf16 is True else torch.float32


def prepare_llm(model: VLM, settings: LlmSettings, attention: str, device: torch.device) -> None:
    """Freeze the LLM, add a LoRA adapter or train it all; set attention, checkpointing, compilation.

    Raises UserError where an adapter does not fit, or layers cannot be compiled here.
    """
    model.llm.set_attn_implementation(attention)
    lora = Lora(settings.lora_r, settings.lora_alpha, settings.lora_experts)
    if settings.tune_llm == "frozen":
        model.llm.requires_grad_(False)
    elif settings.tune_llm == "full":
        train_llm(plain_llm(model.llm))
    elif hasattr(model.llm, "peft_config"):
        check_adapter(model.llm, decoder_of(model.llm), lora)
    else:
        model.llm = add_adapter(model.llm, decoder_of(model.llm), lora)
    every = checkpoint_every(settings.gradient_checkpointing)
    assert every is not None
    if every:
        checkpoint_activations(model.llm, every)
    if settings.compile:
        compile_layers(model.llm, device)
    model.train()
    check_trainable(model, settings.tune_llm != "frozen")


def train_llm(llm: Any) -> None:
    """Make an LLM's weights trainable, also one into which an adapter was merged, which is frozen."""
    llm.requires_grad_(True)
    decoder = decoder_of(llm)
    inner = {id(p) for p in decoder.parameters()}
    # what stands beside the decoder in its model is a tower, as in Gemma 3: no token reaches it
    for p in getattr(llm, llm.base_model_prefix or "", decoder).parameters():
        if id(p) not in inner:
            p.requires_grad_(False)


def check_trainable(model: VLM, llm: bool) -> None:
    """Assert that each part of the model has trainable weights, the LLM too if `llm`."""
    asked = {name for name, part in model.named_children() if any(True for _ in part.parameters())}
    unused = {"visual"} if model.config.frame_marks == "none" else set()
    still = asked - unused - set(() if llm else ("llm",)) - model.parts().keys()
    assert not still, f"asked for and not trainable: {', '.join(sorted(still))}"


def checkpoint_activations(llm: Any, every: int) -> None:
    """Let every N-th layer store its input only, and recompute the rest in the backward pass.

    UserError where the family cannot do so.
    """
    base = llm.get_base_model() if hasattr(llm, "peft_config") else llm
    # the old name is deprecated, the new one is missing before transformers 5.20
    new_name = getattr(base, "activation_checkpointing_enable", None)
    enable = new_name or base.gradient_checkpointing_enable
    # a reentrant checkpoint passes no gradient to the projector before a frozen LLM
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"gradient_checkpointing: {first_line(error)}", fix="set gradient_checkpointing: none"
        ) from None
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):  # as `every_n_layers` of newer transformers does
        layer.gradient_checkpointing = number % every == 0


def compile_layers(llm: Any, device: torch.device) -> None:
    """Compile each decoder layer, not the whole: nearly the same speed, and one compilation for all.

    Raises UserError with the compiler's reason where nothing can be compiled.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that is too new
        raise UserError(
            f"compile: torch.compile does not work here: {first_line(error)}; set compile: false"
        ) from None
    for layer in layers_of(decoder_of(llm)):
        layer.compile()
