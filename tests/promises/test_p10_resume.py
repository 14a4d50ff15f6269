"""P10: resume is bitwise after kill -9 at any moment, saves included.

With `reduce: exact` on another number of processes too. With FSDP2, whose processes each write a part
of a checkpoint, whichever of them is killed.
Importing torch takes seconds, so one process imports it and forks the ranks of every run.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train.loop.checkpoint import verifies
from train.loop.speed import CLOCK

ROOT = Path(__file__).resolve().parents[3]
Json = dict[str, Any]

RANKS = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import accelerate, safetensors.torch, transformers.models.qwen2.modeling_qwen2
import torch.distributed.checkpoint, torch.nn.parallel, torch.utils.tensorboard
import model.vlm, train.loop.loop, train.loop.checkpoint, train.evaluate, train.loop.checks
import train.batches.loader
import train.batches.plan, train.report, train.run, train.loop.step, train.start.prepare_llm
from tests.fsdp_on_cpu import shard_on_cpu
from train.loop.signals import StopSignals

def rank(job, number):
    out = os.open(f"{job['log']}-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    if job["world"] > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1",
            "WORLD_SIZE": str(job["world"]), "LOCAL_WORLD_SIZE": str(job["world"]),
            "MASTER_PORT": str(job["port"])}
    if job.get("fsdp"):
        shard_on_cpu()
    die = job.get("die")

    def watch(event, facts):
        # the moment before a file is opened, a folder made, renamed or removed
        if event == die[0] and str(facts[0]).endswith(die[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    if die and number == job.get("dying", 0):
        sys.addaudithook(watch)
    sent = {step: name for step, who, name in job.get("signals", ()) if who == number}
    taken, steps = StopSignals.take, []

    def take(self):
        steps.append(0)
        if len(steps) in sent:
            os.kill(os.getpid(), getattr(signal, sent[len(steps)]))
        return taken(self)

    StopSignals.take = take
    try:
        train.run.main(job["argv"])
    except SystemExit as stop:
        return stop.code
    return 0

for job in json.load(sys.stdin):
    children = []
    for number in range(job["world"]):
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = rank(job, number)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] and codes[child] not in (143, 130):  # as torchrun does
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    print(json.dumps([codes[child] for child in children]), flush=True)
"""


FACTS = ("world", "die", "dying", "signals", "fsdp")
"""What of a job is no setting of its run."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def settings(run_settings: Json, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Json:
    """A run of three packs a step, with dropout and a checkpoint at each."""
    llm = tmp_path_factory.mktemp("dropout") / "llm"
    shutil.copytree(toy / "llm", llm)
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    return run_settings | {
        "stage_path": llm,
        "per_device_train_batch_size": 1,
        "max_frames_num": 3,
        "max_steps": 3,
        "save_steps": 1,
        "save_total_limit": 1,
        "num_threads": 1,
    }


@pytest.fixture(scope="module")
def run_jobs(
    settings: Json, as_flags: Callable[[Mapping[str, Any]], list[str]]
) -> Callable[..., list[list[int]]]:
    """A function that runs jobs one after the other; returns the exit codes of each one's ranks.

    A job: world, out, settings that differ, `die` (audit event, end of a path) for rank `dying` or 0,
    `signals` (step, rank, name), `fsdp`.
    """

    def run(*jobs: Json) -> list[list[int]]:
        written = []
        for number, job in enumerate(jobs):
            changes = {k: v for k, v in job.items() if k not in ("out", *FACTS)}
            own = {"gradient_accumulation_steps": 3 // job["world"], "output_dir": job["out"]}
            argv = as_flags(settings | own | changes)
            job["out"].mkdir(parents=True, exist_ok=True)
            facts = {"argv": argv, "port": free_port(), "log": str(job["out"] / f"rank-{number}")}
            kept = {k: job[k] for k in FACTS if k in job}
            written.append(kept | facts)
        done = subprocess.run(
            [sys.executable, "-c", RANKS],
            input=json.dumps(written),
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def lines_of(out: Path) -> list[Json]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint: weights and optimizer."""
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_run(ours: Path, theirs: Path, step: int = 3) -> None:
    assert lines_of(ours) == lines_of(theirs)
    a, b = (tensors_of(out / f"checkpoint-{step}") for out in (ours, theirs))
    assert set(a) == set(b)
    assert any("exp_avg_sq" in name for name in a)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    finals = [load_file(out / "projector.safetensors") for out in (ours, theirs)]
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


