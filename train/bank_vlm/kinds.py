"""The video models of transformers whose tower a bank can stand in for, a row each; torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.family.qwen_vl import deepstack_of
from model.tower_kinds import merged_layer
from shards.errors import UserError
from shards.format.features import FeatureConfig
from train.start.pooled import features_problem

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """How one class of models takes what its tower gives."""

    model_type: str
    """In config.json."""
    tower: str
    """The tower's name in the model's `model`."""
    is_merged: bool
    """Tokens go to the LLM as the tower gives them: the bank holds its layer `merged`. Otherwise a
    projector reads patches of a hidden layer."""
    frames_like: str
    """Its processor's way to choose frames, for `encode --frames-like`."""


# only models whose logits, gradients and answers from a bank were compared with those of their own tower
KINDS = (
    Kind("qwen2_vl", "visual", True, "qwen2_vl"),
    Kind("qwen2_5_vl", "visual", True, "qwen2_vl"),
    Kind("qwen3_vl", "visual", True, "qwen3_vl"),
    Kind("llava_onevision", "vision_tower", False, "llava"),
    Kind("llava_next_video", "vision_tower", False, "llava"),
)
REFUSED = {"qwen3_vl_moe": "its experts' weights have not been tried"}
"""`model_type` -> why no bank can stand in for the tower."""


def layer_of(config: Json) -> str:
    """Return the layer of a bank that holds what the tower of a Qwen-VL gives its LLM."""
    return merged_layer(deepstack_of(config))


def find_kind(model_type: str) -> Kind:
    """Return the row of a model; UserError for one whose tower a bank cannot stand in for."""
    for kind in KINDS:
        if kind.model_type == model_type:
            return kind
    raise UserError(
        f"a bank cannot stand in for the tower of {model_type}"
        + (f": {REFUSED[model_type]}" if model_type in REFUSED else ""),
        expected=" or ".join(kind.model_type for kind in KINDS),
        fix="train its language model with train/run.py",
    )


def bank_problem(kind: Kind, config: Json, features: FeatureConfig) -> str | None:
    """Return why a bank does not hold what a model's tower gives, and what does; None if it may.

    config: the model's, as a dictionary. The digest says whether the weights are the same.
    """
    # these models pool or merge by themselves, and need each token that the tower gives
    if 1 not in features.strides:
        return (
            f"the bank holds the strides {', '.join(map(str, features.strides))}, and the model takes "
            "every token; encode with --stride 1"
        )
    if not kind.is_merged:
        return features_problem(config, features.to_json())
    if features.layer != layer_of(config):
        return (
            f"the bank holds layer {features.layer} of a tower, and the model takes merged tokens; "
            f"encode with --tower CHECKPOINT --layer {layer_of(config)} --stride 1"
        )
    # a tower that was saved by itself has its own type, one inside a whole checkpoint the model's
    expected = kind.model_type, config["vision_config"]["model_type"]
    if features.tower_type not in expected:
        return f"the bank's tower is a {features.tower_type}, the model's a {expected[1]}"
    return None
