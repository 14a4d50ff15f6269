"""DeepStack: features of several layers of a tower are added at the LLM's first layers (Qwen3-VL).

    install(llm_decoder, 3)                     # once
    llm_decoder(..., deepstack=(places, values))

A frame's tokens enter the LLM as its tower's merged tokens; behind the LLM's first layer those of an
earlier layer of the tower are added to them, behind the second those of the next, and so on. Which
layers of the tower these are, a bank's `layer` says: `5,11,17,merged`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.batch import FrameGroup
from shards.errors import UserError

Added = tuple[Tensor, Tensor]
"""int64 `(tokens,)`, flat places; `(layers, tokens, width)`, what is added there behind each layer."""


def added(groups: Sequence[FrameGroup], layers: int) -> Added | None:
    """Return what so many layers add to a batch's frames; None where there is nothing to add.

    The channels of their cells are those of the tower's layers, and then the tokens themselves.
    """
    if not layers or not groups:
        return None
    cells = torch.cat([group.projected.flatten(0, 2) for group in groups])
    places = torch.cat([group.token_index.flatten() for group in groups])
    return places, torch.stack(cells.chunk(layers + 1, dim=-1)[:-1])


def install(decoder: Any, layers: int) -> None:
    """Let a decoder's first layers add what its forward is given as `deepstack`, if it is; once.

    It goes to each layer among its arguments and is kept nowhere: a layer that is computed again for
    the backward pass adds the same.
    """
    if len(decoder.layers) < layers:
        raise UserError(
            f"DeepStack adds the features of {layers} layers of a tower, a layer of the LLM each",
            got=f"an LLM of {len(decoder.layers)} layers",
        )
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
    states = output.flatten(0, 1).index_add(0, places, values[number].to(output.dtype))
    return states.view_as(output)
