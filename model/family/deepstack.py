"""DeepStack: features of several layers of a tower are added at the LLM's first layers (Qwen3-VL).

    install(llm_decoder, 3)                     # once
    llm_decoder(..., deepstack=(places, values))

A frame's tokens enter the LLM as its tower's merged tokens; after the LLM's first layer those of an
earlier layer of the tower are added to them, after the second those of the next, and so on. A bank's
`layer` names these layers of the tower: `5,11,17,merged`. The idea is that of arXiv 2406.04334, the
formula transformers' (`Qwen3VLTextModel`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.batch import FrameGroup
from shards.errors import UserError

Added = tuple[Tensor, Tensor]
"""int64 `(tokens,)`, flat places; `(layers, tokens, width)`, what is added there after each layer."""


def added(groups: Sequence[FrameGroup], layers: int) -> Added | None:
    """Return what the LLM's first `layers` add to a batch's frames; None without layers or frames.

    A cell's channels are those of the tower's layers in turn, then those of the token itself.
    """
    if not layers or not groups:
        return None
    cells = torch.cat([group.projected.flatten(0, 2) for group in groups])
    places = torch.cat([group.token_index.flatten() for group in groups])
    return places, torch.stack(cells.chunk(layers + 1, dim=-1)[:-1])


def install(decoder: Any, layers: int) -> None:
    """Hook a decoder's first layers to add the `deepstack` argument of its forward, if there is one.

    The argument travels among each layer's keyword arguments and is stored nowhere, so that a layer that
    gradient checkpointing recomputes adds the same. Safe to call twice. Raises UserError for an LLM of
    fewer layers.
    """
    if len(decoder.layers) < layers:
        raise UserError(
            f"DeepStack adds the features of {layers} layers of a tower, a layer of the LLM each",
            got=f"an LLM of {len(decoder.layers)} layers",
        )
    # a second hook would add everything twice
    if getattr(decoder, "deepstack", 0):
        assert decoder.deepstack == layers
        return
    decoder.deepstack = layers
    for number in range(layers):
        decoder.layers[number].register_forward_hook(partial(_add, number), with_kwargs=True)


def _add(number: int, module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    added: Added | None = kwargs.get("deepstack")
    if added is None:
        return output
    places, values = added
    # out of place: the layer's own output may be kept for the backward pass
    states = output.flatten(0, 1).index_add(0, places, values[number].to(output.dtype))
    return states.view_as(output)
