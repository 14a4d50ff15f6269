"""What is in a Qwen-VL checkpoint beside its tower, read from its config.json; torch-free.

Its language model is a Qwen2 whose rotary positions, of frames alone, are three: time, row, column
(M-RoPE). On text the three are one, and it is Qwen2 itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shards.errors import UserError

Json = Mapping[str, Any]

INNER = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}
"""`model_type` of a checkpoint -> the family of the LLM inside."""
REFUSED = {
    "qwen3_vl": "adds features of three layers of its tower to the LLM's first layers (DeepStack), and a "
    "bank holds those of one",
    "qwen3_vl_moe": "adds features of three layers of its tower to the LLM's first layers (DeepStack), "
    "and a bank holds those of one",
    "qwen2_5_omni": "hears, too: its positions of frames and of sound are interleaved",
    "qwen2_5_omni_thinker": "hears, too: its positions of frames and of sound are interleaved",
}
"""`model_type` of the same house -> why its checkpoints cannot be started from."""
SECTIONS = 16, 24, 24
"""Of a config that does not name them, as in transformers."""
TOKENS_PER_SECOND = 4.0
MEDIA_TAGS = "<|vision_start|>,<|vision_end|>"


@dataclass(frozen=True)
class MRopeFacts:
    """How an LLM's rotary frequencies are shared out, and what a position of time is."""

    sections: tuple[int, ...]
    """Frequencies that turn by time, by row, by column."""
    tokens_per_second: float
    """Positions of time per second; 0 where they count frames."""

    def to_json(self) -> dict[str, Any]:
        return {"sections": list(self.sections), "tokens_per_second": self.tokens_per_second}


def mrope_of(config: Json) -> MRopeFacts | None:
    """Return the M-RoPE that a config.json tells of: a checkpoint's, or of the LLM taken out of one."""
    if "mrope" in config:
        return MRopeFacts(tuple(config["mrope"]["sections"]), config["mrope"]["tokens_per_second"])
    kind = config.get("model_type")
    if kind not in INNER:
        return None
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    seconds = 0.0
    if kind == "qwen2_5_vl":
        vision = config.get("vision_config") or {}
        seconds = float(vision.get("tokens_per_second", TOKENS_PER_SECOND))
    return MRopeFacts(tuple(rope.get("mrope_section", SECTIONS)), seconds)


def config_problem(config: Json) -> str | None:
    """Return why a Qwen-VL checkpoint cannot be started from, as far as its config tells."""
    kind = str(config.get("model_type", ""))
    if kind in REFUSED:
        return (
            f"{kind} {REFUSED[kind]}; start from Qwen2-VL or Qwen2.5-VL, or from a causal LLM alone"
        )
    if kind not in INNER:
        return None
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if scaled not in ("default", "mrope"):
        return (
            f"its rotary positions are scaled ({scaled}), which is not known with M-RoPE; take the "
            "checkpoint as it is published"
        )
    return None


def inner_config(whole: Any, written: Json) -> dict[str, Any]:
    """Return the arguments of the config of the LLM inside; whole: the checkpoint's, of transformers.

    The M-RoPE goes along as `mrope`, so that a model trained from it still knows it.
    """
    if problem := config_problem(written):
        raise UserError(problem)
    text = whole.text_config.to_dict()
    rope = {k: v for k, v in text["rope_parameters"].items() if k not in ("mrope_section", "type")}
    left_out = ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype")
    facts = {name: value for name, value in text.items() if name not in left_out}
    mrope = mrope_of(written)
    assert mrope is not None
    facts |= {"rope_parameters": rope, "mrope": mrope.to_json()}
    return facts | {"tie_word_embeddings": bool(whole.tie_word_embeddings)}
