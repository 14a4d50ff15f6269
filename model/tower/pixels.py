"""Frames -> the tower's pixels, by the arithmetic of the tower's own image processor.

Resizing and cropping are done by Pillow on uint8, exactly as transformers' Pillow processors do;
it needs no torch, so a decoding process can do it before frames travel.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import UserError

FITS = ("crop", "pad", "stretch")
"""How a frame is brought to a tower's fixed size: its longer side is cut at both ends, it is shrunk until
it fits and surrounded by the mean colour, or its sides are scaled by different factors."""
MOST_ELONGATED = 200
"""Largest longer side / shorter side that Qwen's image processors accept."""
BISECTED = 1e-5
"""Width of the interval at which NaFlex's bisection for its scale ends, as in transformers."""


@dataclass(frozen=True)
class OwnSize:
    """A size that follows the frame's own: `smart_resize` of Qwen2-VL and Qwen2.5-VL.

    Both sides become multiples of `multiple` near their own length; a frame of more than `most`
    pixels is shrunk and one of less than `least` is enlarged, its sides in proportion.
    """

    multiple: int
    """Patch size times merge size: whole merged patches."""
    least: int
    """Pixels of a resized frame."""
    most: int
    """Pixels of a resized frame."""

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that a frame of this size is resized to."""
        # Python's round, ties to even, because `smart_resize` uses it
        rows, cols = (round(side / self.multiple) for side in (height, width))
        area = rows * cols * self.multiple**2
        if area > self.most:
            shrink = math.sqrt(height * width / self.most)
            rows, cols = (
                max(1, math.floor(side / shrink / self.multiple)) for side in (height, width)
            )
        elif area < self.least:
            grow = math.sqrt(self.least / (height * width))
            rows, cols = (math.ceil(side * grow / self.multiple) for side in (height, width))
        return rows * self.multiple, cols * self.multiple


@dataclass(frozen=True)
class MostPatches:
    """A size that follows the frame's own, that of SigLIP 2 NaFlex: both sides are scaled alike and
    rounded up to whole patches, by the largest scale that gives at most `patches` of them."""

    multiple: int
    """Pixels on a side of a patch."""
    patches: int

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that a frame of this size is resized to.

        The scale is found by transformers' own bisection, with its bounds and its tolerance.
        """

        def grid(scale: float) -> tuple[int, int]:
            rows, cols = (
                max(1, math.ceil(side * scale / self.multiple)) for side in (height, width)
            )
            return rows, cols

        fits, too_much = BISECTED / 10, 100.0
        while too_much - fits >= BISECTED:
            scale = (fits + too_much) / 2
            if math.prod(grid(scale)) <= self.patches:
                fits = scale
            else:
                too_much = scale
        rows, cols = grid(fits)
        return rows * self.multiple, cols * self.multiple


