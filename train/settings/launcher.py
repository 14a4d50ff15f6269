"""Accelerate's own flags, file and variables: obeyed, or refused by name; never ignored.

`accelerate launch` passes its flags and configuration file on as environment variables, and drops those
that its way of starting does not use (accumulation without DeepSpeed, FSDP with --cpu). So both are
read: the variables, and the command and file of the launcher above this process.

RULES is the whole policy, a row per variable.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from shards.signed import Json
from train.settings.parse import Origin

OFF = ("", "no", "none", "false", "0", "n", "f", "off")

DEEPSPEED = (
    "DeepSpeed is not supported: it scales, clips and accumulates by itself, and this trainer does so "
    "over exact counts. Use DDP, or FSDP2: accelerate launch --config_file "
    "train/presets/fsdp2_8gpu.yaml train/run.py ..."
)
PARALLEL = (
    "parallelism of tensors, pipelines and sequences (Megatron-LM, parallelism_config) is not "
    "supported. Use DDP, or FSDP2 as train/presets/fsdp2_8gpu.yaml does"
)
FP8 = "fp8 is not supported; use bf16"
TPU = "TPUs are not supported; take it out"
NO_FSDP = "FSDP is not switched on; add --use_fsdp (distributed_type: FSDP), or take it out"
LOST_FSDP = (
    "FSDP was asked for, and the run was started without it, as accelerate launch --cpu does; "
    "leave --cpu out (ACCELERATE_USE_FSDP is then true), or FSDP"
)
ALONE = (
    "accelerate launch was asked for several processes and started one (it does so with --cpu, and "
    "with use_cpu in its file). Run `accelerate launch --multi_gpu --num_processes 2 train/run.py ...` "
    "(works on CPU too) or `torchrun --nproc_per_node 2 -m train.run ...`"
)


@dataclass(frozen=True)
class Rule:
    """The treatment of a variable's value: none, a setting of ours, a refusal, or left to Accelerate."""

    unset: tuple[str, ...] = OFF
    """Values, in lower case, without effect here, or for what is done anyway."""
    setting: str = ""
    """The setting here of the same meaning: it takes the value if it is not set, else must agree."""
    values: Mapping[str, str] = field(default_factory=dict)
    """The variable's values that the setting has, as it writes them; empty: they are written alike."""
    refusal: str = ""
    """Why no other value is obeyed, and the way out; empty where Accelerate or the setting obeys all."""


def refused(refusal: str, *unset: str) -> Rule:
    return Rule(unset=(*OFF, *unset), refusal=refusal)


OBEYED = Rule()

