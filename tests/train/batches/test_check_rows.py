"""Rows in which records would change each other are refused, and no others: by what an LLM computes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.family.__main__ import class_and_config
from model.family.conformance import around
from model.family.limits import apart_up_to
from model.family.rows import text_batch
from model.family.twin import make_twin
from model.vlm import VLM
from shards.errors import UserError
from tests.train.batches.test_plan import lengths_of
from train.batches.lengths import Apart
from train.batches.plan import Cut, make_plan
from train.batches.run_plan import RunPlan, check_rows

LIMIT = 20
"""Tokens up to which the twins keep records apart, or one less."""
SHARED = 3


def llama4() -> Any:
    kind, config = class_and_config("llama4_text")
    config.floor_scale, config.attention_chunk_size = LIMIT, 4096
    return make_twin(kind, config)


def phi3() -> Any:
    kind, config = class_and_config("phi3")
    config.max_position_embeddings = 4 * LIMIT
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": LIMIT,
        "factor": 4.0,
    }
    return make_twin(kind, config)


TWINS = {"llama4": llama4, "phi3": phi3}
ROWS: dict[str, tuple[list[int], Cut]] = {
    "short, packed": ([6, 9, 7, 5], Cut(1, pack_tokens=15)),
    "long rows of short ones": ([9, 9, 9, 9], Cut(1, pack_tokens=40)),
    "one long row beside a short one": ([30, 6], Cut(1, pack_tokens=40)),
    "long ones, packed": ([30, 28], Cut(1, pack_tokens=60)),
    "one a row, by itself": ([30, 6, 25], Cut(1)),
    "one a row, padded": ([30, 6, 25, 12], Cut(2, rows_per_pack=2)),
    "short ones, padded": ([13, 6, 12, 19], Cut(2, rows_per_pack=2)),
}
TURNS = {"short": [4, 6, 5], "as long as a row may be": [6, 5, 5], "long in sum": [9, 9, 9]}
TURNS |= {"one long": [24, 3, 4], "all long": [24, 23]}


@pytest.fixture(scope="module", params=TWINS)
def model(request: pytest.FixtureRequest) -> VLM:
    torch.manual_seed(0)
    made = around(TWINS[request.param]())
    made.masked = True
    return made


def ids_of(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(8, 96, count))


@torch.no_grad()
def alone(model: VLM, ids: Tensor) -> Tensor:
    return model.llm(input_ids=ids[None]).logits[0]


def same(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 1e-3 * theirs.square().mean().sqrt())


def is_refused(model: VLM, plan: RunPlan) -> bool:
    try:
        check_rows(plan, model.llm.config.to_dict(), 4096)
    except UserError as error:
        said = str(error)
    else:
        return False
    assert "records would change each other" in said
    assert "per_device_train_batch_size: 1" in said
    return True


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS)
def test_packs_are_refused_where_their_records_change_each_other(model: VLM, rows: str) -> None:
    sizes, cut = ROWS[rows]
    plan = make_plan(lengths_of(sizes), cut)
    right = True
    for step in range(plan.num_steps):
        for number in range(plan.num_packs[step]):
            pack = [[ids_of(sizes[k], k) for k in row] for row in plan.pack(step, number)]
            logits = model.logits(model.hidden_states(text_batch(*pack)))
            for row, got in zip(pack, logits.view(len(pack), -1, logits.shape[-1]), strict=True):
                parts = got[: sum(map(len, row))].split([len(ids) for ids in row])
                right &= all(
                    same(*pair)
                    for pair in zip(parts, (alone(model, ids) for ids in row), strict=True)
                )
    assert is_refused(model, plan) == (not right)


@torch.no_grad()
@pytest.mark.parametrize("turns", TURNS)
def test_independent_turns_are_refused_where_they_change_each_other(model: VLM, turns: str) -> None:
    sizes, head = TURNS[turns], ids_of(SHARED, 99)
    own = [ids_of(size, k) for k, size in enumerate(sizes)]
    batch = text_batch([torch.cat([head, *own])], turns=[SHARED, *sizes])
    _, *parts = model.logits(model.hidden_states(batch)).split([SHARED, *sizes])
    right = all(
        same(part, alone(model, torch.cat([head, ids]))[SHARED:])
        for part, ids in zip(parts, own, strict=True)
    )
    lengths = lengths_of([SHARED + sum(sizes)])
    apart = Apart(*(np.asarray([value]) for value in (SHARED, max(sizes), 0)))
    plan = make_plan(replace(lengths, apart=apart), Cut(1))
    assert is_refused(model, plan) == (not right)


NESTED = {
    "full_attention": {"rope_type": "longrope"},
    "sliding_attention": {"rope_type": "default"},
}
CONFIGS: list[tuple[dict[str, Any], int | None]] = [
    ({"max_position_embeddings": 4096}, None),
    ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 512}, 512),
    ({"rope_parameters": NESTED, "original_max_position_embeddings": 256}, 256),
    ({"text_config": {"rope_scaling": {"type": "longrope"}, "max_position_embeddings": 64}}, 64),
    ({"attn_temperature_tuning": True, "no_rope_layers": [1, 1], "floor_scale": 8}, None),
    ({"attn_temperature_tuning": False, "no_rope_layers": [1, 0], "floor_scale": 8}, None),
    ({"attn_temperature_tuning": True, "no_rope_layers": [1, 0], "floor_scale": 8}, 7),
    ({"rope_scaling": {"type": "su", "long_factor": [1.0]}, "max_position_embeddings": 64}, 64),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64}, None),
    ({"rope_scaling": None}, None),
]


@pytest.mark.parametrize(("config", "tokens"), CONFIGS)
def test_the_limit_is_read_from_every_form_of_config(
    config: dict[str, Any], tokens: int | None
) -> None:
    found = apart_up_to(config)
    assert (found.tokens if found else None) == tokens
