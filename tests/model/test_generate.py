"""Cached, batched answers equal greedy decoding that reads everything again at each step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.batch import Batch
from model.generate import Piece, choose, generate, write_answer
from model.mask import additive_mask
from model.vlm import VLM

STEPS = 12


@torch.no_grad()
def reread(model: VLM, batch: Batch, stop: frozenset[int]) -> list[Piece]:
    """Answer one prompt without a cache: the whole row passes through the LLM for each token."""
    embeds = model.embed(batch)
    length = embeds.shape[1]
    block = torch.full((length,), -1)
    for number, place in enumerate(
        sorted(int(k) for g in batch.groups for k in g.token_index[:, 0])
    ):
        group = next(g for g in batch.groups if place in g.token_index[:, 0])
        block[place : place + group.grid.cells + 1] = number
    answer: list[Piece] = []
    for _ in range(STEPS):
        total = embeds.shape[1]
        mask = torch.ones(total, total, dtype=torch.bool).tril()
        if model.config.frame_attention == "block":
            mask[:length, :length] |= (block[:, None] == block) & (block >= 0)
        mask = mask[None, None]
        if model.llm.config._attn_implementation == "eager":
            mask = additive_mask(mask, torch.float32)
        states = model.llm.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=torch.arange(total)[None],
            use_cache=False,
        ).last_hidden_state
        (piece,) = choose(model, states[:, -1])
        if piece.token in stop:
            break
        answer.append(piece)
        embeds = torch.cat([embeds, embedded(model, piece)[None, None]], dim=1)
    return answer


def embedded(model: VLM, piece: Piece) -> Tensor:
    if piece.axis < 0:
        return model.llm.get_input_embeddings().weight[piece.token]
    table = model.lape.input_tables[piece.axis]
    place = piece.coord * (len(table) - 1)
    low = min(int(place), len(table) - 2)
    return table[low] + (place - low) * (table[low + 1] - table[low])


def same(ours: list[Piece], theirs: list[Piece]) -> None:
    assert [(p.token, p.axis) for p in ours] == [(p.token, p.axis) for p in theirs]
    assert [p.coord for p in ours] == pytest.approx([p.coord for p in theirs], abs=1e-4)


@pytest.fixture
def talks(make_clip: Callable[..., Any]) -> list[tuple[Any, ...]]:
    return [
        ([make_clip(1)], "<video>\nWhere is it at <t:1.25>?"),
        (
            [make_clip(2, frames=3)],
            "Much text comes before it.<video>\nWhen is <x:0.2><y:0.7> seen?",
        ),
        ([], "Say <x:0.5>."),
    ]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("frame_attention", ["block", "token"])
@pytest.mark.parametrize("preset", ["plus", "st"])
def test_answers_with_a_cache_equal_reading_all_again(
    make_llm: Callable[..., Any],
    make_model: Callable[..., VLM],
    make_batch: Callable[..., Batch],
    talks: list[tuple[Any, ...]],
    preset: str,
    frame_attention: str,
    attention: str,
) -> None:
    model = make_model(
        make_llm(attention=attention),
        lape_preset=preset,
        frame_attention=frame_attention,
        num_temporal_tokens=16,  # few, so that the mass of an axis does not always win
        num_spatial_tokens=16,
    )
    batch = make_batch(model, *talks, prompt=True)
    assert len(set(batch.lengths.tolist())) == 3
    answers = generate(model, batch, stop=frozenset(), max_new_tokens=STEPS)
    assert all(len(answer) == STEPS for answer in answers)
    axes = {piece.axis for answer in answers for piece in answer}
    assert -1 in axes
    assert len(axes) > 1  # text and coordinates
    for talk, answer in zip(talks, answers, strict=True):
        alone = make_batch(model, talk, prompt=True)
        same(answer, reread(model, alone, frozenset()))
        same(generate(model, alone, stop=frozenset(), max_new_tokens=STEPS)[0], answer)


def test_each_answer_ends_before_its_own_stop_token(
    make_model: Callable[..., VLM],
    make_batch: Callable[..., Batch],
    talks: list[tuple[Any, ...]],
) -> None:
    model = make_model(enable_lape=False)
    batch = make_batch(model, *talks, prompt=True)
    free = generate(model, batch, stop=frozenset(), max_new_tokens=STEPS)
    stop = frozenset({free[0][4].token, free[1][7].token})
    stopped = generate(model, batch, stop=stop, max_new_tokens=STEPS)
    for whole, cut in zip(free, stopped, strict=True):
        tokens = [piece.token for piece in whole]
        ends = [k for k, token in enumerate(tokens) if token in stop]
        same(cut, whole[: ends[0]] if ends else whole)
    assert len({len(cut) for cut in stopped}) > 1
    assert [len(a) for a in generate(model, batch, stop=frozenset(), max_new_tokens=3)] == [3] * 3


def test_without_lape_answers_are_those_of_transformers(
    make_llm: Callable[..., Any],
    make_model: Callable[..., VLM],
    make_batch: Callable[..., Batch],
) -> None:
    llm = make_llm()
    model = make_model(llm, enable_lape=False)
    for text in ("Where is it?", "A longer question about nothing at all."):
        batch = make_batch(model, ([], text), prompt=True)
        theirs = llm.generate(
            batch.input_ids, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False
        )[0, batch.input_ids.shape[1] :]
        (ours,) = generate(model, batch, stop=frozenset(), max_new_tokens=STEPS)
        assert [piece.token for piece in ours] == theirs.tolist()


def test_an_axis_wins_by_its_whole_mass_and_reads_between_anchors(
    make_model: Callable[..., VLM],
) -> None:
    model = make_model(num_temporal_tokens=20, num_spatial_tokens=20)
    direction = torch.eye(32)[0]
    head, tables = model.llm.get_output_embeddings().weight, model.lape.output_tables
    for mass in (1.5, 0.5):
        with torch.no_grad():
            head.zero_()
            head[5, 0] = 1.0  # the text's best
            for axis in range(3):
                log_target = model.lape.target(axis, torch.tensor([0.333]))[0].log().clamp(min=-30)
                shift = mass if axis == 1 else -9
                tables[axis].copy_((log_target + shift)[:, None] * direction)
        assert model.logits(direction[None])[0, 512:].max() < 1.0  # no single anchor beats it
        (piece,) = choose(model, direction[None])
        if mass < 1:
            assert piece == Piece(5)
            continue
        assert piece.axis == 1
        assert piece.coord == pytest.approx(0.333, abs=1e-3)
        assert piece.token == model.lape.tokens.first[1] + round(0.333 * 19)


def test_a_written_answer_keeps_its_coordinates_in_order(make_model: Callable[..., VLM]) -> None:
    model = make_model()
    words = model.tokenizer("red from ", add_special_tokens=False).input_ids
    to = model.tokenizer(" to ", add_special_tokens=False).input_ids
    pieces = [
        *(Piece(token) for token in words),
        Piece(model.lape.tokens.token_id(0, 0.25), 0, 0.25),
        *(Piece(token) for token in to),
        Piece(model.lape.tokens.token_id(0, 0.5), 0, 0.5),
        Piece(model.lape.tokens.token_id(2, 0.31), 2, 0.31),
        Piece(model.lape.tokens.token_id(1, 1.0), 1, 1.0),
    ]
    written = write_answer(model, pieces, duration=8.0)
    assert written == "red from <t:2.000000> to <t:4.000000><x:0.310000><y:1.000000>"
    assert write_answer(model, [], duration=8.0) == ""
    ids = [piece.token for piece in pieces]
    assert model.tokenizer.decode(ids) == (
        "red from <TEMP-025> to <TEMP-050><WIDTH-031><HEIGHT-099>"
    )


def test_a_written_answer_reads_back_as_the_same_coordinates(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    model = make_model()
    pieces = [Piece(model.lape.tokens.token_id(a, u), a, u) for a, u in ((0, 0.123), (2, 0.987))]
    text = write_answer(model, pieces, duration=5.0)  # the clip's
    batch = make_batch(model, ([make_clip(frames=5)], "<video>\nWhen?", text))
    kept = batch.label_axis >= 0
    assert batch.label_axis[kept].tolist() == [0, 2]
    assert batch.labels[kept].tolist() == [piece.token for piece in pieces]
    assert batch.label_coord[kept].tolist() == pytest.approx([0.123, 0.987], abs=1e-4)
