"""M-RoPE: three positions of each token, against transformers' own of Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLModel,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from model.family.mrope import install, mrope_positions, time_positions
from model.family.qwen_vl import MRopeFacts, deepstack_of, mrope_of
from model.grid import Grid
from shards.errors import UserError

TEXT, VIDEO = 0, 2
MERGE = 2


MODELS = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}


@dataclass(frozen=True)
class Span:
    first: int
    tokens: int
    grid: Grid
    medium: int
    seconds: float


def their_positions(
    kind: str, types: list[int], grids: list[list[int]], seconds: list[float], per_second: int
) -> np.ndarray:
    """Return `get_rope_index` of transformers for one row; grids: units, patch rows and columns."""
    vision = {"spatial_merge_size": MERGE, "tokens_per_second": per_second}
    config = SimpleNamespace(vision_config=SimpleNamespace(**vision))
    model_class: Any = MODELS[kind]
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = model_class.get_vision_position_ids.__get__(model)
    given: dict[str, Any] = {"video_grid_thw": torch.tensor(grids)}
    if kind == "qwen2_5_vl":
        given["second_per_grid_ts"] = seconds
    ids = torch.zeros(1, len(types), dtype=torch.int64)
    kinds = torch.tensor([types], dtype=torch.int32)
    found, _ = model_class.get_rope_index(model, ids, kinds, **given)
    return found[:, 0].numpy()


def drawn(
    seed: int, seconds: float, *, timed: bool = False
) -> tuple[list[int], list[list[int]], list[Span]]:
    """Return a row of text and videos: the type of each token, grids, and our spans.

    timed: with text before each frame.
    """
    rng = np.random.default_rng(seed)
    types, grids, spans = [TEXT] * int(rng.integers(0, 5)), [], []
    for clip in range(int(rng.integers(1, 4))):
        units, rows, cols = (int(n) for n in rng.integers(1, (20, 5, 6)))
        grids.append([units, MERGE * rows, MERGE * cols])
        for unit in range(units):
            types += [TEXT] * (int(rng.integers(1, 9)) if timed else 0)
            grid = Grid(rows, cols, 1)
            spans.append(Span(len(types), grid.cells, grid, clip, 7.25 + unit * seconds))
            types += [VIDEO] * grid.cells
        types += [TEXT] * int(rng.integers(1, 30))
    return types, grids, spans


SECONDS = [0.5, 1.0, 2.0, 0.25, 2 / 3, 1 / 3, 2 / 30, 2 / 29.97, 0.1, 1.3]


@pytest.mark.parametrize(
    ("kind", "per_second"),
    [("qwen2_vl", 0), ("qwen2_5_vl", 2), ("qwen2_5_vl", 25), ("qwen3_vl", 0)],
)
def test_positions_are_those_of_transformers(kind: str, per_second: int) -> None:
    for seed in range(40):
        seconds = SECONDS[seed % len(SECONDS)]
        types, grids, spans = drawn(seed, seconds, timed=kind == "qwen3_vl")
        theirs = their_positions(kind, types, grids, [seconds] * len(grids), per_second)
        place, sample = np.arange(len(types)), np.zeros(len(types), np.int64)
        ours = mrope_positions(place, sample, spans, 1, per_second)
        assert np.array_equal(ours, theirs), (seed, seconds)


def test_text_alone_stands_at_its_place() -> None:
    place = np.asarray([0, 1, 2, 0, 1])
    found = mrope_positions(place, np.asarray([0, 0, 0, 1, 1]), [], 1, 0.0)
    assert found.tolist() == [place.tolist()] * 3


def test_frames_with_text_between_them_begin_anew() -> None:
    """A time that is written before each frame makes it a run of its own."""
    grid = Grid(2, 3, 1)
    spans = [Span(1, 6, grid, 0, 0.0), Span(9, 6, grid, 0, 5.0)]
    found = mrope_positions(np.arange(16), np.zeros(16, np.int64), spans, 1, 2.0)
    assert found[:, 7:9].tolist() == [[4, 5]] * 3
    assert found[:, 9:15].T.tolist() == [[6, 6 + y, 6 + x] for y in range(2) for x in range(3)]
    assert found[:, 15].tolist() == [9, 9, 9]


def test_times_of_uneven_frames_are_their_seconds() -> None:
    assert time_positions([3.0, 3.5, 4.49, 9.0], 2.0) == [0, 1, 2, 12]
    assert time_positions([3.0, 3.5, 4.49, 9.0], 0.0) == [0, 1, 2, 3]


def test_a_rotary_embedding_turns_each_frequency_by_its_own_axis() -> None:
    """The reference: each axis alone, a channel at a time."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=8)
    decoder = LlamaForCausalLM(config).model
    plain = decoder.rotary_emb
    rotary = install(decoder, (2, 3, 3))
    assert install(decoder, (2, 3, 3)) is rotary is decoder.rotary_emb
    positions = torch.randint(0, 50, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    x = torch.zeros(2, 7, 64)
    alone = [plain(x, axis) for axis in positions]
    with rotary.at(positions):
        found = rotary(x, torch.arange(7).expand(2, -1))
    axes = [0] * 2 + [1] * 3 + [2] * 3
    for part in (0, 1):
        for channel in range(16):
            expected = alone[axes[channel % 8]][part][..., channel]
            assert torch.equal(found[part][..., channel], expected)
    # without positions of its own it is the plain one
    place = torch.arange(7).expand(2, -1)
    assert all(map(torch.equal, rotary(x, place), plain(x, place)))
    for wrong in ((2, 3, 4), (8,)):
        with pytest.raises(UserError, match=r"sections .* do not fit LlamaModel"):
            install(LlamaForCausalLM(config).model, wrong)


@pytest.mark.parametrize("sections", [(2, 1, 1), (4, 2, 2), (2, 3, 3), (24, 20, 20), (3, 4, 1)])
def test_frequencies_take_turns_as_in_qwen3_vl(sections: tuple[int, int, int]) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}
    shape = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 2 * sum(sections)}
    theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**shape, rope_parameters=rope))
    plain = {"num_hidden_layers": 1, "vocab_size": 8, "rope_theta": 1e4}
    decoder = LlamaForCausalLM(LlamaConfig(**shape, **plain)).model
    rotary = install(decoder, sections, interleaved=True)
    positions = torch.randint(0, 50, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    x = torch.zeros(2, 7, 64)
    with rotary.at(positions):
        found = rotary(x, torch.arange(7).expand(2, -1))
    for ours, own in zip(found, theirs(x, positions), strict=True):
        torch.testing.assert_close(ours, own)


def test_a_config_tells_its_sections() -> None:
    text: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    for kind, config in (("qwen2_vl", Qwen2VLConfig), ("qwen2_5_vl", Qwen2_5_VLConfig)):
        written = config(text_config=text).to_dict()
        found = mrope_of(written)
        assert found is not None
        assert found.sections == (4, 6, 6)
        assert found.tokens_per_second == (4.0 if kind == "qwen2_5_vl" else 0.0)
        assert mrope_of({"model_type": "qwen2", "mrope": found.to_json()}) == found
    newest = Qwen3VLConfig(text_config=text, vision_config={"deepstack_visual_indexes": [5, 11]})
    found = mrope_of(newest.to_dict())
    assert found == MRopeFacts((4, 6, 6), 0.0, interleaved=True)
    assert mrope_of({"model_type": "qwen3", "mrope": found.to_json()}) == found
    assert deepstack_of(newest.to_dict()) == (5, 11)
    assert deepstack_of({"model_type": "qwen3", "deepstack": [5, 11]}) == (5, 11)
    assert deepstack_of({"model_type": "qwen3"}) == ()
    assert mrope_of({"model_type": "qwen2"}) is None
