"""Towers whose files hold more, or something else, than the class of their `model_type` computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    GotOcr2ImageProcessorPil,
    InternVLVisionConfig,
    InternVLVisionModel,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTImageProcessorPil,
    VJEPA2Config,
    VJEPA2Model,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from model.tower.tower import Tower
from model.tower.trial import check_size
from shards.errors import UserError

SIDE, PATCH = 32, 8
SQUARE = {"height": SIDE, "width": SIDE}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = SMALL | {"image_size": SIDE, "patch_size": PATCH}
TEXT = SMALL | {"vocab_size": 20, "max_position_embeddings": 8}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
QWEN = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
QWEN |= {"out_hidden_size": 16, "fullatt_block_indexes": [1], "window_size": 16}
CLIP = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
MAKE = {
    "siglip": lambda: (
        SiglipVisionModel(SiglipVisionConfig(**VISION)),
        SiglipImageProcessorPil(size=SQUARE),
    ),
    "clip": lambda: (
        CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)),
        CLIPImageProcessorPil(**CLIP),
    ),
    "dinov3": lambda: (
        DINOv3ViTModel(DINOv3ViTConfig(**VISION)),
        ViTImageProcessorPil(size=SQUARE),
    ),
    "internvl": lambda: (
        InternVLVisionModel(InternVLVisionConfig(**VISION)),
        GotOcr2ImageProcessorPil(size=SQUARE),
    ),
    "qwen2_5_vl": lambda: (
        Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**QWEN)),
        Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=4096),
    ),
}


def save(folder: Path, kind: str) -> Path:
    model, processor = MAKE[kind]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def norm_of(weights: dict[str, Any]) -> str:
    """Return the name of a norm's weight in the vision tower's last layer."""
    own = [name for name in weights if "text" not in name and "norm" in name and ".1." in name]
    return next(name for name in own if name.endswith("weight"))


@pytest.mark.parametrize("kind", MAKE)
def test_weights_that_its_class_does_not_take_are_refused(tmp_path: Path, kind: str) -> None:
    """As a layer that config.json does not count, or a norm that its class does not have."""
    file = save(tmp_path, kind) / "model.safetensors"
    Tower.load(str(tmp_path), layer=-1)
    weights = load_file(file)
    norm = norm_of(weights)
    for other in (norm.replace(".1.", ".2."), norm.replace("norm", "inner_norm")):
        save_file(weights | {other: weights[norm].clone()}, file, {"format": "pt"})
        with pytest.raises(UserError, match=r"1 of its weights have no place in \w+ .*norm"):
            Tower.load(str(tmp_path), layer=-1)


def test_heads_and_old_buffers_beside_a_tower_are_left_out(tmp_path: Path) -> None:
    """CLIP as it was published holds its positions' numbers; a head is no part of it."""
    file = save(tmp_path, "clip") / "model.safetensors"
    digest = Tower.load(str(tmp_path)).digest
    more = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    more["classifier.weight"] = torch.ones(3, 16)
    save_file(load_file(file) | more, file, {"format": "pt"})
    assert Tower.load(str(tmp_path)).digest == digest


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("intern_vit_6b", "is code of its own, which is never run; use an InternVL in"),
        ("internvl_chat", "is code of its own, which is never run; use an InternVL in"),
        ("moonvit", r"is not supported \(have siglip,"),
        # EVA-CLIP's checkpoints have CLIP's type and a model of their own
        ("clip", "is code of its own, which is never run"),
        ("timm_wrapper", r"is a tower of timm \(Perception Encoder"),
        ("", r"a config.json without model_type is not supported \(have siglip,"),
    ],
)
def test_code_of_a_tower_is_neither_run_nor_asked_about(
    tmp_path: Path, kind: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path)
    CLIPImageProcessorPil(**CLIP).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (tmp_path / "config.json").write_text(
        json.dumps(written | {"model_type": kind, "auto_map": own})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    # transformers asks at the terminal, for 15 seconds
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(UserError, match=complaint):
        Tower.load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_code_of_an_image_processor_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "siglip")
    written = {
        "image_processor_type": "OwnProcessor",
        "auto_map": {"AutoImageProcessor": "own.Own"},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(UserError, match="cannot be loaded"):
        Tower.load(str(tmp_path))


def test_v_jepa_at_a_size_that_its_positions_are_not_of_is_refused(tmp_path: Path) -> None:
    """Its class takes any size, and would turn patches by the rows and columns of others."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    sizes |= {f"pred_{name}": value for name, value in sizes.items()}
    config = VJEPA2Config(patch_size=8, crop_size=32, frames_per_clip=4, tubelet_size=2, **sizes)
    VJEPA2Model(config).save_pretrained(tmp_path)
    for side in (32, 48):
        crop = {"height": side, "width": side}
        written = {"video_processor_type": "VJEPA2VideoProcessor", "crop_size": crop}
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(written))
        tower = Tower.load(str(tmp_path))
        if side == 32:
            check_size(tower)
            continue
        with pytest.raises(UserError, match=r"48x48 pixels .* its positions are those of 32x32"):
            check_size(tower)
