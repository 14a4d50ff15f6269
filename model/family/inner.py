"""Names of an LLM's weights inside a vision-language model's checkpoint -> its names alone."""

from collections.abc import Collection, Sequence
from pathlib import Path

from shards.errors import UserError

Prefixes = Sequence[tuple[str, str]]

PREFIXES: Prefixes = (
    ("language_model.", ""),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)
"""Prefix of the LLM's weights in a LLaVA checkpoint of transformers, old or new -> in an LLM alone."""
QWEN_PREFIXES: Prefixes = (
    ("model.language_model.", "model."),
    ("model.", "model."),
    ("lm_head.", "lm_head."),
)
"""Likewise in a Qwen-VL checkpoint: as transformers saves it, and as it is published."""
FREQUENCIES = "inv_freq"
"""A buffer that older versions of transformers saved; it follows from the config."""


def own_name(name: str, prefixes: Prefixes, own: Collection[str], folder: Path) -> str | None:
    """Return a weight's name in the LLM alone; None for a weight of another part of the checkpoint.

    own: the names of the LLM's weights. Raises UserError for a weight of its layers, norms or tables that
    it does not have: without a layer or a bias that it was trained with it is another model.
    """
    names = [to + name[len(prefix) :] for prefix, to in prefixes if name.startswith(prefix)]
    if found := next((new for new in names if new in own), None):
        return found
    parts = {_part(known) for known in own}
    if any(_part(new) in parts for new in names) and not name.endswith(FREQUENCIES):
        raise UserError(
            f"{name} has no place in the LLM that its config.json describes",
            where=folder,
            fix="restore the config.json that it was trained with",
        )
    return None


def _part(name: str) -> str:
    """Return the part that a weight belongs to: `model.layers` of `model.layers.3.mlp.bias`."""
    return ".".join(name.split(".")[:-1][:2])
