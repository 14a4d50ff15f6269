"""The plan: today's order where nothing is packed, full rows where it is, and nothing lost between."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from train.batches.lengths import Clips, Lengths
from train.batches.loader import Share
from train.batches.plan import Cut, best_fit_decreasing, make_plan, plan_run
from train.batches.run_plan import RunPlan
from train.data.dataset import Dataset, open_dataset
from train.settings.config import TrainConfig
from train.settings.recorded import facts_changed


def lengths_of(text: list[int], frames: list[int] | None = None) -> Lengths:
    """Records of one clip each (none where frames are not given), 4 cells slow and 1 fast."""
    count = len(frames or [])
    one = np.ones(count, np.int64)
    clips = Clips(
        np.arange(count), np.asarray(frames or [], np.int64), 4 * one, one, 1.0 * one, "none"
    )
    words = np.asarray(text, np.int64)
    return Lengths(words, words // 3, clips, Fraction(1, 2))


def stream(count: int, seed: int, epoch: int) -> list[int]:
    """The shuffled records of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


@given(
    count=st.integers(1, 30),
    size=st.integers(1, 4),
    packs=st.integers(1, 4),
    seed=st.integers(0, 5),
    epochs=st.sampled_from(["0.3", "1.0", "2.5", "3.0", "0.1"]),
    max_steps=st.integers(0, 9),
)
def test_unpacked_batches_are_each_epochs_shuffle_in_order(
    count: int, size: int, packs: int, seed: int, epochs: str, max_steps: int
) -> None:
    batch = size * packs
    cut = Cut(batch, size, seed=seed, epochs=float(epochs), max_steps=max_steps)
    plan = make_plan(lengths_of(list(range(3, count + 3))), cut)
    each = -(-count // batch)
    assert plan.num_steps == (max_steps or math.ceil(Fraction(epochs) * each))
    assert plan.packs_per_step == packs
    for step in range(plan.num_steps):
        first = step % each * batch
        own = stream(count, seed, step // each)[first : first + batch]
        assert plan.records(step) == own
        assert plan.num_rows[step] == len(own)
        assert plan.num_packs[step] == -(-len(own) // size)
        for k in range(plan.num_packs[step]):
            assert plan.pack(step, k) == [[r] for r in own[k * size : (k + 1) * size]]
        assert plan.num_labels[step] == sum((r + 3) // 3 for r in own)


@st.composite
def packed_plans(draw: st.DrawFn) -> tuple[Lengths, Cut]:
    count = draw(st.integers(1, 60))
    text = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    frames = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    rows = draw(st.integers(1, 3))
    cut = Cut(
        rows * draw(st.integers(1, 4)),
        rows,
        pack_tokens=draw(st.integers(60, 150)),
        most_frames=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 3)),
        epochs=draw(st.sampled_from([1.0, 1.5, 3.0])),
        max_steps=draw(st.integers(0, 5)),
        cost=(1.0, 0.1),
    )
    return lengths_of(text, frames), cut


def rows_of(plan: RunPlan) -> list[list[int]]:
    return [
        row
        for step in range(plan.num_steps)
        for k in range(plan.num_packs[step])
        for row in plan.pack(step, k)
    ]


@given(packed_plans())
@settings(deadline=None)
def test_a_packed_plan_keeps_its_limits_and_counts(given_: tuple[Lengths, Cut]) -> None:
    lengths, cut = given_
    plan = make_plan(lengths, cut)
    rows = rows_of(plan)
    assert len(rows) == plan.num_rows.sum() == len(plan.row_start) - 1
    assert plan.num_rows.min() > 0
    assert plan.num_rows.max() <= cut.rows_per_step
    assert all(row and plan.tokens[row].sum() <= cut.pack_tokens for row in rows)
    for step in range(plan.num_steps):
        own = plan.records(step)
        assert plan.num_labels[step] == lengths.supervised[own].sum()
        taken = np.minimum(lengths.clips.frames, cut.most_frames)[own]
        assert plan.num_transitions[step] == (taken - 1).sum()
    assert plan.row_tokens.tolist() == [plan.tokens[row].sum() for row in rows]


@given(packed_plans(), st.integers(1, 30))
@settings(deadline=None)
def test_a_longer_run_begins_with_the_steps_of_a_shorter_one(
    given_: tuple[Lengths, Cut], more: int
) -> None:
    lengths, cut = given_
    short = make_plan(lengths, cut)
    long = make_plan(lengths, replace(cut, max_steps=short.num_steps + more))
    assert rows_of(long)[: len(rows_of(short))] == rows_of(short)


@given(packed_plans())
@settings(deadline=None)
def test_each_epoch_trains_each_record_once_and_only_its_last_step_is_short(
    given_: tuple[Lengths, Cut],
) -> None:
    lengths, cut = given_
    count = len(lengths.text)
    for pack_tokens in (cut.pack_tokens, 0):
        plan = make_plan(lengths, replace(cut, pack_tokens=pack_tokens, epochs=3.0, max_steps=0))
        epochs: list[list[int]] = [[]]
        for step in range(plan.num_steps):
            if len(epochs[-1]) == count:  # a step never holds records of two epochs
                epochs.append([])
            epochs[-1] += plan.records(step)
            ends = len(epochs[-1]) == count
            assert plan.num_rows[step] == cut.rows_per_step or ends
        assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 3
        # few steps, or records, can come in one order three times by chance
        few = plan.num_steps < 3 * 5 if pack_tokens else count < 8
        assert len({tuple(epoch) for epoch in epochs}) > 1 or few


@given(packed_plans(), st.sampled_from([1, 2, 3, 8]))
@settings(deadline=None)
def test_any_number_of_ranks_runs_the_same_records_at_each_step(
    given_: tuple[Lengths, Cut], world: int
) -> None:
    lengths, cut = given_
    for plan in (make_plan(lengths, cut), make_plan(lengths, replace(cut, pack_tokens=0))):
        for step in range(plan.num_steps):
            shares = [Share(rank, world) for rank in range(world)]
            dealt = [list(share.packs(plan, step)) for share in shares]
            assert sorted(k for packs in dealt for k in packs) == list(range(plan.num_packs[step]))
            passes = [len(s.packs(plan, step)) + s.idles(plan, step) for s in shares]
            assert len(set(passes)) == 1, "a rank would be waited for"
            seen = [r for packs in dealt for k in packs for row in plan.pack(step, k) for r in row]
            assert sorted(seen) == sorted(plan.records(step))


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=80),
    st.integers(100, 300),
)
def test_best_fit_puts_each_record_where_it_leaves_least_room(sizes: list[int], limit: int) -> None:
    rows = best_fit_decreasing(list(range(len(sizes))), np.asarray(sizes), limit)
    room: list[int] = []  # the same rule, by trying every row
    for size in sorted(sizes, reverse=True):
        fitting = [k for k in range(len(room)) if room[k] >= size]
        if fitting:
            room[min(fitting, key=lambda k: room[k])] -= size
        else:
            room.append(limit - size)
    found = sorted(limit - sum(sizes[k] for k in row) for row in rows)
    assert found == sorted(room)
    assert limit - sum(sizes[k] for k in rows[-1]) == max(room), "the emptiest comes last"
    assert all(row == sorted(row) for row in rows)


