"""Sharded checkpoints: what several processes wrote is what one would have, and never half of it.

Each process is a real one over gloo, forked from one that has imported torch. Gradients are drawn by
the parameter's name, and AdamW works element by element, so a run on one process is an independent
reference to the bit.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from model.fsdp.parts import PARTS
from model.llm import base_of, load_llm
from model.vlm import VLM
from shards.errors import UserError
from train.loop.checkpoint import find_resume, read_state, verifies
from train.loop.optimizer import MOMENTS, allocate, load_optimizer
from train.start.stage_files import model_problem, stage_problem

ROOT = Path(__file__).resolve().parents[3]
Json = dict[str, Any]

RANKS = """
import json, os, re, resource, shutil, signal, sys, zlib
from pathlib import Path
import torch
torch.set_num_threads(1)
import accelerate, torch.distributed.checkpoint
from torch.distributed.tensor import DTensor, distribute_tensor
import model.fsdp.parts, model.fsdp.save
from model.fsdp.save import save_whole
from model.vlm import VLM
from shards.errors import UserError
from tests.fsdp_on_cpu import shard_on_cpu
from train.loop.checkpoint import save_checkpoint, save_sharded
from train.loop.gradients import make_reduction
from train.loop.optimizer import allocate, load_optimizer

def take_step(model, optimizer, step):
    for name, p in model.named_parameters():
        if p.requires_grad:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
            whole = torch.randn(p.shape, generator=generator)
            cut = isinstance(p, DTensor)
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if cut else whole
    optimizer.step()

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def rank(job, number):
    world, out = job["world"], Path(job["out"])
    if world > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
        shard_on_cpu()
    accelerator = accelerate.Accelerator(cpu=True)
    whole = VLM.load(job["model"])
    whole.requires_grad_("lora" not in job)
    for name, p in whole.named_parameters():
        p.requires_grad_(p.requires_grad or "lora_" in name or not name.startswith("llm."))
    made = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=1e-2)
    reduction = make_reduction("fast", accelerator, whole, made)
    optimizer = reduction.optimizer.optimizer
    allocate(optimizer)
    if "moments" in job:
        load_optimizer(optimizer, whole, Path(job["moments"]))
    for step in job["steps"]:
        take_step(whole, optimizer, step)
    for module, value in job.get("file_bytes", {}).items():
        sys.modules[module].FILE_BYTES = value
    if "limit" in job and number == job["limit"][0]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"][1], resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    save = save_sharded if world > 1 else save_checkpoint
    report = {"error": ""}
    try:
        save(out, job["step"], whole, optimizer, {})
        report["save"] = memory("VmHWM") - before
        Path("/proc/self/clear_refs").write_text("5")
        if job.get("whole"):
            save_whole(whole, out)
        report["whole"] = memory("VmHWM") - before
    except UserError as error:
        report["error"] = str(error)
    (out / f"rank-{number}.json").write_text(json.dumps(report))

for job in json.load(sys.stdin):
    os.makedirs(job["out"], exist_ok=True)
    if "copied" in job:
        shutil.copytree(job["copied"], Path(job["out"]) / Path(job["copied"]).name)
    children = []
    for number in range(job["world"]):
        if not (child := os.fork()):
            try:
                rank(job, number)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(70)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""


