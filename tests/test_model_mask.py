"""Attention intervals against the rule written out, and through a real transformers model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from model.batch import to_device
from model.mask import FRAME_ATTENTION, additive_mask, dense_mask, intervals

Row = tuple[np.ndarray, np.ndarray]


def lay(*samples: str, padding: int = 0) -> Row:
    """Return (sample, block) of a row; digits are frames, letters text, equal digits one frame."""
    sample, block, frames = [], [], 0
    for number, text in enumerate(samples):
        numbers: dict[str, int] = {}
        for char in text:
            sample.append(number)
            if char.isdigit() and char not in numbers:
                numbers[char] = frames
                frames += 1
            block.append(numbers[char] if char.isdigit() else -1)
    return np.array(sample + [-1] * padding), np.array(block + [-1] * padding)


def allowed(row: Row, frame_attention: str) -> np.ndarray:
    """Return the rule, pair by pair: bool `(queries, keys)`."""
    sample, block = row
    length = len(sample)
    out = np.zeros((length, length), bool)
    for q in range(length):
        for k in range(length):
            if sample[q] < 0 or sample[k] < 0:
                out[q, k] = q == k
            elif sample[q] == sample[k]:
                same_frame = block[q] == block[k] >= 0 and frame_attention == "block"
                out[q, k] = k <= q or same_frame
    return out


def mask_of(row: Row, frame_attention: str = "block") -> Tensor:
    start, end = intervals(*row, frame_attention)
    return dense_mask(torch.from_numpy(start)[None], torch.from_numpy(end)[None])


@st.composite
def packed_rows(draw: st.DrawFn) -> Row:
    sample, block, frame = [], [], 0
    for number in range(draw(st.integers(0, 3))):
        for is_frame, tokens in draw(
            st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=5)
        ):
            sample += [number] * tokens
            block += [frame if is_frame else -1] * tokens
            frame += is_frame
    padding = draw(st.integers(0 if sample else 1, 3))
    return np.array(sample + [-1] * padding), np.array(block + [-1] * padding)


@settings(max_examples=150, deadline=None)
@given(packed_rows(), st.sampled_from(FRAME_ATTENTION))
def test_intervals_are_the_written_rule(row: Row, frame_attention: str) -> None:
    start, end = intervals(*row, frame_attention)
    assert start.dtype == end.dtype == np.int32
    assert (end > start).all()  # no query without a key, which would be NaN
    np.testing.assert_array_equal(
        mask_of(row, frame_attention)[0, 0].numpy(), allowed(row, frame_attention)
    )


def test_a_block_mask_looks_as_drawn() -> None:
    drawn = [
        "x.......",
        "xxx.....",  # the two tokens of the first frame see each other
        "xxx.....",
        "xxxx....",
        "xxxxx...",  # a frame of one token
        ".....x..",  # the next sample
        ".....xx.",
        ".......x",  # padding
    ]
    got = mask_of(lay("a00b1", "cd", padding=1))[0, 0]
    assert ["".join("x" if on else "." for on in row) for row in got] == drawn


def test_neighbouring_frames_without_text_between_stay_apart() -> None:
    mask = mask_of(lay("0011", "00"))[0, 0]
    assert not mask[:2, 2:].any()
    assert mask[2:4, :4].all()
    assert not mask[4:, :4].any()  # frame numbers may not join frames of two samples


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_sample_has_the_mask_that_transformers_makes(
    make_llm: Callable[..., Any], attention: str
) -> None:
    row = lay("ab00112233cd")
    config = make_llm(attention=attention).config
    theirs = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 12, 32),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(12)[None],
        block_sequence_ids=torch.from_numpy(row[1])[None],
    )
    ours = mask_of(row)
    if attention == "eager":
        ours = additive_mask(ours, torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_an_additive_mask_is_zero_or_the_least_number() -> None:
    mask = torch.tensor([[True, False]])
    for dtype in (torch.float32, torch.bfloat16):
        added = additive_mask(mask, dtype)
        assert added.dtype == dtype
        assert added.tolist() == [[0.0, torch.finfo(dtype).min]]


@torch.no_grad()
def run(llm: Any, embeds: Tensor, row: Row, positions: Tensor, frame_attention: str) -> Tensor:
    mask = mask_of(row, frame_attention)
    if llm.config._attn_implementation == "eager":
        mask = additive_mask(mask, torch.float32)
    decoder = llm.get_decoder()
    return decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)[0]


FIRST, SECOND = "ab000112223cde", "f0000g11h"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("frame_attention", FRAME_ATTENTION)
def test_a_sample_beside_another_in_a_row_does_not_notice_it(
    make_llm: Callable[..., Any], attention: str, frame_attention: str
) -> None:
    llm = make_llm(attention=attention)
    first, both = len(FIRST), len(FIRST) + len(SECOND)
    embeds = torch.randn(1, both + 2, 32, generator=torch.Generator().manual_seed(0))
    row = lay(FIRST, SECOND, padding=2)
    positions = torch.cat([torch.arange(first), torch.arange(both + 2 - first)])[None]
    packed = run(llm, embeds, row, positions, frame_attention)
    assert packed.isfinite().all()
    for changed, kept in (
        (slice(0, first), slice(first, both)),
        (slice(first, both), slice(0, first)),
        (slice(both, None), slice(0, both)),
    ):
        other = embeds.clone()
        other[:, changed] = 9 * torch.randn(other[:, changed].shape)
        again = run(llm, other, row, positions, frame_attention)
        assert torch.equal(again[:, kept], packed[:, kept])
        assert not torch.equal(again[:, changed], packed[:, changed])
    for text, kept in ((FIRST, slice(0, first)), (SECOND, slice(first, both))):
        alone = run(llm, embeds[:, kept], lay(text), positions[:, kept], frame_attention)
        torch.testing.assert_close(alone, packed[:, kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("frame_attention", FRAME_ATTENTION)
def test_a_later_frame_changes_no_earlier_token(
    make_llm: Callable[..., Any], attention: str, frame_attention: str
) -> None:
    llm = make_llm(attention=attention)
    row = lay(FIRST)
    embeds = torch.randn(1, len(FIRST), 32, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(len(FIRST))[None]
    before = run(llm, embeds, row, positions, frame_attention)
    for frame in range(4):
        inside = row[1] == frame
        other = embeds.clone()
        other[:, inside] = torch.randn(other[:, inside].shape)
        after = run(llm, other, row, positions, frame_attention)
        begin = int(np.argmax(inside))
        assert torch.equal(after[:, :begin], before[:, :begin])
        changed = (after != before).any(dim=-1)[0]
        assert changed[begin:].all()


def test_only_block_attention_lets_the_cells_of_a_frame_see_each_other(
    make_llm: Callable[..., Any],
) -> None:
    llm, row = make_llm(), lay("a000b")
    embeds = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    other = embeds.clone()
    other[:, 3] += 1
    positions = torch.arange(5)[None]
    for frame_attention, moved in (("block", True), ("token", False)):
        before = run(llm, embeds, row, positions, frame_attention)
        after = run(llm, other, row, positions, frame_attention)
        assert torch.equal(after[:, 1], before[:, 1]) != moved


def test_eager_and_sdpa_agree(make_llm: Callable[..., Any]) -> None:
    row = lay(FIRST, SECOND, padding=2)
    length = len(row[0])
    embeds = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(length)[None]
    one, two = (
        run(make_llm(attention=name), embeds, row, positions, "block") for name in ("eager", "sdpa")
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_flex_attention_gives_the_hidden_states_of_sdpa(
    make_model: Callable[..., Any], make_clip: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    """On CUDA only: flex_attention's backward is not implemented for the CPU."""
    model = make_model().cuda()
    talks = [([make_clip(seed=k)], "<video>\nWhen?" + "?" * k, "at <t:0.1>") for k in range(2)]
    batch = to_device(make_batch(model, *talks), torch.device("cuda"))
    dense = model.hidden_states(batch)
    model.llm.set_attn_implementation("flex_attention")
    flex = model.hidden_states(batch)
    torch.testing.assert_close(flex, dense, atol=2e-4, rtol=2e-3)
