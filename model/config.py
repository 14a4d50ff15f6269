"""What a trained model is, beside its weights: every model setting, once; torch-free."""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from model.lape.tokens import LAPE_AXES, PRESETS
from model.slow_fast import STRATEGIES, exact_ratio
from shards.errors import UserError

PROJECTORS = "linear, mlpNx_gelu, mlp_downsample, mlp_downsample_2x2_fix, mlp_downsample_3x3_fix"
JOINED = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
"""Cells on a side that become one token. VILA's first two differ in the order of tokens alone: the
older one's run down the columns; here tokens follow the rows in both."""
MLP = re.compile(r"mlp([1-9])x_gelu")


def joined_cells(kind: str) -> int:
    """Return how many cells on a side a projector makes one token of; UserError if it is unknown."""
    if kind != "linear" and not MLP.fullmatch(kind) and kind not in JOINED:
        raise UserError(f"mm_projector_type must be one of {PROJECTORS}, got {kind!r}")
    return JOINED.get(kind, 1)


Json = dict[str, Any]
FORMAT = 1
FRAME_ATTENTION = ("block", "token")
PREDICTORS = ("resample", "xattn")
FRAME_TIME = ("none", "text")
"""Whether a time stamp is written before each frame."""


@dataclass(frozen=True)
class VLMConfig:
    """What a trained model is, beside its weights: everything that must agree to use them."""

    mm_projector_type: str = "mlp2x_gelu"
    slow_stride: int = 4
    fast_stride: int = 8
    frame_sampling_strategy: str = "interleave"
    slow_frame_ratio: str = "0.5"
    max_frames_num: int = 16
    frame_attention: str = "block"
    predictor: str = "resample"
    loss_weight: float = 0.15
    enable_lape: bool = True
    num_temporal_tokens: int = 100
    num_spatial_tokens: int = 100
    lape_preset: str = "plus"
    lape_sigma: float = 1.0
    lape_axes: str = "all"
    lape_positions: bool = True
    frame_time: str = "none"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("frame_sampling_strategy", STRATEGIES),
            ("frame_attention", FRAME_ATTENTION),
            ("predictor", PREDICTORS),
            ("lape_preset", PRESETS),
            ("lape_axes", LAPE_AXES),
            ("frame_time", FRAME_TIME),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        joined_cells(self.mm_projector_type)
        exact_ratio(self.slow_frame_ratio)


def read_model_config(folder: Path) -> Json:
    """Return a model folder's config.json with `model` as a VLMConfig; UserError if it is none."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: no trained model here (config.json is missing)")
    facts = json.loads(path.read_text())
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a framebank model of format {FORMAT} (got {facts.get('format')!r}); "
            "--model takes the output folder of train/run.py or a checkpoint-N in it"
        )
    unknown = set(facts["model"]) - {field.name for field in fields(VLMConfig)}
    if unknown:
        raise UserError(f"{path}: unknown model settings {sorted(unknown)}; update framebank")
    return dict(facts) | {"model": VLMConfig(**facts["model"])}
