"""Makes the plan of a run: step -> packs -> rows -> records, from lengths, before weights are loaded.

A row is one sequence of the LLM: one record, or, packed, several up to `pack_tokens`. A pack is a
micro-batch: `rows_per_pack` rows, one forward of one rank. A step is `rows_per_step` rows, whose packs
rank r of `world` takes in turn: k = r, r + world, ... An epoch is each record once, shuffled by `order`;
its last step and pack have the rows that are left. World size, workers and prefetch decide nothing here,
and a longer run of the same records begins with the same steps. Where each epoch draws its records
(`splice`, `augment`), they are numbered through the epochs, and counted when their epoch begins.
"""

import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.read.banks import joint
from shards.signed import Json
from train.batches.clips import Clips
from train.batches.fitting import Fit, fit_records
from train.batches.lengths import REFUSED, Lengths, tokenizer_digest
from train.batches.measure import Measure, layout_facts
from train.batches.run_plan import RunPlan, check_rows
from train.data.dataset import Dataset
from train.data.drops import Drop
from train.flops import LlmShape
from train.settings.config import BatchSettings, TrainConfig
from train.settings.drawn import AugmentSettings, SpliceSettings
from train.start.stage import context_of, llm_name, read_config


def order(seed: int, epoch: int, count: int) -> list[int]:
    """Return the order of an epoch: a permutation that depends on nothing but these numbers."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


WINDOW = 1024
"""Records of the shuffled order that are packed together; in a simulation that fills 99.5 % of places."""
NEIGHBOURS = 16
"""Steps that exchange rows, so that the rows of each cost about the same."""


@dataclass(frozen=True)
class Cut:
    """The numbers by which a run's records are divided into rows, packs and steps."""

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
    """Cost of a token of a row, and of the square of a record's length."""


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
    measure = Measure(config, dataset, llm, tokenizer, lenient=lenient)
    lengths = measure.epoch(0)
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
        # forward FLOPs: 2 N for a token of N weights; 2 layers heads head_dim for a causal half square
        (2.0 * shape.layer_weights, 2.0 * heads) if shape else (1.0, 0.0),
    )
    facts = {name: getattr(config, name) for name in SETTINGS}
    facts |= {
        "rows_per_step": rows_per_step,
        "epochs": "each record once",  # earlier plans filled an epoch's last step from the next one
        "slow_stride": dataset.slow_stride,
        "fast_stride": dataset.fast_stride,
        "tokenizer": tokenizer,
        "records": {
            f"{k} {Path(file.path).name}": f"{file.digest} {file.count // file.repeats} x {file.repeats}"
            for k, file in enumerate(dataset.files)
        },
        "bank": joint(dataset.banks.config),
        "clips": lengths.clips.digest,
    }
    facts |= layout_facts(config) | drawn_facts(dataset)
    if apart := [str(k) for k, file in enumerate(dataset.files) if file.independent]:
        facts["independent turns of datasets"] = apart
    later = measure.epoch if dataset.is_drawn else None
    plan = make_plan(lengths, cut, dropped=dataset.dropped, facts=facts, later=later)
    check_rows(plan, read_config(llm) or {}, context_of(llm))
    return plan


def drawn_facts(dataset: Dataset) -> Json:
    """Return the facts of splicing and drawn frames that a plan depends on; empty without these."""
    facts: Json = {"augment": _as_texts(dataset.augment)} if dataset.augment.is_on else {}
    strides = dataset.slow_stride, dataset.fast_stride
    if splices := dataset.splices:
        sources = [record for splice in splices for record in splice.records]
        facts["splice"] = {str(k): _as_texts(own.settings) for k, own in enumerate(splices)}
        facts["spliced clips"] = Clips.of(sources, dataset.banks, *strides).digest
    return facts


def _as_texts(settings: AugmentSettings | SpliceSettings) -> Json:
    return {name: str(value) for name, value in asdict(settings).items()}


