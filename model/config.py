"""Every setting of a model, declared once, and the config.json of a saved model; torch-free.

A run's settings (`train.settings.config`) inherit `ModelSettings`; a saved model's `config.json` is
read back as a `VLMConfig`. Both refuse a value that `setting` does not allow.
"""

import json
import re
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from model.lape.tokens import LAPE_AXES, MOST_ANCHORS, PRESETS
from model.settings import problem_of, setting
from model.slow_fast import STRATEGIES, is_ratio
from shards.errors import UserError

PROJECTORS = (
    "linear, mlpNx_gelu, norm_mlpNx_gelu, mlp_downsample, mlp_downsample_2x2_fix, "
    "mlp_downsample_3x3_fix, identity"
)
JOINED = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
"""Projector -> cells on a side that it joins to one token. VILA's two 2x2 projectors differ only in
the order of their tokens: the older one's run down the columns; here both are row-major."""
# one digit from 1: `mlp0x_gelu` would be no layer at all
MLP = re.compile(r"(norm_)?mlp([1-9])x_gelu")


def is_projector(kind: str) -> bool:
    """Return whether a text names a projector, see `PROJECTORS`."""
    return kind in ("linear", "identity") or kind in JOINED or MLP.fullmatch(kind) is not None


def joined_cells(kind: str) -> int:
    """Return how many cells on a side a projector joins to one token; UserError if it is unknown."""
    if not is_projector(kind):
        raise UserError(f"mm_projector_type must be one of {PROJECTORS}, got {kind!r}")
    return JOINED.get(kind, 1)


Json = dict[str, Any]
FORMAT = 3
READ = (2, 3)
"""Formats of saved models that are read, see `outdated`."""
FRAME_ATTENTION = ("block", "token")
PREDICTORS = ("resample", "xattn")
FRAME_TIME = ("auto", "none", "text", "seconds")
TIME_FORMS = {"text": "{:.1f}s", "seconds": "<{:.1f} seconds>"}
"""`frame_time` -> how seconds are written before a frame: as in answers, or as Qwen3-VL writes them."""
FRAME_POSITIONS = ("auto", "plain", "mrope")
FRAME_MARKS = ("frames", "media", "none")
POOLED = 2
"""Cells on a side that `pool_after_projector` pools to one token, as LLaVA-OneVision does."""
MEDIA_TAGS = re.compile(r"auto|none|[^,\s]+,[^,\s]+")
TURNS = ("dialogue", "independent")
"""Whether each turn of a record sees the turns before it, or only the media and itself."""
CHAT_TEMPLATES = ("", "chatml", "plain", "vicuna", "llama2")
"""Those of `train/start/templates.py`; empty: the tokenizer's own."""
TEMPLATE_DATE = "2024-07-26"
"""A fixed day: templates that write today's (Llama 3.2's) would make every day's prompts different."""


