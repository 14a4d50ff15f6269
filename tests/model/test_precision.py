"""A tower's arithmetic: what is chosen, and that bfloat16 is as independent of neighbours as float32.

pytest tests/model/test_precision.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from model.cpu.matrix_units import matrix_units
from model.tower.precision import (
    FEWEST_WEIGHTS,
    LEAST_GAIN,
    arithmetic,
    decided,
    fastest,
    retype,
    timed,
)
from model.tower.tower import Tower


def save(folder: Path, width: int, layers: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
        )
        SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("small"), 64, 2)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of enough weights to be measured."""
    return save(tmp_path_factory.mktemp("large"), 384, 4)


@pytest.mark.parametrize(
    ("float32", "bfloat16", "dtype"),
    [
        (4.0, 1.0, "bfloat16"),
        (LEAST_GAIN, 1.0, "bfloat16"),
        (LEAST_GAIN - 0.01, 1.0, "float32"),
        (1.0, 1.0, "float32"),
        (0.7, 1.0, "float32"),
    ],
)
def test_only_a_clear_gain_is_taken_and_its_size_is_told(
    float32: float, bfloat16: float, dtype: str
) -> None:
    choice = decided("AMX", float32, bfloat16, error=0.0114)
    assert choice.dtype == dtype
    assert "AMX" in choice.reason
    assert ("features differ by 1.14%" in choice.reason) == (dtype == "bfloat16")


def test_a_small_tower_is_not_measured_and_stays_as_it_is(small: Path) -> None:
    tower = Tower.load(str(small), layer=-1)
    before = [weight.data.data_ptr() for weight in tower.model.parameters()]
    passed: list[object] = []
    tower.model.register_forward_pre_hook(lambda *_: passed.append(1))
    choice = fastest(tower, threads=1)
    assert (choice.dtype, tower.dtype, passed) == ("float32", "float32", [])
    assert "gains nothing" in choice.reason
    assert [weight.data.data_ptr() for weight in tower.model.parameters()] == before


def test_a_larger_one_is_measured_and_left_to_the_last_bit(large: Path) -> None:
    tower = Tower.load(str(large), layer=-1)
    assert sum(weight.numel() for weight in tower.model.parameters()) > FEWEST_WEIGHTS
    before = {name: weight.clone() for name, weight in tower.model.state_dict().items()}
    threads = torch.get_num_threads()
    float32, bfloat16, error = timed(tower, threads=1)
    assert min(float32, bfloat16) > 0
    assert 0 < error < 0.05
    assert torch.get_num_threads() == threads
    assert tower.dtype == "float32"
    after = tower.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    choice = fastest(tower, threads=1)
    assert choice.dtype in ("float32", "bfloat16")
    if not matrix_units():
        assert choice.dtype == "float32"
    assert tower.dtype == "float32"


def test_a_tower_that_is_retyped_is_the_one_that_was_loaded_so(large: Path) -> None:
    """What was measured in float32 and then kept in bfloat16, to the bit: live features equal banked."""
    loaded = Tower.load(str(large), layer=-1, dtype="bfloat16")
    retyped = Tower.load(str(large), layer=-1)
    timed(retyped, threads=1)
    retype(retyped, "bfloat16")
    assert (retyped.dtype, retyped.digest) == ("bfloat16", loaded.digest)
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    for a, b in zip(loaded.model.parameters(), retyped.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(loaded.encode(frames), retyped.encode(frames))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_frame_does_not_see_what_is_in_the_batch_beside_it(
    large: Path, dtype: str, threads: int
) -> None:
    tower = Tower.load(str(large), layer=-1, dtype=dtype)
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (16, 64, 64, 3)).astype(np.uint8)
    others = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = tower.encode_batch(frames, 16)
        for count in (1, 5, 15):
            assert torch.equal(tower.encode_batch(frames[:count], 16), whole[:count]), count
        strange = frames.copy()
        strange[3:] = rng.integers(0, 256, strange[3:].shape)
        assert torch.equal(tower.encode_batch(strange, 16)[:3], whole[:3])
        assert torch.equal(tower.encode(frames, 8), tower.encode(frames, shape=8))
    finally:
        torch.set_num_threads(others)


def test_a_worker_is_told_by_what_rounds_otherwise() -> None:
    assert arithmetic("cpu", "float32") == "cpu"
    assert arithmetic("cuda:3", "bfloat16") == arithmetic("cuda", "float32") == "cuda"
    assert arithmetic("cpu", "bfloat16") == f"cpu, {matrix_units() or 'no'} units for bfloat16"
