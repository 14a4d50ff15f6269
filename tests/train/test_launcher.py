"""Launchers x settings: what Accelerate was asked for is obeyed or refused by name, never ignored.

Most rows are made by Accelerate's own code in this process, some by real launchers.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import pytest
from accelerate.commands import launch as launcher
from accelerate.commands.config import config_args
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from train.settings.config import TrainConfig, parse
from train.settings.launcher import FLAGS, RULES, default_file, rule_of, variable_of, wishes

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
FILE = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: 'NO'
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 1
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
"""What `accelerate config` writes for one process and no wishes."""
FSDP = (ROOT / "train" / "presets" / "fsdp2_8gpu.yaml").read_text()
DDP = FILE.replace("'NO'", "MULTI_GPU").replace("num_processes: 1", "num_processes: 2")
BF16 = FILE.replace("mixed_precision: 'no'", "mixed_precision: bf16")
FP16 = FILE.replace("mixed_precision: 'no'", "mixed_precision: fp16")


@pytest.fixture
def good(toy: Path) -> list[str]:
    paths = ["--stage_path", str(toy / "llm"), "--data_path", str(toy / "train.jsonl")]
    return [*paths, "--output_dir", "out", "--bank", "bank"]


@pytest.fixture
def launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, str], list[str]]]:
    """A function that returns (environment of the script, the launcher's words), as Accelerate does.

    words: of `accelerate launch`; default: the text of `accelerate config`'s file.
    """

    def environment(words: list[str], default: str = "") -> tuple[dict[str, str], list[str]]:
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        path = default_file(os.environ)
        if default:
            path.parent.mkdir(exist_ok=True)
            path.write_text(default)
        monkeypatch.setattr(config_args, "default_config_file", str(path))
        monkeypatch.setattr(launcher, "default_config_file", str(path))
        monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
        args = launcher.launch_command_parser().parse_args([*words, "train/run.py"])
        args, *_ = launcher._validate_launch_command(args)
        several = (args.multi_gpu or args.use_fsdp or args.use_megatron_lm) and not args.cpu
        found = prepare_multi_gpu_env(args) if several else prepare_simple_launcher_cmd_env(args)[1]
        if several:  # torchrun's part
            found = found | {"WORLD_SIZE": str(args.num_processes), "LOCAL_RANK": "0"}
        return found, words

    return environment


def outcome(argv: list[str], *asked: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return the settings that a command line comes to, or the lines that it is refused with."""
    try:
        return parse(argv, *asked)
    except SystemExit:
        return capsys.readouterr().err


OURS = Mapping[str, Any]
TABLE: list[tuple[str, list[str], str, list[str], OURS | str]] = [
    # (name, words of accelerate launch, its default file, our flags, settings or words of a refusal)
    ("nothing", [], "", [], {"bf16": False, "compile": False, "gradient_accumulation_steps": 1}),
    ("a default file", [], FILE, [], {"bf16": False, "gradient_accumulation_steps": 1}),
    ("ours alone", [], FILE, ["--bf16", "true"], {"bf16": True}),
    ("two processes", ["--multi_gpu", "--num_processes", "2"], "", [], {"bf16": False}),
    ("a file of two", [], DDP, ["--bf16", "true"], {"bf16": True}),
    # precision
    ("bf16", ["--mixed_precision", "bf16"], "", [], {"bf16": True}),
    ("bf16=", ["--mixed-precision=bf16"], FILE, [], {"bf16": True}),
    ("bf16 of two", ["--multi_gpu", "--mixed_precision", "bf16"], DDP, [], {"bf16": True}),
    ("bf16 in the file", [], BF16, [], {"bf16": True}),
    ("bf16 of both", [], BF16, ["--bf16", "true"], {"bf16": True}),
    ("no over the file", ["--mixed_precision", "no"], BF16, [], {"bf16": False}),
    (
        *("bf16 against ours", ["--mixed_precision", "bf16"], "", ["--bf16", "false"]),
        "--bf16 bf16 is false, and accelerate launch --mixed_precision asks for true",
    ),
    ("fp16", ["--mixed_precision", "fp16"], "", [], "fp16: only bf16 is supported"),
    ("fp16 in the file", [], FP16, [], "fp16: only bf16 is supported"),
    (
        *("fp16 in old words", [], FP16.replace("mixed_precision: fp16", "fp16: true"), []),
        "fp16: only bf16 is supported",
    ),
    # accumulation and clipping, which Accelerate drops where DeepSpeed is not
    (
        *("accumulation", ["--gradient_accumulation_steps", "4"], "", []),
        {"gradient_accumulation_steps": 4},
    ),
    (
        *("accumulation of two", ["--multi_gpu", "--gradient-accumulation-steps=4"], DDP, []),
        {"gradient_accumulation_steps": 4},
    ),
    (
        "accumulation against ours",
        ["--gradient_accumulation_steps", "4"],
        "",
        ["--gradient_accumulation_steps", "2"],
        "gradient_accumulation_steps is 2, and accelerate launch --gradient_accumulation_steps asks "
        "for 4: take one of them out",
    ),
    (
        "accumulation in both",
        ["--gradient_accumulation_steps", "2"],
        "",
        ["--gradient_accumulation_steps", "2"],
        {"gradient_accumulation_steps": 2},
    ),
    ("no number", ["--gradient_accumulation_steps", "0"], "", [], "must be"),
    (
        *("in a section", [], FILE + "deepspeed_config:\n  gradient_accumulation_steps: 4\n", []),
        {"gradient_accumulation_steps": 4},
    ),
    ("clipping", ["--gradient_clipping", "0.5"], "", [], {"max_grad_norm": 0.5}),
    # compilation
    ("inductor", ["--dynamo_backend", "inductor"], "", [], {"compile": True}),
    (
        *("inductor in the file", [], FILE + "dynamo_config:\n  dynamo_backend: INDUCTOR\n", []),
        {"compile": True},
    ),
    (
        *("inductor against ours", ["--dynamo_backend", "inductor"], "", ["--compile", "false"]),
        "--compile compile is false, and accelerate launch --dynamo_backend asks for true",
    ),
    ("eager", ["--dynamo_backend", "eager"], "", [], "only inductor is supported"),
    ("a mode", ["--dynamo_mode", "max-autotune"], "", [], "compiled in the default mode"),
    ("fullgraph", ["--dynamo_use_fullgraph"], "", [], "a layer may be several graphs"),
    ("dynamic", ["--dynamo_use_dynamic"], "", [], "torch decides about dynamic shapes"),
    # sharing the model
    (
        *("FSDP 1", ["--use_fsdp", "--num_processes", "2"], "", []),
        "FSDP 1 is not supported; set fsdp_version: 2",
    ),
    (
        *("FSDP 2 as it comes", ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"], ""),
        [],
        "set fsdp_cpu_ram_efficient_loading: false",
    ),
    ("our FSDP file", [], FSDP, [], {"reduce": "fast"}),
    (
        *("FSDP and exact", [], FSDP, ["--reduce", "exact"]),
        "--reduce reduce is exact, and ",
    ),
    (
        *("FSDP dropped", ["--cpu", "--num_processes", "1", "--config_file", "FSDP"], "", []),
        "FSDP was asked for, and the run was started without it",
    ),
    (
        *("FSDP not switched on", ["--fsdp_offload_params", "true"], "", []),
        "accelerate launch --fsdp_offload_params true: FSDP is not switched on",
    ),
    (
        *("local checkpoints", [], FSDP.replace(": SHARDED_STATE", ": LOCAL_STATE"), []),
        "LOCAL_STATE_DICT: checkpoints are sharded",
    ),
    (
        *(
            "FSDP's recomputing",
            [],
            FSDP.replace("checkpointing: false", "checkpointing: true"),
            [],
        ),
        "set gradient_checkpointing: full instead",
    ),
    ("ZeRO alone", ["--zero_stage", "3"], "", [], "DeepSpeed is not supported"),
    ("a DeepSpeed file", ["--deepspeed_config_file", "x"], "", [], "DeepSpeed is not supported"),
    (
        *("Megatron", ["--use_megatron_lm", "--num_processes", "2"], "", []),
        "parallelism of tensors, pipelines",
    ),
    (
        *("tensors", ["--parallelism_config_tp_size", "2"], "", []),
        "--parallelism_config_tp_size 2: parallelism of tensors",
    ),
    ("fp8's settings", ["--fp8_backend", "te"], "", [], "--fp8_backend te: fp8 is not supported"),
    # started alone
    (
        *("two on the CPU", ["--cpu", "--num_processes", "2"], "", []),
        "asked for several processes and started one",
    ),
    (
        "two on the CPU, by the file",
        [],
        DDP.replace("MULTI_GPU", "MULTI_CPU").replace("use_cpu: false", "use_cpu: true"),
        [],
        "asked for several processes and started one",
    ),
    ("the CPU", ["--cpu"], "", ["--bf16", "true"], {"bf16": True}),
    ("the CPU drops the default file", ["--cpu"], BF16, [], {"bf16": False}),
    ("affinity, debugging", ["--enable_cpu_affinity", "--debug"], "", [], {"bf16": False}),
]


@pytest.mark.parametrize(
    ("words", "default", "flags", "expected"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_accelerate_launch_is_obeyed_or_refused(
    launched: Callable[..., tuple[dict[str, str], list[str]]],
    good: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    default: str,
    flags: list[str],
    expected: OURS | str,
) -> None:
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    words = [str(tmp_path / "fsdp.yaml") if word == "FSDP" else word for word in words]
    found = outcome([*good, *flags], *launched(words, default), capsys=capsys)
    if isinstance(expected, str):
        assert isinstance(found, str), found
        assert expected in found
        assert all(line.startswith("error: ") for line in found.splitlines())
    else:
        assert isinstance(found, TrainConfig), found
        assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("environ", "flags", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], {"bf16": True}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["--bf16", "false"], "ACCELERATE_MIXED_PRECISION"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, [], "only bf16 is supported"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, [], {"gradient_accumulation_steps": 3}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, [], "must be"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], {"compile": True}),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, [], "DDP"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "FSDP 1 is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, [], {"reduce": "fast"}),
        ({"FSDP_VERSION": "2"}, [], "FSDP_VERSION 2: FSDP is not switched on"),
        ({"ACCELERATE_OF_TOMORROW": "true"}, [], "ACCELERATE_OF_TOMORROW true: not known"),
        ({"ACCELERATE_OF_TOMORROW": "False"}, [], {"bf16": False}),
        ({"MEGATRON_LM_TP_DEGREE": "2"}, [], "parallelism of tensors"),
    ],
)
def test_the_environment_of_python_or_torchrun_is_obeyed_or_refused(
    good: list[str],
    capsys: pytest.CaptureFixture[str],
    environ: dict[str, str],
    flags: list[str],
    expected: OURS | str,
) -> None:
    found = outcome([*good, *flags], environ, capsys=capsys)
    if isinstance(expected, str):
        assert expected in found
        assert len(found.splitlines()) == 1
    else:
        assert {name: getattr(found, name) for name in expected} == expected


