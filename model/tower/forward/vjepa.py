"""The vision tower of V-JEPA 2: patches two frames deep, with attention over all frames of a window."""

from typing import Any

from torch import Tensor

from model.tower.forward.hidden import hidden_state
from model.tower_kinds import Layer


def encode(model: Any, pixels: Tensor, layer: Layer) -> Tensor:
    """Return the hidden states of each unit: `(units, patch_rows, patch_cols, width)`.

    pixels: `(frames, 3, height, width)`, whole units of one window: all of them attend to each other.
    """
    config = model.config
    rows, cols = (length // config.patch_size for length in pixels.shape[2:])
    assert isinstance(layer, int), "it has no merger"
    hidden = hidden_state(model, layer, pixel_values_videos=pixels[None], skip_predictor=True)
    return hidden[0].unflatten(0, (len(pixels) // config.tubelet_size, rows, cols))
