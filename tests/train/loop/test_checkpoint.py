"""Checkpoints: whole or not there, wherever a save dies; damage is seen; the right ones are kept."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from model.llm import base_of, load_llm
from model.vlm import VLM
from shards.errors import UserError
from train.loop.checkpoint import (
    changed_settings,
    checkpoints,
    find_resume,
    kept_rows,
    prune,
    read_state,
    refuse_other_run,
    save_checkpoint,
    save_model,
    set_aside,
    verifies,
)
from train.loop.optimizer import allocate, load_optimizer, save_optimizer

ROOT = Path(__file__).resolve().parents[3]

DYING = """
import errno, json, os, resource, shutil, signal, sys
from pathlib import Path
import torch
from model.vlm import VLM
from train.loop.checkpoint import find_resume, prune, save_checkpoint, verifies
from train.loop.optimizer import allocate

torch.set_num_threads(1)
folder, out, report = map(Path, sys.argv[1:4])
stride = int(sys.argv[4])
model = VLM.load(folder)
optimizer = torch.optim.AdamW(model.parameters())
allocate(optimizer)
save_checkpoint(out, 3, model, optimizer, {})
shutil.copytree(out / "checkpoint-3", out / "kept")

def dies(): os._exit(9)
def fails(): raise OSError(errno.ENOSPC, "No space left on device")
def writes(limit, how):
    # the next write that reaches beyond the limit fails, or kills - Rust's too
    def arm():
        signal.signal(signal.SIGXFSZ, how)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return arm
FAULTS = {"dies": dies, "fails": fails, "dies in a write": writes(16, signal.SIG_DFL),
    "dies in a long write": writes(9000, signal.SIG_DFL),
    "a write fails": writes(16, signal.SIG_IGN), "a long write fails": writes(9000, signal.SIG_IGN)}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

