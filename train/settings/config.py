"""The settings of a training run: `parse(argv)` merges defaults < YAML < environment < flags.

Nothing here imports torch: a wrong key, value or path is reported within a moment, all problems
together, each with its place and its fix, and exit code 2.

Add a setting: a field, by `setting(default, help, bounds)`, of the class below whose part reads it; of
`model/config.py` if a saved model has to know it. Flag, YAML key, `--help` and checks follow, and
`python -m tests.tables` writes it into train/README.md. If it changes which records, frames or tokens a
step has, name it in `train.batches.plan.SETTINGS`: a checkpoint of another value is then refused.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from model.config import TURNS, ModelSettings
from model.settings import setting
from shards.annotations.files import is_hub_name
from shards.annotations.globs import is_glob
from shards.hub import refusal
from train.settings.drawn import problem_of as drawn_problem
from train.settings.drawn import read_augment, read_splice
from train.settings.exits import refuse
from train.settings.foreign import ENVIRONMENT
from train.settings.launcher import wishes
from train.settings.output import output_problem
from train.settings.packages import missing_packages
from train.settings.parse import BOOLEANS, Origin, merge, obey

# the first name whose words fit is taken: H200 NVL stands before H200, as its name contains both
DEVICES = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}
"""Dense bf16 FLOP/s in NVIDIA's data sheets (for Hopper half of the figure with sparsity)."""


def checkpoint_every(word: str) -> int | None:
    """Return N where every N-th layer's activations are recomputed, 0 for none; None if not valid."""
    named = {"full": 1} | {name: int(on) for name, on in BOOLEANS.items()} | {"none": 0}
    if word.lower() in named:
        return named[word.lower()]
    return int(word) if re.fullmatch("[0-9]{1,9}", word) else None


@dataclass(frozen=True)
class DataSettings:
    """Banks and records, and how records are joined to clips."""

    bank: list[str] = setting([], "bank folders made by `preprocess encode`, one or several")
    data_path: list[str] = setting(
        [],
        "records: .json, .jsonl, .csv, .parquet, a folder of one kind, a pattern such as x/*.parquet, "
        "a mixture's YAML, Hub name",
    )
    data_config: str = setting("", "YAML of named datasets: name -> {records, banks}")
    data_mixture: str = setting("", "which of them, how often and how much: a+b*2+c@0.1")
    splice_path: list[str] = setting(
        [],
        "clips with phrases, of which records are spliced: {video, phrase or caption, start?, end?}",
    )
    splice: list[str] = setting(
        [],
        "how: records=10000 (an epoch) parts=2-6 seconds=2-6 rounds=4 questions=span+order+count+seen",
    )
    turns: str = setting(
        "dialogue",
        "several turns of a record: each sees those before it (dialogue), or only the media and itself",
        choices=TURNS,
    )
    augment: list[str] = setting(
        [],
        "which frames are used, drawn for each record and epoch: jitter, pattern=interleave+uniform, "
        "ratio=0.25+0.5, drop=0.3",
    )
    eval_path: list[str] = setting([], "record files for the held-out loss")
    media_dir: str = setting(
        "", "folder that the records' media are relative to, where their names are not banked ids"
    )
    strip_prefix: list[str] = setting(
        [], "leading folders of the records' media that the banks' ids do not have"
    )
    missing: str = setting(
        "error", "a record whose clip no bank has: stop, or drop it", choices=("error", "drop")
    )
    unsupervised: str = setting(
        "error", "a record without an answer: stop, or drop it", choices=("error", "drop")
    )
    on_bad_record: str = setting(
        "refuse",
        "a record that is damaged, misspelt or says two things: stop, or leave it out and list it",
        choices=("refuse", "drop"),
    )
    bad_record_limit: str = setting(
        "50%",
        "bad records of a file that drop leaves out at most: a number, or a share like 1%",
        valid=(
            lambda word: re.fullmatch(r"\d{1,9}|(?:100|\d{1,2}(?:\.\d{1,6})?)%", word) is not None,
            "a number like 100, or a share like 1%",
        ),
    )
    times_past_end: str = setting(
        "refuse",
        "a time after the end of its clip: a bad record, a span that is ended with the clip, or drop",
        choices=("refuse", "clip", "drop"),
    )
    ignore_fields: list[str] = setting([], "fields of records that are not read")
    allow_outside: bool = setting(False, "records may name videos by absolute paths, or by `..`")
    mm_spatial_pool_stride: int = setting(0, "slow stride; 0 takes the bank's finest", least=0)
    fast_stride: int = setting(0, "fast stride; 0 takes the bank's coarsest", least=0)


