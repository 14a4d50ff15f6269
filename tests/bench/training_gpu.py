"""On CUDA: Qwen2.5-shaped random models in bf16, packed rows of 8k and flex_attention.

Against the same rows with SDPA's dense mask, and against transformers' Trainer on padded rows.
Reported: real tokens a second, MFU (train/flops.py), most memory. Without CUDA nothing is measured.
"""

import gc
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.bench._mix import Mix, make_vlm, train_ours, train_padded
from train.cost import LlmShape, attended_pairs, mfu, peak_flops, step_flops

PACK = 8192
RECORDS = 96
ROUNDS = 3
PADDED_SIZE = 4
SHAPES = {
    "Qwen2.5-0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "Qwen2.5-1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
VOCAB = 151936


def run() -> list[dict[str, object]]:
    if not torch.cuda.is_available():
        return [{"model": "no CUDA device: nothing measured"}]
    torch.backends.cuda.matmul.allow_tf32 = True
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            for kind in ("flex_attention", "sdpa", "padded"):
                rows.append({"model": name, "rows": kind} | measure(shape, kind, Path(folder)))
                print(rows[-1], flush=True)  # what is measured outlives a lease that ends
    return rows


def measure(shape: dict[str, int], kind: str, folder: Path) -> dict[str, object]:
    device = torch.device("cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    mix = Mix(RECORDS, VOCAB, frame_attention="token" if kind == "padded" else "block")
    plan = mix.plan(PACK)
    attention = "sdpa" if kind == "padded" else kind
    model = make_vlm(mix, folder, attention, **shape, tie_word_embeddings=True).to(device)
    used = range(mix.count) if kind == "padded" else plan.uses

    def once() -> float:
        if kind == "padded":
            return train_padded(mix, model, PADDED_SIZE, folder, bf16=True)
        return train_ours(mix, model, plan, device, PACK, bf16=True)

    try:
        once()  # compiles, and fills the allocator
        seconds = statistics.median(once() for _ in range(ROUNDS))
    except torch.OutOfMemoryError:
        return {"tokens/s": "out of memory"}
    sizes = LlmShape.of(model.llm.config.to_dict())
    assert sizes
    tokens = sum(len(mix.rows[k]) for k in used)
    flops = step_flops(
        sizes,
        tokens,
        sum(pairs_of(mix, k) for k in used),
        sum(int(mix.rows[k].supervised.sum()) for k in used),
        "full",
    )
    peak = peak_flops(torch.cuda.get_device_name(device))
    return {
        "tokens/s": tokens / seconds,
        "MFU": mfu(flops, seconds, 1, peak) if peak else "peak not known",
        "memory, GB": torch.cuda.max_memory_allocated() / 1e9,
    }


def pairs_of(mix: Mix, record: int) -> int:
    """Return the pairs that a record's mask allows."""
    row = mix.rows[record]
    sizes = [frame.grid.cells + 1 for frame in row.frames] if mix.frame_attention == "block" else []
    return int(attended_pairs(len(row), *((1, size) for size in sizes)))
