"""The fitted baselines that ar_skill is read against, beside fits of NumPy that know nothing of ours."""

import json
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.batch import Batch
from model.frame_causal import PAIRS
from model.vlm import VLM
from shards.errors import UserError
from train.loop import floor as floors
from train.loop.floor import RIDGES, Floor, fit, floor_of_model
from train.settings.config import TrainConfig

Json = dict[str, Any]
PATTERNS = {"interleave": "SFSFS", "first_slow": "SSSFF"}
STRIDE = {"S": 2, "F": 4}


def drifting(seed: int, frames: int = 5, patch_grid: tuple[int, int] = (6, 8)) -> np.ndarray:
    """Return patches `(frames, rows, cols, 12)` that turn in feature space and fall back to a mean."""
    rng, scene = np.random.default_rng(seed), np.random.default_rng(99)
    home = scene.normal(size=(*patch_grid, 12)) * 2
    turn = np.linalg.qr(scene.normal(size=(12, 12)))[0]
    out = [rng.normal(size=(*patch_grid, 12)) * 2]
    for _ in range(frames - 1):
        moved = 0.5 * out[-1] + 0.2 * out[-1] @ turn + 0.3 * home
        out.append(moved + 0.3 * rng.normal(size=moved.shape))
    return np.stack(out)


def normalised(features: np.ndarray) -> np.ndarray:
    """Return `(cells, dim)`, each cell less its mean over its deviation."""
    cells = features.astype(np.float64).reshape(-1, features.shape[-1])
    centred = cells - cells.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)


def steps_of(clips: Sequence[Any], pattern: str) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Return (last frame, next frame) on the next one's grid, by pair of streams."""
    out: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for clip in clips:
        count = len(clip.info.timestamps)
        own = {1: "S", 5: pattern, 3: {"SFSFS": "SFS", "SSSFF": "SSF"}[pattern]}[count]
        for k in range(1, count):
            stored = clip.features[STRIDE[own[k]]]
            step = normalised(stored[k - 1]), normalised(stored[k])
            out.setdefault(own[k - 1 : k + 1], []).append(step)
    return out


def least_squares(steps: list[tuple[np.ndarray, np.ndarray]], share: float) -> np.ndarray:
    """Return the ridge `(dim + 1, dim)` as a plain least-squares problem with more rows."""
    weigh = [1 / np.sqrt(len(x)) for x, _ in steps]
    x = np.concatenate([w * np.c_[x, np.ones(len(x))] for w, (x, _) in zip(weigh, steps)])  # noqa: B905
    y = np.concatenate([w * y for w, (_, y) in zip(weigh, steps)])  # noqa: B905
    dim = y.shape[1]
    penalty = np.sqrt(share * (x[:, :dim] ** 2).sum() / dim) * np.eye(dim + 1)[:dim]
    found = np.linalg.lstsq(np.r_[x, penalty], np.r_[y, np.zeros((dim, dim))], rcond=None)[0]
    return np.asarray(found)


