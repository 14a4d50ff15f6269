"""Sliding windows and chunks, pair by pair against the rule written out, and in cached answers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from model.batch import Batch
from model.config import FRAME_ATTENTION
from model.family.masks import frame_starts, step_masks
from model.family.windows import reaches
from model.generate import Piece, choose, generate
from model.mask import Reach, additive_mask, block_mask, dense_mask, intervals
from model.vlm import VLM
from train.batches.collate import collate, pack
from train.data.records import Turn

Llm = Callable[..., Any]
WINDOW = 8


def allowed(
    sample: np.ndarray, block: np.ndarray, reach: Reach, frame_attention: str
) -> np.ndarray:
    """Return the rule, pair by pair: bool `(queries, keys)`."""
    length = len(sample)
    first = {s: int(np.flatnonzero(sample == s)[0]) for s in set(sample.tolist())}
    position = [k - first[s] for k, s in enumerate(sample.tolist())]
    out = np.zeros((length, length), bool)
    for q in range(length):
        for k in range(length):
            if sample[q] < 0 or sample[q] != sample[k]:
                out[q, k] = sample[q] < 0 and q == k
                continue
            same = block[q] == block[k] >= 0
            inside = k <= q or (same and frame_attention == "block")
            near = True
            if reach.window is not None:
                near = position[q] - position[k] < reach.window
            if reach.chunk is not None:
                near = position[q] // reach.chunk == position[k] // reach.chunk
            out[q, k] = inside and (near or same)
    return out


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    sample, block, frame = [], [], 0
    for number in range(draw(st.integers(1, 3))):
        for is_frame, tokens in draw(
            st.lists(st.tuples(st.booleans(), st.integers(1, 7)), min_size=1, max_size=5)
        ):
            sample += [number] * tokens
            block += [frame if is_frame else -1] * tokens
            frame += is_frame
    padding = draw(st.integers(0, 3))
    return np.array(sample + [-1] * padding), np.array(block + [-1] * padding)


REACHES = st.one_of(
    st.builds(Reach, window=st.integers(1, 9)), st.builds(Reach, chunk=st.integers(1, 9))
)


@settings(max_examples=60, deadline=None)
@given(packed_rows(), REACHES, st.sampled_from(FRAME_ATTENTION))
def test_every_form_of_a_mask_is_the_written_rule(
    row: tuple[np.ndarray, np.ndarray], reach: Reach, frame_attention: str
) -> None:
    sample, block = row
    length = len(sample)
    place = np.arange(length)
    first = np.array([np.flatnonzero(sample == s)[0] for s in sample])
    position = torch.from_numpy(np.where(sample >= 0, place - first, place))[None]
    of_frame = [np.flatnonzero(block == b)[0] if b >= 0 else k for k, b in enumerate(block)]
    start, end = (torch.from_numpy(b)[None] for b in intervals(sample, block, frame_attention))
    narrow = reach.narrowed(start, position, torch.tensor(of_frame)[None])
    assert narrow.dtype == torch.int32
    assert (narrow[:, 1:] >= narrow[:, :-1]).all()  # as block_mask needs it
    expected = allowed(sample, block, reach, frame_attention)
    np.testing.assert_array_equal(dense_mask(narrow, end)[0, 0].numpy(), expected)
    flex = block_mask(narrow, end)
    key = torch.arange(length)
    pairs = flex.mask_mod(torch.tensor(0), torch.tensor(0), key[:, None], key[None])
    np.testing.assert_array_equal(pairs.numpy(), expected)


def sliding(kind: str, attention: str = "sdpa") -> Any:
    """Return a random LLM that slides: in all layers, or in two of three."""
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": True,
        "attn_implementation": attention,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mistral":
            return MistralForCausalLM(MistralConfig(num_hidden_layers=2, **sizes)).eval()
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config = Gemma3TextConfig(num_hidden_layers=3, layer_types=kinds, **sizes)
        return Gemma3ForCausalLM(config).eval()


def expected_masks(model: VLM, batch: Batch, sample: np.ndarray) -> dict[str, np.ndarray]:
    """Return each kind's mask of a batch by the written rule."""
    rows, length = batch.input_ids.shape
    block = np.full(rows * length, -1)
    number = 0
    for group in batch.groups:
        for tokens, closing in zip(group.token_index, group.end_index, strict=True):
            block[tokens.numpy()] = block[int(closing)] = number
            number += 1
    return {
        kind: np.stack(
            [
                allowed(s, b, reach, model.config.frame_attention)
                for s, b in zip(sample, block.reshape(rows, length), strict=True)
            ]
        )
        for kind, reach in reaches(model.llm.config).items()
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("frame_attention", FRAME_ATTENTION)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_a_batch_gives_each_kind_of_layer_the_written_rule(
    make_model: Callable[..., VLM],
    make_clip: Callable[..., Any],
    make_batch: Callable[..., Batch],
    kind: str,
    packed: bool,
    frame_attention: str,
    attention: str,
) -> None:
    model = make_model(sliding(kind, attention), frame_attention=frame_attention)
    clips = [make_clip(seed=k, frames=3) for k in range(2)]
    talks = [([clip], "<video>\nWhen?" + " so?" * k, "at <t:0.1>") for k, clip in enumerate(clips)]
    if packed:
        batch, sample = packed_batch(model, talks)
    else:
        batch = make_batch(model, *talks)
        place = torch.arange(batch.input_ids.shape[1])
        sample = torch.where(place < batch.lengths[:, None], 0, -1).numpy()
    given_ = model.attention_mask(batch)
    masks = given_ if isinstance(given_, dict) else {"": given_}
    expected = expected_masks(model, batch, sample)
    assert masks.keys() == expected.keys()
    for name, mask in masks.items():
        seen = mask[:, 0] if attention == "sdpa" else mask[:, 0] == 0
        np.testing.assert_array_equal(seen.numpy(), expected[name])
    assert model(batch)["ce"].isfinite()


def packed_batch(model: VLM, talks: list[Any]) -> tuple[Batch, np.ndarray]:
    """Return the talks in one row, and the number of each token's record."""
    from train.batches.chat import Chat
    from train.batches.collate import lay_out

    chat = Chat(model.tokenizer, model.lape.tokens if model.lape else None)
    rows = []
    for clips, *texts in talks:
        turns = [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)]
        encoded = chat.encode(turns, [clip.info.duration for clip in clips])
        rows.append(lay_out(encoded, [clip.info for clip in clips], model.config, "average"))
    row = pack(rows)
    clips_of_row = [clip for talk in talks for clip in talk[0]]
    batch = collate([row], [clips_of_row], model.config, ["packed"], length=len(row) + 3)
    return batch, np.pad(row.sample, (0, 3), constant_values=-1)[None]