def make_plan(
    lengths: Lengths,
    cut: Cut,
    *,
    dropped: Mapping[str, int] | None = None,
    facts: Json | None = None,
    later: Callable[[int], Lengths] | None = None,
) -> RunPlan:
    """Return the plan of a run; UserError where no record is left.

    dropped: reason -> number of records left out before. A record whose text and one frame do not fit
    is dropped here. later: the lengths of a later epoch, where epochs differ; called as the run comes to
    it. Records are then numbered through the epochs.
    """
    assert cut.rows_per_step % cut.rows_per_pack == 0, cut
    counted = [Counted.of(lengths, cut)]
    uses, row_start, step_start = cut_steps(_epochs(counted, cut, later), cut)
    left_out = left_out_of(counted)
    reasons = {reason: len(records) for reason, records in left_out.items()}
    columns = [item.name for item in fields(Counted) if item.name != "fit"]
    return RunPlan(
        rows_per_step=cut.rows_per_step,
        rows_per_pack=cut.rows_per_pack,
        pack_tokens=cut.pack_tokens,
        step_start=step_start,
        **{name: np.concatenate([getattr(own, name) for own in counted]) for name in columns},
        uses=uses,
        row_start=row_start,
        cost=cut.cost,
        dropped=dict(dropped or {}) | reasons,
        left_out=left_out,
        frames_line=counted[0].fit.line,
        facts=dict(facts or {}),
    )


@dataclass(frozen=True)
class Counted:
    """The counts of an epoch's records, or of all epochs' where these are equal: int64 `(records,)`."""

    fit: Fit
    frames: np.ndarray
    tokens: np.ndarray
    visual: np.ndarray
    supervised: np.ndarray
    transitions: np.ndarray
    causal_pairs: np.ndarray
    frame_pairs: np.ndarray
    conversation: np.ndarray
    clips: np.ndarray

    @classmethod
    def of(cls, lengths: Lengths, cut: Cut) -> "Counted":
        """Return the counts of fitted records; UserError where none is left."""
        fit = fit_records(lengths, cut.most_frames, cut.max_tokens, cut.pack_tokens)
        if not len(fit.kept):
            limits = [limit for limit in (cut.max_tokens, cut.pack_tokens) if limit]
            if REFUSED in fit.left_out or not limits:
                reasons = {reason: len(own) for reason, own in fit.left_out.items()}
                raise UserError(f"no record is left: {reasons}", fix="take another chat_template")
            raise UserError(
                f"no record fits {min(limits)} tokens", fix="raise max_tokens and pack_tokens"
            )
        visual = lengths.visual(fit.frames)
        return cls(
            fit=fit,
            frames=fit.frames,
            tokens=lengths.text + visual + lengths.stamps(fit.frames),
            visual=visual,
            supervised=lengths.supervised,
            transitions=lengths.transitions(fit.frames),
            causal_pairs=lengths.causal_pairs(fit.frames),
            frame_pairs=lengths.frame_pairs(fit.frames),
            conversation=lengths.conversation(fit.frames),
            clips=lengths.seen_uses(fit.frames),
        )


def _epochs(
    counted: list[Counted], cut: Cut, later: Callable[[int], Lengths] | None
) -> Iterator[Iterator[list[list[int]]]]:
    """Yield the steps of each epoch, and count the records of later ones as they are reached."""
    for epoch in itertools.count():
        if later is not None and epoch:
            counted.append(Counted.of(later(epoch), cut))
        own = counted[-1]
        first = 0 if later is None else epoch * len(own.frames)
        if cut.pack_tokens:
            steps = packed_epoch(own, cut, epoch)
        else:
            steps = plain_epoch(own.fit.kept, cut, epoch)
        yield ([[first + k for k in row] for row in step] for step in steps)


def left_out_of(counted: Sequence[Counted]) -> dict[str, np.ndarray]:
    """Return the records that are left out, by reason, numbered through the epochs."""
    found: dict[str, list[np.ndarray]] = {}
    for epoch, own in enumerate(counted):
        for reason, records in own.fit.left_out.items():
            found.setdefault(reason, []).append(records + epoch * len(own.frames))
    return {reason: np.concatenate(records) for reason, records in found.items()}


