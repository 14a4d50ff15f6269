"""A tower of your own: the row that model/tower_kinds.py shows, added and held against transformers."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from model import tower_kinds
from model.tower.tower import Tower
from model.tower_kinds import KINDS, TowerKind, find_kind, frame_flops
from shards.errors import UserError

SIDE, PATCH, WIDTH = 32, 8, 16


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A random ViT on disk, as it is published."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2}
    config = ViTConfig(**sizes, num_hidden_layers=3, image_size=SIDE, patch_size=PATCH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
    return tmp_path


def shown_row() -> TowerKind:
    """Return the row in the docstring, indented by four blanks, as it stands there."""
    (row,) = re.findall(r"^    (TowerKind\(.*\))$", str(tower_kinds.__doc__), re.MULTILINE)
    kind: TowerKind = eval(row, {"TowerKind": TowerKind})
    return kind


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_the_row_that_is_shown_adds_a_tower(
    vit: Path, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"vit is not supported \(have siglip,"):
        Tower.load(str(vit), layer=layer)
    monkeypatch.setattr(tower_kinds, "KINDS", [*KINDS, shown_row()])
    tower = Tower.load(str(vit), layer=layer)
    assert (tower.width, tower.patch, tower.frames_per_unit) == (WIDTH, PATCH, 1)
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 40, 3), dtype=np.uint8)

    theirs: Any = ViTModel.from_pretrained(vit).eval()
    processor = AutoImageProcessor.from_pretrained(vit, backend="pil")
    pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]

    ours = tower.encode(tower.pixels.resize(frames), batch_frames=3)
    assert ours.shape == (3, SIDE // PATCH, SIDE // PATCH, WIDTH)
    assert torch.equal(ours.flatten(1, 2), hidden[:, 1:])
    assert frame_flops(theirs.config.to_dict(), 16)


def test_every_row_names_a_class_and_a_model_type_stands_in_one_row() -> None:
    types = [name for kind in KINDS for name in kind.model_types]
    assert len(set(types)) == len(types)
    for name in types:
        kind = find_kind(name)
        module, _, attribute = kind.model.partition(":")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute)
