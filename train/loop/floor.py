"""Baselines of the frame-causal loss: predictions of the next frame without the model.

    copy      the last frame again
    affine    a x last frame + b x cell mean, a and b of least squares
    ridge     a matrix x last frame + a vector, cell by cell, of ridge regression

The last frame is read on the next one's grid; the cell mean is that of the next frames of training
clips. Both fits are of a run's training clips, once for each pair of streams, and `floor.safetensors`
in its output folder keeps them for `train/evaluate.py`. Features and errors are those of the loss.

Copying alone is too weak a baseline: in both runs of `make demo` the ridge is the strongest of the three.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from model.batch import Batch, FrameGroup, Transitions, to_device
from model.config import VLMConfig
from model.frame_causal import PAIRS, frame_mse, frame_target, pair_of
from model.llm import open_as_folder
from model.slow_fast import uniform_indices
from shards.errors import UserError, naming
from shards.format.features import differences
from shards.read.banks import Place
from shards.read.timeline import places_of
from shards.signed import Json, canonical_json, digest
from train.batches.loader import Loader
from train.batches.run_plan import RunPlan
from train.data.dataset import Dataset

if TYPE_CHECKING:
    from accelerate import Accelerator

FILE = "floor.safetensors"
VERSION = 1
MOST_CLIPS, MOST_CELLS = 1024, 2**19
"""Most clips, and most cells of them, that the fits read: some gigabytes of features, once."""
MOST_DRAWN = 4096
"""Most records that these clips are chosen from, where records are drawn (`splice`)."""
CLIPS_AT_ONCE, CELLS_AT_ONCE = 4, 2**14
"""Clips, and cells in fp64, that are in memory at a time."""
HELD_IN = 5
"""Every fifth of these clips is left out of the first fit and chooses the ridge's penalty."""
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the penalty, as shares of the inputs' mean square."""


class Floor:
    """The fitted baselines of a run."""

    def __init__(self, tensors: dict[str, Tensor], facts: Json) -> None:
        """tensors: fp32, see `fitted`. facts: what they were fitted on, see `facts_of`."""
        self.tensors, self.facts = tensors, facts

    def to(self, device: torch.device) -> "Floor":
        """Return a copy on a device."""
        return Floor({n: t.to(device) for n, t in self.tensors.items()}, self.facts)

    @torch.no_grad()
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the baselines' error sums by pair of streams, as the model's: name -> fp32 `(4,)`.

        Empty where the last frames were not read on the next ones' grids. A pair of streams that no
        training clip had is predicted by copying.
        """
        if any(pairs.copy is None for pairs in batch.transitions):
            return {}
        device = batch.input_ids.device
        out = {f"ar_{name}": torch.zeros(4, device=device) for name in ("affine", "ridge")}
        # fp32 whatever the run computes in: rounding would make a baseline easier to beat
        with torch.autocast(device.type, enabled=False):
            for pairs in batch.transitions:
                pair, slot = pair_of(batch, pairs), PAIRS.index(pair_of(batch, pairs))
                last, truth = ends(batch, pairs)
                for name, guess in self.guesses(pair, batch.groups[pairs.target], last):
                    out[f"ar_{name}"][slot] += frame_mse(guess, truth)
        return out

    def guesses(self, pair: str, target: FrameGroup, last: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the predictions of next frames from the last ones: `(n, cells, dim)`, normalised."""
        own = self.tensors
        if f"{pair}.matrix" not in own:
            yield from (("affine", last), ("ridge", last))
            return
        # a grid that no training clip had takes the mean of all cells
        mean = own.get(_mean_name(pair, target), own[f"{pair}.mean"])
        share_of_last, share_of_mean = own[f"{pair}.mix"]
        yield "affine", share_of_last * last + share_of_mean * mean
        yield "ridge", last @ own[f"{pair}.matrix"] + own[f"{pair}.vector"]