RULES: Mapping[str, Rule] = {
    # -- ours by another name
    "ACCELERATE_MIXED_PRECISION": Rule(
        setting="bf16",
        values={"bf16": "true"},
        refusal="only bf16 is supported: there is no loss scaling; use --mixed_precision bf16 or no",
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Rule(
        unset=("", "none"), setting="gradient_accumulation_steps"
    ),
    "ACCELERATE_GRADIENT_CLIPPING": Rule(unset=("", "none"), setting="max_grad_norm"),
    "ACCELERATE_DYNAMO_BACKEND": Rule(
        setting="compile",
        values={"inductor": "true"},
        refusal="only inductor is supported; use --dynamo_backend inductor or no",
    ),
    "ACCELERATE_DYNAMO_MODE": refused(
        "layers are compiled in the default mode; take it out", "default"
    ),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": refused("a layer may be several graphs; take it out"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": refused("torch decides about dynamic shapes; take it out"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": OBEYED,  # `compile` compiles layer by layer
    # -- Accelerate's own affair, with no say in what is learned
    "ACCELERATE_USE_CPU": OBEYED,
    "ACCELERATE_TORCH_DEVICE": OBEYED,
    "ACCELERATE_CPU_AFFINITY": OBEYED,
    "ACCELERATE_DEBUG_MODE": OBEYED,
    "ACCELERATE_DEBUG_RDV_FILE": OBEYED,
    "ACCELERATE_LOG_LEVEL": OBEYED,
    "ACCELERATE_ENABLE_RICH": OBEYED,
    "ACCELERATE_INIT_INCLUDE_BUFFERS": OBEYED,
    "ACCELERATE_BYPASS_DEVICE_MAP": OBEYED,
    "ACCELERATE_USE_SAGEMAKER": OBEYED,
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": refused(
        "SageMaker's own data parallelism is not supported; start the processes with torchrun"
    ),
    # -- FSDP: version 2 alone
    "ACCELERATE_USE_FSDP": Rule(setting="reduce", values={"true": "fast"}),
    "FSDP_VERSION": Rule(
        unset=("2",),
        refusal="FSDP 1 is not supported; set fsdp_version: 2, as train/presets/fsdp2_8gpu.yaml does",
    ),
    "FSDP_RESHARD_AFTER_FORWARD": OBEYED,
    "FSDP_OFFLOAD_PARAMS": OBEYED,
    "FSDP_MIN_NUM_PARAMS": OBEYED,
    "FSDP_AUTO_WRAP_POLICY": OBEYED,
    "FSDP_TRANSFORMER_CLS_TO_WRAP": OBEYED,
    "FSDP_SYNC_MODULE_STATES": OBEYED,  # every process builds the same weights
    "FSDP_SHARDING_STRATEGY": refused(
        "FSDP 2 has no sharding strategies; set fsdp_reshard_after_forward: true or false",
        *("full_shard", "1"),
    ),
    "FSDP_BACKWARD_PREFETCH": refused(
        "FSDP 2 has a prefetch of its own; take it out", "no_prefetch"
    ),
    "FSDP_FORWARD_PREFETCH": refused("FSDP 2 has a prefetch of its own; take it out"),
    "FSDP_USE_ORIG_PARAMS": Rule(
        unset=("", "none", "true", "1", "yes"),
        refusal="FSDP 2 always keeps the original parameters; take it out",
    ),
    "FSDP_STATE_DICT_TYPE": refused(
        "checkpoints are sharded, for any number of processes, and a run's model is whole; set "
        "fsdp_state_dict_type: SHARDED_STATE_DICT",
        *("sharded_state_dict", "3", "full_state_dict", "1"),
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": refused(
        "every process loads the model by itself; set fsdp_cpu_ram_efficient_loading: false"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": refused(
        "set gradient_checkpointing: full instead, and fsdp_activation_checkpointing: false"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": refused(
        "activations are recomputed, not moved; set gradient_checkpointing: full instead"
    ),
    "FSDP_IGNORED_MODULES": refused(
        "nobody would add up the gradients of ignored modules; take it out"
    ),
    # -- other ways to share the work
    "ACCELERATE_USE_DEEPSPEED": refused(DEEPSPEED),
    "ACCELERATE_DEEPSPEED_*": refused(DEEPSPEED),
    "ACCELERATE_CONFIG_DS_FIELDS": refused(DEEPSPEED),
    "ACCELERATE_USE_MEGATRON_LM": refused(PARALLEL),
    "MEGATRON_LM_*": refused(PARALLEL),
    "ACCELERATE_USE_PARALLELISM_CONFIG": refused(PARALLEL),
    "ACCELERATE_ALLOW_CP_STANDALONE": refused(PARALLEL),
    "PARALLELISM_CONFIG_*": refused(PARALLEL),
    "ACCELERATE_FP8_*": refused(FP8),
    "ACCELERATE_DOWNCAST_BF16": refused(TPU),
    "ACCELERATE_IN_TPU_POD": refused(TPU),
    # -- what a later Accelerate may bring
    "ACCELERATE_*": refused("not known to this trainer; take it out"),
}
"""Variable, or `PREFIX*` of those without a row of their own -> its rule."""

FLAGS: Mapping[str, str] = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "downcast_bf16": "ACCELERATE_DOWNCAST_BF16",
    "use_fsdp": "ACCELERATE_USE_FSDP",
    "use_deepspeed": "ACCELERATE_USE_DEEPSPEED",
    "use_megatron_lm": "ACCELERATE_USE_MEGATRON_LM",
    "use_parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG",
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "fsdp_*": "FSDP_*",
    "megatron_lm_*": "MEGATRON_LM_*",
    "parallelism_config_*": "PARALLELISM_CONFIG_*",
    "dynamo_*": "ACCELERATE_DYNAMO_*",
    "fp8_*": "ACCELERATE_FP8_*",
    "deepspeed_*": "ACCELERATE_DEEPSPEED_*",
    "zero3_*": "ACCELERATE_DEEPSPEED_ZERO3_*",
    "offload_*": "ACCELERATE_DEEPSPEED_OFFLOAD_*",
}
"""Flag of `accelerate launch`, or key of its file -> the variable that it becomes, or would have."""

DISTRIBUTED = {"FSDP": "use_fsdp", "DEEPSPEED": "use_deepspeed", "MEGATRON_LM": "use_megatron_lm"}
"""`distributed_type` of the file -> the flag of the same meaning."""

Asked = dict[str, tuple[str, Origin]]
"""Variable -> (its value, where that was written)."""


@dataclass(frozen=True)
class Wishes:
    """The launcher's requests: values of settings here, and problems."""

    settings: list[tuple[str, str, Origin]]
    """(our setting, its value as it is written, where)"""
    problems: list[str]


