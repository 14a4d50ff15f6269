"""The plan of a run as arrays: the records of each step, their rows and packs, and all counts.

Made by `train.batches.plan`. Rows, packs and steps are numbered through the run; `uses` are the records
of the rows, one row after the other.
"""

import itertools
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from model.family.limits import apart_up_to, check_context
from shards.errors import UserError
from shards.signed import Json, canonical_json, digest


@dataclass(frozen=True)
class RunPlan:
    """The records of each step, the frames used of them, and their division into rows and packs."""

    rows_per_step: int
    """Of a whole step; the last step of an epoch may have less."""
    rows_per_pack: int
    pack_tokens: int
    step_start: np.ndarray
    """int64 `(steps + 1,)`: the row that each step begins with, then the number of rows."""
    frames: np.ndarray
    """int64 `(records,)`: frames of each clip of a record that are used, at most."""
    tokens: np.ndarray
    """int64 `(records,)`, tokens with that many frames."""
    visual: np.ndarray
    """Tokens of frames among them, each frame's closing one included."""
    supervised: np.ndarray
    transitions: np.ndarray
    causal_pairs: np.ndarray
    """(query, key) pairs of each record under causal attention."""
    frame_pairs: np.ndarray
    """Pairs that `block` attention adds to the causal ones of each record."""
    conversation: np.ndarray
    """int64 `(records,)`, tokens of the longest conversation: the record, or a turn and what it sees."""
    clips: np.ndarray
    """int64 `(records,)`, clips, or parts of spliced media, of which a record has frames."""
    uses: np.ndarray
    """int64 `(uses,)`: the records of the run's rows, one row after the other."""
    row_start: np.ndarray
    """int64 `(rows + 1,)` into `uses`."""
    cost: tuple[float, float]
    dropped: dict[str, int]
    """Records left out, by reason, before this plan and by it."""
    left_out: dict[str, np.ndarray] = field(default_factory=dict)
    """Reason -> int64, the records that this plan leaves out."""
    frames_line: str = ""
    """The number of frames left out for `max_tokens` and `pack_tokens`, in words; empty if none."""
    facts: Json = field(default_factory=dict)
    """All that the plan depends on, by name."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.step_start) - 1

    @property
    def packs_per_step(self) -> int:
        """Packs of a whole step."""
        return self.rows_per_step // self.rows_per_pack

    @cached_property
    def num_rows(self) -> np.ndarray:
        """Rows of each step: int64 `(steps,)`."""
        return np.diff(self.step_start)

    @cached_property
    def num_packs(self) -> np.ndarray:
        """Packs of each step: int64 `(steps,)`."""
        return -(-self.num_rows // self.rows_per_pack)

    @cached_property
    def pack_start(self) -> np.ndarray:
        """The row that each pack of the run begins with: int64 `(packs,)`."""
        # packs never span steps: the last pack of a short step has what rows are left
        packs = zip(self.step_start.tolist(), self.num_packs.tolist(), strict=False)
        starts = [first + self.rows_per_pack * np.arange(count) for first, count in packs]
        return np.concatenate(starts)

    def pack(self, step: int, pack: int) -> list[list[int]]:
        """Return the rows of a pack, each as its records in order."""
        assert 0 <= pack < self.num_packs[step]
        first = int(self.step_start[step]) + pack * self.rows_per_pack
        last = min(first + self.rows_per_pack, int(self.step_start[step + 1]))
        edges = self.row_start[first : last + 1].tolist()
        return [self.uses[a:b].tolist() for a, b in itertools.pairwise(edges)]

    def records(self, step: int) -> list[int]:
        """Return the records of a step, in the order of its packs."""
        first, last = self._first_use[step : step + 2]
        return [int(record) for record in self.uses[first:last]]

    def first_with_media(self, most: int) -> list[int]:
        """Return the first records of the run that have clips, at most `most`.

        If the run is too short to reach one, the first such records of the data.
        """
        used = list(dict.fromkeys(self.uses[self.clips[self.uses] > 0].tolist()))
        return (used or np.flatnonzero(self.clips).tolist())[:most]

    @property
    def _first_use(self) -> np.ndarray:
        return self.row_start[self.step_start]

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
        """Transitions of each step: the denominator of the frame loss, int64 `(steps,)`."""
        return self.per_step(self.transitions)

    def per_step(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of a per-record quantity over the records of each step."""
        return np.add.reduceat(values[self.uses], self._first_use[:-1])

    @cached_property
    def row_cost(self) -> np.ndarray:
        """Forward FLOPs of each row, up to a constant, see `Cut.cost`: float64 `(rows,)`."""
        linear, quadratic = self.cost
        own = 2 * self.causal_pairs - self.tokens  # of a dialogue the square of its tokens
        squares = np.add.reduceat(own[self.uses].astype(float), self.row_start[:-1])
        return linear * self.row_tokens + quadratic * squares

    @cached_property
    def pack_slots(self) -> np.ndarray:
        """Tokens of each pack, padding to its longest row included: int64 `(packs,)`."""
        longest = np.maximum.reduceat(self.row_tokens, self.pack_start)
        return longest * np.diff(self.pack_start, append=len(self.row_tokens))

    @property
    def heaviest(self) -> tuple[int, int]:
        """Return (step, pack) of the pack with most tokens, the costliest among equals.

        Tokens with padding, since memory follows them: activations are allocated for padding too.
        """
        cost = np.add.reduceat(self.row_cost, self.pack_start)
        # lexsort takes the most significant key last
        place = int(np.lexsort((cost, self.pack_slots))[-1])
        first = np.concatenate([[0], np.cumsum(self.num_packs)])
        step = int(np.searchsorted(first, place, side="right")) - 1
        return step, place - int(first[step])

    @property
    def efficiency(self) -> float:
        """Return the share of places that hold a token: of `pack_tokens`, or of padded rows."""
        # packed rows have a fixed length, others that of the longest in their pack
        places = len(self.row_tokens) * self.pack_tokens or int(self.pack_slots.sum())
        return float(self.row_tokens.sum()) / places

    @property
    def dropped_line(self) -> str:
        """The number of records left out, with reasons, as part of a line."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return f"{sum(self.dropped.values())} dropped" + (f" ({reasons})" if reasons else "")

    @property
    def short_line(self) -> str:
        """The steps with fewer rows than a whole one, as the end of a line; empty if there are none."""
        short = self.num_rows[self.num_rows < self.rows_per_step].tolist()
        if not short:
            return ""
        rows = f"{short[0]} row{'s' if short[0] > 1 else ''}"
        shown = rows if len(set(short)) == 1 else f"{min(short)} to {max(short)} rows"
        return f"; {len(short)} short at the end of an epoch ({shown})"

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all facts that the plan depends on."""
        return digest(canonical_json(self.facts))


