"""The numbers of a run's steps: metrics.jsonl as columns, of a long run a sample of its lines."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from shards.signed import Json

MOST_LINES = 20_000
"""Of a file that are parsed: more says no more in a curve, and takes seconds."""
BUCKETS = 120
"""Points of a curve."""
SECONDS = re.compile(rb'"seconds": ([0-9.eE+-]+)')


@dataclass(frozen=True)
class Curve:
    """A number over steps, each point of several steps. float64 `(points,)` each."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Metrics:
    """Lines of metrics.jsonl: those of the training steps, or a sample of them, and all others."""

    rows: tuple[Json, ...]
    """Of training steps in their order; the last step is among them."""
    held_out: tuple[Json, ...]
    steps: int
    """Lines of training steps in the file."""
    seconds: float
    """Of all steps."""
    not_finite: bool
    """Whether any number of any line is no number: NaN or infinity."""

    @property
    def last(self) -> Json:
        return self.rows[-1] if self.rows else {}

    @property
    def sampled(self) -> bool:
        return len(self.rows) < self.steps

    @cached_property
    def names(self) -> frozenset[str]:
        """What any of the lines says."""
        return frozenset(name for row in self.rows for name in row)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps, values) of the lines that have a number by this name: float64 each."""
        found = [(row["step"], row[name]) for row in self.rows if name in row]
        both = np.asarray(found, np.float64).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def curve(self, name: str) -> Curve:
        return bucketed(*self.column(name))

    def end(self, name: str) -> float | None:
        """Return the mean over the last tenth of the steps; None where nothing says it there."""
        steps, values = self.column(name)
        late = values[steps > 0.9 * self.last.get("step", 0)]
        return float(late.mean()) if len(late) else None


def read_metrics(path: Path) -> Metrics:
    """Read a run's metrics.jsonl, also while it is written: a last line that is torn is left out."""
    data = path.read_bytes()
    # what follows the last line end is empty, or a line that is being written
    lines = data.split(b"\n")[:-1]
    # sorted by bytes, parsed after the draw: JSON of all lines of a long run takes seconds
    others = [line for line in lines if b'"kind": "eval"' in line]
    if others:
        lines = [line for line in lines if b'"kind": "train"' in line]
    chosen = lines
    if len(lines) > MOST_LINES:
        # drawn, not every k-th: baselines are measured at every tenth step
        drawn = np.random.default_rng(0).choice(len(lines) - 1, MOST_LINES - 1, replace=False)
        chosen = [lines[k] for k in np.sort(drawn)] + [lines[-1]]
    return Metrics(
        rows=tuple(map(json.loads, chosen)),
        held_out=tuple(map(json.loads, others)),
        steps=len(lines),
        # over all lines, not over the sample
        seconds=float(np.asarray(SECONDS.findall(data), np.float64).sum()),
        not_finite=b": NaN" in data or b": Infinity" in data or b": -Infinity" in data,
    )


def bucketed(steps: np.ndarray, values: np.ndarray, buckets: int = BUCKETS) -> Curve:
    """Return the mean, least and most of values over stretches of steps, in as many points at most."""
    # a NaN would make its whole point one, and matplotlib a gap
    kept = np.isfinite(values)
    steps, values = steps[kept], values[kept]
    if len(steps) <= buckets:
        return Curve(steps, values, values, values)
    # unique: no stretch is empty, of which reduceat would return the next value
    begins = np.unique(np.linspace(0, len(steps), buckets, endpoint=False).astype(int))
    counts = np.diff(begins, append=len(steps))
    return Curve(
        np.add.reduceat(steps, begins) / counts,
        np.add.reduceat(values, begins) / counts,
        np.minimum.reduceat(values, begins),
        np.maximum.reduceat(values, begins),
    )