def wishes(environ: Mapping[str, str], words: Sequence[str] | None = None) -> Wishes:
    """Return the requests to Accelerate, by variables and by the launcher above.

    words: what stands between `accelerate launch` and the script; None where that is not known.
    """
    # -- all that was asked for, wherever: variables, the launcher's file, its flags
    asked = {name: (value, name) for name, value in environ.items() if rule_of(name)}
    if words is not None:
        asked |= _by_launcher(environ, words)
    found = Wishes([], [])
    with_fsdp = asked.get("ACCELERATE_USE_FSDP", ("", ""))[0].strip().lower() not in OFF
    if with_fsdp:
        # what Accelerate takes for unsaid
        asked.setdefault("FSDP_VERSION", ("1", "FSDP_VERSION"))
    for variable, (value, origin) in asked.items():
        rule = rule_of(variable)
        assert rule is not None, variable
        low = value.strip().lower()
        # -- each by its rule
        idle = variable.startswith("FSDP_") and not with_fsdp
        refusal = NO_FSDP if idle else rule.refusal
        if low in rule.unset and not (idle and low):
            continue
        if rule.setting and (not rule.values or low in rule.values):
            found.settings.append((rule.setting, rule.values.get(low, value.strip()), origin))
        # one sentence for all that DeepSpeed alone has
        elif refusal and not any(line.endswith(refusal) for line in found.problems):
            found.problems.append(f"{origin} {value}: {refusal}")
    if with_fsdp and environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        origin = asked["ACCELERATE_USE_FSDP"][1]
        found.problems.append(f"{origin}: {LOST_FSDP}")
    if _started_alone(environ):
        found.problems.append(ALONE)
    return found


def _started_alone(environ: Mapping[str, str]) -> bool:
    """Return whether Accelerate was asked for several processes and started one.

    `accelerate launch --cpu --num_processes 2` (1.15) sets MASTER_ADDR, which it does for two and
    more, and then starts the script once, without WORLD_SIZE.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environ
    return launched and "MASTER_ADDR" in environ and "WORLD_SIZE" not in environ


def rule_of(variable: str) -> Rule | None:
    """Return a variable's rule, None where it is not Accelerate's."""
    if variable in RULES:
        return RULES[variable]
    family = (name for name in RULES if name.endswith("*") and variable.startswith(name[:-1]))
    # the longest prefix: ACCELERATE_FP8_* is meant more closely than ACCELERATE_*
    return RULES[best] if (best := max(family, key=len, default="")) else None


def variable_of(flag: str) -> str | None:
    """Return the variable of a flag, None where the flag only concerns the starting of processes."""
    if flag in FLAGS:
        return FLAGS[flag]
    for name, variable in FLAGS.items():
        if name.endswith("*") and flag.startswith(name[:-1]):
            return variable[:-1] + flag[len(name) - 1 :].upper()
    return None


def _by_launcher(environ: Mapping[str, str], words: Sequence[str]) -> Asked:
    """Return the values of the launcher's flags and file; flags win, as they do for Accelerate."""
    flags = dict(_flags(words))
    # --cpu makes Accelerate read no file
    path = flags.get("config_file") or ("" if "cpu" in flags else str(default_file(environ)))
    asked: Asked = {}
    for key, value in _file_items(path):
        if variable := variable_of(key):
            asked[variable] = (value, f"{path} {key}")
    for flag, value in flags.items():
        if variable := variable_of(flag):
            asked[variable] = (value, f"accelerate launch --{flag}")
    return asked


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (flag, value) of a command line; a flag without a value is `true`."""
    for place, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            following = words[place + 1 : place + 2]
            # argparse takes the next word, unless it is a flag
            if not equals:
                value = following[0] if following and not following[0].startswith("-") else "true"
            yield name.replace("-", "_"), value


def default_file(environ: Mapping[str, str]) -> Path:
    """Return the file that `accelerate config` writes and `accelerate launch` reads by default."""
    cache = environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(environ.get("HF_HOME", f"{cache}/huggingface")).expanduser()
    return home / "accelerate" / "default_config.yaml"


def _file_items(path: str) -> Iterator[tuple[str, str]]:
    """Yield (flag, value) of a configuration file, with the sections' keys as flags are named."""
    try:
        # JSON is YAML, too
        content: Json = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError):
        return  # Accelerate has read it, or there is none
    for key, value in content.items():
        if isinstance(value, dict):
            section = key.removesuffix("_config")
            prefix = f"{section}_" if section in ("fsdp", "fp8", "dynamo") else ""
            for name, one in value.items():
                yield name if name.startswith(prefix) else prefix + name, _written(one)
        elif key == "distributed_type" and value in DISTRIBUTED:
            yield DISTRIBUTED[value], "true"
        else:
            yield key, _written(value)


def _written(value: object) -> str:
    """Return a file's value as Accelerate writes it into a variable."""
    return "" if value is None else str(value)