def run(*jobs: Json) -> list[list[Json]]:
    """Run jobs one after the other; return the reports of each one's ranks."""
    written = []
    for job in jobs:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        written.append({"steps": [0], "step": 1, "port": port} | job)
    done = subprocess.run(
        [sys.executable, "-c", RANKS],
        input=json.dumps(written, default=str),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    codes = [set(json.loads(line)) for line in done.stdout.splitlines()]
    assert codes == [{0}] * len(jobs), done.stderr[-4000:]
    return [
        [
            json.loads((Path(job["out"]) / f"rank-{number}.json").read_text())
            for number in range(job["world"])
        ]
        for job in jobs
    ]


@pytest.fixture(scope="module")
def made(
    make_model: Callable[..., VLM],
    make_llm: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """A function that returns the folder of a small model of a kind: tied, untied or lora."""

    def make(kind: str) -> Path:
        out = tmp_path_factory.mktemp(kind)
        llm = make_llm(width=8, tied=kind == "tied")
        if kind == "lora":
            llm.save_pretrained(out / "base")
            llm = load_llm(out / "base")
        model = make_model(
            llm,
            num_temporal_tokens=5,
            num_spatial_tokens=5,
            mm_projector_type="norm_mlp2x_gelu",
        )
        if kind == "lora":
            model.llm = get_peft_model(model.llm, LoraConfig(r=2, target_modules="all-linear"))
            model.base = base_of(out / "base", torch.float32, merged=False)
        model.save(out / "model", whole=False)
        return out / "model"

    return make


@pytest.fixture(scope="module")
def saved(made: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one and of two processes, each saved after a step, and -b after one more.

    In full-0 and full-1 the disk is full for that process, when checkpoint-2 is written.
    """
    out, model = tmp_path_factory.mktemp("saved"), made("tied")
    first = {"model": model, "whole": True}
    small = {"model.fsdp.save": 10_000, "model.fsdp.parts": 3_000}
    then = {"steps": [1], "step": 2, **continued(out / "two/checkpoint-1")}
    run(
        {"world": 1, "out": out / "one", **first},
        {"world": 1, "out": out / "one-b", "model": model, "steps": [0, 1], "step": 2},
        {"world": 2, "out": out / "two", **first, "file_bytes": small},
        {"world": 2, "out": out / "two-b", **then},
        *(
            {
                **{"world": 2, "out": out / f"full-{rank}", "limit": [rank, 6_000], **then},
                "copied": out / "two/checkpoint-1",
            }
            for rank in (0, 1)
        ),
    )
    return out


def continued(checkpoint: Path) -> Json:
    return {"model": checkpoint, "moments": checkpoint}


def assert_same(ours: Path, theirs: Path) -> None:
    """Assert that two checkpoints hold the same bits: weights, buffers and the optimizer's state."""
    held = []
    for folder in (ours, theirs):
        assert verifies(folder)
        model = VLM.load(folder)
        trained = [
            (name, p)
            for name, p in model.named_parameters()
            if model.base is None or "lora_" in name or not name.startswith("llm.")
        ]
        optimizer = torch.optim.AdamW([p for _, p in trained])
        allocate(optimizer)
        load_optimizer(optimizer, model, folder)
        moments = {f"{n}/{k}": v for n, p in trained for k, v in optimizer.state[p].items()}
        assert all(moments[f"{n}/{k}"].any() for n, _ in trained for k in MOMENTS)
        held.append(model.state_dict() | moments)
    assert held[0].keys() == held[1].keys()
    assert [n for n, value in held[0].items() if not torch.equal(value, held[1][n])] == []


@pytest.mark.slow
def test_two_processes_save_what_one_does_and_go_on_with_the_same_bits(saved: Path) -> None:
    assert_same(saved / "two/checkpoint-1", saved / "one/checkpoint-1")
    assert_same(saved / "two-b/checkpoint-2", saved / "one-b/checkpoint-2")


def test_every_process_wrote_its_own_files_and_all_are_sealed(saved: Path) -> None:
    folder = saved / "two/checkpoint-1"
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(read_state(folder)["files"]) | {"checkpoint.json"} == files
    assert not [name for name in files if name.endswith((".pt", ".pkl", ".distcp", ".metadata"))]
    for part in ("llm", "optimizer"):
        sizes = [
            sum(file.stat().st_size for file in (folder / part).glob(f"shard-0000{rank}-*"))
            for rank in (1, 2)
        ]
        assert max(sizes) < 1.3 * min(sizes), sizes
        assert len(list((folder / part).glob(PARTS))) > 2
    assert not (folder / "llm/model.safetensors").exists()


def test_the_last_save_is_a_whole_model_folder(saved: Path) -> None:
    ours, theirs = saved / "two", saved / "one"
    assert len(list((ours / "llm").glob("model-*.safetensors"))) > 1  # several files, an index
    a, b = VLM.load(ours).state_dict(), VLM.load(theirs).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    llm = AutoModelForCausalLM.from_pretrained(ours / "llm").state_dict()
    assert all(torch.equal(value, a[f"llm.{name}"]) for name, value in llm.items())
    rest = ["config.json", "projector.safetensors", "visual.safetensors", "lape/tables.safetensors"]
    rest += ["frame_causal.safetensors", "lape/tokens.json", "llm/config.json"]
    rest += ["llm/generation_config.json", "llm/tokenizer.json"]
    for name in rest:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert not list(ours.glob("*.tmp"))
    # names alone differ from what one process writes
    held: dict[str, torch.Tensor] = {}
    for file in (ours / "llm").glob("model-*.safetensors"):
        held |= load_file(file)
    assert held.keys() == load_file(theirs / "llm/model.safetensors").keys()


def test_a_checkpoint_is_a_stage_and_a_model_folder(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "two/checkpoint-1", tmp_path / "copied"))
    assert stage_problem(str(folder)) is None
    assert model_problem(folder) is None
    assert stage_problem(str(folder / "llm")) is None
    before = base_of(folder / "llm", torch.float32, merged=False).digest
    loaded = load_llm(folder / "llm")
    assert torch.equal(loaded.lm_head.weight, VLM.load(folder).llm.lm_head.weight)
    last = max((folder / "llm").glob(PARTS))
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    assert base_of(folder / "llm", torch.float32, merged=False).digest != before
    assert not verifies(folder)
    last.write_bytes(data[:-10])
    assert "cut off" in str(model_problem(folder))
    with pytest.raises(UserError, match="its weights do not read"):
        VLM.load(folder)


def test_a_part_that_is_missing_is_refused_never_read_as_zeros(saved: Path, tmp_path: Path) -> None:
    for number, file in enumerate(sorted((saved / "two/checkpoint-1/llm").glob(PARTS))):
        folder = Path(shutil.copytree(saved / "two/checkpoint-1", tmp_path / str(number)))
        (folder / "llm" / file.name).unlink()
        with pytest.raises(UserError, match=r"missing|config asks for"):
            VLM.load(folder)
    model = VLM.load(saved / "two/checkpoint-1")
    for number, file in enumerate(sorted((saved / "two/checkpoint-1/optimizer").glob(PARTS))):
        folder = Path(shutil.copytree(saved / "two/checkpoint-1", tmp_path / f"moments-{number}"))
        (folder / "optimizer" / file.name).unlink()
        optimizer = torch.optim.AdamW(model.parameters())
        allocate(optimizer)
        with pytest.raises(UserError, match=r"missing|no optimizer state|is \("):
            load_optimizer(optimizer, model, folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_ends_all_and_leaves_the_checkpoint_before(
    saved: Path, rank: int
) -> None:
    out = saved / f"full-{rank}"
    (line,) = {json.loads((out / f"rank-{k}.json").read_text())["error"] for k in (0, 1)}
    assert "checkpoint-2: cannot be written" in line
    assert f"process {rank}: " in line
    assert line.count("\n") == 0
    assert find_resume(out, "auto") == out / "checkpoint-1"
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"checkpoint-1"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_any_number_of_processes_reads_what_any_other_saved(
    made: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    model = made(kind)
    own = {"lora": True} if kind == "lora" else {}
    first = {"model": model, "whole": True, **own}
    run(*({"world": world, "out": tmp_path / str(world), **first} for world in (1, 2, 3)))
    for world in (2, 3):
        assert_same(tmp_path / f"{world}/checkpoint-1", tmp_path / "1/checkpoint-1")
        ours, theirs = (VLM.load(tmp_path / str(n)).state_dict() for n in (world, 1))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    then = {"steps": [1], "step": 2, **own}
    ways = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)]
    run(
        *(
            {
                "world": new,
                "out": tmp_path / f"{old}-{new}",
                **continued(tmp_path / f"{old}/checkpoint-1"),
                **then,
            }
            for old, new in ways
        )
    )
    for old, new in ways:
        assert_same(tmp_path / f"{old}-{new}/checkpoint-2", tmp_path / "1-1/checkpoint-2")


@pytest.mark.slow
def test_no_process_holds_more_than_a_file_when_it_saves(
    make_model: Callable[..., VLM], tmp_path: Path
) -> None:
    """Twelve layers of 16 MB: 190 MB of weights and 380 MB of moments, of which each process has half."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512}
    llm = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, tie_word_embeddings=True))
    weights = sum(p.nbytes for p in llm.parameters())
    assert weights > 180e6
    make_model(llm).save(tmp_path / "model")
    small = {"model.fsdp.save": 16_000_000, "model.fsdp.parts": 4_000_000}
    job = {"world": 2, "out": tmp_path / "out", "model": tmp_path / "model"}
    (reports,) = run(job | {"file_bytes": small, "whole": True})
    for report in reports:
        assert report["save"] < 0.1 * 3 * weights, report
        assert report["whole"] < 0.4 * weights, report
