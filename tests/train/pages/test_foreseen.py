"""Next frames that evaluation keeps: those of the loss, and their file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from train.pages.read.foreseen import (
    ROLES,
    Foreseen,
    NextFrame,
    in_few_directions,
    read_foreseen,
    write_foreseen,
)


def some_clip(dim: int = 7) -> Foreseen:
    """A clip of frames of two sizes."""
    rng = np.random.default_rng(0)
    shapes = [(2, 2), (1, 1), (4, 3)]
    frames = [
        NextFrame(0.5 * k, "SF", 0.25, 0.5, *rng.normal(size=(3, *shape, dim)))
        for k, shape in enumerate(shapes)
    ]
    return Foreseen("a.mp4", tuple(frames))


def test_the_file_gives_back_times_errors_and_three_directions(tmp_path: Path) -> None:
    path = tmp_path / "foreseen-test.npz"
    assert read_foreseen(path) == []
    clip = some_clip()
    write_foreseen(path, [clip, Foreseen("b.mp4", ())])
    found, empty = read_foreseen(path)
    assert (empty.clip, empty.frames) == ("b.mp4", ())
    kept = in_few_directions(clip)
    for number, (frame, own) in enumerate(zip(found.frames, clip.frames, strict=True)):
        facts = [(f.time, f.pair, f.error, f.copy_error) for f in (frame, own)]
        assert facts[0] == facts[1]
        for role in ROLES:
            assert getattr(frame, role).shape == (*own.target.shape[:2], 3)
            assert getattr(frame, role) == pytest.approx(kept[f"{number}.{role}"], abs=5e-3)


def test_the_directions_are_those_in_which_what_came_differs_most() -> None:
    """Of cells that lie in three dimensions all distances stay; of others none grows."""
    clip = some_clip(dim=3)
    kept = in_few_directions(clip)
    came = [kept[f"{k}.target"].reshape(-1, 3) for k in range(3)]
    cells = [frame.target.reshape(-1, 3) for frame in clip.frames]
    distances = [
        np.linalg.norm(x[:, None] - x, axis=-1) for x in map(np.concatenate, (came, cells))
    ]
    assert distances[0] == pytest.approx(distances[1])
    wide = np.concatenate([f.target.reshape(-1, 7) for f in some_clip().frames])
    kept = in_few_directions(some_clip())
    few = np.concatenate([kept[f"{k}.target"].reshape(-1, 3) for k in range(3)])
    values = np.linalg.svd(wide - wide.mean(axis=0), compute_uv=False)
    assert np.square(few).sum() == pytest.approx(np.square(values[:3]).sum())


@pytest.mark.slow
def test_evaluation_keeps_the_frames_whose_errors_are_its_losses(
    trained_run: Path, toy: Path, toy_bank: Path, tmp_path: Path
) -> None:
    from accelerate.state import AcceleratorState

    from train.evaluate import main

    ignored = shutil.ignore_patterns("checkpoint-*")
    run = Path(shutil.copytree(trained_run, tmp_path / "run", ignore=ignored))
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--model", str(run), "--bank", str(toy_bank), "--max_records", "1"]
    main([*words, "--data_path", str(toy / "test.jsonl")])
    AcceleratorState._reset_state(reset_partial_state=True)
    (clip,) = read_foreseen(run / "foreseen-test.npz")
    losses = json.loads((run / "eval-test.json").read_text())["losses"]
    assert len(clip.frames) == losses["transitions"]
    errors = np.asarray([(f.error, f.copy_error) for f in clip.frames])
    means = losses["autoregressive_loss"], losses["ar_copy_baseline"]
    assert errors.mean(axis=0) == pytest.approx(means, rel=1e-4)
    for pair in {f.pair for f in clip.frames}:
        own = errors[[f.pair == pair for f in clip.frames], 0]
        assert own.mean() == pytest.approx(losses[f"ar_{pair}"], rel=1e-4)
    assert [f.time for f in clip.frames] == sorted(f.time for f in clip.frames)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1].keys() >= {"gamma_time", "gamma_height", "gamma_width"}
    from model.vlm import VLM

    gamma = VLM.load(run).lape.gamma.tolist()  # type: ignore[union-attr]
    assert [lines[-1][f"gamma_{axis}"] for axis in ("time", "height", "width")] == gamma
