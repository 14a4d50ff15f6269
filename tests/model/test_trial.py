"""Image processors that do what their values do not say, and sizes that a tower cannot take."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from model.tower.tower import Tower
from model.tower.trial import check_size
from shards.errors import UserError

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 8,
}


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**CONFIG)).save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    return tmp_path


def turned_colours(values: Any) -> Any:
    return values[:, ::-1]


def shifted(values: Any) -> Any:
    return values - 0.5 / 255


def cut_by_a_row(values: Any) -> Any:
    return values[:, :, 1:]


@pytest.mark.parametrize("change", [turned_colours, shifted, cut_by_a_row])
def test_a_processor_with_a_step_of_its_own_is_refused(
    change: Any, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess = SiglipImageProcessorPil.preprocess

    def with_a_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = preprocess(self, *args, **kwargs)
        done["pixel_values"] = change(done["pixel_values"])
        return done

    Tower.load(str(tower))
    monkeypatch.setattr(SiglipImageProcessorPil, "preprocess", with_a_step)
    with pytest.raises(UserError, match=r"SiglipImageProcessorPil does more .* than is known"):
        Tower.load(str(tower))


def test_values_that_are_known_here_are_no_step_of_their_own(tower: Path) -> None:
    path = tower / "preprocessor_config.json"
    values = json.loads(path.read_text())
    for change in ({"do_rescale": False}, {"do_normalize": False}, {"image_std": [0.2, 0.3, 0.4]}):
        path.write_text(json.dumps(values | change))
        Tower.load(str(tower))


def test_a_size_that_the_tower_cannot_take_is_one_line(tower: Path) -> None:
    path = tower / "preprocessor_config.json"
    size = {"size": {"height": 64, "width": 64}}
    path.write_text(json.dumps(json.loads(path.read_text()) | size))
    with pytest.raises(UserError, match=r"cannot take the 64x64 pixels") as error:
        check_size(Tower.load(str(tower)))
    assert "\n" not in str(error.value)