def test_only_what_started_alone_is_said_to_have() -> None:
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    two = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    for environ in ({}, launched, launched | two, two):
        assert wishes(environ).problems == []
    assert len(wishes(launched | {"MASTER_ADDR": "127.0.0.1"}).problems) == 1


def test_every_variable_that_accelerate_reads_or_writes_has_a_row() -> None:
    pattern = re.compile(r"""["']((?:ACCELERATE|FSDP)_[A-Z0-9_]*[A-Z0-9])["']""")
    names = set()
    for path in Path(accelerate.__file__).parent.rglob("*.py"):
        if "test_utils" not in path.parts:
            names |= set(pattern.findall(path.read_text()))
    # the class reads its variables by a prefix and the rest of the name
    source = Path(accelerate.__file__).with_name("utils") / "dataclasses.py"
    names |= {f"FSDP_{rest}" for rest in re.findall(r'env_prefix \+ "([A-Z_]+)"', _fsdp(source))}
    assert len(names) > 50
    assert {name for name in names if rule_of(name) in (None, RULES["ACCELERATE_*"])} == set()


def _fsdp(source: Path) -> str:
    text = source.read_text().partition("class FullyShardedDataParallelPlugin")[2]
    return text.partition("\nclass ")[0]


STARTING = (
    "config_file quiet cpu multi_gpu tpu num_processes num_machines "
    "num_cpu_threads_per_process enable_cpu_affinity gpu_ids same_network machine_rank "
    "main_process_ip main_process_port tee log_dir role rdzv_backend rdzv_conf max_restarts "
    "monitor_interval module no_python tpu_use_cluster tpu_use_sudo vm env "
    "main_training_function aws_access_key_id aws_secret_access_key debug training_script "
    "mpirun_hostfile training_script_args help"
)
"""Flags that say how processes are started, which the launcher does."""