def mixed(count: int, seed: int = 0) -> Lengths:
    """Images and clips of 16, 64 and 128 frames, 49 and 16 cells: mean about 1,250 tokens."""
    rng = np.random.default_rng(seed)
    text = rng.integers(60, 400, count)
    frames = rng.choice([1, 16, 64, 128], count, p=[0.3, 0.3, 0.25, 0.15])
    one = np.ones(count, np.int64)
    clips = Clips(np.arange(count), frames, 49 * one, 16 * one, 1.0 * one, "none")
    return Lengths(text, text // 4, clips, Fraction(1, 4))


def test_windows_hand_on_what_does_not_fill_a_row() -> None:
    lengths = mixed(5000)
    cut = Cut(1, pack_tokens=8192, most_frames=128, max_steps=1500)
    uses = np.bincount(make_plan(lengths, cut).uses, minlength=5000)
    assert (uses.min(), uses.max()) in ((1, 2), (2, 3))


@pytest.mark.parametrize("budget", [7300, 8192, 16384])
def test_rows_of_twice_the_longest_record_are_full_to_a_hundredth(budget: int) -> None:
    lengths = mixed(20_000)
    plan = make_plan(lengths, Cut(16, pack_tokens=budget, most_frames=128))
    assert int(plan.tokens.max()) * 2 <= budget
    assert plan.efficiency >= 0.99
    short = lengths_of(np.random.default_rng(1).integers(50, 300, 20_000).tolist())
    assert make_plan(short, Cut(2, pack_tokens=budget)).efficiency >= 0.99


def test_the_packs_of_a_step_cost_nearly_the_same() -> None:
    cut = Cut(64, pack_tokens=8192, most_frames=128, cost=(2 * 358e6, 2 * 24 * 896.0))
    plan = make_plan(mixed(20_000), cut)
    whole = plan.row_cost[: (plan.num_steps - 1) * 64]  # the last step is short
    ranks = whole.reshape(-1, 8, 8).sum(axis=1)  # of eight, every eighth pack
    assert (ranks.max(axis=1) / ranks.mean(axis=1)).mean() < 1.005


def test_a_hundred_thousand_records_are_planned_in_seconds() -> None:
    import time

    lengths = mixed(100_000)
    began = time.process_time()
    plan = make_plan(lengths, Cut(64, pack_tokens=8192, most_frames=128))
    assert time.process_time() - began < 5
    assert len(plan.uses) > 95_000


def test_frames_are_left_out_until_a_record_fits_and_it_is_dropped_when_none_does() -> None:
    # two frames: 5 + 2 tokens; three: 5 + 2 + 5
    lengths = lengths_of([10, 10, 10, 16, 30], [6, 2, 6, 6, 1])
    plan = make_plan(lengths, Cut(1, max_tokens=21, most_frames=8))
    assert plan.frames[:4].tolist() == [2, 8, 2, 1]
    assert plan.tokens[:4].tolist() == [17, 17, 17, 21]
    assert plan.dropped == {"longer than max_tokens 21 with one frame": 1}
    assert sorted(plan.uses.tolist()) == [0, 1, 2, 3]
    whole = make_plan(lengths, Cut(1, most_frames=8))
    assert (whole.dropped, set(whole.frames.tolist())) == ({}, {8})
    packed = make_plan(lengths, Cut(1, pack_tokens=30, max_tokens=100, most_frames=8))
    assert packed.dropped == {"longer than pack_tokens 30 with one frame": 1}
    assert packed.tokens[0] == 10 + 3 * 5 + 2 * 2
    with pytest.raises(UserError, match="no record fits 5 tokens"):
        make_plan(lengths, Cut(1, max_tokens=5))


@given(
    frames=st.integers(1, 40),
    text=st.integers(1, 60),
    limit=st.integers(1, 200),
    most=st.integers(1, 40),
)
def test_the_most_frames_that_fit_are_kept(frames: int, text: int, limit: int, most: int) -> None:
    def size(count: int) -> int:
        used = min(count, frames)
        slow = (used + 1) // 2
        return text + slow * 5 + (used - slow) * 2

    lengths = lengths_of([text, 1], [frames, 1])
    fitting = [n for n in range(1, most + 1) if size(n) <= limit]
    plan = make_plan(lengths, Cut(1, max_tokens=max(limit, 6), most_frames=most))
    if limit >= 6:
        assert (0 in plan.uses.tolist()) == bool(fitting) or plan.num_steps == 1
        if fitting:
            assert plan.frames[0] == max(fitting)
            assert plan.tokens[0] == size(max(fitting))


def test_the_heaviest_pack_is_the_one_with_most_places() -> None:
    plan = make_plan(lengths_of([5, 9, 80, 7, 30, 31, 6, 3]), Cut(4, 2, max_steps=2))
    step, k = plan.heaviest
    assert [2] in plan.pack(step, k)
    packed = make_plan(lengths_of([30] * 40), Cut(2, pack_tokens=100, max_steps=3))
    assert packed.pack(*packed.heaviest) == [packed.pack(*packed.heaviest)[0]]


@pytest.fixture(scope="module")
def config(toy: Path, toy_bank: Path) -> TrainConfig:
    return TrainConfig(
        stage_path=str(toy / "llm"), bank=[str(toy_bank)], data_path=[str(toy / "train.jsonl")]
    )


def changed(config: TrainConfig, dataset: Dataset, rows: int = 4, **settings_: object) -> list[str]:
    plan = plan_run(config, dataset, 4)
    other = plan_run(replace(config, **settings_), dataset, rows)  # type: ignore[arg-type]
    lines = facts_changed({"plan": plan.facts}, {"plan": other.facts})
    assert (other.fingerprint != plan.fingerprint) == bool(lines)
    return lines


def test_what_changes_a_plan_is_named(config: TrainConfig) -> None:
    dataset = open_dataset(config)
    assert changed(config, dataset) == []
    assert changed(config, dataset, seed=1) == ["seed was 0, is now 1"]
    assert changed(config, dataset, rows=8) == ["rows_per_step was 4, is now 8"]
    assert changed(config, dataset, max_frames_num=4) == ["max_frames_num was 16, is now 4"]
    assert changed(config, dataset, pack_tokens=900) == ["pack_tokens was 0, is now 900"]
    # neither the cut into packs nor the length of the run is part of what was learned so far
    assert changed(config, dataset, per_device_train_batch_size=4) == []
    assert changed(config, dataset, max_steps=70, prefetch=9) == []


def test_other_records_and_clips_are_named(config: TrainConfig, tmp_path: Path) -> None:
    plan = plan_run(config, open_dataset(config), 4)
    (path,) = config.data_path
    moved = tmp_path / "renamed.jsonl"
    moved.write_bytes(Path(path).read_bytes())
    again = replace(config, data_path=[str(moved)])
    facts = plan_run(again, open_dataset(again), 4).facts
    assert facts_changed({"plan": plan.facts}, {"plan": facts}) == []
    moved = moved.rename(tmp_path / "train.jsonl")
    lines = Path(path).read_text().splitlines(keepends=True)
    moved.write_text("".join(lines[1:]))
    again = replace(config, data_path=[str(moved)])
    facts = plan_run(again, open_dataset(again), 4).facts
    assert facts_changed({"plan": plan.facts}, {"plan": facts}) == [
        f"record file train.jsonl has changed (it gave {len(lines)} records, now {len(lines) - 1})"
    ]
