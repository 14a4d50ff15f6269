"""One hidden state of a vision tower, computed without the layers behind it.

At layer -2 these are one of DINOv2-S's 12 layers, 8 % of its time, and one of so400m's 27 with its
pooling head; nor are the states of all other layers kept in memory until the forward ends.
"""

from typing import Any

from torch import Tensor, nn


def hidden_state(model: Any, layer: int, *inputs: Any, **named: Any) -> Tensor:
    """Return `model(..., output_hidden_states=True).hidden_states[layer]`, to the bit.

    model: a vision tower of transformers. layer: as in Python, among the embeddings and the outputs of
    all layers. The embeddings, and the last state, which some towers normalise, take a whole forward.
    """
    layers = layers_of(model)
    place = layer % (len(layers) + 1)
    if place in (0, len(layers)):
        states = model(*inputs, **named, output_hidden_states=True).hidden_states
        found: Tensor = states[layer]
        return found
    # state k is what layer k - 1 gives: state 0 are the embeddings
    hook = layers[place - 1].register_forward_hook(_end_here)
    try:
        model(*inputs, **named)
    except _LayerReached as reached:
        return reached.state
    finally:
        hook.remove()
    raise AssertionError(f"{type(model).__name__} ran without its layer {place}")


def layers_of(model: Any) -> nn.ModuleList:
    """Return the tower's layers: its first list of as many modules as its config counts."""
    config = model.config
    # Qwen's towers call it depth
    depth = config.depth if hasattr(config, "depth") else config.num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next(found for found in lists if len(found) == depth)


class _LayerReached(Exception):
    """Ends a forward with the output of one of its layers."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


def _end_here(layer: nn.Module, inputs: Any, output: Any) -> None:
    # an exception, as a forward has no other way out; layers of some versions
    # give a tuple, the state first
    raise _LayerReached(output[0] if isinstance(output, tuple) else output)
