"""Attention intervals against the rule written out, and through a real transformers model."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import create_causal_mask

from model.batch import to_device
from model.config import FRAME_ATTENTION
from model.mask import BLOCK, additive_mask, block_mask, dense_mask, intervals

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
    frames = torch.from_numpy(row[1])

    def same_frame(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (frames[query] == frames[key]) & (frames[key] >= 0)

    theirs = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 12, 32),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(12)[None],
        or_mask_function=same_frame,
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


def long_row(rng: np.random.Generator, length: int) -> Row:
    """Return a row of samples with frames of up to 200 tokens, padded to a length."""
    sample, block, number, frame = [], [], 0, 0
    while True:
        one: list[int] = []
        for _ in range(rng.integers(1, 6)):
            size = int(rng.integers(1, 200))
            one += [frame if rng.random() < 0.6 else -1] * size
            frame += 1
        if len(sample) + len(one) > length:
            break
        sample += [number] * len(one)
        block += one
        number += 1
    padding = [-1] * (length - len(sample))
    return np.array(sample + padding), np.array(block + padding)


@pytest.mark.parametrize("length", [256, 1024, 1000, 130])
@pytest.mark.parametrize("frame_attention", FRAME_ATTENTION)
def test_a_block_mask_is_the_dense_mask_and_its_full_blocks_are_full(
    length: int, frame_attention: str
) -> None:
    rng = np.random.default_rng(length)
    rows = [intervals(*long_row(rng, length), frame_attention) for _ in range(4)]
    start, end = (torch.from_numpy(np.stack(bounds)) for bounds in zip(*rows, strict=True))
    mask, dense = block_mask(start, end), dense_mask(start, end)
    assert mask.seq_lengths == (length, length)
    blocks = -(-length // BLOCK)
    missing = blocks * BLOCK - length
    tiles = (  # rows, query blocks, key blocks, pairs of a block
        torch.nn.functional.pad(dense[:, 0], (0, missing, 0, missing))
        .view(len(rows), blocks, BLOCK, blocks, BLOCK)
        .transpose(2, 3)
        .flatten(3)
    )
    seen = torch.zeros(len(rows), blocks, blocks, dtype=torch.int32)
    for kind, counts, indices in (
        (1, mask.kv_num_blocks, mask.kv_indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts.dtype == indices.dtype == torch.int32
        for row, query in itertools.product(range(len(rows)), range(blocks)):
            chosen = indices[row, 0, query, : counts[row, 0, query]].long()
            assert chosen.tolist() == sorted(set(chosen.tolist()))
            assert (seen[row, query, chosen] == 0).all()  # never both partial and full
            seen[row, query, chosen] = kind
    assert torch.equal(seen == 2, tiles.all(dim=-1))
    assert torch.equal(seen == 1, tiles.any(dim=-1) & ~tiles.all(dim=-1))
    assert torch.equal(mask.to_dense()[:, 0].bool(), seen > 0)
    place = torch.arange(length)
    pairs = [
        mask.mask_mod(torch.tensor(row), torch.tensor(0), place[:, None], place[None])
        for row in range(len(rows))
    ]
    assert torch.equal(torch.stack(pairs)[:, None], dense)


def test_a_block_mask_has_the_blocks_that_torch_finds_by_trying_every_pair() -> None:
    row = long_row(np.random.default_rng(3), 640)
    start, end = (torch.from_numpy(bound)[None] for bound in intervals(*row))
    ours = block_mask(start, end)
    theirs = create_block_mask(ours.mask_mod, 1, None, 640, 640, device="cpu")
    for name in ("num_blocks", "indices"):
        for kind in ("kv", "full_kv", "q", "full_q"):
            one, two = (getattr(mask, f"{kind}_{name}") for mask in (ours, theirs))
            torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_plain_causal_rows_need_no_mask(
    make_model: Callable[..., Any], make_clip: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    model = make_model(frame_attention="token")
    talks = [([make_clip(seed=k)], "<video>\nWhen?" + "?" * k, "at <t:0.1>") for k in range(3)]
    masked = make_batch(model, *talks)
    plain = replace(masked, causal=True)
    assert model.attention_mask(plain) is None
    real = (torch.arange(masked.input_ids.shape[1]) < masked.lengths[:, None]).flatten()
    assert not real.all()
    one, two = (model.hidden_states(batch)[real] for batch in (masked, plain))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    losses = [model(batch)["ce"] for batch in (masked, plain)]
    grads = [torch.autograd.grad(loss, list(model.projector.parameters())) for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    model.llm.set_attn_implementation("eager")
    assert model.attention_mask(plain) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_gives_losses_and_gradients_of_sdpa(
    make_model: Callable[..., Any],
    make_clip: Callable[..., Any],
    make_batch: Callable[..., Any],
    make_llm: Callable[..., Any],
    dtype: torch.dtype,
) -> None:
    """On CUDA only: flex_attention's backward is not implemented for the CPU."""
    model = make_model(make_llm(width=128)).cuda()
    talks = [([make_clip(seed=k)], "<video>\nWhen?" + "?" * k, "at <t:0.1>") for k in range(2)]
    batch = to_device(make_batch(model, *talks), torch.device("cuda"))
    found = []
    for attention in ("sdpa", "flex_attention"):
        model.llm.set_attn_implementation(attention)
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = model(batch)
        (out["ce"] + out["ar"].sum()).backward()
        found.append([out["ce"], out["ar"], *(p.grad for p in model.parameters())])
    loose = 2e-3 if dtype == torch.float32 else 5e-2
    for dense, flex in zip(*found, strict=True):
        torch.testing.assert_close(flex, dense, rtol=loose, atol=loose * float(dense.abs().max()))