KILLED = -signal.SIGKILL
BEFORE = ("os.mkdir", "checkpoint-2.tmp")
DURING = ("open", "checkpoint-2.tmp/checkpoint.json")
AFTER = ("shutil.rmtree", "checkpoint-1")
"""Moments around the second save; the last one is when it is whole and the first is to be pruned."""


@pytest.fixture
def drawn(toy: Path, tmp_path: Path) -> Json:
    """Settings by which no epoch is like another: media spliced, frames drawn, questions apart."""
    videos = {json.loads(line)["video"] for line in (toy / "train.jsonl").read_text().splitlines()}
    rows = [{"video": name, "phrase": [f"scene {k}", f"the {k}th"], "start": 0.5}
            for k, name in enumerate(sorted(videos))]  # fmt: skip
    path = tmp_path / "phrases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "splice_path": path,
        "splice": ["records=4", "parts=2-3", "seconds=0.5-2", "span=When is {} there?"],
        "augment": ["jitter", "pattern", "drop=0.4"],
        "turns": "independent",
        "mm_projector_type": "norm_mlp2x_gelu",
    }


@pytest.mark.parametrize(
    ("world", "spliced"),
    [
        (1, False),
        pytest.param(3, False, marks=pytest.mark.slow),
        pytest.param(3, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_before_during_and_after_a_save_goes_on_exactly(
    run_jobs: Callable[..., list[list[int]]],
    tmp_path: Path,
    drawn: Json,
    world: int,
    spliced: bool,
) -> None:
    out, straight = tmp_path / "out", tmp_path / "straight"
    run = {"world": world} | (drawn if spliced else {})
    deaths = [{**run, "out": out, "die": die} for die in (BEFORE, DURING, AFTER)]
    codes = run_jobs(*deaths, {**run, "out": out}, {**run, "out": straight, "resume": "none"})
    assert [code[0] for code in codes] == [KILLED, KILLED, KILLED, 0, 0]
    assert [set(code) for code in codes[3:]] == [{0}, {0}]
    text = (out / "train.log").read_text()
    assert [text.count(f"checkpoint-{step}\n") for step in (1, 2)] == [2, 1], text
    assert_same_run(out, straight)


PART = "optimizer/shard-{:05d}-model-00001-of-00001.safetensors"


@pytest.mark.slow
def test_a_sharded_run_goes_on_exactly_whichever_process_is_killed_at_a_save(
    run_jobs: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    out, straight = tmp_path / "out", tmp_path / "straight"
    run = {"world": 3, "fsdp": True}
    deaths = [
        (0, "os.mkdir", "checkpoint-2.tmp/llm"),
        (1, "open", f"checkpoint-2.tmp/{PART.format(2)}"),
        (0, "open", f"checkpoint-2.tmp/{PART.format(1)}"),
        (0, *DURING),
        (0, "os.rename", "checkpoint-2.tmp"),
        # it is whole from here on
        (2, "open", f"checkpoint-2/{PART.format(3)}"),
        (2, "open", f"checkpoint-3.tmp/{PART.format(3)}"),
        (0, "shutil.rmtree", "checkpoint-2"),
    ]
    codes = run_jobs(
        *({**run, "out": out, "dying": rank, "die": moment} for rank, *moment in deaths),
        {**run, "out": out},
        {**run, "out": straight, "resume": "none"},
    )
    for (rank, *_), killed in zip(deaths, codes, strict=False):
        assert killed[rank] == KILLED
    assert [set(code) for code in codes[-2:]] == [{0}, {0}]
    text = (out / "train.log").read_text()
    assert [text.count(f"checkpoint-{step}\n") for step in (1, 2, 3)] == [5, 2, 1], text
    assert_same_run(out, straight)
    assert not list(out.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("spliced", [False, True])
def test_exact_sums_give_the_same_bits_on_one_two_and_three_processes(
    run_jobs: Callable[..., list[list[int]]],
    toy: Path,
    tmp_path: Path,
    drawn: Json,
    spliced: bool,
) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join((toy / "test.jsonl").read_text().splitlines(keepends=True)[:4]))
    shared = {"reduce": "exact", "max_steps": 4, "save_steps": 0, "eval_path": held_out}
    shared |= drawn if spliced else {}
    out, straight = tmp_path / "out", tmp_path / "straight"
    stop = {"out": out, "signals": [(1, 0, "SIGTERM")]}
    codes = run_jobs(
        {"world": 1, **stop, **shared},
        {"world": 2, **stop, **shared},
        {"world": 3, **stop, **shared},
        {"world": 1, "out": out, **shared},
        {"world": 3, "out": straight, **shared},
    )
    assert codes == [[143], [143] * 2, [143] * 3, [0], [0] * 3]
    assert [line["step"] for line in lines_of(out)] == [1, 2, 3, 4, 4]
    assert_same_run(out, straight, step=4)


@pytest.mark.slow
def test_exact_sums_over_packs_that_do_not_divide_by_the_processes(
    run_jobs: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    shared = {"reduce": "exact", "max_steps": 4}
    jobs = []
    for world in (1, 2, 3):
        out = tmp_path / str(world)
        first = {"gradient_accumulation_steps": 5, "signals": [(1, 0, "SIGTERM")]}
        jobs += [
            {"world": 1, "out": out, **first, **shared},
            {"world": world, "out": out, **shared},
        ]
    codes = run_jobs(*jobs)
    assert [set(code) for code in codes] == [{143}, {0}] * 3
    assert_same_run(tmp_path / "2", tmp_path / "1", step=4)
    assert_same_run(tmp_path / "3", tmp_path / "1", step=4)


@pytest.mark.slow
def test_signals_to_any_rank_save_on_all_at_the_same_step(
    run_jobs: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shared = {"save_steps": 0, "save_total_limit": 9, "max_steps": 5}
    signals = [(1, 1, "SIGUSR1"), (3, 1, "SIGTERM")]
    assert run_jobs({"world": 2, "out": out, "signals": signals, **shared}) == [[143, 143]]
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    assert all(verifies(path) for path in out.glob("checkpoint-*"))
    assert [line["step"] for line in lines_of(out)] == [1, 2, 3]
    said = (out / "train.log").read_text()
    assert "stopped by SIGTERM after step 3 of 5; checkpoint-3 is saved" in said
    assert not (out / "projector.safetensors").exists(), "a stopped run is not a finished one"


@pytest.mark.slow
def test_torchrun_killed_at_any_moment_goes_on_exactly(
    settings: Json, as_flags: Callable[[Mapping[str, Any]], list[str]], tmp_path: Path
) -> None:
    own = {"gradient_accumulation_steps": 2, "max_steps": 30, "logging_steps": 1}

    def start(out: Path) -> "subprocess.Popen[bytes]":
        flags = as_flags(settings | own | {"output_dir": out})
        torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "3"]
        return subprocess.Popen(
            [*torchrun, "--master_port", str(free_port()), "-m", "train.run", *flags],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    out, straight = tmp_path / "out", tmp_path / "straight"
    for step in (4, 12, 20):
        process = start(out)
        while not (out / f"checkpoint-{step}").exists():
            assert process.poll() is None
        # torchrun's workers are in sessions of their own
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 3
        for number in [process.pid, *map(int, children)]:
            os.kill(number, signal.SIGKILL)
        process.wait()
    assert start(out).wait() == 0
    assert start(straight).wait() == 0
    assert_same_run(out, straight, step=30)