def attempt(number, fault):
    # save and prune in a child, with a fault at the number-th change to the disk
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        seen = [0]
        def change():
            seen[0] += 1
            if seen[0] == number:
                fault()
        def watch(event, facts):
            if event == "open":
                writes = facts[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if writes and str(facts[0]).startswith(str(out)):
                    change()
            elif event in CHANGES and str(facts[0]).startswith(str(out)):
                change()
        sync = os.fsync
        def synced(handle):
            change()
            sync(handle)
        os.fsync = synced
        sys.addaudithook(watch)
        try:
            save_checkpoint(out, 6, model, optimizer, {})
            prune(out, 1, None)
        except BaseException:
            os._exit(7)
        os._exit(0 if number else min(seen[0], 255))
    _, status = os.waitpid(child, 0)
    there, whole = (out / "checkpoint-6").exists(), verifies(out / "checkpoint-6")
    entry = {"code": os.waitstatus_to_exitcode(status), "there": there, "whole": whole,
             "found": find_resume(out, "auto").name, "older": (out / "checkpoint-3").exists()}
    for name in ("checkpoint-6", "checkpoint-6.tmp", "checkpoint-3"):
        shutil.rmtree(out / name, ignore_errors=True)
    shutil.copytree(out / "kept", out / "checkpoint-3")
    return entry

changes = attempt(0, None)["code"]
found = {name: [attempt(k, fault) for k in range(1 + place % stride, changes + 1, stride)]
         for place, (name, fault) in enumerate(FAULTS.items())}
report.write_text(json.dumps({"changes": changes, "found": found}))
"""


@pytest.fixture(scope="module")
def model(make_model: Callable[..., VLM], make_llm: Callable[..., object]) -> VLM:
    return make_model(make_llm(width=8), num_temporal_tokens=5, num_spatial_tokens=5)


@pytest.fixture(scope="module")
def optimizer(model: VLM) -> torch.optim.Optimizer:
    """AdamW after a step, so that its state is not zero."""
    made = torch.optim.AdamW(model.parameters())
    allocate(made)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    made.step()
    return made


@pytest.fixture(scope="module")
def saved(
    model: VLM, optimizer: torch.optim.Optimizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run's folder with checkpoint-3 and checkpoint-6. Read it only."""
    out = tmp_path_factory.mktemp("saved")
    for step in (3, 6):
        save_checkpoint(out, step, model, optimizer, {"best": None})
    return out


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_with_a_fault_at_any_write_leaves_the_checkpoint_before_it(
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
    assert 30 < report["changes"] < 255
    for name, entries in report["found"].items():
        for entry in entries:
            # once it bears its name it is complete; before that the older one is what it was
            assert entry["there"] == entry["whole"], (name, entry)
            assert entry["found"] == ("checkpoint-6" if entry["there"] else "checkpoint-3"), name
            assert entry["older"] or entry["whole"], name
            if name == "dies":
                assert entry["code"] == 9
        failed = [entry for entry in entries if entry["code"]]
        assert failed, name
        assert any(not entry["there"] for entry in failed), name
    if stride == 1:
        assert {entry["there"] for entry in report["found"]["dies"]} == {False, True}


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
    model: VLM, optimizer: torch.optim.Optimizer, saved: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    (out / "checkpoint-8.tmp").mkdir()  # of a save that was killed
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint-9: cannot be written .*; make room"):
            save_checkpoint(out, 9, model, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in out.iterdir()} == {"checkpoint-3", "checkpoint-6"}


def test_a_checkpoint_holds_model_optimizer_and_state(saved: Path, model: VLM) -> None:
    folder = saved / "checkpoint-3"
    state = read_state(folder)
    assert (state["best"], state["step"]) == (None, 3)
    assert state["versions"]["torch"] == torch.__version__
    assert verifies(folder)
    loaded = VLM.load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(state["files"]) | {"checkpoint.json"} == files
    assert not [name for name in files if name.endswith((".pt", ".pkl", ".bin"))]
    assert not list(saved.glob("*.tmp"))


def test_an_optimizers_state_comes_back_bit_by_bit(
    saved: Path, model: VLM, optimizer: torch.optim.Optimizer
) -> None:
    folder = saved / "checkpoint-3"
    again = torch.optim.AdamW([{"params": list(model.parameters())[::-1]}])  # in another order
    allocate(again)
    load_optimizer(again, model, folder)
    for p in model.parameters():
        ours, theirs = again.state[p], optimizer.state[p]
        assert set(ours) == set(theirs) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert ours["exp_avg"].any()


def test_a_large_state_is_cut_into_files(
    model: VLM,
    optimizer: torch.optim.Optimizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.loop.optimizer.FILE_BYTES", 5_000)
    save_optimizer(optimizer, model, tmp_path)
    assert len(list(tmp_path.glob("optimizer-*.safetensors"))) > 5
    again = torch.optim.AdamW(model.parameters())
    allocate(again)
    load_optimizer(again, model, tmp_path)
    for p in model.parameters():
        assert torch.equal(again.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])


def test_an_optimizer_of_other_weights_is_refused_by_name(saved: Path, model: VLM) -> None:
    names = [name for name, _ in model.named_parameters()]
    fewer = torch.optim.AdamW(list(model.parameters())[1:])
    allocate(fewer)
    with pytest.raises(UserError, match=f"{names[0]}/[a-z_]+: not trained here"):
        load_optimizer(fewer, model, saved / "checkpoint-3")
    projector = [p for name, p in model.named_parameters() if name.startswith("projector")]
    more = torch.optim.AdamW(model.parameters())
    allocate(more)
    more.state[projector[0]]["max_exp_avg_sq"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"no optimizer state of projector.*max_exp_avg_sq"):
        load_optimizer(more, model, saved / "checkpoint-3")


def test_an_allocated_state_is_what_adamw_begins_with() -> None:
    weights = [torch.nn.Parameter(torch.full((3, 2), 0.5)) for _ in range(2)]
    for p, ready in zip(weights, (True, False), strict=True):
        optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1)
        if ready:
            allocate(optimizer)
        for _ in range(3):
            p.grad = p.detach().clone() + 0.25
            optimizer.step()
    assert torch.equal(*weights)


FACTS = {"model": {"enable_lape": True, "slow": [1, 2]}, "plan": {"seed": 0}}


def test_another_run_is_refused_by_every_fact_that_differs() -> None:
    state = {"facts": json.loads(json.dumps(FACTS))}
    refuse_other_run(
        Path("checkpoint-3"), state, FACTS | {"model": {**FACTS["model"], "slow": (1, 2)}}
    )
    other = {"model": {"enable_lape": False, "slow": [1, 2]}, "plan": {"seed": 1}}
    with pytest.raises(UserError, match="checkpoint-3: this run differs from") as refused:
        refuse_other_run(Path("checkpoint-3"), state, other)
    assert "enable_lape was true, is now false; seed was 0, is now 1; use " in str(refused.value)


def test_settings_that_changed_are_told() -> None:
    config = {"learning_rate": 1e-4, "resume": "auto", "bank": ("a",)}
    state: dict[str, Any] = {"config": {"learning_rate": 1e-4, "resume": "none", "bank": ["a"]}}
    state["step"] = 3
    assert changed_settings(Path("checkpoint-3"), state, 4, config) == ""
    told = changed_settings(Path("checkpoint-3"), state, 4, config | {"learning_rate": 0.5})
    assert told == "changed   since checkpoint-3: learning_rate was 0.0001, is now 0.5"


@pytest.mark.parametrize(
    ("sizes", "world", "said"),
    [
        ((2, 4), 1, ""),
        ((2, 4), 3, ""),  # other processes alone: the rows stay, as they should
        ((4, 2), 1, ""),  # cut otherwise, and the same rows
        ((2, 1), 4, ""),
        (
            (2, 2),
            1,
            "not 4 (per_device_train_batch_size 2 x gradient_accumulation_steps 2 x 1 proc",
        ),
        (
            (1, 4),
            4,
            "not 16 (per_device_train_batch_size 1 x gradient_accumulation_steps 4 x 4 proc",
        ),
    ],
)
def test_steps_of_other_rows_than_the_runs_are_said_not_to_be_taken(
    sizes: tuple[int, int], world: int, said: str
) -> None:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    state = {"global_batch": 8, "config": dict(zip(names, (2, 4), strict=True))}
    line = kept_rows(state, dict(zip(names, sizes, strict=True)), world)
    assert bool(line) == bool(said)
    assert said in line
    assert not line or line.startswith("kept      a step has 8 rows, as the run began with, ")


@pytest.fixture
def over_base(
    make_model: Callable[..., VLM], make_llm: Callable[..., Any], tmp_path: Path
) -> tuple[VLM, Path]:
    """A model with an adapter over an LLM on disk, and where that lies."""
    base = tmp_path / "base"
    make_llm(width=8).save_pretrained(base)
    model = make_model(load_llm(base))
    model.llm = get_peft_model(model.llm, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in model.llm.named_parameters():
            if "lora_B" in name:
                p.fill_(0.01)
    model.base = base_of(base, torch.float32, merged=False)
    return model.eval(), base


def same_bits(ours: VLM, theirs: VLM) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_an_llm_that_is_not_trained_is_named_not_copied(
    over_base: tuple[VLM, Path], tmp_path: Path
) -> None:
    model, base = over_base
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    allocate(optimizer)
    folder = save_checkpoint(tmp_path / "run", 1, model, optimizer, {})
    held = {p.relative_to(folder).as_posix() for p in (folder / "llm").rglob("*.safetensors")}
    assert held == {"llm/lora/adapter_model.safetensors"}
    assert same_bits(VLM.load(folder), model)
    model.save(tmp_path / "whole")
    shutil.rmtree(base)
    assert same_bits(VLM.load(tmp_path / "whole"), model)  # complete by itself
    with pytest.raises(UserError, match="base: no LLM here any more"):
        VLM.load(folder)


def test_another_llm_in_the_bases_place_is_refused(
    over_base: tuple[VLM, Path], make_llm: Callable[..., Any], tmp_path: Path
) -> None:
    model, base = over_base
    model.save(tmp_path / "checkpoint", whole=False)
    moved = base.rename(tmp_path / "moved")
    again = base_of(moved, torch.float32, merged=False)
    loaded = VLM.load(tmp_path / "checkpoint", base=again)
    assert same_bits(loaded, model)
    assert loaded.base == again  # the next checkpoint names where it lies now
    make_llm(width=8, seed=1).save_pretrained(base)
    with pytest.raises(UserError, match=r"not the LLM that .* was trained over"):
        VLM.load(tmp_path / "checkpoint")


def test_a_merged_adapter_is_part_of_the_base(
    over_base: tuple[VLM, Path], make_model: Callable[..., VLM], tmp_path: Path
) -> None:
    first, _ = over_base
    first.save(tmp_path / "checkpoint", whole=False)
    stage = tmp_path / "checkpoint" / "llm"
    second = make_model(load_llm(stage).merge_and_unload())
    second.base = base_of(stage, torch.float32, merged=True)
    second.save(tmp_path / "second", whole=False)
    assert not list((tmp_path / "second" / "llm").rglob("*.safetensors"))
    assert same_bits(VLM.load(tmp_path / "second"), second)
    flipped(stage / "lora" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not the LLM that"):
        VLM.load(tmp_path / "second")


def test_a_base_in_half_precision_is_not_read_as_more(
    over_base: tuple[VLM, Path], make_model: Callable[..., VLM], tmp_path: Path
) -> None:
    _, base = over_base
    model = make_model(load_llm(base, torch.bfloat16))
    model.base = base_of(base, torch.bfloat16, merged=False)
    model.save(tmp_path / "checkpoint", whole=False)
    (weight, *_), (own, *_) = (
        list(m.llm.parameters()) for m in (VLM.load(tmp_path / "checkpoint"), model)
    )
    assert weight.dtype == torch.float32
    assert torch.equal(weight, own.float())


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
        if damage is cut and file.name == "checkpoint.json":
            continue  # its last byte is a newline, which says nothing
        run = tmp_path / "run"
        shutil.copytree(saved, run)
        damage(run / "checkpoint-6" / file)
        assert find_resume(run, "auto") == run / "checkpoint-3", file
        with pytest.raises(UserError, match="files are missing or damaged"):
            find_resume(run, str(run / "checkpoint-6"))
        shutil.rmtree(run)


def test_a_models_save_that_fails_midway_leaves_no_mix_of_two_models(
    make_model: Callable[..., VLM], tmp_path: Path
) -> None:
    """The LLM is new then, and what is beside it is of the model that was here before."""
    model, file = make_model(), tmp_path / "projector.safetensors"
    save_model(model, tmp_path, print, trained=False)
    with torch.no_grad():
        for value in model.parameters():
            value += 1
    file.rename(tmp_path / "old")
    file.mkdir()  # no file can be written there
    with pytest.raises(
        UserError, match=r"cannot be written .*make room, then run the same command"
    ):
        save_model(model, tmp_path, print, trained=False)
    file.rmdir()
    (tmp_path / "old").rename(file)  # as a kill just before its turn leaves it
    with pytest.raises(UserError, match=r"config\.json is missing"):
        VLM.load(tmp_path)
    save_model(model, tmp_path, print, trained=False)
    loaded = VLM.load(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


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
    flipped(run / "checkpoint-6" / "optimizer-0.safetensors")
    assert find_resume(run, "auto") == run / "checkpoint-3"
    set_aside(run, 3)
    assert {path.name for path in run.iterdir()} == {"checkpoint-3", "checkpoint-6.old"}
    # else the next save would be pruned in favour of the damaged one
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3"]
    shutil.copytree(saved / "checkpoint-6", run / "checkpoint-6")
    set_aside(run, 0)
    assert {path.name for path in run.iterdir()} == {"checkpoint-3.old", "checkpoint-6.old"}
