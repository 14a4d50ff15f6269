"""What of the LLM is trained, which activations it keeps, and whether its layers are compiled."""

from typing import Any

import torch

from model.llm import check_adapter
from model.vlm import VLM
from shards.errors import UserError
from train.settings.config import TrainConfig, checkpoint_every


def llm_dtype(config: TrainConfig) -> torch.dtype:
    """Return the LLM's own type: trained weights are fp32, frozen ones as small as asked."""
    frozen = config.tune_llm != "full"
    return torch.bfloat16 if frozen and config.bf16 else torch.float32


def prepare_llm(model: VLM, config: TrainConfig, attention: str, device: torch.device) -> None:
    """Freeze, adapt or free the LLM; set how it attends, what it keeps in memory, what is compiled.

    UserError where layers cannot be compiled here.
    """
    model.llm.set_attn_implementation(attention)
    if config.tune_llm == "frozen":
        model.llm.requires_grad_(False)
    elif config.tune_llm == "full":
        model.llm.requires_grad_(True)  # what an adapter was merged into came frozen
    elif hasattr(model.llm, "peft_config"):
        check_adapter(model.llm, config.lora_r, config.lora_alpha)
    else:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear"
        )
        model.llm = get_peft_model(model.llm, lora)  # its matrices are fp32 whatever the base is
    every = checkpoint_every(config.gradient_checkpointing)
    assert every is not None
    if every:
        checkpoint_activations(model.llm, every)
    if config.compile:
        compile_layers(model.llm, device)
    model.train()
    check_trainable(model, config.tune_llm != "frozen")


def check_trainable(model: VLM, llm: bool) -> None:
    """Assert that each part that is asked for has weights that a step may move; llm: if it is too."""
    asked = {name for name, part in model.named_children() if any(True for _ in part.parameters())}
    still = asked - set(() if llm else ("llm",)) - model.parts().keys()
    assert not still, f"asked for and not trainable: {', '.join(sorted(still))}"


def checkpoint_activations(llm: Any, every: int) -> None:
    """Let every N-th layer keep its input alone, and compute the rest again in the backward pass."""
    base = llm.get_base_model() if hasattr(llm, "peft_config") else llm
    # the old name is deprecated, the new one is not there before transformers 5.20
    new_name = getattr(base, "activation_checkpointing_enable", None)
    enable = new_name or base.gradient_checkpointing_enable
    # a reentrant one would cut off the gradient of what lies before a frozen LLM
    enable({"use_reentrant": False}, every_n_layers=every)


def compile_layers(llm: Any, device: torch.device) -> None:
    """Compile each decoder layer, not the whole: nearly the same speed, compiled once for all.

    UserError with the compiler's reason where nothing can be compiled.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that is too new
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"compile: torch.compile does not work here: {reason}; set compile: false"
        ) from None
    for layer in llm.get_decoder().layers:
        layer.compile()