@dataclass(frozen=True)
class LlmSettings:
    """The LLM that a run starts from, its trained part, and its arithmetic."""

    stage_path: str = setting(
        "",
        "what to start from: an LLM (folder or Hub name), a run, a VILA stage, a LLaVA or "
        "Qwen-VL checkpoint",
    )
    attn: str = setting(
        "auto",
        "attention implementation; auto says what it takes and why",
        choices=("auto", "sdpa", "eager", "flex_attention", "flash_attention_2"),
    )
    tune_llm: str = setting(
        "full", "the trained part of the LLM", choices=("full", "frozen", "lora")
    )
    # rank and alpha of LLaVA-ST's LoRA
    lora_r: int = setting(128, "LoRA rank", least=1)
    lora_alpha: int = setting(256, "LoRA alpha", least=1)
    lora_experts: bool = setting(
        True,
        "whether LoRA adapts an MoE's routed experts, too: a matrix each, billions in large LLMs",
    )
    gradient_checkpointing: str = setting(
        "none",
        "recompute activations to save memory: none, full, or N for every N-th layer",
        valid=(
            lambda word: checkpoint_every(word) is not None,
            "none, full or a positive integer",
        ),
    )
    compile: bool = setting(False, "torch.compile the LLM's layers; pays with pack_tokens")
    bf16: bool | str = setting(
        False,
        "bf16 arithmetic, trained weights stay fp32; auto: where a CPU's step is clearly faster, as "
        "measured when the run begins",
        choices=("auto",),
    )
    # of fp32 products; the check of the LLM against transformers' own forward multiplies without it
    tf32: bool = setting(True, "TF32 matrix products on CUDA")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW's settings and the learning rates."""

    # that of NVILA-Lite's supervised fine-tuning and of LLaVA-ST
    learning_rate: float = setting(2e-5, "of the LLM", more_than=0)
    projector_lr: float = setting(0.0, "of projector and new heads; 0 takes learning_rate", least=0)
    lape_lr: float = setting(0.0, "of LAPE's tables; 0 takes 10 x learning_rate", least=0)
    weight_decay: float = setting(0.0, "of matrices: no vector, no row of LAPE's tables", least=0)
    adam_beta2: float = setting(
        0.999, "AdamW's memory of squared gradients", more_than=0, less_than=1
    )
    # as in the scripts of VILA and LLaVA-ST
    warmup_ratio: float = setting(0.03, "share of the steps with rising rate", least=0, most=1)
    lape_warmup_steps: int = setting(
        0, "first steps in which the LLM is not updated, and all else is", least=0
    )
    max_grad_norm: float = setting(1.0, "gradient clipping", more_than=0, finite=False)


