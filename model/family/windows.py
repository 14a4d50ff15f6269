"""How far back each kind of layer of an LLM sees, read from its config."""

import inspect
from typing import Any

from model.mask import Reach

KINDS = {"full_attention": None, "sliding_attention": "window", "chunked_attention": "chunk"}
"""Kinds of layers whose mask can be made -> what limits them, as a field of `Reach`."""


def text_config(llm: Any) -> Any:
    """Return the config of an LLM's own layers, which may lie inside that of a larger model."""
    inner = getattr(llm.config, "get_text_config", None)
    return inner(decoder=True) if inner is not None else llm.config


def reaches(config: Any) -> dict[str, Reach] | None:
    """Return the reach of each kind of layer; None where layers are of a kind that no mask reaches.

    Without `layer_types` all layers are of one kind, which has no name. This is how transformers
    itself makes the masks of its own generation (`create_masks_for_generate`).
    """
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    chunk = getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"": Reach(window=window, chunk=chunk if window is None else None)}
    if not set(kinds) <= set(KINDS):
        return None
    own = {"window": getattr(config, "sliding_window", None), "chunk": chunk}
    found = {}
    for kind in dict.fromkeys(kinds):
        limit = KINDS[kind]
        found[kind] = Reach(**{limit: own[limit]}) if limit else Reach()
    return found


def takes_positions(decoder: Any) -> bool:
    """Tell whether a decoder is told the positions of its tokens."""
    taken = inspect.signature(decoder.forward).parameters
    return "position_ids" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())
