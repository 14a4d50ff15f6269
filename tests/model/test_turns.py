"""The mask of turns that do not see each other, in every form, against the rule written out."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from model.config import FRAME_ATTENTION
from model.mask import BLOCK, Reach, block_mask, dense_mask, intervals, other_turns


class Laid(NamedTuple):
    """A packed row, one entry per token."""

    sample: np.ndarray
    block: np.ndarray
    turn: np.ndarray
    position: np.ndarray


def lay(records: list[tuple[list[tuple[bool, int]], list[int]]], padding: int = 0) -> Laid:
    """Return a row of records: what is shared, as (is a frame, tokens); tokens of each turn."""
    sample, block, turn, position, frames = [], [], [], [], 0
    for number, (shared, turns) in enumerate(records):
        count = 0
        for is_frame, tokens in shared:
            block += [frames if is_frame else -1] * tokens
            frames += is_frame
            count += tokens
        sample += [number] * (count + sum(turns))
        turn += [0] * count
        position += range(count)
        for k, tokens in enumerate(turns, start=1):
            turn += [k] * tokens
            block += [-1] * tokens
            position += range(count, count + tokens)
    columns = (sample, -1), (block, -1), (turn, 0)
    arrays = [np.array(values + [fill] * padding, np.int64) for values, fill in columns]
    return Laid(*arrays, np.array([*position, *range(padding)], np.int64))


def allowed(row: Laid, frame_attention: str, reach: Reach) -> np.ndarray:
    """Return the rule, pair by pair: bool `(queries, keys)`."""
    length = len(row.sample)
    out = np.zeros((length, length), bool)
    for q in range(length):
        for k in range(length):
            same_frame = row.block[q] == row.block[k] >= 0
            before = k <= q or (same_frame and frame_attention == "block")
            at = row.position[q], row.position[k]
            near = same_frame or bool(reach.sees(*(torch.tensor(p) for p in at)))
            if row.sample[q] < 0 or row.sample[k] < 0:
                out[q, k] = q == k
            else:
                seen = row.turn[k] in (0, row.turn[q])
                out[q, k] = row.sample[q] == row.sample[k] and seen and before and near
    return out


def bounds(
    row: Laid, frame_attention: str, reach: Reach
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    start, end = (
        torch.from_numpy(b)[None] for b in intervals(row.sample, row.block, frame_attention)
    )
    first, behind = (torch.from_numpy(b)[None] for b in other_turns(row.sample, row.turn))
    assert first.dtype == behind.dtype == torch.int32
    of_frame = [
        int(np.flatnonzero(row.block == b)[0]) if b >= 0 else k for k, b in enumerate(row.block)
    ]
    places = torch.from_numpy(row.position)[None], torch.tensor(of_frame)[None]
    others = first, behind
    return reach.narrowed(start, *places, others), end, others


SHARED = st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=4)
TURNS = st.lists(st.integers(1, 5), max_size=4)
REACHES = st.one_of(
    st.just(Reach()),
    st.builds(Reach, window=st.integers(1, 9)),
    st.builds(Reach, chunk=st.integers(1, 9)),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(SHARED, TURNS).filter(lambda r: r[0] or r[1]), min_size=1, max_size=3),
    st.integers(0, 3),
    REACHES,
    st.sampled_from(FRAME_ATTENTION),
)
def test_every_form_of_the_mask_is_the_written_rule(
    records: list[tuple[list[tuple[bool, int]], list[int]]],
    padding: int,
    reach: Reach,
    frame_attention: str,
) -> None:
    row = lay(records, padding)
    start, end, others = bounds(row, frame_attention, reach)
    expected = allowed(row, frame_attention, reach)
    np.testing.assert_array_equal(dense_mask(start, end, others)[0, 0].numpy(), expected)
    key = torch.arange(len(row.sample))
    zero = torch.tensor(0)
    pairs = block_mask(start, end, others).mask_mod(zero, zero, key[:, None], key[None])
    np.testing.assert_array_equal(pairs.numpy(), expected)


def test_the_mask_of_two_records_looks_as_drawn() -> None:
    row = lay([([(False, 1), (True, 2)], [2, 1, 2]), ([], [1, 2])], padding=1)
    start, end, others = bounds(row, "block", Reach())
    drawn = [
        "x...........",
        "xxx.........",  # a frame of two tokens
        "xxx.........",
        "xxxx........",  # the first turn
        "xxxxx.......",
        "xxx..x......",  # the second
        "xxx...x.....",
        "xxx...xx....",
        "........x...",  # turns of a record that share nothing
        ".........x..",
        ".........xx.",
        "...........x",  # padding
    ]
    got = dense_mask(start, end, others)[0, 0]
    assert ["".join("x" if on else "." for on in line) for line in got] == drawn


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_flex_attention_leave_out_what_no_query_sees(
    seed: int, window: int | None
) -> None:
    rng = np.random.default_rng(seed)
    records = [
        (
            [(False, 30), *[(True, int(n)) for n in rng.integers(5, 60, 4)]],
            rng.integers(20, 300, 4).tolist(),
        )
        for _ in range(2)
    ]
    row = lay(records, padding=int(rng.integers(0, 50)))
    start, end, others = bounds(row, "block", Reach(window=window))
    dense = dense_mask(start, end, others)
    mask, length = block_mask(start, end, others), len(row.sample)
    theirs = create_block_mask(mask.mask_mod, 1, None, length, length, device="cpu")
    ours, full = mask.to_dense().bool(), theirs.to_dense().bool()
    assert (ours | ~full).all(), "every block that holds a pair is touched"
    # what is skipped or taken whole is so, pair by pair
    size = -(-length // BLOCK) * BLOCK
    padded = torch.zeros(size, size, dtype=torch.bool)
    padded[:length, :length] = dense[0, 0]
    tiles = padded.view(size // BLOCK, BLOCK, size // BLOCK, BLOCK).transpose(1, 2)
    wholly = torch.zeros_like(ours[0, 0])
    assert mask.full_kv_num_blocks is not None
    for query, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        wholly[query, mask.full_kv_indices[0, 0, query, :count]] = True
    assert tiles[wholly].all()
    assert not tiles[~ours[0, 0]].any()
    if window is None:
        hidden = ~full[0, 0] & torch.ones_like(full[0, 0]).tril()
        assert (ours[0, 0] & hidden).sum() < hidden.sum(), "blocks of other turns are left out"
