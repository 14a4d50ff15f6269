"""The LLM of a Qwen-VL checkpoint, described by the checkpoint's config.json; torch-free.

The LLM is a Qwen2 or Qwen3 whose rotary positions of frames are three: time, row, column (M-RoPE). On
text the three are equal, and it is a plain Qwen2 or Qwen3. Qwen3-VL's first layers also add features of
several layers of its tower (DeepStack), and it writes the time before each frame.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shards.errors import UserError

Json = Mapping[str, Any]

INNER = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}
"""`model_type` of a checkpoint -> the family of the LLM inside."""
REFUSED = {
    "qwen3_vl_moe": "has experts, whose weights are stored differently than in the LLM alone",
    "qwen2_5_omni": "takes sound, too: its positions of frames and of sound are interleaved",
    "qwen2_5_omni_thinker": "takes sound, too: its positions of frames and of sound are interleaved",
}
"""`model_type` of a related checkpoint -> why a run cannot start from it."""
SECTIONS = {"qwen2_vl": (16, 24, 24), "qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)}
"""M-RoPE sections of a config that names none: transformers' defaults."""
DEEPSTACK = 8, 16, 24
"""Layers of Qwen3-VL's tower, counted from 0, whose features its LLM adds: likewise."""
TOKENS_PER_SECOND = 4.0
MEDIA_TAGS = "<|vision_start|>,<|vision_end|>"


@dataclass(frozen=True)
class MRopeFacts:
    """An LLM's division of rotary frequencies between axes, and its unit of time."""

    sections: tuple[int, ...]
    """Number of frequencies for time, row and column."""
    tokens_per_second: float
    """Positions of time per second; 0 where they count frames."""
    interleaved: bool = False
    """Whether the axes alternate over the frequencies; else each has a contiguous block of them."""

    def to_json(self) -> dict[str, Any]:
        """Return the `mrope` field that the inner LLM's config.json keeps, see `inner_config`."""
        facts = {"sections": list(self.sections), "tokens_per_second": self.tokens_per_second}
        return facts | ({"interleaved": True} if self.interleaved else {})


def mrope_of(config: Json) -> MRopeFacts | None:
    """Return the M-RoPE of a config.json, a checkpoint's or that of the LLM taken out of one, or None."""
    if "mrope" in config:
        facts = config["mrope"]
        seconds, interleaved = facts["tokens_per_second"], facts.get("interleaved", False)
        return MRopeFacts(tuple(facts["sections"]), seconds, interleaved)
    kind = config.get("model_type")
    if kind not in INNER:
        return None
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    # Qwen3-VL, which writes times, counts frames too, as Qwen2-VL does; only Qwen2.5-VL counts seconds
    seconds = 0.0
    if kind == "qwen2_5_vl":
        vision = config.get("vision_config") or {}
        seconds = float(vision.get("tokens_per_second", TOKENS_PER_SECOND))
    sections = tuple(rope.get("mrope_section", SECTIONS[kind]))
    return MRopeFacts(sections, seconds, interleaved=kind == "qwen3_vl")


def deepstack_of(config: Json) -> tuple[int, ...]:
    """Return the tower's layers whose features the LLM's first layers add; empty without DeepStack.

    config: a checkpoint's, or that of the LLM taken out of one.
    """
    if config.get("model_type") == "qwen3_vl":
        return tuple((config.get("vision_config") or {}).get("deepstack_visual_indexes", DEEPSTACK))
    return tuple(config.get("deepstack", ()))


def writes_times(config: Json) -> bool:
    """Return whether a checkpoint was trained with the time, and control tokens, around each frame."""
    return config.get("model_type") == "qwen3_vl"


def config_problem(config: Json) -> str | None:
    """Return why a run cannot start from a Qwen-VL checkpoint, by its config.json; None if it can."""
    kind = str(config.get("model_type", ""))
    if kind in REFUSED:
        return (
            f"{kind} {REFUSED[kind]}; start from Qwen2-VL, Qwen2.5-VL or a Qwen3-VL without experts, or "
            "from a causal LLM alone"
        )
    if kind not in INNER:
        return None
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if scaled not in ("default", "mrope"):
        return (
            f"its rotary positions are scaled ({scaled}), which is not supported with M-RoPE; take the "
            "checkpoint as it is published"
        )
    return None


def inner_config(whole: Any, written: Json) -> dict[str, Any]:
    """Return the arguments for the config of the LLM inside.

    whole: the checkpoint's config in transformers; written: its config.json. The M-RoPE is kept as a
    field `mrope`, so that a model trained from it has it too.
    """
    if problem := config_problem(written):
        raise UserError(problem)
    text = whole.text_config.to_dict()
    ours = ("mrope_section", "mrope_interleaved", "type")
    # a plain Qwen knows no sections: what is M-RoPE goes to `mrope`, the frequencies stay
    rope = {k: v for k, v in text["rope_parameters"].items() if k not in ours}
    # facts of the whole checkpoint or of its file, which would describe the LLM alone wrongly
    left_out = ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype")
    facts = {name: value for name, value in text.items() if name not in left_out}
    mrope = mrope_of(written)
    assert mrope is not None
    facts |= {"rope_parameters": rope, "mrope": mrope.to_json()}
    if layers := deepstack_of(written):
        facts["deepstack"] = list(layers)
    return facts | {"tie_word_embeddings": bool(whole.tie_word_embeddings)}
