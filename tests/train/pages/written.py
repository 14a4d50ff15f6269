"""Folders of runs as training and evaluation leave them, by what writes them; the numbers are made up."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from train.scores.predictions import Prediction, report_of, write_predictions
from train.settings.config import TrainConfig
from train.settings.recorded import write_run

STEPS = 60
HOSTILE = "<script>alert(1)</script>"
LOG = """stage     LLM: Qwen2ForCausalLM from llm
bank      bank: 9 clips, fingerprint 0123456789ab
records   48 to train on, 0 held out, 0 dropped
frames    SFSFSF (S: stride 4, 2x2 cells; F: stride 8, 1x1), 21 tokens of a clip
warning   train.jsonl: 3 records <b>look</b> odd
step {steps}/{steps} ce 1.0 ar 0.3
"""


def metrics_lines(steps: int, slope: float = 1.0, seed: int = 0) -> list[str]:
    """Return metrics.jsonl of a run whose losses fall, with baselines at every tenth step."""
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        fall = np.exp(-slope * 5 * step / steps)
        row = {
            "step": step,
            "kind": "train",
            "loss": 1 + fall + 0.05 * rng.random(),
            "ce_loss": 0.9 + fall,
            "ce_text": 0.8 + fall,
            "ce_span": 0.7 + fall,
            "autoregressive_loss": 0.3 + fall,
            "grad_norm": 0.5 + rng.random(),
            "learning_rate": 1e-3 * (1 - step / steps),
            "learning_rate_lape": 3e-3 * (1 - step / steps),
            "seconds": 0.25,
            "data_wait": 0.01,
            "tokens_per_second": 5000.0,
            "memory_gb": 1.5,
        }
        if step % 10 == 0:
            row |= {"ar_copy_baseline": 0.5, "ar_affine_baseline": 0.4, "ar_ridge_baseline": 0.45}
            row |= {"ar_skill": 1 - row["autoregressive_loss"] / 0.4, "ar_skill_SF": 0.1}
            row |= {"gamma_time": 1.2 - step / 200, "gamma_height": 1.1, "gamma_width": 1.0}
        lines.append(json.dumps(row))
    return lines


def predictions(
    clips: Sequence[str], good: bool, count: int = 1, seed: int = 0
) -> list[Prediction]:
    """Return answers of six kinds about each clip, near the right ones or nowhere near."""
    rng = np.random.default_rng(seed)
    found = []
    for number, clip in enumerate(clips * count):
        start, x, y = 0.5 + 2 * rng.random(), *(0.1 + 0.5 * rng.random(2))
        off = 0.02 if good else 1.0
        here = {
            "span": (
                f"<t:{start:.3f}> to <t:{start + 1:.3f}>",
                f"<t:{start + off:.3f}> to <t:{start + 1:.3f}>",
            ),
            "point": (f"<x:{x:.3f}><y:{y:.3f}>", f"<x:{min(x + off / 2, 1):.3f}><y:{y:.3f}>"),
            "box": (
                f"<x:{x:.3f}><y:{y:.3f}><x:{x + 0.3:.3f}><y:{y + 0.3:.3f}>",
                f"<x:{x:.3f}><y:{y:.3f}><x:{x + 0.3 - off / 4:.3f}><y:{y + 0.3:.3f}>",
            ),
            "count": (str(number % 4), str(number % 4) if good else "7"),
            "seen": (f"thing {number % 5}", f"thing {number % 5}" if good else HOSTILE),
        }  # fmt: skip
        for task, (reference, answer) in here.items():
            found.append(
                Prediction(
                    record=f"{number}-{task}",
                    media=(clip,),
                    turn=1,
                    task=task,
                    question=f"<video>\nWhat of <i>{task}</i> at <t:1.5>?",
                    reference=reference,
                    duration=4.0,
                    answer=answer,
                    cut=False,
                )
            )
    return found


def write_scores(folder: Path, name: str, said: Sequence[Prediction], **more: Any) -> None:
    about = {"test_set": "test", "data_path": "/data/test.jsonl", "records": len(said)}
    flags = dict.fromkeys(("untrained", "shuffled", "probe"), False)
    losses = {"ce_loss": 1.1, "ce_span": 1.9, "autoregressive_loss": 0.5, "ar_skill": -0.25}
    losses |= {"ar_copy_baseline": 0.5, "ar_affine_baseline": 0.4, "ar_ridge_baseline": 0.45}
    report = about | flags | {"losses": losses} | report_of(said) | more
    (folder / f"eval-{name}.json").write_text(json.dumps(report))
    write_predictions(folder / f"predictions-{name}.jsonl", said)


def write_a_run(
    folder: Path,
    clips: Sequence[str] = ("test/clip-00000.mp4", "test/clip-00001.mp4"),
    *,
    good: bool = True,
    steps: int = STEPS,
    settings: Mapping[str, Any] = {},
) -> Path:
    """Write a run's folder: settings, steps, log, tables, scores with one control; return it."""
    folder.mkdir(parents=True)
    config = asdict(TrainConfig(stage_path="llm", bank=["bank"])) | dict(settings)
    write_run(folder, config, 0)
    (folder / "metrics.jsonl").write_text("".join(f"{x}\n" for x in metrics_lines(steps)))
    (folder / "train.log").write_text(LOG.format(steps=steps))
    write_scores(folder, "test", predictions(list(clips), good))
    shuffled = predictions(list(clips), good=False)
    write_scores(folder, "test-shuffled", shuffled, shuffled=True)
    (folder / "lape").mkdir()
    rows = np.random.default_rng(0).normal(size=(20, 8)).cumsum(axis=0).astype(np.float32)
    tables = {
        f"{role}.{axis}": rows for role in ("input_tables", "output_tables") for axis in range(3)
    }
    save_file({"gamma": np.ones(3, np.float32), **tables}, folder / "lape" / "tables.safetensors")
    return folder