def check_rows(plan: RunPlan, llm: Json, limit: int | None) -> None:
    """Raise UserError where rows are longer than an LLM reads, or than it keeps records apart.

    llm: its config.json. limit: its context, see `context_of`.
    """
    lengths, tokens = plan.conversation[plan.uses], plan.tokens[plan.uses]
    longest = int(lengths.max())
    check_context(longest, limit, "the longest record", f"set max_tokens: {limit}, or less")
    apart = apart_up_to(llm)
    if apart is None:
        return
    # a record of independent turns is several conversations; one in a row is at its own places
    several = np.diff(plan.row_start) > 1
    several |= np.logical_or.reduceat(lengths < tokens, plan.row_start[:-1])
    if apart.by_row:
        wrong = several & (plan.row_tokens > apart.tokens)
    else:
        mixed = lengths.min() <= apart.tokens < longest
        wrong = (several | (plan.rows_per_pack > 1)) & mixed
    if wrong.any():
        name = "pack_tokens" if plan.pack_tokens else "max_tokens"
        raise UserError(
            f"records would change each other in {int(wrong.sum()):,} rows: {apart.why}",
            got=f"rows of up to {int(plan.row_tokens.max()):,} tokens, records of up to {longest:,}",
            fix=f"set {name}: {apart.tokens}, or less; or pack_tokens: 0, turns: dialogue and "
            "per_device_train_batch_size: 1",
        )
