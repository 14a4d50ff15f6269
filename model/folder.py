"""A model folder's files: the LLM in Hugging Face form, the other parts as safetensors.

What is missing, or has another shape than the config says, is refused by name.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load_llm(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a causal LLM by hub name or folder, with its LoRA adapter where one lies inside.

    A weight that is not there is refused: transformers would draw it at random and warn.
    """
    logging.disable_progress_bar()  # its bar for every file drowns the run's own lines
    llm, found = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(f"{path}: weights are missing: {', '.join(sorted(found['missing_keys']))}")
    if (Path(path) / "lora").exists():
        from peft import PeftModel

        llm = PeftModel.from_pretrained(llm, Path(path) / "lora", is_trainable=True)
    return llm


def save_llm(llm: Any, path: Path) -> None:
    """Save an LLM so that transformers alone loads it; an adapter lies beside it in `lora/`."""
    if not hasattr(llm, "peft_config"):
        llm.save_pretrained(path)
        return
    base = llm.get_base_model()
    own = {
        name.replace(".base_layer", ""): value
        for name, value in base.state_dict().items()
        if "lora_" not in name
    }
    base.save_pretrained(path, state_dict=own)
    llm.save_pretrained(path / "lora")


def save_weights(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    weights = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    save_file(weights, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a part's weights; ValueError lists every tensor that is missing, extra or of another shape."""
    _require(path)
    saved, own = load_file(path), module.state_dict()
    wrong = [
        f"{name} is {tuple(saved[name].shape)}, the config asks for {tuple(own[name].shape)}"
        if name in saved and name in own
        else f"{name} is {'missing' if name in own else 'not in this model'}"
        for name in sorted(set(saved) | set(own))
        if name not in saved or name not in own or saved[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    module.load_state_dict(saved)


def read_json(path: Path) -> Any:
    _require(path)
    return json.loads(path.read_text())


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def _require(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: missing; the model folder was copied in part, copy it again")
