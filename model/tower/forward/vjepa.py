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
    # its attention counts rows and columns of a square of this size: patches of another would be turned
    # by the places of others, without an error
    if set(pixels.shape[2:]) != {config.crop_size}:
        raise ValueError(f"its positions are those of {config.crop_size}x{config.crop_size} pixels")
    rows, cols = (length // config.patch_size for length in pixels.shape[2:])
    assert isinstance(layer, int), "it has no merger"
    hidden = hidden_state(model, layer, pixel_values_videos=pixels[None], skip_predictor=True)
    return hidden[0].unflatten(0, (len(pixels) // config.tubelet_size, rows, cols))
