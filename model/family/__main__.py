"""Prints which causal LM families of the installed transformers pass the checks, as a markdown table.

python -m model.family [FAMILY ...]
"""

import sys
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model.family.conformance import Verdict, said_by, verdict_of

GRANITE = {
    "logits_scaling": 8.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
}
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "dots1": {
        "head_dim": 128,
        "num_experts_per_tok": 6,
        "n_routed_experts": 128,
        "n_shared_experts": 2,
    },
    "granite": GRANITE,
    "granitemoe": GRANITE,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "mixtral": {"sliding_window": 4096},
    "nemotron": {"num_key_value_heads": 8},
    "phi3": {"sliding_window": 2047},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4096},
}
"""Family -> values of its published checkpoints, where the class's defaults are invalid or easier."""


def families() -> list[str]:
    """Return the `model_type` of every family that AutoModelForCausalLM loads."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_and_config(family: str) -> tuple[type, Any]:
    """Return the class and config of a family as its checkpoints have it."""
    config = CONFIG_MAPPING[family](**AS_PUBLISHED.get(family, {}))
    llm_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(
        config, llm_class.config_class
    ):  # the config of a larger model that contains the LLM
        config = config.get_text_config(decoder=True)
    return llm_class, config


def verdicts(names: list[str]) -> Iterator[tuple[str, Verdict | str]]:
    """Yield each family with its verdict, or with the reason why there is none."""
    for family in names:
        try:
            llm_class, config = class_and_config(family)
        except Exception as error:  # defaults of a config may raise anything
            yield family, said_by(error)
            continue
        found = verdict_of(llm_class, config)
        yield family, found.unbuilt or found


def row(family: str, found: Verdict | str) -> str:
    """Return a family's line of the table."""
    if isinstance(found, str):
        return f"| {family} | not built | {found.replace('|', '/')[:120]} |"
    packed = found.right(packed=True, block=True)
    if packed:
        return f"| {family} | exact | {', '.join(n for n in packed if n in found.failed)} |"
    for words, packs, block in (
        ("exact, not packed", False, True),
        ("exact, `token` packed", True, False),
        ("exact, `token` unpacked", False, False),
    ):
        if found.right(packed=packs, block=block):
            why = found.refusal(next(iter(found.failed)), packed=True, block=True) or ""
            return f"| {family} | {words} | {why.partition(': ')[2].partition('; use')[0]} |"
    why = found.refusal(next(iter(found.failed)), packed=False, block=False) or ""
    return f"| {family} | refused | {why.partition(': ')[2].replace('|', '/')[:140]} |"


def main(names: list[str]) -> None:
    """Print the table for some families, all if none is named."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    print(f"| family (transformers {transformers.__version__}) | verdict | back-ends, or why |")  # noqa: T201
    print("|---|---|---|")  # noqa: T201
    for family, found in verdicts(names or families()):
        print(row(family, found), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