def is_date(text: str) -> bool:
    """Return whether a text is an existing day in the form 2024-07-26."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True)
class ModelSettings:
    """The settings that a run chooses and that a saved model keeps."""

    mm_projector_type: str = setting(
        "mlp2x_gelu",
        f"projector: {PROJECTORS.replace(', ', ' | ')}",
        valid=(is_projector, f"one of {PROJECTORS}"),
    )
    frame_sampling_strategy: str = setting(
        "interleave", "which frames are slow", choices=STRATEGIES
    )
    # a text, so that 0.07 is the fraction 7/100: as floats 0.07 * 100 is above 7 and rounds up to 8
    slow_frame_ratio: str = setting(
        "0.5", "share of slow frames, in [0, 1]", valid=(is_ratio, "a number in [0, 1]")
    )
    max_frames_num: int = setting(16, "frames of a clip that are used, uniformly", least=1)
    frame_time: str = setting(
        "auto",
        "the time before each frame: text, 12.5s; seconds, <12.5 seconds> with media_tags around each "
        "frame (Qwen3-VL); none; auto, as the stage was trained",
        choices=FRAME_TIME,
    )
    frame_positions: str = setting(
        "auto",
        "where frames' tokens stand: plain, one after the other; mrope, at their time, row and column "
        "(Qwen-VL's LLMs); auto, as the LLM was trained",
        choices=FRAME_POSITIONS,
    )
    frame_marks: str = setting(
        "frames",
        "learned vectors: one that closes each frame and one per stream; one that closes each medium "
        "(LLaVA's newline); none",
        choices=FRAME_MARKS,
    )
    media_tags: str = setting(
        "auto",
        "control tokens around each medium, such as <|vision_start|>,<|vision_end|>; none; auto, as the "
        "stage has them",
        valid=(
            lambda word: MEDIA_TAGS.fullmatch(word) is not None,
            "auto, none or two tokens with a comma between",
        ),
    )
    # a published projector was trained on single patches: pooling its output is not pooling its
    # input, since GELU is between
    pool_after_projector: bool = setting(
        False,
        "pool 2x2 banked cells to one token after the projector, bilinearly, as LLaVA-OneVision does",
    )
    # off adds no token and no parameter: logits are those of the same model without LAPE, bit for bit
    enable_lape: bool = setting(True, "coordinate tokens and positions (LAPE)")
    # LLaVA-ST's number; more anchors buy little, since decoding is finer than one bin
    num_temporal_tokens: int = setting(100, "anchors on the time axis", least=2, most=MOST_ANCHORS)
    num_spatial_tokens: int = setting(
        100, "anchors on each of height and width", least=2, most=MOST_ANCHORS
    )
    lape_preset: str = setting("plus", "plus, or st for parity with LLaVA-ST", choices=PRESETS)
    # In a toy regression (100 bins, 300 noisy samples) targets of one bin erred by 2.4 % of the axis,
    # two-hot targets by 3.1 %. The lower bound: 0.01 is one-hot already, below it fp32 divides by zero.
    lape_sigma: float = setting(
        1.0, "width of coordinate targets in bins (plus)", least=0.01, most=MOST_ANCHORS
    )
    lape_axes: str = setting(
        "all",
        "axes whose coordinates are tokens; on the others numbers stay text",
        choices=tuple(LAPE_AXES),
    )
    lape_positions: bool = setting(True, "add positions to the frames' tokens too")
    # small: LLaVA-ST's random tables, at gamma 1, start as noise of 0.87 standard deviations a dimension
    lape_share: float = setting(
        0.1, "positions beside the projected features in a fresh model, by RMS (plus)", more_than=0
    )
    # the target has variance 1, so the loss starts near 1 over any tower: 0.15 of it is about 5 to 15 %
    # of a usual cross-entropy
    loss_weight: float = setting(0.15, "weight of the frame-causal loss; 0 builds no head", least=0)
    predictor: str = setting("resample", "frame predictor", choices=PREDICTORS)
    # `token` is what flash_attention_2 and LLMs with a recurrent state can compute
    frame_attention: str = setting(
        "block",
        "attention inside a frame: block, each token sees the whole frame; token, causal",
        choices=FRAME_ATTENTION,
    )
    chat_template: str = setting(
        "", "one of ours, for a tokenizer that brings none", choices=CHAT_TEMPLATES
    )
    template_date: str = setting(
        TEMPLATE_DATE,
        "the date that chat templates write which ask for one; kept with the model",
        valid=(is_date, f"a date such as {TEMPLATE_DATE}"),
    )

    @property
    def closing_tokens(self) -> int:
        """Number of tokens after the cells of each frame."""
        return int(self.frame_marks == "frames")

    @property
    def newline_tokens(self) -> int:
        """Number of tokens after the last frame of each medium."""
        return int(self.frame_marks == "media")

    @property
    def around_media(self) -> tuple[str, str] | None:
        """The control tokens before and after each medium; None where there are none."""
        return None if self.frame_time == "seconds" else self._tags

    @property
    def around_frames(self) -> tuple[str, str] | None:
        """The control tokens before and after each frame; None where there are none."""
        return self._tags if self.frame_time == "seconds" else None

    @property
    def _tags(self) -> tuple[str, str] | None:
        before, _, behind = self.media_tags.partition(",")
        return (before, behind) if behind else None

    @property
    def time_form(self) -> str:
        """The format of the time before each frame; empty where none is written."""
        return TIME_FORMS.get(self.frame_time, "")

    @property
    def pooled(self) -> int:
        """Banked cells on a side that are pooled to one token after the projector."""
        return POOLED if self.pool_after_projector else 1

    @property
    def by_columns(self) -> bool:
        """Whether a frame's tokens stand column by column: VILA's first projector, which the `_fix` in
        names of later ones is about, transposes them. With M-RoPE, positions say where a token is."""
        return self.mm_projector_type == "mlp_downsample" and self.frame_positions != "mrope"

    @property
    def finer(self) -> int:
        """Cells on a side that become one token in the projector or after it."""
        return self.pooled if self.pool_after_projector else joined_cells(self.mm_projector_type)


@dataclass(frozen=True)
class VLMConfig(ModelSettings):
    """The settings of a saved model: all that must agree for its weights to be used.

    What a run may leave to its stage (`auto`) is decided here.
    """

    frame_time: str = setting("none", "none, text or seconds", choices=FRAME_TIME[1:])
    frame_positions: str = setting("plain", "plain or mrope", choices=FRAME_POSITIONS[1:])
    media_tags: str = setting(
        "none",
        "control tokens around each medium, or none",
        valid=(lambda word: MEDIA_TAGS.fullmatch(word) is not None, "none or two tokens"),
    )
    # strides belong to the model: its projector has seen cells of this size and no other
    slow_stride: int = setting(4, "the bank's stride that slow frames are read at", least=1)
    fast_stride: int = setting(8, "the bank's stride that fast frames are read at", least=1)
    # M-RoPE and DeepStack are facts of the stage's LLM, so no setting of a run
    mrope_sections: str = setting("", "rotary frequencies by time, row, column, such as 16,24,24")
    mrope_tokens_per_second: float = setting(
        0.0, "positions of time per second (Qwen2.5-VL); 0 counts frames (Qwen2-VL)", least=0
    )
    mrope_interleaved: bool = setting(False, "frequencies of the three take turns (Qwen3-VL)")
    deepstack: int = setting(
        0,
        "layers of the tower whose features are added at the LLM's first layers (Qwen3-VL)",
        least=0,
    )
    turns: str = setting(
        "dialogue", "how turns of a record saw each other in training", choices=(*TURNS, "mixed")
    )

    def __post_init__(self) -> None:
        """Raise one UserError that lists every setting whose value is not allowed."""
        values = {item: getattr(self, item.name) for item in fields(self)}
        problems = [
            f"{item.name} {problem}, got {value!r}"
            for item, value in values.items()
            if (problem := problem_of(item, value))
        ]
        if problems:
            raise UserError.of(problems)


def outdated(facts: Json) -> str:
    """Return why a model of an older format cannot be used; empty where it is computed as it was.

    facts: those of its config.json.
    """
    if facts.get("format") == 1:
        # its weights would be refused by their shapes, which says nothing of the cause
        return "its frame predictor does not take the seconds until the next frame"
    if facts.get("format") != 2:
        return ""
    model, features = facts.get("model", {}), facts.get("features", {})
    by_rows = model.get("mm_projector_type") == "mlp_downsample"
    if by_rows and model.get("frame_positions") != "mrope":
        return "its mlp_downsample gives the tokens of a frame row by row, and not as VILA's does"
    bilinear = features.get("pool") == "bilinear" or model.get("pool_after_projector")
    if bilinear and model.get("enable_lape") and model.get("lape_positions"):
        return "positions of its bilinear cells are up to half a patch beside them"
    return ""


def read_model_config(folder: Path) -> Json:
    """Return a model folder's config.json, with `model` as a VLMConfig; UserError if there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError("no trained model here (config.json is missing)", where=folder)
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}", where=path) from None
    if lacking := outdated(facts):
        raise UserError(
            f"a model of format {facts['format']}, before framebank's {FORMAT}: {lacking}",
            where=path,
            fix=f"train it again, or start a run from its LLM: stage_path: {folder / 'llm'}",
        )
    if facts.get("format") not in READ:
        raise UserError(
            f"not a framebank model of format {FORMAT} (got {facts.get('format')!r})",
            where=path,
            fix="--model takes the output folder of train/run.py or a checkpoint-N in it",
        )
    # a setting of a newer version may change the forward pass: left out, it would change logits silently
    unknown = set(facts["model"]) - {item.name for item in fields(VLMConfig)}
    if unknown:
        raise UserError(
            f"unknown model settings {sorted(unknown)}", where=path, fix="update framebank"
        )
    try:
        model = VLMConfig(**facts["model"])
    except UserError as error:
        raise UserError.of(f"{path}: {problem}" for problem in error.problems) from None
    return dict(facts) | {"model": model}
