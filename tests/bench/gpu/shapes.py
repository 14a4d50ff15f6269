"""Shapes of the models that are timed here, and tiny ones that any device computes in seconds."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Shape = Mapping[str, int]
LLMS: Mapping[str, Shape] = {
    "Qwen2.5-0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "Qwen2.5-1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
TINY_LLM: Shape = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SO400M: Shape = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "image_size": 384,
    "patch_size": 14,
}
"""SigLIP-so400m/14-384."""
TINY_TOWER: Shape = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 64,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Size:
    """What is timed, on which device."""

    device: torch.device
    vocab: int
    pack: int
    records: int
    scale: int
    """Divides the records' frames and texts."""
    rounds: int

    @classmethod
    def of(cls, small: bool) -> "Size":
        if small:
            return cls(torch.device("cpu"), 512, 1024, 6, 8, 1)
        return cls(torch.device("cuda"), 151936, 8192, 96, 1, 3)

    @property
    def bf16(self) -> bool:
        return self.device.type == "cuda"


def llm_shape(name: str, small: bool) -> Shape:
    return TINY_LLM if small else LLMS[name]


def tower_shape(small: bool) -> Shape:
    return TINY_TOWER if small else SO400M
