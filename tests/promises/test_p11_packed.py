"""P11: packed, padded and single-record losses agree; no record sees another, no frame a later one.

To the bit: other features in record A leave B as it was, and another frame t every prediction up to it.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.batch import Batch
from model.vlm import VLM
from train.ask import FreshClip
from train.batches.chat import Chat
from train.batches.collate import Row, collate, lay_out, pack
from train.data.records import Turn

CASES = [(frames, attn) for frames in ("block", "token") for attn in ("sdpa", "eager")]


@pytest.fixture(scope="module")
def talks(make_clip: Callable[..., FreshClip]) -> list[tuple[list[FreshClip], list[str]]]:
    """Four conversations; the second is about no clip, the last about two, one of them once more."""
    first, second, third = make_clip(1, 4), make_clip(2, 3, (4, 4)), make_clip(3, 1)
    # the second one's frames are far apart, and not evenly
    uneven = replace(second.info, timestamps=np.array([2.0, 9.0, 31.0]), start=2.0, end=40.0)
    second = replace(second, info=uneven)
    return [
        ([first], ["<video> When?", "from <t:0.5> to <t:1.5>", "Where?", "<x:0.25>"]),
        ([], ["Who is there?", "nobody at all"]),
        ([third], ["<image>", "a circle"]),
        ([second, first], ["<video> or <video>?", "at <t:2>"]),
    ]


@pytest.fixture(scope="module")
def models(make_llm: Callable[..., Any], make_model: Callable[..., VLM]) -> dict[Any, VLM]:
    return {
        (frames, attn): make_model(make_llm(attention=attn), frame_attention=frames)
        for frames, attn in CASES
    }


def lay(model: VLM, talk: tuple[list[FreshClip], list[str]]) -> Row:
    clips, texts = talk
    chat = Chat.of(model)
    turns = [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)]
    infos = [clip.info for clip in clips]
    encoded = chat.encode(turns, [info.duration for info in infos])
    return lay_out(encoded, infos, model.config, "average")


def batch_of(model: VLM, *rows: list[Any], length: int = 0) -> Batch:
    """Each row is a list of conversations."""
    laid = [pack([lay(model, talk) for talk in row]) for row in rows]
    clips = [[clip for own, _ in row for clip in own] for row in rows]
    names = [f"{k}" for k, row in enumerate(rows) for _ in row]
    return collate(laid, clips, model.config, names, with_copy=True, length=length)


def sums(model: VLM, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        out = model(batch)
    parts = ["ce", "coordinate_ce", "ar", "ar_copy", "ar_count"]
    return np.concatenate([out[name].reshape(-1).double().numpy() for name in parts])


@pytest.mark.parametrize("case", CASES)
def test_packed_padded_and_single_records_have_the_same_losses(
    models: dict[Any, VLM], talks: list[Any], case: tuple[str, str]
) -> None:
    model = models[case]
    alone = sum(sums(model, batch_of(model, [talk])) for talk in talks)
    padded = sums(model, batch_of(model, *[[talk] for talk in talks]))
    packed = sums(model, batch_of(model, talks))
    two = sums(model, batch_of(model, talks[:1], talks[1:], length=256))
    turned = sums(model, batch_of(model, talks[::-1]))
    for other in (padded, packed, two, turned):
        assert other == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_implementations_agree_on_packed_rows(models: dict[Any, VLM], talks: list[Any]) -> None:
    for frames in ("block", "token"):
        sdpa, eager = models[frames, "sdpa"], models[frames, "eager"]
        ours, theirs = (sums(model, batch_of(model, talks)) for model in (sdpa, eager))
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_packed_gradients_are_those_of_the_records_apart(
    models: dict[Any, VLM], talks: list[Any], case: tuple[str, str]
) -> None:
    def gradients(*rows: list[Any]) -> dict[str, Tensor]:
        model = models[case]
        model.zero_grad()
        for row in rows:
            out = model(batch_of(model, row))
            (out["ce"] + out["ar"].sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    apart, together = gradients(*[[talk] for talk in talks]), gradients(talks)
    assert apart.keys() == together.keys()
    for name, value in apart.items():
        scale = value.abs().max().item() + 1e-6
        assert torch.allclose(together[name] / scale, value / scale, atol=2e-5), name


def test_each_record_counts_its_own_positions_and_no_frame_number_comes_twice(
    models: dict[Any, VLM], talks: list[Any]
) -> None:
    model = models["block", "sdpa"]
    rows = [lay(model, talk) for talk in talks]
    batch = batch_of(model, talks, length=300)
    expected = [k for row in rows for k in range(len(row))]
    assert batch.position_ids[0].tolist() == expected + [0] * (300 - len(expected))
    assert batch.lengths.tolist() == [len(expected)]
    packed = pack(rows)
    frames = [len(row.frames) for row in rows]
    assert packed.block.max() + 1 == len(packed.frames) == sum(frames)
    # each frame's tokens are one stretch, and two frames never share a number
    numbers = packed.block[packed.block >= 0]
    assert (np.diff(numbers) >= 0).all()
    assert packed.sample.tolist() == [k for k, row in enumerate(rows) for _ in range(len(row))]
    assert [frame.clip for frame in packed.frames] == [0] * 4 + [1] + [2] * 3 + [3] * 4


def test_nobody_sees_another_record(models: dict[Any, VLM], talks: list[Any]) -> None:
    model = models["block", "sdpa"]
    batch = batch_of(model, talks, length=256)
    bounds = np.cumsum([0, *(len(lay(model, talk)) for talk in talks)])
    for low, high in pairwise(bounds):
        assert (batch.mask_start[0, low:high] == low).all()
        assert (batch.mask_end[0, low:high] <= high).all()
    labels = batch.predict_index.numpy()
    owner = np.searchsorted(bounds, labels, side="right")
    assert (owner == np.searchsorted(bounds, labels + 1, side="right")).all()
    start, end = batch.mask_start[0, bounds[-1] :], batch.mask_end[0, bounds[-1] :]
    assert torch.equal(end - start, torch.ones_like(end)), "padding sees itself alone"


def test_one_record_a_row_needs_no_mask_where_frames_are_causal(
    models: dict[Any, VLM], talks: list[Any]
) -> None:
    token, block = models["token", "sdpa"], models["block", "sdpa"]
    assert batch_of(token, *[[talk] for talk in talks]).causal
    assert not batch_of(token, talks).causal
    assert not batch_of(block, *[[talk] for talk in talks]).causal


def changed(talk: tuple[list[FreshClip], list[str]], clip: int, frame: int) -> Any:
    """The same conversation with the features of one frame replaced by noise."""
    clips, texts = list(talk[0]), talk[1]
    rng = np.random.default_rng(9)
    features = {}
    for stride, array in clips[clip].features.items():
        features[stride] = array.copy()
        features[stride][frame] = rng.normal(size=array.shape[1:]) * 3
    clips[clip] = replace(clips[clip], features=features)
    return clips, texts


def hidden_and_predictions(model: VLM, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the hidden states, and each frame's prediction by the flat place of the frame's end."""
    found = {}
    with torch.no_grad():
        hidden = model.hidden_states(batch)
        assert model.frame_causal is not None
        for pairs in batch.transitions:
            source, target = batch.groups[pairs.source], batch.groups[pairs.target]
            states = hidden[source.token_index[pairs.source_frame]]
            times = target.time[pairs.target_frame]
            guess = model.frame_causal.predict(states, source, target, times, pairs.gap)
            ends = target.end_index[pairs.target_frame].tolist()
            found |= dict(zip(ends, guess, strict=True))
    return hidden, found