@dataclass(frozen=True)
class Pixels:
    """The resolved values of an image processor: its steps, in this order."""

    height: int
    """Of the resized frame, in pixels; with `shortest_edge`, the length of the shorter side alone; 0
    where frames keep a size of their own."""
    width: int
    """Likewise."""
    shortest_edge: bool
    """Whether resizing keeps the aspect ratio, `height` (= `width`) being the shorter side."""
    resample: int
    """Pillow's filter number: 2 bilinear, 3 bicubic."""
    crop: tuple[int, int] | None
    """(height, width) of the centre crop after resizing."""
    scale: float
    """Factor on levels 0 to 255, such as 1 / 255."""
    mean: tuple[float, ...]
    """Of each channel, subtracted after scaling."""
    std: tuple[float, ...]
    """Of each channel, divided by after subtracting."""
    own_size: OwnSize | MostPatches | None = None
    """Where frames of different sizes make different patch grids."""
    pad: bool = False
    """Whether resizing keeps the aspect ratio and the rest of `height` and `width` is filled with the
    mean colour, the frame in the middle."""

    @classmethod
    def from_processor(cls, processor: Any) -> "Pixels":
        """Read the values of a transformers image processor; UserError for steps not supported here."""
        name = type(processor).__name__
        size = dict(processor.size or {})
        values: dict[str, Any] = {
            "resample": int(processor.resample),
            "scale": float(processor.rescale_factor) if processor.do_rescale else 1.0,
            "mean": tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
            "std": tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
        }
        # -- by what its values are, not by its name: processors of many classes resize alike
        if not size and hasattr(processor, "max_num_patches") and processor.do_resize:
            most = MostPatches(processor.patch_size, processor.max_num_patches)
            return cls(0, 0, False, crop=None, own_size=most, **values)
        edge = size.get("shortest_edge")
        if processor.do_resize and edge and "longest_edge" in size:
            if not hasattr(processor, "merge_size"):
                raise UserError(f"{name}: resizes to {size}, a rule that is not supported")
            multiple = processor.patch_size * processor.merge_size
            own_size = OwnSize(multiple, least=int(edge), most=int(size["longest_edge"]))
            return cls(0, 0, False, crop=None, own_size=own_size, **values)
        if not processor.do_resize or not (edge or {"height", "width"} <= set(size)):
            raise UserError(
                f"{name}: resizes to {size}; only a fixed height and width, or shortest_edge with a "
                "centre crop, gives every frame the same patch grid"
            )
        crop = None
        if getattr(processor, "do_center_crop", False):
            crop = (int(processor.crop_size["height"]), int(processor.crop_size["width"]))
        if edge and crop is None:
            raise UserError(f"{name}: shortest_edge without a centre crop makes grids of any size")
        return cls(
            height=int(edge or size["height"]),
            width=int(edge or size["width"]),
            shortest_edge=bool(edge),
            crop=crop,
            **values,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the values as a bank's fingerprint has them.

        `own_size` and `pad` only where set, so that other banks keep the fingerprint that they have.
        """
        values = asdict(self)
        if self.own_size is None:
            del values["own_size"]
        if not self.pad:
            del values["pad"]
        return (
            values
            | {name: list(values[name]) for name in ("mean", "std")}
            | {"crop": list(self.crop) if self.crop else None}
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Pixels":
        """Rebuild what `to_json` wrote."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        if "own_size" in values:
            size: dict[str, int] = values["own_size"]
            values["own_size"] = MostPatches(**size) if "patches" in size else OwnSize(**size)
        return cls(**values)

    def fitted(self, fit: str) -> "Pixels":
        """Return the values that bring frames to the same size in another way, one of `FITS`.

        Raises UserError where frames keep a size of their own, and for a crop that is not square.
        """
        if self.own_size:
            raise UserError(
                f"--fit {fit}: its frames keep a shape of their own, and nothing is cut",
                fix="leave out --fit",
            )
        height, width = self.crop or (self.height, self.width)
        whole = replace(self, height=height, width=width, shortest_edge=False, crop=None, pad=False)
        if fit == "stretch":
            return whole
        if fit == "pad":
            return replace(whole, pad=True)
        assert fit == "crop", fit
        if self.crop:  # as its own processor does
            return self
        if height != width:
            raise UserError(
                f"--fit crop: cuts squares, and its frames are {height}x{width}",
                fix="use --fit pad or stretch",
            )
        return replace(whole, shortest_edge=True, crop=(height, width))

    def cut_away(self, height: int, width: int, patch: int) -> float:
        """Return the share of a frame of this size that no whole patch covers, in [0, 1)."""
        y0, x0, y1, x1 = self.covered(height, width, patch)
        return 1 - (min(y1, 1) - max(y0, 0)) * (min(x1, 1) - max(x0, 0))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) of the pixels that the tower takes of a frame of this size."""
        if self.pad:
            return self.height, self.width
        return self.crop or self.resized(height, width)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that a frame is resized to, before the crop."""
        if self.own_size:
            return self.own_size.of(height, width)
        if self.pad:
            # the longer side just fits
            scale = min(self.height / height, self.width / width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        if not self.shortest_edge:
            return self.height, self.width
        if height <= width:
            # rounded down, as `get_resize_output_image_size` of transformers does
            return self.height, int(self.height * width / height)
        return int(self.height * height / width), self.height

    def covered(self, height: int, width: int, patch: int) -> tuple[float, float, float, float]:
        """Return the part of a frame that whole patches cover: y0, x0, y1, x1 as fractions of it.

        patch: pixels on a side. A tower takes as many patches as fit, from the upper left: the rest of
        the crop below and to the right (6 of 384 pixels, with patches of 14) enters no feature. Patches
        of a padded frame extend beyond it: below 0 and above 1.
        """
        rows, cols = self.resized(height, width)
        kept_rows, kept_cols = self.output_size(height, width)
        # negative where the frame is padded: it then begins inside the output
        top, left = (rows - kept_rows) // 2, (cols - kept_cols) // 2
        bottom = top + kept_rows // patch * patch
        right = left + kept_cols // patch * patch
        return top / rows, left / cols, bottom / rows, right / cols

    def check(self, height: int, width: int) -> None:
        """Raise UserError for a frame size that the steps cannot bring to the tower's."""
        if isinstance(self.own_size, OwnSize) and max(height, width) > MOST_ELONGATED * min(
            height, width
        ):
            raise UserError(
                f"a frame of {height}x{width} is more than {MOST_ELONGATED} times as long as wide, "
                "which the tower's processor refuses"
            )
        if self.pad:
            return
        rows, cols = self.resized(height, width)
        least = self.output_size(height, width)
        if min(rows, cols) < 1 or rows < least[0] or cols < least[1]:
            raise UserError(f"a crop of {self.crop} does not fit a frame resized to {rows}x{cols}")

    def resize(self, frames: np.ndarray) -> np.ndarray:
        """Resize, and crop or pad: uint8 `(frames, height, width, 3)` -> uint8 at `output_size`.

        Raises UserError as `check` does.
        """
        height, width = frames.shape[1:3]
        self.check(height, width)
        rows, cols = self.resized(height, width)
        out = np.empty((len(frames), *self.output_size(height, width), 3), np.uint8)
        # the centre, rounded down, as transformers crops
        top, left = (rows - out.shape[1]) // 2, (cols - out.shape[2]) // 2
        if self.pad:
            # normalised, the mean colour is 0: padding is as little of a picture as can be
            out[:] = [round(level / self.scale) for level in self.mean]
        for place, frame in enumerate(frames):
            image = Image.fromarray(frame).resize((cols, rows), Image.Resampling(self.resample))
            if self.pad:
                out[place, -top : rows - top, -left : cols - left] = np.asarray(image)
                continue
            out[place] = np.asarray(image)[top : top + out.shape[1], left : left + out.shape[2]]
        return out
