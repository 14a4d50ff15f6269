"""Attention a sample at a time is attention under the whole mask, and costs what the samples cost.

pytest tests/model/test_by_sample.py
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import model.cpu.by_sample
from model.config import FRAME_ATTENTION
from model.cpu.by_sample import Samples, attend, by_sample
from model.family.conformance import text_batch, try_twin
from model.mask import Reach, dense_mask, intervals, other_turns
from model.vlm import VLM

HEADS, DIM = 4, 8


class Layer(nn.Module):
    """What the function asks of an attention layer."""

    num_key_value_groups = 2
    is_causal = True


@st.composite
def packed(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (sample, frame, turn) of rows of one length: int `(rows, length)`."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        sample, frame, turn, number = [], [], [], 0
        for k in range(draw(st.integers(0, 4))):
            own = draw(st.booleans())
            for part in range(draw(st.integers(1, 4))):
                tokens, seen = draw(st.integers(1, 6)), draw(st.booleans()) and not part
                sample += [k] * tokens
                frame += [number if seen else -1] * tokens
                turn += [part * own] * tokens
                number += seen
        rows.append((sample, frame, turn))
    length = max(1, *(len(row[0]) for row in rows)) + draw(st.integers(0, 3))
    filled = [
        [row[k] + [nothing] * (length - len(row[k])) for row in rows]
        for k, nothing in enumerate((-1, -1, 0))
    ]
    sample, frame, turn = map(np.array, filled)
    return sample, frame, turn


def attended(
    attention: Callable[..., Any], mask: Tensor, real: Tensor, seed: int
) -> tuple[Tensor, ...]:
    """Return what attention of drawn queries, keys and values gives, and its gradients."""
    drawn = torch.Generator().manual_seed(seed)
    rows, length = real.shape
    own = [
        torch.randn(rows, heads, length, DIM, generator=drawn).requires_grad_()
        for heads in (HEADS, HEADS // 2, HEADS // 2)
    ]
    out = attention(Layer(), *own, mask, dropout=0.0, scaling=DIM**-0.5)[0]
    assert out.shape == (rows, length, HEADS, DIM)
    # of padding nothing is used
    out = out * real[..., None, None]
    (out * torch.randn(out.shape, generator=drawn)).sum().backward()
    return out.detach(), *(one.grad for one in own)  # type: ignore[misc]


@settings(max_examples=150, deadline=None)
@given(
    packed(), st.sampled_from(FRAME_ATTENTION), st.booleans(), st.sampled_from([None, 3]),
    st.integers(0, 99),
)  # fmt: skip
def test_it_is_attention_under_the_whole_mask(
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    frames: str,
    turns: bool,
    window: int | None,
    seed: int,
) -> None:
    sample, frame, turn = rows
    bounds = [intervals(s, f, frames) for s, f in zip(sample, frame, strict=True)]
    start, end = (torch.from_numpy(np.stack(one)) for one in zip(*bounds, strict=True))
    others = None
    if turns:
        found = [other_turns(s, t) for s, t in zip(sample, turn, strict=True)]
        others = tuple(torch.from_numpy(np.stack(one)) for one in zip(*found, strict=True))
    place = torch.arange(sample.shape[1]).expand(sample.shape)
    narrow = Reach(window=window).narrowed(start, place, place, others)  # type: ignore[arg-type]
    mask = dense_mask(narrow, end, others)  # type: ignore[arg-type]
    real = torch.from_numpy(sample >= 0)
    expected = attended(sdpa_attention_forward, mask.clone(), real, seed)
    plain = window is None and others is None
    mask = by_sample(mask, start, end, real.sum(1), plain=plain)
    several = max(len(set(row[row >= 0])) for row in sample) > 1
    samples: Samples | None = getattr(mask, "samples", None)
    assert (samples is not None) == several
    for ours, theirs in zip(attended(attend, mask, real, seed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if samples:
        whole = torch.tril(torch.ones(mask.shape[2:], dtype=torch.bool))
        same = torch.from_numpy(sample[:, :, None] == sample[:, None, :])
        pairs = real[:, :, None] & real[:, None, :]
        # where it says so, no mask is needed in a sample; else it is read
        assert not samples.causal or torch.equal(mask[:, 0] & pairs, whole & same & pairs)


def test_it_computes_the_squares_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, bool]] = []

    def counted(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **how: Any) -> Any:
        seen.append((q.shape[2], k.shape[2], mask is None))
        return sdpa_attention_forward(module, q, k, v, mask, **how)

    monkeypatch.setattr(model.cpu.by_sample, "sdpa_attention_forward", counted)
    sample = np.array([0] * 5 + [1] * 3 + [2] * 4 + [-1] * 2)
    for frames, causal in (("token", True), ("block", False)):
        frame = np.array([-1, 0, 0] + [-1] * 11)
        start, end = (torch.from_numpy(one)[None] for one in intervals(sample, frame, frames))
        mask = by_sample(dense_mask(start, end), start, end, torch.tensor([12]), plain=True)
        attended(attend, mask, torch.from_numpy(sample >= 0)[None], 0)
        assert seen == [(n, n, causal) for n in (5, 3, 4, 2)]
        seen.clear()
    # no mask, or one of a single sample: as transformers has it
    attended(attend, torch.ones(1, 1, 14, 14, dtype=torch.bool), torch.ones(1, 14).bool(), 0)
    assert seen == [(14, 14, False)]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_model_packed_is_its_samples_and_so_are_its_gradients(
    kind: str, make_llm: Callable[..., Any], make_model: Callable[..., VLM]
) -> None:
    assert AttentionInterface()["sdpa"] is attend
    verdict = try_twin(type(make_llm(kind)), make_llm(kind).config)
    assert "sdpa" in verdict.right(packed=True, block=True, apart=True)
    vlm = make_model(make_llm(kind))
    ids = [torch.arange(9) + 20, torch.arange(5) + 90, torch.arange(7) + 200]
    table = vlm.llm.get_input_embeddings().weight

    def gradient(*rows: list[Tensor], kept: bool = True) -> Tensor:
        vlm.zero_grad()
        batch = text_batch(*rows)
        # else computed once more in the backward pass, under the same masks
        run = (
            vlm.hidden_states
            if kept
            else partial(checkpoint, vlm.hidden_states, use_reentrant=False)
        )
        found = run(batch)
        real = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
        vlm.logits(found[real.flatten()]).square().sum().backward()
        assert table.grad is not None
        return table.grad.clone()

    apart = sum(gradient([row]) for row in ids)
    for packed_ in ([ids], [ids[:2], ids[2:]]):
        torch.testing.assert_close(gradient(*packed_), apart, rtol=1e-4, atol=1e-4)
        assert torch.equal(gradient(*packed_, kept=False), gradient(*packed_))
