"""A tower's image processor, as transformers loads it, with Pillow's arithmetic."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import cached_file

from shards.errors import UserError

AS_PILLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "DINOv3ViTImageProcessor": ("ViTImageProcessorPil", {}),
    "VJEPA2VideoProcessor": ("BitImageProcessorPil", {"crop_size": {"height": 256, "width": 256}}),
}
"""Image processors that exist with torchvision only -> a Pillow one of the same steps, and its defaults
that differ. DINOv3's resizes without rounding to whole levels, which Pillow does: at most one level
apart."""
IMAGENET = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD, "resample": 2}
PROCESSOR_FILES = "preprocessor_config.json", "video_preprocessor_config.json"
STEPS = {"size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"}


def load_processor(name: str) -> Any:
    """Return a tower's image processor, whose values are read; its arithmetic is Pillow's."""
    if processor := _as_pillow(name):
        return processor
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except ImportError:  # transformers before 5.9
        raise UserError(
            f"transformers {transformers.__version__} reads no image processor without torchvision",
            where=f"tower {name}",
            fix="pip install torchvision, or 'transformers>=5.9'",
        ) from None
    if getattr(processor, "crop_to_patches", False):  # tiles are for pictures: a frame is one tile
        processor.crop_to_patches = False
    return processor


def _as_pillow(name: str) -> Any:
    """Return the Pillow processor in place of one that exists with torchvision only, see `AS_PILLOW`."""
    written = next(filter(None, map(partial(_written, name), PROCESSOR_FILES)), {})
    kind = written.get("image_processor_type") or written.get("video_processor_type") or ""
    if kind.removesuffix("Fast") not in AS_PILLOW:
        return None
    with_pillow, differing = AS_PILLOW[kind.removesuffix("Fast")]
    given = {
        key: value
        for key, value in written.items()
        if value is not None and (key in STEPS or key.startswith("do_"))
    }
    values = IMAGENET | differing | given
    if kind.startswith("VJEPA2"):  # its class computes the size, whatever its file says
        crop = values["crop_size"]
        edge = crop if isinstance(crop, int) else crop["height"]
        values["size"] = {"shortest_edge": int(edge * 256 / 224)}
    return getattr(transformers, with_pillow)(**values)


def _written(name: str, file: str) -> dict[str, Any]:
    """Return a tower's JSON file; empty where there is none, or where the Hub cannot be reached."""
    quietly = ("missing_entries", "connection_errors")
    path = cached_file(name, file, **{f"_raise_exceptions_for_{what}": False for what in quietly})
    return dict(json.loads(Path(path).read_text())) if path else {}
