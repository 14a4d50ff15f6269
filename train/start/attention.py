"""Which attention implementation a run takes, and why."""

from shards.errors import UserError
from train.settings.config import TrainConfig


def choose_attention(config: TrainConfig, device: str, longest: int) -> tuple[str, str]:
    """Return (implementation, reason); raises UserError where the asked one cannot work here.

    device: `cuda`, `cpu`, ... longest: tokens of the longest record. A mask of intervals costs
    flex_attention only the blocks that are attended, SDPA the whole square of a row; without a mask
    SDPA has its fastest kernels.
    """
    if config.attn == "flex_attention" and device != "cuda":
        raise UserError(
            "attn flex_attention needs CUDA (it cannot train on the CPU); use attn: auto or sdpa"
        )
    if config.attn != "auto":
        chosen, reason = config.attn, "as asked"
    elif device == "cuda" and config.pack_tokens:
        chosen, reason = "flex_attention", "packed rows on CUDA: only attended blocks are computed"
    elif config.pack_tokens:
        chosen = "sdpa"
        reason = "packed rows, with a dense mask (flex_attention trains on CUDA only)"
    elif config.frame_attention == "block":
        chosen, reason = "sdpa", "frames that see themselves wholly need a dense mask"
    else:
        chosen, reason = "sdpa", "one record a row, causal: no mask at all"
    if chosen != "flex_attention" and config.pack_tokens > 2 * longest:
        reason += (
            f"; a dense mask costs the square of a row, and the longest record has {longest} tokens: "
            f"pack_tokens {2 * longest} or less would be faster than {config.pack_tokens}"
        )
    return chosen, reason
