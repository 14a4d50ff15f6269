"""The run as data: step -> packs -> rows -> records, made from lengths before any weight is loaded.

A row is what attention sees: one record, or - packed - several up to `pack_tokens`. A pack is
`rows_per_pack` rows, one forward of one rank. A step is `rows_per_step` rows, whose packs rank r of
`world` takes in turn: k = r, r + world, ... Nothing here depends on world size, workers or prefetch,
and a longer run of the same records begins with the same steps.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from model.family.limits import check_context
from shards.errors import UserError
from shards.format.features import differences
from shards.read.banks import joint
from shards.signed import Json, canonical_json, digest
from train.batches.fitting import fit_records
from train.batches.lengths import REFUSED, Lengths, measure, tokenizer_digest
from train.cost import LlmShape
from train.data.dataset import Dataset
from train.settings.config import BatchSettings, TrainConfig
from train.start.stage import context_of, llm_name, read_config


def order(seed: int, epoch: int, count: int) -> list[int]:
    """Return the order of an epoch: a permutation that depends on nothing but these numbers."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


WINDOW = 1024
"""Records of the shuffled order that are packed together."""
NEIGHBOURS = 16
"""Steps whose rows are shared out among them by cost."""


@dataclass(frozen=True)
class Cut:
    """How a run's records are cut into rows, packs and steps."""

    rows_per_step: int
    rows_per_pack: int = 1
    pack_tokens: int = 0
    """Tokens that a row holds at most; 0 gives one record a row, in the plain shuffled order."""
    max_tokens: int = 0
    """Tokens of a record at most, kept by leaving out whole frames; 0 sets no limit."""
    most_frames: int = 16
    seed: int = 0
    epochs: float = 1.0
    max_steps: int = 0
    """0: the epochs decide."""
    cost: tuple[float, float] = (1.0, 0.0)
    """What a token of a row costs, and what the square of a record's length does."""