def test_a_frame_longer_than_the_window_needs_a_mask_even_where_rows_are_causal(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    model = make_model(sliding("mistral"), frame_attention="token")
    long = make_batch(model, ([make_clip()], "<video>\nWhen?", "now"))
    assert long.causal
    assert max(group.grid.cells for group in long.groups) + 1 > WINDOW
    assert model.attention_mask(long) is not None
    text = make_batch(model, ([], "When? " * 9, "now"))
    assert model.attention_mask(text) is None  # the LLM's own, which slides


def test_text_has_no_frame_and_cells_have_that_of_their_first(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    model = make_model()
    batch = make_batch(
        model,
        ([], "Where is it now?", "here"),
        ([make_clip(frames=2)], "<video>\nWhen?", "now"),
    )
    starts = frame_starts(batch)
    place = torch.arange(batch.input_ids.shape[1]).expand_as(starts)
    flat = starts.flatten()
    inside = torch.zeros_like(flat, dtype=torch.bool)
    for group in batch.groups:
        for tokens, closing in zip(group.token_index, group.end_index, strict=True):
            whole = torch.cat([tokens, closing[None]])
            inside[whole] = True
            assert (flat[whole] == tokens[0] % starts.shape[1]).all()
    assert torch.equal(flat[~inside], place.flatten()[~inside])


def test_a_new_token_sees_by_positions_of_its_record_and_never_by_places_of_the_cache() -> None:
    lengths = torch.tensor([12, 5])
    keys = torch.cat([torch.arange(12).expand(2, 12), lengths[:, None]], dim=1)
    seen = torch.cat([torch.arange(12) < lengths[:, None], torch.ones(2, 1, dtype=torch.bool)], 1)
    kinds = {"sliding_attention": Reach(window=4), "chunked_attention": Reach(chunk=4)}
    masks = step_masks(kinds, seen, keys, lengths, "sdpa", torch.float32)
    slides, chunks = masks["sliding_attention"], masks["chunked_attention"]
    assert slides.shape == (2, 1, 1, 13)
    assert torch.nonzero(slides[0, 0, 0]).flatten().tolist() == [9, 10, 11, 12]
    assert torch.nonzero(slides[1, 0, 0]).flatten().tolist() == [2, 3, 4, 12]
    assert torch.nonzero(chunks[0, 0, 0]).flatten().tolist() == [12]  # 12 begins a chunk
    assert torch.nonzero(chunks[1, 0, 0]).flatten().tolist() == [4, 12]


@torch.no_grad()
def reread(model: VLM, batch: Batch, steps: int) -> list[Piece]:
    """Answer one prompt without a cache, under masks by the written rule."""
    embeds = model.embed(batch)
    length = embeds.shape[1]
    answer: list[Piece] = []
    for _ in range(steps):
        total = embeds.shape[1]
        sample = np.zeros((1, total), int)
        longer = torch.nn.functional.pad(batch.input_ids, (0, total - length))
        grown = Batch(**{**vars(batch), "input_ids": longer})
        masks: dict[str, Any] = {
            kind: torch.from_numpy(mask)[:, None]
            for kind, mask in expected_masks(model, grown, sample).items()
        }
        if model.llm.config._attn_implementation == "eager":
            masks = {kind: additive_mask(mask, torch.float32) for kind, mask in masks.items()}
        states = model.decode(
            embeds, masks if len(masks) > 1 else masks.popitem()[1], torch.arange(total)[None]
        )
        (piece,) = choose(model, states[:, -1])
        answer.append(piece)
        if piece.axis < 0:
            vector: Tensor = model.llm.get_input_embeddings()(torch.tensor([piece.token]))[0]
        else:
            vector = model.lape.embed(piece.axis, torch.tensor([piece.coord]))[0]
        embeds = torch.cat([embeds, vector[None, None]], dim=1)
    return answer


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("frame_attention", FRAME_ATTENTION)
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_cached_answers_slide_as_whole_rows_do(
    make_model: Callable[..., VLM],
    make_clip: Callable[..., Any],
    make_batch: Callable[..., Batch],
    kind: str,
    frame_attention: str,
    attention: str,
) -> None:
    model = make_model(
        sliding(kind, attention),
        frame_attention=frame_attention,
        num_temporal_tokens=16,
        num_spatial_tokens=16,
    )
    talks: list[Any] = [
        ([make_clip(1)], "<video>\nWhere is it at <t:1.25>?"),
        ([make_clip(2, frames=3)], "Much text comes before it.<video>\nWhen is it seen?"),
        ([], "Say <x:0.5>."),
    ]
    batch = make_batch(model, *talks, prompt=True)
    answers = generate(model, batch, stop=frozenset(), max_new_tokens=WINDOW + 4)
    for talk, answer in zip(talks, answers, strict=True):
        theirs = reread(model, make_batch(model, talk, prompt=True), WINDOW + 4)
        assert [(p.token, p.axis) for p in answer] == [(p.token, p.axis) for p in theirs]
        assert [p.coord for p in answer] == pytest.approx([p.coord for p in theirs], abs=1e-4)
