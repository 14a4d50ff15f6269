"""FLOPs and memory of a training step, from its real tokens and attended pairs.

A matrix product (m, k) x (k, n) is 2 m k n. Forward of the LLM (PaLM, appendix B, with the pairs
that the mask allows in the place of all): 2 N tokens + 4 layers heads head_dim pairs, N the weights
of its layers; the head 2 width rows for each supervised token, as no other row passes through it.
The backward pass takes twice the forward where weights are trained, once where the gradient only
passes through (frozen, and LoRA but for its small matrices). Recomputed activations, padding, norms,
projector, LAPE and frame predictor count as nothing: a reported MFU is never too high for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.settings.config import DEVICES, LlmSettings, checkpoint_every

Number = Any
"""An int, a float, or a NumPy array of either."""

MFU_IS = (
    "MFU = FLOPs of real (unpadded) tokens and attended pairs / (seconds x devices x peak); factor "
    "3 full, 2 frozen LLM or LoRA; no recompute counted, the head only on supervised rows"
)
COUNTED = """
bitnet cohere cohere2 cwm diffllama doge ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 granite
granite_swa helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder llama llava_llama llava_mistral
llava_qwen ministral ministral3 mistral olmo olmo2 olmo3 phi3 qwen2 qwen2_vl qwen2_vl_text qwen2_5_vl
qwen2_5_vl_text qwen3 qwen3_vl_text seed_oss smollm3 stablelm vaultgemma
"""
"""Families whose layers are these matrices: experts, ungated MLPs and layers with a state are not."""


@dataclass(frozen=True)
class LlmShape:
    """The sizes of a decoder with gated MLPs and grouped queries, see `COUNTED`."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rows: int
    """Of the embedding and the head."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LlmShape | None":
        """Return the shape that a config.json describes, or None where it is of another family."""
        # multimodal checkpoints keep the LLM's sizes one level down
        config = config.get("text_config", config)
        # by name: a config with experts has an `intermediate_size` too, and Mixtral's layers eight such
        if config.get("model_type") not in COUNTED.split():
            return None
        try:
            width, heads = config["hidden_size"], config["num_attention_heads"]
            return cls(
                layers=config["num_hidden_layers"],
                width=width,
                heads=heads,
                # `or`, not a default: configs write null for "as many as heads" and "width / heads"
                kv_heads=config.get("num_key_value_heads") or heads,
                # Qwen3 has heads wider than width / heads, and says so
                head_dim=config.get("head_dim") or width // heads,
                mlp=config["intermediate_size"],
                rows=config["vocab_size"],
            )
        except KeyError:
            return None

    @property
    def layer_weights(self) -> int:
        """Weights of all layers, without norms and biases."""
        # products of a layer: queries and output (heads x head_dim each), keys and values (kv_heads
        # x head_dim each), gate, up and down of the MLP
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * self.width * (2 * queries + 2 * keys + 3 * self.mlp)


def attended_pairs(length: Number, *frames: tuple[Number, int]) -> Number:
    """Return how many (query, key) pairs a record's mask allows: causal ones, and whole frames.

    length: tokens of the record. frames: (number of frames, tokens of each) per stream, under `block`
    attention; a frame's closing token is one of its tokens. Ints or NumPy arrays.
    """
    # a token sees itself and all before it: n(n+1)/2 pairs; whole frames add the later ones, n(n-1)/2
    return length * (length + 1) // 2 + sum(
        count * (size * (size - 1) // 2) for count, size in frames
    )


def forward_flops(shape: LlmShape, tokens: Number, pairs: Number, supervised: Number) -> Number:
    """Return the FLOPs of one forward pass of LLM and head."""
    # queries x keys and weights x values are 2 head_dim FLOPs a pair and head each
    attention = 4 * shape.layers * shape.heads * shape.head_dim
    return (
        2 * shape.layer_weights * tokens
        + attention * pairs
        + 2 * shape.width * shape.rows * supervised
    )


def step_flops(
    shape: LlmShape, tokens: Number, pairs: Number, supervised: Number, tune_llm: str
) -> Number:
    """Return the FLOPs of forward and backward; tune_llm: full, frozen or lora."""
    # backward: gradients of activations cost a forward, those of weights another
    return forward_flops(shape, tokens, pairs, supervised) * (3 if tune_llm == "full" else 2)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by the name that CUDA gives it, or None."""
    for name, flops in DEVICES.items():
        if all(word in device_name for word in name.split()):
            return flops
    return None


def mfu(flops: float, seconds: float, devices: int, peak: float) -> float:
    """Return a step's FLOPs, over all ranks, as a share of the devices' peak."""
    return flops / (seconds * devices * peak)


ACTIVATIONS = 34
"""Bytes of 16-bit activations that a layer keeps per token and unit of width (arXiv 2205.05198)."""


def memory_bytes(settings: LlmSettings, shape: LlmShape, tower_width: int, places: int) -> float:
    """Return an estimate of a device's peak memory: weights, gradients, moments, activations, logits.

    places: tokens of a pack, padding included.
    """
    # embedding and head are counted apart; where they are tied it is the estimate's safe side
    llm = shape.layer_weights + 2 * shape.rows * shape.width
    heads = 4 * shape.width * (shape.width + tower_width)
    trained = heads + (llm if settings.tune_llm == "full" else 0)
    if settings.tune_llm == "lora":
        trained += 2 * settings.lora_r * shape.layers * (6 * shape.width + 3 * shape.mlp)
    small = 2 if settings.bf16 is True else 4
    frozen = 0 if settings.tune_llm == "full" else llm * small
    every = checkpoint_every(settings.gradient_checkpointing)
    # of recomputed layers one at a time is held whole, while its backward runs
    whole = shape.layers if not every else shape.layers - -(-shape.layers // every) + 1
    # ACTIVATIONS counts 16-bit numbers, fp32 keeps twice as many bytes; a recomputed layer's input stays
    kept = small / 2 * shape.width * places * (ACTIVATIONS * whole + 2 * shape.layers)
    # the head takes 1024 supervised rows at once (HEAD_ROWS): their fp32 logits, and the gradient
    logits = 2 * 4 * min(1024, places) * shape.rows
    # 16 bytes a trained weight: the weight, its gradient and two moments, all fp32
    return 16 * trained + frozen + kept + logits
