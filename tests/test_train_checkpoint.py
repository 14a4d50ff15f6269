"""Checkpoints: whole or not there, wherever a save dies; damage is seen; the right ones are kept."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.vlm import VLM
from train.checkpoint import (
    checkpoints,
    find_resume,
    prune,
    read_state,
    save_checkpoint,
    set_aside,
    verifies,
)

ROOT = Path(__file__).resolve().parents[1]

DYING = """
import json, os, resource, shutil, signal, sys
from pathlib import Path
import torch
from model.vlm import VLM
from train import checkpoint
from train.checkpoint import find_resume, save_checkpoint, verifies

torch.set_num_threads(1)
folder, out, report = map(Path, sys.argv[1:4])
stride = int(sys.argv[4])
model = VLM.load(folder)
optimizer = torch.optim.AdamW(model.parameters())
optimizer.step()
save_checkpoint(out, 3, model, optimizer, {})
sizes = {p.stat().st_size for p in (out / "checkpoint-3").rglob("*") if p.is_file()}

def attempt(arm):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        arm()
        save_checkpoint(out, 6, model, optimizer, {})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    there = (out / "checkpoint-6").exists()
    found = find_resume(out, "auto").name
    entry = {"died": status != 0, "there": there, "whole": verifies(out / "checkpoint-6"),
             "files": len(list((out / "checkpoint-6").rglob("*"))), "found": found}
    shutil.rmtree(out / "checkpoint-6", ignore_errors=True)
    return entry

def at_line(number):
    watched, left = ("checkpoint.py", "vlm.py"), [number]
    def trace(frame, event, arg):
        if not frame.f_code.co_filename.endswith(watched):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
        return trace
    return lambda: sys.settrace(trace)

def at_byte(limit):
    def arm():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return arm

lines, number = [], 0
while not lines or lines[-1]["died"]:
    lines.append(attempt(at_line(number)))
    number += stride
limits = sorted({n for size in sizes for n in (size // 2, size - 1)})
limits = limits if stride == 1 else limits[:: len(limits) // 6]
files = [attempt(at_byte(limit)) for limit in limits]
report.write_text(json.dumps({"lines": lines, "bytes": files, "left": os.listdir(out)}))
"""


@pytest.fixture(scope="module")
def model(make_model: Callable[..., VLM], make_llm: Callable[..., object]) -> VLM:
    return make_model(make_llm(width=8), num_temporal_tokens=5, num_spatial_tokens=5)


@pytest.fixture(scope="module")
def optimizer(model: VLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


@pytest.fixture(scope="module")
def saved(
    model: VLM, optimizer: torch.optim.Optimizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run's folder with checkpoint-3 and checkpoint-6. Read it only."""
    out = tmp_path_factory.mktemp("saved")
    for step in (3, 6):
        save_checkpoint(out, step, model, optimizer, {"best": None})
    return out


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_that_dies_anywhere_leaves_the_checkpoint_before_it(
    model: VLM, tmp_path: Path, stride: int
) -> None:
    model.save(tmp_path / "model")
    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / name) for name in ("model", "out", "report.json")]
    done = subprocess.run(
        [sys.executable, "-c", DYING, *arguments, str(stride)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["lines"]) > 50 // stride + 2
    whole = report["lines"][-1]
    assert (whole["died"], whole["whole"], whole["found"]) == (False, True, "checkpoint-6")
    deaths = [entry for entry in [*report["lines"], *report["bytes"]] if entry["died"]]
    assert len(deaths) > len(report["lines"]) + 3, "deaths between and within the writes"
    for entry in deaths:
        # once it bears its name it is complete, even where the death came after that
        assert entry["there"] == entry["whole"], entry
        assert entry["found"] == ("checkpoint-6" if entry["there"] else "checkpoint-3")
        assert entry["files"] in (0, whole["files"])
    assert all(not entry["there"] for entry in report["bytes"] if entry["died"])


def test_a_checkpoint_holds_model_optimizer_and_state(saved: Path, model: VLM) -> None:
    folder = saved / "checkpoint-3"
    assert read_state(folder) == {"best": None, "step": 3}
    assert verifies(folder)
    loaded = VLM.load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    assert torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]
    listed = json.loads((folder / "hashes.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(listed) | {"hashes.json"} == files
    assert not list(saved.glob("*.tmp"))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flipped, cut, Path.unlink])
def test_a_damaged_checkpoint_is_not_chosen(
    saved: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    assert find_resume(saved, "auto") == saved / "checkpoint-6"
    whole = saved / "checkpoint-6"
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        if damage is cut and file.name == "hashes.json":
            continue  # its last byte is a newline, which says nothing
        run = tmp_path / "run"
        shutil.copytree(saved, run)
        damage(run / "checkpoint-6" / file)
        assert find_resume(run, "auto") == run / "checkpoint-3", file
        with pytest.raises(ValueError, match="files are missing or damaged"):
            find_resume(run, str(run / "checkpoint-6"))
        shutil.rmtree(run)


def test_resume_none_starts_anew_and_a_folder_is_taken_as_asked(saved: Path) -> None:
    assert find_resume(saved, "none") is None
    assert find_resume(saved, str(saved / "checkpoint-3")) == saved / "checkpoint-3"


def test_an_empty_run_has_nothing_to_resume(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9.tmp").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    assert find_resume(tmp_path, "auto") is None


@settings(max_examples=30, deadline=None)
@given(
    steps=st.sets(st.integers(1, 2000), max_size=8),
    limit=st.integers(1, 4),
    best=st.none() | st.integers(1, 2000),
)
def test_pruning_keeps_the_newest_and_the_best(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], limit: int, best: int | None
) -> None:
    out = tmp_path_factory.mktemp("prune")
    for step in steps:
        (out / f"checkpoint-{step}" / "llm").mkdir(parents=True)
    prune(out, limit, f"checkpoint-{best}" if best else None)
    kept = {int(path.name.partition("-")[2]) for path in out.iterdir()}
    assert kept == set(sorted(steps)[-limit:]) | (steps & {best})


def test_checkpoints_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-10",
        "checkpoint-9",
    ]


def test_what_lies_beyond_the_resumed_step_is_set_aside_not_deleted(
    saved: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    flipped(run / "checkpoint-6" / "optimizer.pt")
    assert find_resume(run, "auto") == run / "checkpoint-3"
    set_aside(run, 3)
    assert {path.name for path in run.iterdir()} == {"checkpoint-3", "checkpoint-6.old"}
    # else the next save would be pruned in favour of the damaged one
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3"]
    shutil.copytree(saved / "checkpoint-6", run / "checkpoint-6")
    set_aside(run, 0)
    assert {path.name for path in run.iterdir()} == {"checkpoint-3.old", "checkpoint-6.old"}