def mean_error(guesses: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> float:
    return float(sum(((g - t) ** 2).mean() for g, t in zip(guesses, truths, strict=True)))


def by_hand(
    first: Sequence[Any], held_in: Sequence[Any], unseen: Sequence[Any], pattern: str
) -> dict[str, np.ndarray]:
    """Return the sums that the fits of some clips reach on others, by pair of streams."""
    out = {"ar_affine": np.zeros(4), "ar_ridge": np.zeros(4)}
    parts = [steps_of(clips, pattern) for clips in (first, held_in, unseen)]
    for slot, pair in enumerate(PAIRS):
        one, other, tested = (part.get(pair, []) for part in parts)
        if not tested:
            continue
        xs, ys = zip(*tested, strict=True)

        def ridge_error(share: float, steps: Any, on: Any) -> float:
            fitted = least_squares(steps, share)
            guesses = [np.c_[x, np.ones(len(x))] @ fitted for x, _ in on]
            return mean_error(guesses, [y for _, y in on])

        share = min(RIDGES, key=lambda s: ridge_error(s, one, other))
        out["ar_ridge"][slot] = ridge_error(share, one + other, tested)
        # each grid has a mean of its own
        means: dict[int, np.ndarray] = {}
        for cells in {len(y) for _, y in one + other}:
            means[cells] = np.mean([y for _, y in one + other if len(y) == cells], axis=0)
        columns = np.concatenate(
            [
                np.stack([x, means[len(x)]], -1).reshape(-1, 2) / len(x) ** 0.5
                for x, _ in one + other
            ]
        )
        wanted = np.concatenate([(y / len(y) ** 0.5).reshape(-1) for _, y in one + other])
        a, b = np.linalg.lstsq(columns, wanted, rcond=None)[0]
        out["ar_affine"][slot] = mean_error([a * x + b * means[len(x)] for x in xs], ys)
    return out


def batches_of(make_batch: Callable[..., Batch], model: VLM, clips: Sequence[Any]) -> list[Batch]:
    talks = [([clip], "<video>\nWhere?", "here") for clip in clips]
    return [make_batch(model, *talks[k : k + 3]) for k in range(0, len(talks), 3)]


@pytest.mark.parametrize("strategy", ["interleave", "first_slow"])
def test_the_fits_and_their_losses_are_those_of_brute_force(
    make_model: Callable[..., VLM],
    make_clip: Callable[..., Any],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
) -> None:
    """Of clips of two grids and three lengths, fitted in chunks, read on clips that they never saw."""
    monkeypatch.setattr(floors, "CELLS_AT_ONCE", 20)
    model = make_model(frame_sampling_strategy=strategy)
    sizes = [(5, (6, 8)), (3, (6, 8)), (5, (5, 7)), (1, (6, 8))]
    clips = [make_clip(k, patches=drifting(k, *sizes[k % 4])) for k in range(36)]
    first, held_in, unseen = clips[:20], clips[20:28], clips[28:]
    fitted = Floor(
        fit(batches_of(make_batch, model, first), batches_of(make_batch, model, held_in)), {}
    )
    found = {name: torch.zeros(4) for name in ("ar_affine", "ar_ridge")}
    copy = torch.zeros(4)
    for batch in batches_of(make_batch, model, unseen):
        for name, sums in fitted.losses(batch).items():
            found[name] += sums
        with torch.no_grad():
            copy += model(batch)["ar_copy"]
    expected = by_hand(first, held_in, unseen, PATTERNS[strategy])
    for name, sums in found.items():
        np.testing.assert_allclose(sums, expected[name], rtol=1e-6, err_msg=name)
    assert max(sums.sum() for sums in expected.values()) < 0.9 * float(copy.sum())


def test_what_no_training_clip_had_is_predicted_all_the_same(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    """A pair of streams by copying, a grid by the mean of all cells."""
    model, later = make_model(), make_model(frame_sampling_strategy="first_slow")
    clips = [make_clip(k, patches=drifting(k)) for k in range(6)]
    fitted = Floor(fit(batches_of(make_batch, model, clips), ()), {})
    (other_pairs,) = batches_of(make_batch, later, clips[:1])
    with torch.no_grad():
        copy = later(other_pairs)["ar_copy"]
    assert fitted.losses(other_pairs)["ar_ridge"][0] == copy[0] > 0  # SS
    (other_grid,) = batches_of(make_batch, model, [make_clip(7, patch_grid=(4, 9))])
    for sums in fitted.losses(other_grid).values():
        assert sums.isfinite().all()
        assert sums.sum() > 0


def test_a_single_clip_does_not_choose_its_own_ridge(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    batches = batches_of(make_batch, make_model(), [make_clip()])
    fitted = fit(batches, ())
    assert {float(fitted[f"{pair}.ridge"]) for pair in ("SF", "FS")} == {max(RIDGES)}
    # frames without any detail leave nothing to fit, and no NaN
    flat = make_clip(patches=np.ones((5, 6, 8, 12)))
    batches = batches_of(make_batch, make_model(), [flat])
    assert all(value.isfinite().all() for value in fit(batches, batches).values())


def test_batches_without_the_last_frames_on_the_next_grid_give_no_sums(
    make_model: Callable[..., VLM], make_clip: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    model = make_model()
    (batch,) = batches_of(make_batch, model, [make_clip()])
    fitted = Floor(fit([batch], ()), {})
    without = replace(batch, transitions=tuple(replace(p, copy=None) for p in batch.transitions))
    assert fitted.losses(without) == {}
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fitted.losses(batch)
    for name, sums in fitted.losses(batch).items():
        assert torch.equal(sums, rounded[name]), "a floor is never computed in half precision"


# -- of a run


@pytest.fixture(scope="module")
def run(
    train_here: Callable[..., Path], toy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Twelve steps, of which the tenth reads the baselines; a held-out loss at the end."""
    out = tmp_path_factory.mktemp("floor") / "out"
    return train_here(out, max_steps=12, save_steps=6, eval_path=toy / "test.jsonl")


def lines_of(out: Path, kind: str) -> list[Json]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_runs_skill_is_read_against_its_strongest_baseline(run: Path) -> None:
    read = [line for line in lines_of(run, "train") if "ar_skill" in line]
    assert [line["step"] for line in read] == [10]
    for line in (*read, *lines_of(run, "eval")):
        baselines = [line[f"ar_{name}_baseline"] for name in ("copy", "affine", "ridge")]
        assert len(set(baselines)) == 3
        assert line["ar_skill"] == pytest.approx(1 - line["autoregressive_loss"] / min(baselines))
    assert "floor     fitting" in (run / "train.log").read_text()
    tensors = load_file(run / "floor.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"SF", "FS"}


def test_a_resumed_run_keeps_its_floor_and_another_plan_fits_anew(
    run: Path, train_here: Callable[..., Path], toy: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(run, tmp_path / "out"))
    shutil.rmtree(out / "checkpoint-12")
    before = (out / "floor.safetensors").stat().st_mtime_ns
    shared = {"max_steps": 12, "save_steps": 6, "eval_path": toy / "test.jsonl"}
    train_here(out, **shared)
    assert (out / "floor.safetensors").stat().st_mtime_ns == before
    assert lines_of(out, "eval") == lines_of(run, "eval")
    # damaged, it is fitted again, to the same bytes
    whole = (out / "floor.safetensors").read_bytes()
    (out / "floor.safetensors").write_bytes(whole[: len(whole) // 2])
    shutil.rmtree(out / "checkpoint-12")
    train_here(out, **shared)
    assert (out / "floor.safetensors").read_bytes() == whole
    train_here(out, **(shared | {"resume": "none", "seed": 5, "max_steps": 1}))
    assert (out / "floor.safetensors").read_bytes() != whole


def test_a_floor_of_other_frames_or_a_broken_one_is_refused_by_name(
    run: Path, tmp_path: Path
) -> None:
    config = VLM.load(run).config
    assert floor_of_model(run, config) is not None
    assert floor_of_model(run / "checkpoint-12", config) is not None
    assert floor_of_model(tmp_path, config) is None
    with pytest.raises(
        UserError, match=r"floor.safetensors.*other frames.*slow_frame_ratio: '0.25'"
    ):
        floor_of_model(run, replace(config, slow_frame_ratio="0.25"))
    shutil.copy(run / "floor.safetensors", tmp_path)
    with open(tmp_path / "floor.safetensors", "r+b") as file:
        file.truncate(900)
    with pytest.raises(UserError, match="does not read as a run's floor"):
        floor_of_model(tmp_path, config)


def test_a_floor_on_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    floor = Floor({"x": torch.zeros(9000)}, {"version": 0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match=r"floor\.safetensors: .*File too large"):
            floors.write(floor, tmp_path / floors.FILE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_the_fits_read_each_clip_once_and_no_more_than_they_may(
    run: Path, run_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.batches.plan import plan_run
    from train.data.dataset import open_dataset

    values = {name: str(v) if isinstance(v, Path) else v for name, v in run_settings.items()}
    values |= {"bank": [str(values["bank"])], "data_path": [str(values["data_path"])]}
    config = TrainConfig(**values)
    dataset = open_dataset(config)
    plan = plan_run(config, dataset, 2)
    every = floors.records_to_fit(dataset, plan)
    read = [place for k in every for place in dataset.records[k].places]
    assert len(read) == len(set(read)) == len({p for r in dataset.records for p in r.places})
    monkeypatch.setattr(floors, "MOST_CLIPS", 3)
    some = floors.records_to_fit(dataset, plan)
    assert len(some) == 3
    assert (some[0], some[-1]) == (every[0], every[-1])
    monkeypatch.setattr(floors, "MOST_CELLS", 2 * int(plan.visual[every[0]]))
    assert len(floors.records_to_fit(dataset, plan)) == 2