@dataclass(frozen=True)
class BatchSettings:
    """How records are cut into rows, micro-batches, steps and epochs."""

    per_device_train_batch_size: int = setting(2, "rows of a micro-batch", least=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches of a step, per device", least=1)
    pack_tokens: int = setting(
        0, "pack records into rows of up to this many tokens; 0: one record a row", least=0
    )
    max_tokens: int = setting(
        0, "tokens of a record at most, by leaving out whole frames; 0: no limit", least=0
    )
    prefetch: int = setting(2, "steps whose batches are prepared ahead", least=1)
    num_train_epochs: float = setting(1.0, "passes over the mixture", more_than=0)
    max_steps: int = setting(0, "stop after this many steps; 0: epochs decide", least=0)


@dataclass(frozen=True)
class RunSettings:
    """Outputs, logs, checkpoints and resuming."""

    output_dir: str = setting("", "where the run writes model, checkpoints and logs")
    seed: int = setting(0, "of order, initialisation and dropout", least=0, most=2**32 - 1)
    plan: bool = setting(False, "print the run's plan and cost, and stop: no weights, no GPU")
    # published packed runs reach 33 to 46 % (torchtitan, lmms-engine, nanochat)
    assumed_mfu: float = setting(
        0.4, "share of a device's peak that --plan counts with", more_than=0, most=1
    )
    device_flops: float = setting(
        0.0,
        "a device's peak FLOP/s, for MFU; 0 takes the data sheet's where known (--plan: plan_device's)",
        least=0,
    )
    plan_device: str = setting(
        "H100", "the device whose hours --plan prints", choices=tuple(DEVICES)
    )
    plan_devices: int = setting(
        0, "how many of them --plan counts with; 0: as many as it is launched on", least=0
    )
    wandb: bool = setting(
        False, "mirror metrics to Weights & Biases (WANDB_PROJECT, WANDB_NAME, ... are read)"
    )
    logging_steps: int = setting(10, "steps between printed lines", least=1)
    eval_steps: int = setting(0, "steps between held-out losses; 0: at the end", least=0)
    save_steps: int = setting(0, "steps between checkpoints; 0: at the end", least=0)
    # by the clock, so that a crash costs half an hour at most, however long a step takes
    save_minutes: float = setting(
        30.0,
        "minutes between checkpoints, whatever the steps; 0: save_steps alone decides",
        least=0,
    )
    save_total_limit: int = setting(
        2, "newest checkpoints kept; the best one is kept, too", least=1
    )
    resume: str = setting("auto", "auto, none, or a checkpoint folder")
    # exact holds three fp32 tensors of the trained weights' size, and broadcasts each pack's gradient
    reduce: str = setting(
        "fast",
        "gradients: fast (DDP, FSDP), or exact: the same bits on any number of processes",
        choices=("fast", "exact"),
    )
    num_threads: int = setting(
        0, "torch's threads of a process, kept on resume; 0: as it starts", least=0, most=1024
    )
    rehearsal: bool = setting(True, "run the heaviest pack before step 1, so that it fits or never")


@dataclass(frozen=True)
class TrainConfig(
    RunSettings, BatchSettings, OptimizerSettings, LlmSettings, ModelSettings, DataSettings
):
    """One run: all its settings, flat. Python collects the fields of the bases from last to first.

    A part of the trainer that needs a few settings takes the class that declares them. The names are
    those of the LLaVA, VILA and lmms-engine scripts where they have one.
    """


def parse(
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    launched: Sequence[str] | None = None,
) -> TrainConfig:
    """Return the settings of a command line, or print every problem and exit with 2.

    launched: the words between `accelerate launch` and the script, None where it started nothing.
    """
    environ = os.environ if environ is None else environ
    if any(flag in ("-h", "--help") for flag in argv):
        print(help_text())  # noqa: T201
        raise SystemExit(0)
    problems: list[str] = []
    values = merge(TrainConfig, argv, environ, problems)
    asked = wishes(environ, launched)
    obey(TrainConfig, values, asked.settings, problems)
    problems += asked.problems
    if problems:
        refuse(problems)
    config = TrainConfig(**{name: value for name, (value, _) in values.items()})
    # after the merge: what contradicts what is known only of the final values
    problems = check(config, {name: origin for name, (_, origin) in values.items()}, environ)
    if problems:
        refuse(problems)
    return config


def check(
    config: TrainConfig, origins: Mapping[str, Origin], environ: Mapping[str, str]
) -> list[str]:
    """Return the problems of a config whose values have the right types, a line each."""
    problems = []
    # -- what is missing, then what does not exist, then what does not go together
    for name in ("stage_path", "output_dir"):
        if not getattr(config, name):
            problems.append(f"{name}: missing; give --{name} PATH or set it in the YAML")
    # the contents of a stage's folder are checked later: see train.start.stage_files
    stage = config.stage_path
    if stage and not Path(stage).exists() and (problem := name_problem(stage)):
        where = origins.get("stage_path", "stage_path")
        problems.append(f"{where} stage_path: {problem}")
    if config.output_dir:
        reads = {name: [getattr(config, name)] for name in ("stage_path", "data_config")}
        reads |= {
            name: getattr(config, name)
            for name in ("bank", "data_path", "splice_path", "eval_path")
        }
        if problem := output_problem(Path(config.output_dir), reads):
            problems.append(f"{origins.get('output_dir', 'output_dir')} output_dir: {problem}")
    if config.data_mixture and not config.data_config:
        problems.append("data_mixture: needs data_config, a YAML of named datasets")
    if config.splice and not config.splice_path:
        problems.append(
            "splice: needs splice_path, clips with phrases; an entry of data_config has a splice of "
            "its own"
        )
    for name, read in (("splice", read_splice), ("augment", read_augment)):
        if problem := drawn_problem(read, getattr(config, name)):
            problems.append(f"{origins.get(name, name)} {name}: {problem}")
    if not (config.data_config or config.data_path or config.splice_path):
        problems.append("data_path: missing; give --data_path RECORDS.jsonl, or data_config")
    for name in ("data_path", "splice_path", "eval_path"):
        for path in getattr(config, name):
            # patterns and Hub names are looked up where they are read, with messages of their own
            if not Path(path).exists() and not is_glob(path) and not is_hub_name(path):
                problems.append(f"{origins.get(name, name)} {name}: no such file: {path}")
    if config.attn.startswith("flash") and (why := needs_mask(config)):
        problems.append(f"{origins.get('attn', 'attn')} attn {config.attn}: {why}")
    # a plan trains nothing and logs nothing: it needs none of them
    if not config.plan:
        problems += missing_packages(vars(config), origins, environ)
    if (
        config.resume not in ("auto", "none")
        and not (Path(config.resume) / "checkpoint.json").exists()
    ):
        problems.append(
            f"{origins.get('resume', 'resume')} resume: {config.resume} is no checkpoint "
            "(expected auto, none, or a checkpoint-N folder)"
        )
    return problems


def needs_mask(config: TrainConfig) -> str | None:
    """Return why rows need a mask, which flash attention does not take, with the fix; None if not."""
    if config.frame_attention == "block":
        return (
            "frames cannot see themselves wholly in it; use frame_attention: token, or attn: auto"
        )
    if config.pack_tokens:
        return "it would let packed records see each other; use attn: auto, or pack_tokens: 0"
    if config.turns == "independent":
        return "it would let independent turns see each other; use attn: auto, or turns: dialogue"
    return None


def name_problem(name: str) -> str | None:
    """Return why a name is neither a local folder nor a model of the Hub; None if it may be one."""
    expected = (
        "expected a folder of a causal LLM, a Hub name like Qwen/Qwen2.5-0.5B, or a framebank run; "
        "also a VILA stage or a LLaVA checkpoint: a folder with config.json"
    )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return f"no such folder: {name} ({expected})"
    why = refusal(name)
    return why and f"no such folder: {name}, and as a name of the Hub: {why} ({expected})"


def help_text() -> str:
    """Return the manual of every setting."""
    lines = [
        "accelerate launch train/run.py [STAGE_PATH [DATA_MIXTURE [OUTPUT_DIR]]] --config X.yaml "
        "[--setting value ...]",
        "accelerate launch train/run.py --sweep SWEEP.yaml ... [--setting value ...]",
        "",
        "Trains LAPE, projector and LLM on banked features, without videos or a vision tower.",
        f"Settings are merged: defaults < YAML < environment ({', '.join(ENVIRONMENT)}) < flags.",
        "",
    ]
    for item in fields(TrainConfig):
        default = "" if item.default is MISSING else item.default
        shown = (
            ""
            if default in ("", 0, None)
            else f" [{str(default).lower() if isinstance(default, bool) else default}]"
        )
        choices = f" ({', '.join(item.metadata['choices'])})" if item.metadata["choices"] else ""
        lines.append(f"  --{item.name:<28} {item.metadata['help']}{choices}{shown}")
    return "\n".join(lines)
