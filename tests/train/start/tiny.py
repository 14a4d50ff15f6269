"""Random tiny checkpoints of transformers' own classes, as stages on disk."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
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
    SiglipVisionConfig,
)

PATCH, LLM_WIDTH, ROWS = 4, 32, 512
TAGS = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
TEXT = {
    "hidden_size": LLM_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH}
WIDTH = 16
SIDE = 5
"""Patches on a side: of an odd number, pooling by two leaves half a cell, or a row."""
LLAVA_VIDEO = ROWS - 1
LLAVA_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
}
LLAVA_TEXT = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def qwen2(tied: bool) -> Any:
    vision = VISION | {"embed_dim": 24, "hidden_size": LLM_WIDTH, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=TEXT, vision_config=vision, tie_word_embeddings=tied)
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5(tied: bool) -> Any:
    vision = VISION | {
        "hidden_size": 24,
        "out_hidden_size": LLM_WIDTH,
        "intermediate_size": 20,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 3,
    }
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, tie_word_embeddings=tied)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3(tied: bool) -> Any:
    """Its LLM's two layers add what two layers of its tower give."""
    rope = TEXT["rope_parameters"] | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {k: v for k, v in TEXT.items() if k not in ("bos_token_id", "eos_token_id")}
    vision = VISION | {
        "hidden_size": 24,
        "out_hidden_size": LLM_WIDTH,
        "intermediate_size": 20,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        text_config=text | {"head_dim": 8, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=tied,
    )
    return Qwen3VLForConditionalGeneration(config)


def save_qwen(folder: Path, make: Callable[[], Any], toy: Path) -> Any:
    """Save a Qwen-VL with the words of the toy world; return transformers' model of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = make().eval()
        for weight in theirs.model.visual.parameters():
            weight.data.normal_(std=0.3)
    tokenizer = AutoTokenizer.from_pretrained(toy / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    assert len(tokenizer) <= ROWS
    theirs.config.video_token_id = tokenizer.convert_tokens_to_ids(TAGS[-1])
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = {"min_pixels": 16 * 16, "max_pixels": 64 * 64}
    Qwen2VLImageProcessorPil(**limits, patch_size=PATCH).save_pretrained(folder)
    return theirs


def onevision(vision: Mapping[str, int] = LLAVA_VISION, **values: Any) -> Any:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=Qwen2Config(**LLAVA_TEXT),
        **values,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def next_video(vision: Mapping[str, int] = LLAVA_VISION, **values: Any) -> Any:
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=Qwen2Config(**LLAVA_TEXT),
        **values,
    )
    return LlavaNextVideoForConditionalGeneration(config)


def save_llava(folder: Path, theirs: Any, toy: Path) -> None:
    """Save a LLaVA with the words of the toy world, its projector and newline drawn at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, weight in theirs.named_parameters():
            if "multi_modal_projector" in name or "newline" in name:
                weight.data.normal_(std=0.3)
    theirs.config.video_token_id = LLAVA_VIDEO
    theirs.eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy / "llm").save_pretrained(folder)