def test_every_flag_of_accelerate_launch_has_a_variable_or_starts_processes() -> None:
    flags = {action.dest for action in launcher.launch_command_parser()._actions}
    assert len(flags) > 90
    known = {flag: variable_of(flag) for flag in flags}
    assert {flag for flag, variable in known.items() if variable is None} == set(STARTING.split())
    assert all(rule_of(variable) for variable in known.values() if variable)
    assert all(
        rule_of(variable.replace("*", "X")) or variable == "FSDP_*" for variable in FLAGS.values()
    )


# -- real launchers


def trained(
    command: list[str], settings: Mapping[str, Any], as_flags: Any, **environ: str
) -> "subprocess.CompletedProcess[str]":
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("ACCELERATE_", "FSDP_"))}
    return subprocess.run(
        [*command, *as_flags(settings)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environ,
    )


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def recorded(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "run.json").read_text())["config"]
    return config


@pytest.mark.slow
def test_a_real_launch_obeys_the_default_file_and_a_flag_that_accelerate_drops(
    run_settings: Mapping[str, Any], as_flags: Any, tmp_path: Path
) -> None:
    (tmp_path / "hf" / "accelerate").mkdir(parents=True)
    (tmp_path / "hf" / "accelerate" / "default_config.yaml").write_text(BF16)
    settings = {**run_settings, "output_dir": tmp_path / "out", "max_steps": 1}
    command = [str(BIN / "accelerate"), "launch", "--gradient_accumulation_steps", "3"]
    done = trained([*command, "train/run.py"], settings, as_flags, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    config = recorded(tmp_path / "out")
    assert (config["bf16"], config["gradient_accumulation_steps"]) == (True, 3)
    assert "3 micro-batches on 1 process" in (tmp_path / "out" / "train.log").read_text()


def test_accumulation_of_the_environment_is_ours_and_divides_nothing_again(
    train_here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = train_here(tmp_path / "ours", max_steps=2, gradient_accumulation_steps=3)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    theirs = train_here(tmp_path / "theirs", max_steps=2)

    def numbers(out: Path) -> list[tuple[float, float]]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in lines]

    assert numbers(theirs) == numbers(ours)


@pytest.mark.slow
def test_an_fsdp_file_on_the_cpu_is_refused_by_every_process(
    run_settings: Mapping[str, Any], as_flags: Any, tmp_path: Path
) -> None:
    settings = {**run_settings, "output_dir": tmp_path / "out", "per_device_train_batch_size": 1}
    command = [str(BIN / "accelerate"), "launch", "--num_processes", "2"]
    command += ["--config_file", "train/presets/fsdp2_8gpu.yaml", "--main_process_port", port()]
    done = trained([*command, "train/run.py"], settings, as_flags, HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "error: ACCELERATE_USE_FSDP: FSDP was asked for, and Accelerate shards on" in done.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_two_processes_warn_of_nothing(
    run_settings: Mapping[str, Any], as_flags: Any, tmp_path: Path
) -> None:
    settings = {**run_settings, "output_dir": tmp_path / "out", "per_device_train_batch_size": 1}
    settings["turns"] = "independent"  # in dialogues of these records answers repeat
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port()]
    done = trained([*command, "-m", "train.run"], settings, as_flags)
    assert done.returncode == 0, done.stderr
    assert "find_unused_parameters" not in done.stderr
    assert "arning" not in done.stderr