@pytest.mark.parametrize("case", CASES)
def test_other_features_of_one_record_leave_the_others_bit_identical(
    models: dict[Any, VLM], talks: list[Any], case: tuple[str, str]
) -> None:
    model = models[case]
    bounds = np.cumsum([0, *(len(lay(model, talk)) for talk in talks)])
    before, _ = hidden_and_predictions(model, batch_of(model, talks))
    for number, clip in ((0, 0), (2, 0), (3, 1)):
        noisy = list(talks)
        noisy[number] = changed(talks[number], clip, 0)
        batch = batch_of(model, noisy)
        after, _ = hidden_and_predictions(model, batch)
        same = (before == after).all(dim=1).numpy()
        own = slice(bounds[number], bounds[number + 1])
        assert not same[own].all()
        same[own] = True
        assert same.all()
        with torch.no_grad():
            ours, theirs = (model(b)["token_ce"] for b in (batch, batch_of(model, talks)))
        places = batch.predict_index.numpy()
        elsewhere = (places < bounds[number]) | (places >= bounds[number + 1])
        assert torch.equal(ours[elsewhere], theirs[elsewhere])
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("frame", [1, 2, 3])
def test_another_frame_leaves_every_prediction_up_to_it_bit_identical(
    models: dict[Any, VLM], talks: list[Any], case: tuple[str, str], frame: int
) -> None:
    model = models[case]
    row = pack([lay(model, talk) for talk in talks])
    batch = batch_of(model, talks)
    before, predicted = hidden_and_predictions(model, batch)
    after, again = hidden_and_predictions(
        model, batch_of(model, [changed(talks[0], 0, frame), *talks[1:]])
    )
    begins = row.frames[frame].first
    assert torch.equal(before[:begins], after[:begins])
    ends = sorted(place for place in predicted if place < len(lay(model, talks[0])))
    assert len(ends) == 3  # of four frames
    for k, place in enumerate(ends, start=1):
        # the prediction of frame k is made from frame k - 1
        assert torch.equal(predicted[place], again[place]) == (k <= frame)
