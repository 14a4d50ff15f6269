"""The frame-causal loss: nothing leaks, nothing that learns is a target, and motion is learned."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import Batch
from model.frame_causal import PAIRS, FrameCausal, frame_target, gap_code, skill
from model.slow_fast import STRATEGIES, uniform_indices
from model.vlm import VLM

QUESTION, ANSWER = "Look.<video>\nWhere at <t:1.5>?", "at <x:0.25><y:0.75>"
Place = tuple[int, int]
"""(row, number of the frame in that row)."""


def frames_of(batch: Batch) -> dict[Place, tuple[int, int]]:
    """Return (group, frame in the group) of every frame, by its place in the batch."""
    length = batch.input_ids.shape[1]
    found = sorted(
        (int(first), g, k)
        for g, group in enumerate(batch.groups)
        for k, first in enumerate(group.token_index[:, 0])
    )
    out: dict[Place, tuple[int, int]] = {}
    for first, g, k in found:
        row = first // length
        out[row, sum(place[0] == row for place in out)] = (g, k)
    return out


@torch.no_grad()
def run(model: VLM, batch: Batch) -> tuple[dict[Place, Tensor], Tensor]:
    """Return the prediction for each frame that has one, and the hidden states."""
    hidden = model.hidden_states(batch)
    place_of = {where: place for place, where in frames_of(batch).items()}
    predictions = {}
    for pairs in batch.transitions:
        source, target = batch.groups[pairs.source], batch.groups[pairs.target]
        states = hidden[source.token_index[pairs.source_frame]]
        time = target.time[pairs.target_frame]
        guess = model.frame_causal.predict(states, source, target, time, pairs.gap)
        for k, frame in enumerate(pairs.target_frame.tolist()):
            predictions[place_of[pairs.target, frame]] = guess[k]
    return predictions, hidden.view(*batch.input_ids.shape, -1)


def with_noise(batch: Batch, place: Place) -> Batch:
    g, k = frames_of(batch)[place]
    features = batch.groups[g].features.clone()
    features[k] = 3 * torch.randn(features[k].shape, generator=torch.Generator().manual_seed(5))
    groups = list(batch.groups)
    groups[g] = replace(groups[g], features=features)
    return replace(batch, groups=tuple(groups))


@pytest.mark.parametrize("predictor", ["resample", "xattn"])
@pytest.mark.parametrize("frame_attention", ["block", "token"])
@pytest.mark.parametrize("strategy", ["interleave", "first_slow", "uniform"])
@pytest.mark.parametrize("patch_grid", [(8, 8), (5, 9)])
def test_future_frames_cannot_change_past_predictions(
    make_model: Callable[..., VLM],
    make_clip: Callable[..., Any],
    make_batch: Callable[..., Batch],
    patch_grid: tuple[int, int],
    strategy: str,
    frame_attention: str,
    predictor: str,
) -> None:
    model = make_model(
        frame_sampling_strategy=strategy, frame_attention=frame_attention, predictor=predictor
    )
    clips = [make_clip(seed, frames, patch_grid) for seed, frames in ((1, 5), (2, 3))]
    batch = make_batch(model, *(([clip], QUESTION, ANSWER) for clip in clips))
    before, hidden = run(model, batch)
    assert set(before) == {(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)}
    for row, frame in frames_of(batch):
        after, hidden_after = run(model, with_noise(batch, (row, frame)))
        changed = {place for place in before if not torch.equal(before[place], after[place])}
        assert changed == {place for place in before if place[0] == row and place[1] > frame}
        g, k = frames_of(batch)[row, frame]
        begin = int(batch.groups[g].token_index[k, 0]) % hidden.shape[1]
        assert torch.equal(hidden[row, :begin], hidden_after[row, :begin])
        assert torch.equal(hidden[1 - row], hidden_after[1 - row])


def test_text_after_the_frames_changes_no_prediction_and_text_before_may(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    model, clip = make_model(), make_clip()
    batch = make_batch(model, ([clip], QUESTION, ANSWER))
    before, _ = run(model, batch)
    last = max(int(group.end_index.max()) for group in batch.groups)
    first = min(int(group.token_index.min()) for group in batch.groups)
    for place, changes in (
        (last + 1, False),
        (batch.input_ids.shape[1] - 1, False),
        (first - 1, True),
    ):
        ids = batch.input_ids.clone()
        ids[0, place] = (ids[0, place] + 1) % 300
        after, _ = run(model, replace(batch, input_ids=ids))
        assert all(torch.equal(before[p], after[p]) != changes for p in before)
    longer, _ = run(model, make_batch(model, ([clip], QUESTION + " Say where!", ANSWER)))
    for place, guess in before.items():
        torch.testing.assert_close(longer[place], guess, rtol=1e-4, atol=1e-5)


def normalised(features: np.ndarray) -> np.ndarray:
    cells = features.astype(np.float64).reshape(-1, features.shape[-1])
    centred = cells - cells.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("strategy", ["interleave", "first_slow"])
def test_the_loss_is_the_mean_square_over_cells_and_weighs_frames_alike(
    make_model: Callable[..., VLM],
    make_clip: Callable[..., Any],
    make_batch: Callable[..., Batch],
    strategy: str,
) -> None:
    model = make_model(frame_sampling_strategy=strategy)
    clips = [make_clip(seed, frames) for seed, frames in ((1, 5), (2, 4), (3, 1))]
    batch = make_batch(model, *(([clip], QUESTION, ANSWER) for clip in clips))
    predictions, _ = run(model, batch)
    with torch.no_grad():
        out = model(batch)
    patterns = {
        "interleave": ("SFSFS", "SFSF", "S"),
        "first_slow": ("SSSFF", "SSFF", "S"),
    }[strategy]
    loss, copy, count = np.zeros(4), np.zeros(4), np.zeros(4)
    for row, pattern in enumerate(patterns):
        for k in range(1, len(pattern)):
            slot = PAIRS.index(pattern[k - 1 : k + 1])
            stored = clips[row].features[2 if pattern[k] == "S" else 4]
            truth = normalised(stored[k])
            loss[slot] += ((predictions[row, k].double().numpy() - truth) ** 2).mean()
            copy[slot] += ((normalised(stored[k - 1]) - truth) ** 2).mean()
            count[slot] += 1
    assert out["ar_count"].tolist() == out["ar_copy_count"].tolist() == count.tolist()
    assert batch.num_transitions == count.sum() == 7
    np.testing.assert_allclose(out["ar"], loss, rtol=1e-4)
    np.testing.assert_allclose(out["ar_copy"], copy, rtol=1e-4)


def test_targets_carry_no_gradient_and_are_normalised_per_cell() -> None:
    features = torch.randn(2, 3, 4, 16, dtype=torch.float16).requires_grad_()
    target = frame_target(features)
    assert not target.requires_grad
    assert target.shape == (2, 12, 16)
    assert target.dtype == torch.float32
    np.testing.assert_allclose(target[1], normalised(features[1].detach().numpy()), atol=1e-4)
    assert frame_target(torch.full((1, 2, 2, 8), 7.0)).eq(0).all()  # a flat cell is not NaN


def test_the_frame_loss_reaches_all_that_learns_and_nothing_through_its_targets(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    model = make_model()
    batch = make_batch(model, ([make_clip()], QUESTION, ANSWER))
    leaves = [group.features.float().requires_grad_() for group in batch.groups]
    groups = [replace(g, features=leaf) for g, leaf in zip(batch.groups, leaves, strict=True)]
    model(replace(batch, groups=tuple(groups)))["ar"].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    places = frames_of(batch)
    for (_, frame), (g, k) in places.items():
        # the last frame is a target alone; the others are read as well
        assert bool(leaves[g].grad[k].abs().sum() > 0) == (frame < 4)


def test_without_weight_the_language_gradients_are_those_of_a_model_without_the_head(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    with_head, without = make_model(loss_weight=0.15), make_model(loss_weight=0)
    assert without.frame_causal is None
    batch = make_batch(with_head, ([make_clip()], QUESTION, ANSWER))
    one, other = with_head(batch), without(batch)
    assert torch.equal(one["ce"], other["ce"])
    assert not any(name.startswith("ar") for name in other)
    (one["ce"] + 0.0 * one["ar"].sum()).backward()
    other["ce"].backward()
    gradients = {name: p.grad for name, p in with_head.named_parameters()}
    for name, parameter in without.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-8)


def test_a_clip_of_one_frame_adds_zero_and_no_nan(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    model = make_model()
    batch = make_batch(model, ([make_clip(frames=1)], QUESTION, ANSWER))
    out = model(batch)
    assert out["ar"].tolist() == out["ar_count"].tolist() == out["ar_copy"].tolist() == [0.0] * 4
    (out["ce"] + out["ar"].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(p.grad.eq(0).all() for p in model.frame_causal.parameters())


def test_frames_of_two_media_items_are_not_joined(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    model = make_model()
    clips = [make_clip(1, frames=2), make_clip(2, frames=3)]
    batch = make_batch(model, (clips, "<video> and <video>\nWhere?", ANSWER))
    predictions, _ = run(model, batch)
    assert set(predictions) == {(0, 1), (0, 3), (0, 4)}


def test_eager_and_sdpa_predict_the_same(
    make_llm: Callable[..., Any],
    make_model: Callable[..., VLM],
    make_clip: Callable[..., Any],
    make_batch: Callable[..., Batch],
) -> None:
    talks = [([make_clip(1)], QUESTION, ANSWER), ([make_clip(2, frames=2)], QUESTION, ANSWER)]
    outs = []
    for attention in ("eager", "sdpa"):
        model = make_model(make_llm(attention=attention))
        batch = make_batch(model, *talks)
        outs.append((run(model, batch)[0], model(batch)))
    (one, losses), (other, other_losses) = outs
    for place in one:
        torch.testing.assert_close(one[place], other[place], rtol=1e-4, atol=1e-5)
    for name in losses:
        torch.testing.assert_close(losses[name], other_losses[name], rtol=1e-4, atol=1e-4)


def test_a_fresh_head_starts_near_the_loss_of_predicting_nothing() -> None:
    torch.manual_seed(0)
    head = FrameCausal(64, 48)
    guess = head.down(torch.nn.functional.gelu(head.up(head.norm(torch.randn(1, 100, 64)))))
    loss = (guess - frame_target(torch.randn(1, 10, 10, 48))).square().mean().item()
    assert loss == pytest.approx(1.0, abs=0.1)


def test_skill_is_above_zero_only_when_the_floor_is_beaten() -> None:
    assert skill(0.5, 1.0) == 0.5
    assert skill(1.0, 1.0) == 0.0
    assert skill(2.0, 1.0) == -1.0
    assert math.isnan(skill(0.5, 0.0))  # frames that do not change leave nothing to beat


def moving_patches(rng: np.random.Generator, frames: int = 4) -> np.ndarray:
    """Return waves `(frames, 4, 8, 12)` that move one patch to the left per frame."""
    speed = np.array([0.5, 0.9, 1.3, 0.6, 1.0, 1.4])
    rows, cols = np.arange(4)[:, None, None], np.arange(8 + frames)[:, None]
    phase = speed * cols + 0.3 * rows + rng.uniform(0, 2 * np.pi, size=6)
    wide = rng.uniform(0.5, 1.5, size=6)[:, None] * np.stack([np.sin(phase), np.cos(phase)], -1)
    panorama = wide.reshape(4, 8 + frames, 12)
    return np.stack([panorama[:, k : k + 8] for k in range(frames)])


@pytest.mark.slow
def test_a_moving_picture_is_predicted_better_than_by_repeating_the_last_frame(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    rng = np.random.default_rng(0)
    model = make_model()

    def fresh(clips: int) -> Batch:
        made = [make_clip(patches=moving_patches(rng)) for _ in range(clips)]
        return make_batch(model, *(([clip], "<video>\nWhere?", "here") for clip in made))

    @torch.no_grad()
    def held_out() -> tuple[float, float]:
        out = model(unseen)
        loss, count = out["ar"].sum().item(), out["ar_count"].sum().item()
        return skill(loss, out["ar_copy"].sum().item()), loss / count

    unseen = fresh(16)
    assert held_out()[0] < 0.2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = fresh(8)
        loss = model(batch)["ar"].sum() / batch.num_transitions
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    reached, loss_per_frame = held_out()
    assert reached > 0.3
    assert loss_per_frame < 0.5  # 1 is what predicting the mean reaches


def at_times(clip: Any, times: Any, frames: Any = None) -> Any:
    """Return a clip whose frames (chosen ones, if given) were shown at these seconds."""
    times = np.asarray(times, np.float64)
    start, end = times[0], 2 * times[-1] - times[-2] if len(times) > 1 else times[0] + 1
    info = replace(clip.info, timestamps=times, start=start, end=end)
    features = {s: x if frames is None else x[frames] for s, x in clip.features.items()}
    return replace(clip, info=info, features=features)


def gaps_of(batch: Batch) -> dict[Place, float]:
    """Return the gap before each frame that has one, by its place in the batch."""
    place_of = {where: place for place, where in frames_of(batch).items()}
    return {
        place_of[pairs.target, frame]: gap
        for pairs in batch.transitions
        for frame, gap in zip(pairs.target_frame.tolist(), pairs.gap.tolist(), strict=True)
    }


@given(data=st.data(), most=st.integers(2, 9), strategy=st.sampled_from(STRATEGIES))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_gap_is_the_seconds_between_the_frames_that_are_taken(
    make_model: Callable[..., VLM],
    make_clip: Callable[..., Any],
    make_batch: Callable[..., Batch],
    data: st.DataObject,
    most: int,
    strategy: str,
) -> None:
    """Of uneven times, of parts that begin late, of frames left out, of several media in a row."""
    model = make_model(max_frames_num=most, frame_sampling_strategy=strategy)
    media = []
    for seed in range(data.draw(st.integers(1, 3))):
        apart = data.draw(st.lists(st.floats(0.01, 40), min_size=1, max_size=11))
        start = data.draw(st.floats(0, 1000))
        media.append(at_times(make_clip(seed, len(apart)), start + np.cumsum(apart)))
    ask = " ".join(["<video>"] * len(media)) + "?"
    batch = make_batch(model, (media, ask, "yes"), (media[-1:], "<video>?", "no"))
    expected = {}
    for row, clips in enumerate((media, media[-1:])):
        frame = 0
        for clip in clips:
            taken = clip.info.timestamps[uniform_indices(len(clip.info.timestamps), most)]
            for k, gap in enumerate(np.diff(taken), start=frame + 1):
                expected[row, k] = gap
            frame += len(taken)
    assert gaps_of(batch) == pytest.approx(expected, rel=1e-6)


@given(data=st.data(), rate=st.integers(2, 5), frames=st.integers(2, 6), start=st.integers(0, 99))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_moments_banked_at_another_rate_are_predicted_the_same(
    make_model: Callable[..., VLM],
    make_clip: Callable[..., Any],
    make_batch: Callable[..., Batch],
    data: st.DataObject,
    rate: int,
    frames: int,
    start: int,
) -> None:
    """A clip of `rate` times as many frames a second, of which the same are taken; and one that lies
    `start` seconds later in its file. What differs is no time between frames."""
    second = data.draw(st.sampled_from([0.25, 0.5, 1.0, 4.0]))
    many = (frames - 1) * rate + 1
    model, dense = make_model(max_frames_num=frames), make_clip(frames=many)
    slow = at_times(dense, np.arange(frames) * second, np.arange(frames) * rate)
    fast = at_times(dense, np.arange(many) * second / rate)
    fast = replace(fast, info=replace(fast.info, end=slow.info.end))
    late = at_times(slow, start + slow.info.timestamps)
    one, *others = (make_batch(model, ([clip], QUESTION, ANSWER)) for clip in (slow, fast, late))
    with torch.no_grad():
        for other in others:
            assert gaps_of(one) == gaps_of(other)
            assert torch.equal(model(one)["ar"], model(other)["ar"])


def test_a_slower_video_is_told_from_a_faster_one_by_the_gap_alone(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    """Played at another speed its frames have the same shares of the clip, and another gap."""
    model, clip = make_model(), make_clip()
    one, other = (
        make_batch(model, ([at_times(clip, np.arange(5.0) * speed)], "<video>?", "here"))
        for speed in (1, 8)
    )
    for a, b in zip(one.groups, other.groups, strict=True):
        assert torch.equal(a.time, b.time)
    (before, hidden), (after, hidden_after) = run(model, one), run(model, other)
    assert torch.equal(hidden, hidden_after)
    assert all(not torch.equal(before[place], after[place]) for place in before)
    codes = [gap_code(batch.transitions[0].gap) for batch in (one, other)]
    torch.testing.assert_close(codes[1] - codes[0], torch.full_like(codes[0], 3 / 4))
    with torch.no_grad():
        model.frame_causal.query.weight[:, -1] = 0
    (before, _), (after, _) = run(model, one), run(model, other)
    assert all(torch.equal(before[place], after[place]) for place in before)


def test_any_gap_is_a_small_finite_number() -> None:
    codes = gap_code(torch.tensor([0.0, 1e-9, 1 / 60, 1.0, 3600.0, 1e9]))
    assert codes.isfinite().all()
    assert codes.abs().max() <= 3.5
    assert codes[3] == 0
    assert (codes.diff() >= 0).all()
