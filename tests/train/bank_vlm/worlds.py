"""Tiny random checkpoints of transformers' video models, and banks that their own towers made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from preprocess.encode.run import EncodeOptions, encode
from shards import Bank
from shards.format.features import Sampling
from train.bank_vlm.kinds import layer_of

PATCH, WIDTH, ROWS = 4, 32, 512
IMAGE, VIDEO, FIRST, LAST = 510, 509, 508, 507
"""Ids of their placeholders, and of what Qwen's stand between."""
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
TOKENS = {"video_token_id": VIDEO, "image_token_id": IMAGE}
ENDS = {"vision_start_token_id": FIRST, "vision_end_token_id": LAST}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH}
LLAVA_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 6 * PATCH,
    "patch_size": PATCH,
}
LIMITS = {"min_pixels": 16 * 16, "max_pixels": 64 * 64}
SIZES = {"a": (24, 40), "b": (40, 24), "still": (24, 24)}
"""Height and width of each clip."""
FRAMES = {"a": 6, "b": 6, "still": 1}


def qwen2_vl() -> Any:
    vision = QWEN_VISION | {"embed_dim": 24, "hidden_size": WIDTH, "mlp_ratio": 2}
    text = TEXT | {"rope_parameters": MROPE}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **TOKENS, **ENDS)
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    vision = QWEN_VISION | {
        "hidden_size": 24,
        "out_hidden_size": WIDTH,
        "intermediate_size": 20,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 3,
    }
    text = TEXT | {"rope_parameters": MROPE}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS, **ENDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    """Its LLM's two layers add what two layers of its tower give."""
    vision = QWEN_VISION | {
        "hidden_size": 24,
        "out_hidden_size": WIDTH,
        "intermediate_size": 20,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = MROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {k: v for k, v in TEXT.items() if k not in ("bos_token_id", "eos_token_id")}
    text |= {"head_dim": 8, "rope_parameters": rope}
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **TOKENS, **ENDS
    )
    return Qwen3VLForConditionalGeneration(config)


def onevision() -> Any:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**LLAVA_VISION),
        text_config=Qwen2Config(**TEXT),
        video_token_index=VIDEO,
        image_token_index=IMAGE,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def next_video() -> Any:
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**LLAVA_VISION),
        text_config=Qwen2Config(**TEXT),
        video_token_index=VIDEO,
        image_token_index=IMAGE,
    )
    return LlavaNextVideoForConditionalGeneration(config)


MAKE: Mapping[str, Callable[[], Any]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava_onevision": onevision,
    "llava_next_video": next_video,
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
