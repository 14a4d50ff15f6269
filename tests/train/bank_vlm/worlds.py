"""Tiny random checkpoints of transformers' video models, and banks that their own towers made."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)

from preprocess.encode.run import EncodeOptions, encode
from shards import Bank
from shards.format.features import FeatureConfig, Sampling
from shards.signed import read_signed_json, signed_json, write_atomic
from tests.train.start import tiny
from tests.train.start.tiny import PATCH
from train.bank_vlm.kinds import layer_of

IMAGE, VIDEO, FIRST, LAST = 510, 509, 508, 507
"""Ids of their placeholders, and of what Qwen's stand between."""
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": FIRST,
    "vision_end_token_id": LAST,
}
LLAVA_VISION = tiny.LLAVA_VISION | {"num_hidden_layers": 3, "image_size": 6 * PATCH}
"""Of whole halves: LLaVA-NeXT-Video's processor counts no others right."""
LIMITS = {"min_pixels": 16 * 16, "max_pixels": 64 * 64}
SIZES = {"a": (24, 40), "b": (40, 24), "still": (24, 24)}
"""Height and width of each clip."""
FRAMES = {"a": 6, "b": 6, "still": 1}


MAKE: Mapping[str, Callable[[], Any]] = {
    "qwen2_vl": partial(tiny.qwen2, False),
    "qwen2_5_vl": partial(tiny.qwen2_5, False),
    "qwen3_vl": partial(tiny.qwen3, False),
    "llava_onevision": partial(tiny.onevision, LLAVA_VISION),
    "llava_next_video": partial(tiny.next_video, LLAVA_VISION),
}


@dataclass(frozen=True)
class World:
    """A checkpoint on disk, and a bank of what its tower gives the language model."""

    kind: str
    folder: Path
    bank: Path
    videos: Path

    def model(self) -> Any:
        torch.manual_seed(0)
        return type(MAKE[self.kind]()).from_pretrained(self.folder).eval()

    def features(self, name: str) -> Tensor:
        """Return a clip's features as the bank rounds them, `(units, rows, cols, width)`."""
        bank = Bank.open(self.bank)
        return torch.from_numpy(bank.read(bank.row(name), 1)).float()


def make_videos(root: Path) -> Path:
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        (root / "videos" / name).mkdir(parents=True)
        noise = np.random.default_rng(number)
        for k in range(FRAMES[name]):
            pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "videos" / name / f"{k:03}.png")
    return root / "videos"


def make_world(root: Path, kind: str, tokenizer: Path) -> World:
    """Save a checkpoint and encode `root/videos` with the tower in it."""
    place = root / kind
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MAKE[kind]().eval()
        for name, token in IDS.items():
            setattr(model.config, name, token)
        inner = model.model
        tower = inner.visual if kind.startswith("qwen") else inner.vision_tower
        for weight in tower.parameters():
            weight.data.normal_(std=0.3)
    model.save_pretrained(place / "model")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(place / "model")
    if kind.startswith("qwen"):
        Qwen2VLImageProcessorPil(**LIMITS, patch_size=PATCH).save_pretrained(place / "model")
        where, layer = place / "model", layer_of(model.config.to_dict())
    else:
        where = place / "tower"
        tower.save_pretrained(where)
        side = {"height": 6 * PATCH, "width": 6 * PATCH}
        made = SiglipImageProcessorPil if kind == "llava_onevision" else CLIPImageProcessorPil
        made(
            size=side, **({"do_center_crop": False} if made is CLIPImageProcessorPil else {})
        ).save_pretrained(where)
        layer = model.config.vision_feature_layer
    options = EncodeOptions(
        tower=str(where), strides=(1,), sampling=Sampling(num_frames=6), layer=layer
    )
    stills = [
        str(path) for path in (root / "videos").glob("*.png")
    ]  # of a folder with videos, none
    summary = encode([str(root / "videos"), *stills], place / "bank", options)
    assert (summary.clips, summary.failures) == (3, []), summary
    return World(kind, place / "model", place / "bank", root / "videos")


def of_another_tower(bank: Path, copy: Path) -> Path:
    """Return a copy of a bank that says to be of a tower of the same kind with other weights."""
    shutil.copytree(bank, copy)
    record = read_signed_json(copy / "bank.json")
    record["features"]["tower_digest"] = "00" * 16
    record["fingerprint"] = FeatureConfig.from_json(record["features"]).fingerprint
    write_atomic(copy / "bank.json", signed_json(record))
    return copy


class Worlds:
    """The worlds of each kind over the same videos, each made when it is first asked for."""

    def __init__(self, root: Path, tokenizer: Path) -> None:
        self.root, self.tokenizer = root, tokenizer
        self._made: dict[str, World] = {}

    def __call__(self, kind: str) -> World:
        if kind not in self._made:
            self._made[kind] = make_world(self.root, kind, self.tokenizer)
        return self._made[kind]
