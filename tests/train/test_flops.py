"""FLOPs against figures worked out by hand, and against the counts of torch itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel

from model.family.__main__ import class_and_config, families
from model.family.head import decoder_of
from model.mask import dense_mask, intervals
from model.tower_kinds import frame_flops
from train.flops import (
    LlmShape,
    attended_pairs,
    forward_flops,
    mfu,
    peak_flops,
    step_flops,
)
from train.start.stage import read_config

SMALL = {
    "model_type": "qwen2",
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}
"""Qwen2-0.5B."""
LARGE = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
"""Qwen2-7B."""
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14}
SIGLIP |= {"model_type": "siglip_vision_model"}


def shape_of(config: dict[str, Any]) -> LlmShape:
    shape = LlmShape.of(config)
    assert shape
    return shape


def test_layer_weights_are_those_published() -> None:
    # 24 (2 896^2 + 2 896 128 + 3 896 4864) and 28 (2 3584^2 + 2 3584 512 + 3 3584 18944)
    assert shape_of(SMALL).layer_weights == 357_826_560
    assert shape_of(LARGE).layer_weights == 6_525_288_448


@pytest.mark.parametrize(
    ("config", "tune_llm", "tera"),
    [
        (SMALL, "full", 1.557),
        (SMALL, "frozen", 1.038),
        (LARGE, "full", 26.68),
        (LARGE, "lora", 17.79),
    ],
)
def test_a_step_of_a_short_record(config: dict[str, Any], tune_llm: str, tera: float) -> None:
    """668 tokens, 80 supervised: 2 * 357.8e6 * 668 + 2 * 24 * 896 * 668^2 + 2 * 896 * 151936 * 80."""
    pairs = attended_pairs(668)
    assert pairs == 668 * 669 // 2
    flops = step_flops(shape_of(config), 668, pairs, 80, tune_llm)
    assert flops / 1e12 == pytest.approx(tera, rel=1e-3)


def test_the_tower_of_llava() -> None:
    assert frame_flops(SIGLIP, 729, -2) == pytest.approx(0.642e12, rel=1e-3)  # 26 layers
    assert frame_flops(SIGLIP, 729, -1) == frame_flops(SIGLIP, 729, 27)
    assert frame_flops(SIGLIP, 729, -1) == pytest.approx(0.666e12, rel=2e-3)
    assert frame_flops({"model_type": "siglip", "vision_config": SIGLIP}, 729) == frame_flops(
        SIGLIP, 729
    )
    ratio = {**SIGLIP, "intermediate_size": None, "mlp_ratio": 4304 / 1152}
    assert frame_flops(ratio, 729) == pytest.approx(frame_flops(SIGLIP, 729))
    assert frame_flops({"model_type": "dinov2"}, 729) is None
    assert frame_flops({**SIGLIP, "model_type": "unknown"}, 729) is None


def test_the_llms_flops_are_those_that_torch_counts(make_llm: Callable[..., Any]) -> None:
    llm = make_llm(width=64, attention="eager").eval()  # fused attention is not counted on the CPU
    ids = torch.zeros(1, 32, dtype=torch.long)
    mask = torch.zeros(1, 1, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        llm(input_ids=ids, attention_mask=mask, use_cache=False)
    assert counter.get_total_flops() == forward_flops(shape_of(llm.config.to_dict()), 32, 32**2, 32)


def test_the_towers_flops_are_those_that_torch_counts() -> None:
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )
    config._attn_implementation = "eager"
    tower = SiglipVisionModel(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(pixel_values=torch.zeros(1, 3, 16, 16))
    assert counter.get_total_flops() == frame_flops(config.to_dict(), 16, -1)


@pytest.mark.parametrize("frame_attention", ["block", "token"])
def test_attended_pairs_are_the_ones_of_the_mask(frame_attention: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        sizes = rng.choice([3, 10], size=rng.integers(1, 6))
        block = np.full(2, -1)
        for number, size in enumerate(sizes):
            block = np.concatenate([block, np.full(size, number), np.full(rng.integers(3), -1)])
        start, end = intervals(np.zeros(len(block), np.int64), block, frame_attention)
        mask = dense_mask(torch.from_numpy(start)[None], torch.from_numpy(end)[None])
        frames = [(int((sizes == size).sum()), size) for size in (3, 10)]
        own = frames if frame_attention == "block" else []
        assert attended_pairs(len(block), *own) == mask.sum().item()


def test_whole_columns_are_counted_at_once() -> None:
    lengths, slow, fast = np.array([100, 200]), np.array([1, 2]), np.array([3, 0])
    pairs = attended_pairs(lengths, (slow, 17), (fast, 5))
    one_by_one = [attended_pairs(100, (1, 17), (3, 5)), attended_pairs(200, (2, 17), (0, 5))]
    assert pairs.tolist() == one_by_one
    flops = step_flops(shape_of(SMALL), lengths, pairs, np.array([8, 9]), "full")
    assert flops[1] == step_flops(shape_of(SMALL), 200, one_by_one[1], 9, "full")


def test_another_family_is_told_from_ours_by_what_its_config_lacks() -> None:
    assert LlmShape.of({"n_embd": 768, "n_layer": 12}) is None
    assert LlmShape.of({"text_config": SMALL}) == LlmShape.of(SMALL)
    shape = shape_of({**SMALL, "num_key_value_heads": None, "head_dim": 128})
    assert (shape.kv_heads, shape.head_dim) == (14, 128)
    assert shape_of({**SMALL, "head_dim": None}).head_dim == 64


@pytest.mark.slow
def test_every_familys_layers_are_counted_rightly_or_not_at_all() -> None:
    """As published, not made small: on "meta" weights take no memory."""
    counted = []
    for family in families():
        try:
            llm_class, config = class_and_config(family)
        except Exception:  # some defaults are not valid
            continue
        if (shape := LlmShape.of(config.to_dict())) is None:
            continue
        with torch.device("meta"):
            decoder = decoder_of(llm_class(config))
        tables = ("embed", "wte")
        weights = sum(
            p.numel()
            for name, p in decoder.named_parameters()
            if p.ndim > 1 and not name.startswith(tables)
        )
        assert shape.layer_weights == pytest.approx(weights, rel=0.01), family
        counted.append(config.model_type)
    assert {"llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "smollm3"} <= set(counted)
    assert not {"mixtral", "qwen3_moe", "gpt_oss", "starcoder2", "nemotron"} & set(counted)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_are_known_by_the_names_that_cuda_gives_them(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_mfu_is_a_share_of_all_devices() -> None:
    assert mfu(989e12, 2.0, 4, 989e12) == pytest.approx(1 / 8)


def test_a_models_config_is_read_without_the_network(toy: Path, tmp_path: Path) -> None:
    config = read_config(str(toy / "llm"))
    assert config
    assert LlmShape.of(config)
    tower = read_config(str(toy / "tower"))
    assert tower
    assert frame_flops(tower, 16)
    assert read_config(str(tmp_path)) is None
    assert read_config("nobody/nothing") is None
