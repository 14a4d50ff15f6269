"""The reach of each kind of layer of an LLM (sliding windows, chunks), from its config."""

import inspect
from typing import Any

from model.mask import Reach

KINDS = {"full_attention": None, "sliding_attention": "window", "chunked_attention": "chunk"}
"""Kind of layer whose mask can be made -> the field of `Reach` that limits it; None: no limit."""


def text_config(llm: Any) -> Any:
    """Return the config of an LLM's own layers, which may be nested in that of a larger model."""
    inner = getattr(llm.config, "get_text_config", None)
    return inner(decoder=True) if inner is not None else llm.config


def reaches(config: Any) -> dict[str, Reach] | None:
    """Return kind of layer -> its reach; None where a kind of layer takes no masks.

    Without `layer_types` all layers are of one kind, named "". The rule is transformers' own
    (`create_masks_for_generate`).
    """
    window = getattr(config, "sliding_window", None)
    # Qwen2's configs state a window that this field then turns off
    if not getattr(config, "use_sliding_window", True):
        window = None
    chunk = getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"": Reach(window=window, chunk=chunk if window is None else None)}
    # a kind of layer that is not known here may do anything with a mask
    if not set(kinds) <= set(KINDS):
        return None
    own = {"window": getattr(config, "sliding_window", None), "chunk": chunk}
    found = {}
    for kind in dict.fromkeys(kinds):
        limit = KINDS[kind]
        found[kind] = Reach(**{limit: own[limit]}) if limit else Reach()
    return found


def takes_positions(decoder: Any) -> bool:
    """Return whether a decoder's forward takes the positions of its tokens."""
    taken = inspect.signature(decoder.forward).parameters
    return "position_ids" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())
