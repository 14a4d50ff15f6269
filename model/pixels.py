"""Frames -> the tower's pixels, with the arithmetic of the tower's own image processor.

Resizing and cropping are done by Pillow on uint8, exactly as transformers' Pillow processors do;
it needs no torch, so a decoding process can do it before frames travel.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Pixels:
    """The resolved values of an image processor: what it does to a frame, in this order."""

    height: int
    """Of the resized frame; with `shortest_edge`, the target of the shorter side alone."""
    width: int
    shortest_edge: bool
    """Whether resizing keeps the aspect ratio, `height` (= `width`) being the shorter side."""
    resample: int
    """Pillow's filter number: 2 bilinear, 3 bicubic."""
    crop: tuple[int, int] | None
    """(height, width) of the centre crop after resizing."""
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, processor: Any) -> "Pixels":
        """Read the values of a transformers image processor; ValueError for one we cannot follow."""
        name = type(processor).__name__
        size = dict(processor.size or {})
        edge = size.get("shortest_edge")
        if not processor.do_resize or not (edge or {"height", "width"} <= set(size)):
            raise ValueError(
                f"{name}: resizes to {size}; only a fixed height and width, or shortest_edge with a "
                "centre crop, gives every frame the same patch grid"
            )
        crop = None
        if getattr(processor, "do_center_crop", False):
            crop = (int(processor.crop_size["height"]), int(processor.crop_size["width"]))
        if edge and crop is None:
            raise ValueError(f"{name}: shortest_edge without a centre crop makes grids of any size")
        return cls(
            height=int(edge or size["height"]),
            width=int(edge or size["width"]),
            shortest_edge=bool(edge),
            resample=int(processor.resample),
            crop=crop,
            scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
            mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
        )

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return (
            values
            | {name: list(values[name]) for name in ("mean", "std")}
            | {"crop": list(self.crop) if self.crop else None}
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Pixels":
        """Rebuild what `to_json` wrote."""
        lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**(data | lists))

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of what the tower gets."""
        return self.crop or (self.height, self.width)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that a frame is resized to, before the crop."""
        if not self.shortest_edge:
            return self.height, self.width
        if height <= width:
            return self.height, int(self.height * width / height)
        return int(self.height * height / width), self.height

    def covered(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return the part of a frame that the tower sees: y0, x0, y1, x1 as fractions of it."""
        if self.crop is None:
            return 0.0, 0.0, 1.0, 1.0
        rows, cols = self.resized(height, width)
        top, left = (rows - self.crop[0]) // 2, (cols - self.crop[1]) // 2
        return top / rows, left / cols, (top + self.crop[0]) / rows, (left + self.crop[1]) / cols

    def check(self, height: int, width: int) -> None:
        """Raise ValueError for a frame size that cannot be made to fit."""
        rows, cols = self.resized(height, width)
        if min(rows, cols) < 1 or rows < self.output_size[0] or cols < self.output_size[1]:
            raise ValueError(f"a crop of {self.crop} does not fit a frame resized to {rows}x{cols}")

    def resize(self, frames: np.ndarray) -> np.ndarray:
        """Resize and crop: uint8 `(frames, height, width, 3)` -> uint8 at `output_size`."""
        self.check(frames.shape[1], frames.shape[2])
        rows, cols = self.resized(frames.shape[1], frames.shape[2])
        out = np.empty((len(frames), *self.output_size, 3), np.uint8)
        top, left = (rows - out.shape[1]) // 2, (cols - out.shape[2]) // 2
        for place, frame in enumerate(frames):
            image = Image.fromarray(frame).resize((cols, rows), Image.Resampling(self.resample))
            out[place] = np.asarray(image)[top : top + out.shape[1], left : left + out.shape[2]]
        return out
