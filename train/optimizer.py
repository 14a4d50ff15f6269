"""AdamW over the model's parts, and the learning rate as a function of the step."""

import math
from pathlib import Path
from typing import Any

import torch

from model.vlm import VLM
from train.config import TrainConfig


def parameter_groups(model: VLM, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups: every trained parameter in exactly one, vectors never decayed."""
    head_rate = config.projector_lr or config.learning_rate
    rates = {"llm": config.learning_rate, "lape": config.lape_lr or 10 * config.learning_rate}
    groups = []
    for part, parameters in model.parts().items():
        for decay in (True, False):
            chosen = [p for p in parameters if (p.ndim >= 2 and part != "lape") == decay]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "name": part,
                        "peak": rates.get(part, head_rate),
                        "weight_decay": config.weight_decay if decay else 0.0,
                    }
                )
    return groups


def make_optimizer(model: VLM, config: TrainConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, config.adam_beta2))


def load_optimizer(optimizer: Any, folder: Path) -> None:
    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.optimizer.load_state_dict(saved)


def rate(step: int, total: int, warmup_ratio: float) -> float:
    """Return the learning rate at a step as a share of its peak: linear warm-up, then cosine."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