def cut_steps(
    epochs: Iterator[Iterator[list[list[int]]]], cut: Cut
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (uses, row starts, step starts) of a run: `max_steps`, or the epochs that are asked for.

    epochs: endless, each its steps in order, each step its rows. A fraction of an epoch is that share of
    its steps, rounded up.
    """
    steps: list[list[list[int]]] = []
    for number, epoch in enumerate(epochs):
        if cut.max_steps:
            steps += itertools.islice(epoch, cut.max_steps - len(steps))
            over = len(steps) == cut.max_steps
        else:
            left = Fraction(str(cut.epochs)) - number
            whole = list(epoch)
            steps += whole[: math.ceil(left * len(whole))]
            over = left <= 1
        if over:
            break
    rows = [row for step in steps for row in step]
    starts = [np.cumsum([0, *map(len, parts)]) for parts in (rows, steps)]
    return np.concatenate([np.asarray(row) for row in rows]), starts[0], starts[1]


def plain_epoch(kept: np.ndarray, cut: Cut, epoch: int) -> Iterator[list[list[int]]]:
    """Return the steps of an epoch, one record a row in the shuffled order."""
    stream = kept[order(cut.seed, epoch, len(kept))].tolist()
    return steps_of([[record] for record in stream], cut)


def steps_of(rows: list[list[int]], cut: Cut) -> Iterator[list[list[int]]]:
    """Yield rows as steps; the last one may be short."""
    for first in range(0, len(rows), cut.rows_per_step):
        yield rows[first : first + cut.rows_per_step]


def packed_epoch(counted: Counted, cut: Cut, epoch: int) -> Iterator[list[list[int]]]:
    """Yield the steps of an epoch, its records packed into rows.

    The epoch is cut into windows, a window packed into rows, and the rows of neighbouring steps divided
    by cost. Each is done in order of the stream, so that the number of steps decides only its end.
    """
    block, first = NEIGHBOURS * cut.rows_per_step, 0
    rows: list[list[int]] = []
    for packed, last in _packed_windows(counted.fit.kept, counted.tokens, cut, epoch):
        rows += packed
        while len(rows) >= block or (last and rows):
            rng = np.random.default_rng([cut.seed, first, 2, epoch])
            yield from steps_of(balance_steps(rows[:block], counted, cut, rng), cut)
            rows, first = rows[block:], first + block


def _packed_windows(
    kept: np.ndarray, tokens: np.ndarray, cut: Cut, epoch: int
) -> Iterator[tuple[list[list[int]], bool]]:
    """Yield the rows of each window of an epoch in random order, and whether the epoch ends."""
    rest: list[int] = []
    drawn = epoch * len(kept)
    for window, last in windows(kept, cut.seed, epoch):
        packed = best_fit_decreasing([*rest, *window], tokens, cut.pack_tokens)
        # the emptiest row goes into the next window, but not into the next epoch
        rest = [] if last or len(packed) == 1 else packed.pop()
        rng = np.random.default_rng([cut.seed, drawn, 1])
        emptiest = [packed.pop()] if last else []  # goes to the end
        yield [packed[k] for k in rng.permutation(len(packed))] + emptiest, last
        drawn += len(window)


def windows(kept: np.ndarray, seed: int, epoch: int) -> Iterator[tuple[list[int], bool]]:
    """Yield the shuffled records of an epoch in windows, and whether it ends."""
    count = -(-len(kept) // WINDOW)
    stream = kept[order(seed, epoch, len(kept))]
    for number, window in enumerate(np.array_split(stream, count)):
        yield window.tolist(), number == count - 1


def best_fit_decreasing(records: list[int], tokens: np.ndarray, limit: int) -> list[list[int]]:
    """Return rows of at most `limit` tokens: each record, longest first, goes where least room is left.

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
    rows: list[list[int]], counted: Counted, cut: Cut, rng: np.random.Generator
) -> list[list[int]]:
    """Return the rows of neighbouring steps so that those of one step cost nearly the same.

    The ranks of a step then wait little for each other: for 8 ranks 0.06 % more time than with equal
    packs in a simulation, 0.4 % without. Steps come in random order; rows that make no whole step, the
    cheapest, come last.
    """
    linear, quadratic = cut.cost
    sums = [[own[row].sum() for row in rows] for own in (counted.tokens, counted.causal_pairs)]
    # 2 p - n is n squared for a dialogue, whose pairs p are n (n + 1) / 2
    cost = [linear * n + quadratic * (2 * p - n) for n, p in zip(*sums, strict=True)]
    ranked = sorted(range(len(rows)), key=lambda k: -cost[k])
    whole = len(rows) // cut.rows_per_step
    starts = [*(rng.permutation(whole) * cut.rows_per_step), whole * cut.rows_per_step]
    return [rows[k] for start in starts for k in ranked[start : start + cut.rows_per_step]]


def all_drops(dataset: Dataset, plan: RunPlan) -> list[Drop]:
    """Return each record that a run leaves out, once: bad, not banked, or too long."""
    own = [
        Drop.of_record(dataset.record(k), reason)
        for reason, records in plan.left_out.items()
        for k in records.tolist()
    ]
    return [*dataset.drops, *dict.fromkeys(own)]