@dataclass(frozen=True)
class RunPlan:
    """Which records each step learns from, how many frames of them, and how they lie in rows."""

    rows_per_step: int
    rows_per_pack: int
    pack_tokens: int
    num_steps: int
    frames: np.ndarray
    """int64 `(records,)`: frames of each clip of a record that are used, at most."""
    tokens: np.ndarray
    """int64 `(records,)`, with that many frames."""
    visual: np.ndarray
    """Tokens of frames among them, each frame's closing one included."""
    supervised: np.ndarray
    transitions: np.ndarray
    frame_pairs: np.ndarray
    """Pairs that `block` attention adds to the causal ones of each record."""
    clips: np.ndarray
    """int64 `(records,)`, clips of each record."""
    uses: np.ndarray
    """int64 `(uses,)`: the records of the run's rows, one row after the other."""
    row_start: np.ndarray
    """int64 `(rows + 1,)` into `uses`."""
    cost: tuple[float, float]
    dropped: dict[str, int]
    """Records left out, by reason, before this plan and by it."""
    left_out: dict[str, np.ndarray] = field(default_factory=dict)
    """int64, the records that this plan leaves out, by reason."""
    frames_line: str = ""
    """How many frames of the others `max_tokens` and `pack_tokens` leave out; empty where none."""
    facts: Json = field(default_factory=dict)
    """All that the plan depends on, by name."""

    @property
    def packs_per_step(self) -> int:
        return self.rows_per_step // self.rows_per_pack

    def pack(self, step: int, pack: int) -> list[list[int]]:
        """Return the rows of a pack, each as its records in order."""
        assert 0 <= pack < self.packs_per_step
        first = step * self.rows_per_step + pack * self.rows_per_pack
        edges = self.row_start[first : first + self.rows_per_pack + 1].tolist()
        return [self.uses[a:b].tolist() for a, b in itertools.pairwise(edges)]

    def records(self, step: int) -> list[int]:
        """Return the records of a step, in the order of its packs."""
        first, last = self._step_start[step : step + 2]
        return [int(record) for record in self.uses[first:last]]

    @property
    def _step_start(self) -> np.ndarray:
        return self.row_start[:: self.rows_per_step]

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """Tokens of each row without padding: int64 `(rows,)`."""
        return np.add.reduceat(self.tokens[self.uses], self.row_start[:-1])

    @cached_property
    def num_labels(self) -> np.ndarray:
        """Supervised tokens of each step: the denominator of the language loss, int64 `(steps,)`."""
        return self.per_step(self.supervised)

    @cached_property
    def num_transitions(self) -> np.ndarray:
        """Steps from frame to frame of each step: the denominator of the frame loss."""
        return self.per_step(self.transitions)

    def per_step(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of a per-record quantity over the records of each step."""
        return np.add.reduceat(values[self.uses], self._step_start[:-1])

    @cached_property
    def row_cost(self) -> np.ndarray:
        linear, quadratic = self.cost
        squares = np.add.reduceat(self.tokens[self.uses].astype(float) ** 2, self.row_start[:-1])
        return linear * self.row_tokens + quadratic * squares

    @cached_property
    def pack_slots(self) -> np.ndarray:
        """Places of each pack with its padding to the longest row: int64 `(packs,)`."""
        longest = self.row_tokens.reshape(-1, self.rows_per_pack).max(axis=1)
        return longest * self.rows_per_pack

    @property
    def heaviest(self) -> tuple[int, int]:
        """Return (step, pack) of the pack with most places, among those the costliest."""
        cost = self.row_cost.reshape(-1, self.rows_per_pack).sum(axis=1)
        place = int(np.lexsort((cost, self.pack_slots))[-1])
        return divmod(place, self.packs_per_step)

    @property
    def efficiency(self) -> float:
        """Return the share of places that hold a token: of full rows, or of rows padded as they are."""
        places = len(self.row_tokens) * self.pack_tokens or int(self.pack_slots.sum())
        return float(self.row_tokens.sum()) / places

    @property
    def dropped_line(self) -> str:
        """How many records were left out, and why."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return f"{sum(self.dropped.values())} dropped" + (f" ({reasons})" if reasons else "")

    @cached_property
    def fingerprint(self) -> str:
        return digest(canonical_json(self.facts))

    def differences(self, saved: Json) -> list[str]:
        """Return a line for each fact in which this plan differs from the one that has `saved`."""
        return differences(self.facts, saved, "plan ")


SETTINGS = (
    "seed",
    "pack_tokens",
    "max_tokens",
    "max_frames_num",
    "frame_sampling_strategy",
    "slow_frame_ratio",
    "enable_lape",
    "num_temporal_tokens",
    "num_spatial_tokens",
    "lape_axes",
    "frame_time",
    "chat_template",
    "template_date",
)
"""Settings that a plan depends on."""


def rows_per_step(settings: BatchSettings, world: int, state: Json) -> int:
    """Return the rows of a step over all ranks; a resumed run keeps its own on any world size.

    The packs need not divide by the number of processes, but each must have one.
    """
    size = settings.per_device_train_batch_size
    rows = state.get("global_batch") or size * settings.gradient_accumulation_steps * world
    if rows % size:
        raise UserError(
            f"the run's global batch of {rows} rows does not divide into micro-batches of {size}",
            fix="set per_device_train_batch_size to a divisor of it",
        )
    if rows // size < world:
        raise UserError(
            f"the run's global batch of {rows} rows gives {rows // size} micro-batches of {size} to "
            f"{world} processes",
            fix=f"use at most {rows} processes, and per_device_train_batch_size "
            f"{max(1, rows // world)} or a smaller divisor of {rows}",
        )
    return int(rows)


def plan_run(config: TrainConfig, dataset: Dataset, rows_per_step: int) -> RunPlan:
    """Return the plan of a run: the same on every rank, for any number of them.

    rows_per_step: of the whole step, fixed at the run's first start and kept when it is resumed.
    """
    llm = llm_name(config.stage_path)
    tokenizer = tokenizer_digest(llm)
    lenient = config.on_bad_record == "drop"
    lengths = measure(config, dataset, llm, tokenizer, lenient=lenient)
    shape = LlmShape.of(read_config(llm) or {})
    heads = shape.layers * shape.heads * shape.head_dim if shape else 0
    cut = Cut(
        rows_per_step,
        config.per_device_train_batch_size,
        config.pack_tokens,
        config.max_tokens,
        config.max_frames_num,
        config.seed,
        config.num_train_epochs,
        config.max_steps,
        # forward FLOPs: 2 N of a token, and 2 layers heads head_dim of each causal half square
        (2.0 * shape.layer_weights, 2.0 * heads) if shape else (1.0, 0.0),
    )
    facts = {name: getattr(config, name) for name in SETTINGS}
    facts |= {
        "rows_per_step": rows_per_step,
        "slow_stride": dataset.slow_stride,
        "fast_stride": dataset.fast_stride,
        "tokenizer": tokenizer,
        "records": {
            f"{k} {Path(part.path).name}": f"{part.digest} {len(part.records)} x {part.repeats}"
            for k, part in enumerate(dataset.parts)
        },
        "bank": joint(dataset.banks.config),
        "clips": lengths.clips.digest,
    }
    plan = make_plan(lengths, cut, dropped=dataset.dropped, facts=facts)
    limit = context_of(llm)
    longest = int(plan.tokens[plan.uses].max())
    check_context(longest, limit, "the longest record", f"set max_tokens: {limit}, or less")
    return plan


def make_plan(
    lengths: Lengths,
    cut: Cut,
    *,
    dropped: Mapping[str, int] | None = None,
    facts: Json | None = None,
) -> RunPlan:
    """Return the plan of a run; UserError where no record is left.

    dropped: what was left out before, by reason. A record whose text and one frame do not fit is
    dropped here.
    """
    assert cut.rows_per_step % cut.rows_per_pack == 0, cut
    frames, kept, left_out, frames_line = fit_records(
        lengths, cut.most_frames, cut.max_tokens, cut.pack_tokens
    )
    reasons = dict(dropped or {}) | {reason: len(own) for reason, own in left_out.items()}
    if not len(kept):
        limits = [limit for limit in (cut.max_tokens, cut.pack_tokens) if limit]
        if REFUSED in left_out or not limits:
            raise UserError(f"no record is left: {reasons}", fix="take another chat_template")
        raise UserError(
            f"no record fits {min(limits)} tokens", fix="raise max_tokens and pack_tokens"
        )
    visual = lengths.visual(frames)
    tokens = lengths.text + visual + lengths.stamps(frames)
    if cut.pack_tokens:
        uses, row_start, num_steps = packed_rows(kept, tokens, cut)
    else:
        uses, num_steps = plain_rows(kept, cut)
        row_start = np.arange(len(uses) + 1)
    return RunPlan(
        rows_per_step=cut.rows_per_step,
        rows_per_pack=cut.rows_per_pack,
        pack_tokens=cut.pack_tokens,
        num_steps=num_steps,
        frames=frames,
        tokens=tokens,
        visual=visual,
        supervised=lengths.supervised,
        transitions=lengths.transitions(frames),
        frame_pairs=lengths.frame_pairs(frames),
        clips=np.bincount(lengths.clips.record, minlength=len(frames)),
        uses=uses,
        row_start=row_start,
        cost=cut.cost,
        dropped=reasons,
        left_out=left_out,
        frames_line=frames_line,
        facts=dict(facts or {}),
    )


def plain_rows(kept: np.ndarray, cut: Cut) -> tuple[np.ndarray, int]:
    """Return the records of a run of one record a row, and its steps: whole steps, one at least.

    Epochs follow one another in one endless stream; a step may span two of them.
    """
    steps = cut.max_steps or max(1, int(cut.epochs * len(kept) / cut.rows_per_step))
    wanted = steps * cut.rows_per_step
    epochs = range(-(-wanted // len(kept)))
    stream = [kept[order(cut.seed, epoch, len(kept))] for epoch in epochs]
    return np.concatenate(stream)[:wanted], steps


def packed_rows(
    kept: np.ndarray, tokens: np.ndarray, cut: Cut
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (uses, row starts, steps) of a run of packed rows.

    The stream of epochs is cut into windows, a window packed into rows, and the rows of a few
    neighbouring steps shared out by cost. Each is done in order of the stream, so that the number of
    steps decides only where it ends.
    """
    rows: list[list[int]] = []
    steps = cut.max_steps
    block = NEIGHBOURS * cut.rows_per_step
    rest: list[int] = []
    drawn = 0
    for window, last in windows(kept, cut.seed):
        packed = best_fit_decreasing([*rest, *window], tokens, cut.pack_tokens)
        # the emptiest row is filled up in the next window; an epoch leaves nothing to the next
        rest = [] if last or len(packed) == 1 else packed.pop()
        rng = np.random.default_rng([cut.seed, drawn, 1])
        emptiest = [packed.pop()] if last else []  # what ends a run may cut off
        rows += [packed[k] for k in rng.permutation(len(packed))] + emptiest
        drawn += len(window)
        if not steps and drawn >= int(cut.epochs * len(kept)):
            share = cut.epochs * len(kept) / drawn
            steps = max(1, int(len(rows) * min(share, 1.0)) // cut.rows_per_step)
        if steps and len(rows) >= -(-steps // NEIGHBOURS) * block:
            break
    balanced: list[list[int]] = []
    for first in range(0, steps * cut.rows_per_step, block):
        rng = np.random.default_rng([cut.seed, first, 2])
        balanced += balance_steps(rows[first : first + block], tokens, cut, rng)
    balanced = balanced[: steps * cut.rows_per_step]
    row_start = np.concatenate([[0], np.cumsum([len(row) for row in balanced])])
    return np.concatenate([np.asarray(row) for row in balanced]), row_start, steps


def windows(kept: np.ndarray, seed: int) -> Iterator[tuple[list[int], bool]]:
    """Yield the shuffled records in windows, epoch after epoch without end, and if an epoch ends."""
    count = -(-len(kept) // WINDOW)
    for epoch in itertools.count():
        stream = kept[order(seed, epoch, len(kept))]
        for number, window in enumerate(np.array_split(stream, count)):
            yield window.tolist(), number == count - 1


def best_fit_decreasing(records: list[int], tokens: np.ndarray, limit: int) -> list[list[int]]:
    """Return rows of at most `limit` tokens: each record, longest first, where it leaves least room.

    The emptiest row comes last. Rows keep the order in which their records were given.
    """
    sizes = tokens[records].tolist()
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room, row: sorted
    for place in sorted(range(len(records)), key=lambda k: -sizes[k]):
        found = bisect_left(free, (sizes[place], -1))
        if found == len(free):
            room, row = limit, len(rows)
            rows.append([])
        else:
            room, row = free.pop(found)
        rows[row].append(place)
        insort(free, (room - sizes[place], row))
    emptiest = free[-1][1]
    rows.append(rows.pop(emptiest))
    return [[records[place] for place in sorted(row)] for row in rows]


def balance_steps(
    rows: list[list[int]], tokens: np.ndarray, cut: Cut, rng: np.random.Generator
) -> list[list[int]]:
    """Return the rows of neighbouring steps so that those of one step cost nearly the same.

    The ranks of a step then wait little for each other. Steps come in random order.
    """
    linear, quadratic = cut.cost
    lengths = [tokens[row].astype(float) for row in rows]
    cost = [linear * own.sum() + quadratic * (own**2).sum() for own in lengths]
    ranked = sorted(range(len(rows)), key=lambda k: -cost[k])
    starts = rng.permutation(len(rows) // cut.rows_per_step) * cut.rows_per_step
    return [rows[k] for start in starts for k in ranked[start : start + cut.rows_per_step]]