def ends(batch: Batch, pairs: Transitions) -> tuple[Tensor, Tensor]:
    """Return the last frames and the next ones of some transitions: fp32 `(n, cells, dim)`."""
    assert pairs.copy is not None
    truth = batch.groups[pairs.target].features[pairs.target_frame]
    return frame_target(pairs.copy), frame_target(truth)


# -- fits


@dataclass
class Moments:
    """Sums over the transitions of one pair of streams: fp64, each transition with a total weight of 1.

    x: the last frames' cells, each with a 1 appended; y: the next frames' cells.
    """

    xx: Tensor
    """`(dim + 1, dim + 1)`."""
    xy: Tensor
    """`(dim + 1, dim)`."""
    yy: Tensor
    grids: dict[str, Tensor] = field(default_factory=dict)
    """By the name of a grid's mean: `(2, cells, dim)`, sums of x and y over transitions."""
    counts: dict[str, int] = field(default_factory=dict)
    """Transitions of each grid."""

    @classmethod
    def zeros(cls, dim: int, device: torch.device) -> "Moments":
        """Return the moments of no transition."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(zero.new_zeros(dim + 1, dim + 1), zero.new_zeros(dim + 1, dim), zero)

    def add(self, grid: str, last: Tensor, truth: Tensor) -> None:
        """Add transitions of one grid: `(n, cells, dim)` each."""
        n, cells, _ = last.shape
        at_once = max(1, CELLS_AT_ONCE // cells)
        for some, following in zip(last.split(at_once), truth.split(at_once), strict=True):
            # fp64: normal equations square the condition number of the features
            x = F.pad(some.double(), (0, 1), value=1.0).flatten(0, 1)
            y = following.double().flatten(0, 1)
            # a frame's cells together weigh 1, as in the loss, where frames count
            # alike whatever their grid
            self.xx += x.T @ x / cells
            self.xy += x.T @ y / cells
            self.yy += y.square().sum() / cells
        sums = torch.stack([frames.sum(dim=0, dtype=torch.float64) for frames in (last, truth)])
        self.grids[grid] = self.grids.get(grid, 0) + sums
        self.counts[grid] = self.counts.get(grid, 0) + n

    def __add__(self, other: "Moments") -> "Moments":
        out = Moments(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)
        for one in (self, other):
            for grid, sums in one.grids.items():
                out.grids[grid] = out.grids.get(grid, 0) + sums
                out.counts[grid] = out.counts.get(grid, 0) + one.counts[grid]
        return out

    @property
    def weight(self) -> float:
        """The number of transitions."""
        return float(sum(self.counts.values()))


def ridge(of: Moments, share: float) -> Tensor:
    """Return the ridge regression `(dim + 1, dim)` from x to y: (X'X + penalty I)^-1 X'Y.

    Hoerl and Kennard 1970. share: the penalty, as a share of the mean square of x's features. The last
    row, the vector, is not penalised.
    """
    dim = of.xy.shape[1]
    penalised = of.xx.clone()
    # the sums alone are kept (dim^2 numbers), so that clips are read once for seven penalties
    squares = penalised.diagonal()[:dim]
    # a view of the diagonal: the addition is to `penalised` itself; never 0, which a constant
    # channel would make singular
    squares += max(share * float(squares.mean()), 1e-12)
    return torch.linalg.solve(penalised, of.xy)


def error(matrix: Tensor, of: Moments) -> float:
    """Return the sum of squared errors of `x @ matrix`: tr(Y'Y) - 2 tr(M'X'Y) + tr(M'X'X M)."""
    # |Y - X M|^2 multiplied out, from the sums: no clip is read twice
    return float(of.yy - 2 * (matrix * of.xy).sum() + (matrix * (of.xx @ matrix)).sum())


def best_ridge(first: Moments, held_in: Moments) -> float:
    """Return the penalty with which a fit of some clips predicts others best; the largest if none are."""
    if not (first.weight and held_in.weight):
        return RIDGES[-1]
    # the largest penalty where nothing can be compared: it predicts least boldly
    return min(RIDGES, key=lambda share: error(ridge(first, share), held_in))


def mix(of: Moments) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (share of the last frame, share of the cell mean) and the means `(cells, dim)` by grid."""
    dim = of.xy.shape[1]
    last_last, last_next = of.xx.diagonal()[:dim].sum(), of.xy.diagonal().sum()
    last_mean, mean_mean = torch.zeros_like(of.yy), torch.zeros_like(of.yy)
    means = {}
    for grid, (last, following) in of.grids.items():
        mean = following / of.counts[grid]
        last_mean += (last * mean).sum() / len(mean)
        mean_mean += (following * mean).sum() / len(mean)
        means[grid] = mean
    # the mean's product with the next frames equals its product with itself
    normal = torch.stack([last_last, last_mean, last_mean, mean_mean]).view(2, 2)
    right = torch.stack([last_next, mean_mean])
    # pinv: where every last frame is the mean (stills), the two inputs are one,
    # and the matrix is singular
    return torch.linalg.pinv(normal, hermitian=True) @ right, means


def fitted(pair: str, first: Moments, held_in: Moments) -> dict[str, Tensor]:
    """Return the fits of one pair of streams, by name: fp32.

    SF.matrix `(dim, dim)`, SF.vector `(dim,)`, SF.ridge: the chosen share; SF.mix `(2,)`, SF.mean.2x3
    `(cells, dim)` of each grid, SF.mean `(dim,)` of all cells.
    """
    # the penalty is chosen on clips left out; the fit itself then has all of them
    whole = first + held_in
    share = best_ridge(first, held_in)
    matrix = ridge(whole, share)
    shares, means = mix(whole)
    out = {
        f"{pair}.matrix": matrix[:-1],
        f"{pair}.vector": matrix[-1],
        f"{pair}.ridge": torch.tensor(share),
        f"{pair}.mix": shares,
        f"{pair}.mean": whole.xy[-1] / whole.weight,
        **means,
    }
    return {name: value.float().cpu().contiguous() for name, value in out.items()}


def fit(first: Iterable[Batch], held_in: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the fits of all pairs of streams from batches of training clips."""
    moments: dict[tuple[str, int], Moments] = {}
    for part, batches in enumerate((first, held_in)):
        for batch in batches:
            for pairs in batch.transitions:
                pair = pair_of(batch, pairs)
                last, truth = ends(batch, pairs)
                for other in (0, 1):
                    moments.setdefault((pair, other), Moments.zeros(last.shape[-1], last.device))
                grid = _mean_name(pair, batch.groups[pairs.target])
                moments[pair, part].add(grid, last, truth)
    out: dict[str, Tensor] = {}
    for pair in PAIRS:
        if (pair, 0) in moments:
            out |= fitted(pair, moments[pair, 0], moments[pair, 1])
    return out


def _mean_name(pair: str, target: FrameGroup) -> str:
    return f"{pair}.mean.{target.grid.rows}x{target.grid.cols}"


# -- of a run


def records_to_fit(dataset: Dataset, plan: RunPlan) -> list[int]:
    """Return the training records that the fits read: evenly spread, no two of the same clip.

    Only records with a transition. Held-out records are not among them, as for the model.
    """
    taken: set[Place] = set()
    found = []
    able = np.flatnonzero(plan.transitions[: dataset.count])
    if dataset.is_drawn:
        able = able[uniform_indices(len(able), MOST_DRAWN)] if len(able) else able
    for k in able.tolist():
        places = {place for medium in dataset.record(k).places for place in places_of(medium)}
        # several records of one clip would count its frames several times
        if not places & taken:
            taken |= places
            found.append(k)
    if not found:
        return []
    cells = float(plan.visual[found].mean())
    count = max(1, min(MOST_CLIPS, int(MOST_CELLS / cells)))
    return [found[k] for k in uniform_indices(len(found), count)]


def facts_of(plan: RunPlan, config: VLMConfig, records: Sequence[int]) -> Json:
    """Return the facts that a run's fits depend on."""
    names = ("frame_sampling_strategy", "slow_frame_ratio", "max_frames_num")
    return {
        "version": VERSION,
        "plan": plan.fingerprint,
        "records": digest(canonical_json({"records": list(records)})),
        "frames": {name: getattr(config, name) for name in (*names, "slow_stride", "fast_stride")},
    }


def floor_of_run(
    folder: Path,
    plan: RunPlan,
    loader: Loader,
    accelerator: "Accelerator",
    say: Callable[[str], None],
) -> Floor | None:
    """Return the baselines of a run, fitted once and kept in its folder; every rank calls this.

    One process of each machine reads clips and fits, the others read the file. None where the model
    predicts no frames, or no training clip has two.
    """
    if loader.config.loss_weight == 0:
        return None
    records = records_to_fit(loader.dataset, plan)
    facts = facts_of(plan, loader.config, records)
    if not records:
        (folder / FILE).unlink(missing_ok=True)  # an earlier run's
        say("floor     none: no training clip has a step from frame to frame to fit it on")
        return None
    with accelerator.local_main_process_first():
        floor = _kept(folder / FILE, facts)
        if floor is None:
            say(f"floor     fitting copy, affine mix and ridge on {len(records)} training records")
            # by place in the list, with no random number: the same clips on every rank and resume
            chosen = [k for k in range(len(records)) if k % HELD_IN == HELD_IN - 1]
            held_in = [records[k] for k in chosen]
            first = [k for k in records if k not in set(held_in)]
            parts = (_batches(part, plan, loader, accelerator) for part in (first, held_in))
            floor = Floor(fit(*parts), facts)
            write(floor, folder / FILE)
    return floor.to(accelerator.device)


def _batches(
    records: Sequence[int], plan: RunPlan, loader: Loader, accelerator: "Accelerator"
) -> Iterator[Batch]:
    for begin in range(0, len(records), CLIPS_AT_ONCE):
        rows = [
            [(loader.dataset.record(k), int(plan.frames[k]))]
            for k in records[begin : begin + CLIPS_AT_ONCE]
        ]
        yield to_device(loader.rows(rows, with_copy=True), accelerator.device)


# -- on disk


def write(floor: Floor, path: Path) -> None:
    """Write a floor so that it exists whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            save_file(floor.tensors, temporary, {"facts": canonical_json(floor.facts).decode()})
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    open_as_folder(temporary)
    os.replace(temporary, path)


def read(path: Path) -> Floor:
    """Read a floor; UserError where the file is none."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return Floor({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"does not read as a run's floor ({error})",
            where=path,
            fix="move it away to go without ar_skill, or resume the run, which fits it again",
        ) from None


def _kept(path: Path, facts: Json) -> Floor | None:
    """Return the floor of these facts that is stored already, or None."""
    try:
        floor = read(path) if path.exists() else None
    except UserError:
        return None
    return floor if floor and floor.facts == json.loads(canonical_json(facts)) else None


def floor_of_model(folder: Path, config: VLMConfig) -> Floor | None:
    """Return the floor that is stored beside a trained model or its checkpoint, or None.

    Raises UserError where it was fitted on other frames than the model takes.
    """
    is_checkpoint = (folder / "checkpoint.json").exists()
    # a checkpoint's floor is its run's: clips and fit are the same at every step
    path = (folder.resolve().parent if is_checkpoint else folder) / FILE
    if not path.exists():
        return None
    floor = read(path)
    theirs = floor.facts.get("frames", {})
    if lines := differences({name: getattr(config, name) for name in theirs}, theirs):
        raise UserError(
            f"fitted on other frames than {folder} takes: {'; '.join(lines)}",
            where=path,
            fix="move it away to go without ar_skill",
        )
    return floor
