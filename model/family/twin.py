"""A tiny twin of an LLM: its class and config with small sizes, so that a check costs milliseconds.

What characterises a family stays: its kinds of layers and their order, scalings, soft-caps, rotary types,
experts and their routing. Sizes shrink.
"""

from typing import Any

import torch

WINDOW = 8
"""Tokens of a twin's sliding window or chunk: short, so that a row of 40 tokens crosses several."""
MOST_LAYERS = 8
"""A twin keeps the LLM's first layers until all kinds are among them; where that would take more than
this, it has one layer of each kind."""
MOST_WEIGHTS = 20_000_000
"""A larger twin is refused: a field that this file does not know kept its full size."""
WIDTH, HEADS, HEAD_DIM = 64, 4, 16
SIZES: dict[str, Any] = {
    # text
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "embedding_size": WIDTH,
    "n_embd": WIDTH,
    "d_model": WIDTH,
    "emb_dim": WIDTH,
    "attention_hidden_size": WIDTH,
    "lru_width": WIDTH,
    "hidden_size_per_layer_input": 16,
    # feed-forward
    "intermediate_size": WIDTH,
    "intermediate_size_mlp": WIDTH,
    "ffn_dim": WIDTH,
    "ffn_hidden_size": WIDTH,
    "expert_ffn_hidden_size": WIDTH,
    "n_inner": WIDTH,
    "dff": WIDTH,
    "dim_ff": WIDTH,
    "decoder_ffn_dim": WIDTH,
    "encoder_ffn_dim": WIDTH,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": WIDTH,
    "block_ff_dim": WIDTH,
    "block_multiple_of": 16,
    # heads
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "n_heads": HEADS,
    "num_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "dim_head": HEAD_DIM,
    "d_kv": HEAD_DIM,
    "kv_channels": HEAD_DIM,
    "attention_head_dim": HEAD_DIM,
    "global_head_dim": HEAD_DIM,
    "swa_head_dim": HEAD_DIM,
    "rotary_dim": 8,
    # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "zero_expert_num": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    # states
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "n_mamba_heads": 8,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "mamba_dt_rank": 8,
    "time_step_rank": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # what attention reaches
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "attention_window_size": WINDOW,
    "window_size": WINDOW,
    "local_attention": WINDOW,
}
"""Name of a config's field -> its value in a twin, where the LLM's own is larger."""


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def make_twin(llm_class: type, config: Any, seed: int = 0) -> Any:
    """Return a random LLM of a class, on the CPU, in fp32 and eval mode; the caller's RNG stays.

    Raises ValueError where it is still large. Its weights have a deviation of 0.2: at the usual 0.02 the
    output of so small a network hardly depends on its input, and every check would pass.
    """
    small = type(config).from_dict(shrunk(config))
    small._attn_implementation = "eager"
    # sizes first, on "meta": a class whose large field is unknown here must not fill the memory
    with torch.device("meta"):
        size = sum(p.numel() for p in llm_class(small).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"with small sizes it still has {size} weights")
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        # a run may have set bfloat16, in which no check to 1e-4 could pass
        torch.set_default_dtype(torch.float32)
        try:
            twin = llm_class(small)
        finally:
            torch.set_default_dtype(dtype)
        for p in twin.parameters():
            # vectors (norms, biases) keep their ones and zeros
            if p.dim() > 1 and p.is_floating_point():
                p.data.normal_(std=0.2)
    return twin.eval()


def shrunk(config: Any) -> dict[str, Any]:
    """Return the fields of the twin's config, made from an LLM's config."""
    own = {n: v for n, v in config.to_dict().items() if _is_set(config, n)}
    return _smaller(own, config)


def _is_set(config: Any, name: str) -> bool:
    """Return whether a config's field can be set, and is not computed from other fields."""
    known = getattr(type(config), getattr(config, "attribute_map", {}).get(name, name), None)
    return not isinstance(known, property) or known.fset is not None


def _smaller(own: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return fields with small sizes, those of nested configs too."""
    less = dict(own)
    for name, value in own.items():
        if isinstance(value, dict):
            less[name] = _smaller(value, getattr(config, name, None))
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value > SIZES.get(name, value)
        ):
            less[name] = SIZES[name]
    for place, name in enumerate(SPECIAL):
        if own.get(name) is not None:
            less[name] = place  # an id below the small vocabulary
    heads = next((own[n] for n in HEAD_COUNTS if isinstance(own.get(n), int)), 0)
    for name in KEY_HEADS:
        if isinstance(own.get(name), int) and heads:
            groups = max(1, heads // own[name])  # grouped stays grouped, multi-query multi-query
            less[name] = HEADS if groups == 1 else 1 if own[name] == 1 else 2
    if own.get("head_dim") == own.get("qk_rope_head_dim") is not None:
        less["head_dim"] = less["qk_rope_head_dim"]  # that of the rotary part
    if "state_size" in own and "expand" in own and "num_heads" in own:
        less["num_heads"] = own["expand"] * WIDTH // HEAD_DIM  # the inner width, cut into heads
    if "mamba_d_ssm" in own:
        less["mamba_d_ssm"] = less["mamba_n_heads"] * less["mamba_d_head"]
    return less | _layers(own, config)


def _layers(own: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the twin's number of layers, and each per-layer list cut to these layers."""
    count = next((own[n] for n in LAYERS if isinstance(own.get(n), int)), 0)
    if not count:
        return {}
    lists = {n: v for n, v in own.items() if isinstance(v, list | tuple) and len(v) == count > 1}
    worked_out = getattr(config, "layer_types", None)
    sorts = [*lists.values(), *([worked_out] if worked_out and len(worked_out) == count else [])]
    # a layer's kind is all that its lists say of it together
    kinds = [tuple(str(v[k]) for v in sorts) for k in range(count)]
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    # two at least, so that something passes from layer to layer
    kept = list(range(min(count, max(2, firsts[-1] + 1))))
    if len(kept) > MOST_LAYERS:
        kept = firsts if len(firsts) > 1 else [0, 1]
    less: dict[str, Any] = {}
    if own.get("num_kv_shared_layers"):  # the later half reads the keys of the earlier one
        less["num_kv_shared_layers"] = len(kept)
        kept = kept + kept
    less |= {n: [v[k] for k in kept] for n, v in lists.items()}
    for name, value in own.items():
        if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            less[name] = {key: v for key, v in value.items() if int(key) < len(kept)}
    return less | {n: len(kept) for n in LAYERS if isinstance(own.get(n), int)}
