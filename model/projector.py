"""Banked features -> LLM width. The names are LLaVA's `mm_projector_type`."""

from torch import nn

PROJECTORS = ("mlp2x_gelu", "linear")


def build_projector(kind: str, tower_width: int, llm_width: int) -> nn.Module:
    """Return a module that maps `(..., tower_width)` to `(..., llm_width)`."""
    if kind == "linear":
        return nn.Linear(tower_width, llm_width)
    assert kind == "mlp2x_gelu", kind
    return nn.Sequential(
        nn.Linear(tower_width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
    )
