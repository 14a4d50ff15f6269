"""Qwen2.5-shaped random models in bf16 on packed rows of 8k, with flex_attention and with a dense mask.

Beside transformers' Trainer on padded rows: real tokens a second, MFU (train/flops.py), most memory.

python -m tests.bench.gpu.training Qwen2.5-0.5B [--small]
"""

import gc
import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.bench._mix import Mix, make_vlm, train_ours, train_padded
from tests.bench.gpu.shapes import Shape, Size, llm_shape
from train.flops import LlmShape, attended_pairs, mfu, peak_flops, step_flops

PADDED_SIZE = 4
KINDS = ("flex_attention", "sdpa", "padded")


def main(name: str, small: bool) -> list[dict[str, Any]]:
    torch.backends.cuda.matmul.allow_tf32 = True
    size, shape = Size.of(small), llm_shape(name, small)
    kinds = KINDS if size.bf16 else KINDS[1:]  # flex_attention wants a GPU's compiler
    with TemporaryDirectory() as folder:
        found = {kind: measure(size, shape, kind, Path(folder)) for kind in kinds}
    rows = []
    for kind, (rate, used, memory) in found.items():
        rows.append(
            {
                "what": f"{name}, {kind}: tokens/s",
                "value": rate,
                "note": f"MFU {used:.1%}; " * bool(used)
                + f"{rate / found['padded'][0]:.1f} x padded; {memory / 1e9:.1f} GB",
            }
        )
    return rows


def measure(size: Size, shape: Shape, kind: str, folder: Path) -> tuple[float, float, int]:
    """Return real tokens a second, MFU (0 where the device's peak is not known), most memory in bytes."""
    cuda = size.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    attends = "token" if kind == "padded" else "block"
    mix = Mix(size.records, size.vocab, frame_attention=attends, scale=size.scale)
    plan = mix.plan(size.pack)
    attention = "sdpa" if kind == "padded" else kind
    model = make_vlm(mix, folder, attention, **shape, tie_word_embeddings=True).to(size.device)
    used = range(mix.count) if kind == "padded" else plan.uses

    def once() -> float:
        if kind == "padded":
            return train_padded(mix, model, PADDED_SIZE, folder, bf16=size.bf16)
        return train_ours(mix, model, plan, size.device, size.pack, bf16=size.bf16)

    once()  # compiles, and fills the allocator
    seconds = statistics.median(once() for _ in range(size.rounds))
    sizes = LlmShape.of(model.llm.config.to_dict())
    assert sizes
    tokens = sum(len(mix.rows[k]) for k in used)
    pairs = sum(pairs_of(mix, k) for k in used)
    supervised = sum(int(mix.rows[k].supervised.sum()) for k in used)
    flops = step_flops(sizes, tokens, pairs, supervised, "full")
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    memory = torch.cuda.max_memory_allocated() if cuda else 0
    return tokens / seconds, mfu(flops, seconds, 1, peak) if peak else 0.0, memory


def pairs_of(mix: Mix, record: int) -> int:
    """Return the pairs that a record's mask allows."""
    row = mix.rows[record]
    sizes = [frame.grid.cells + 1 for frame in row.frames] if mix.frame_attention == "block" else []
    return int(attended_pairs(len(row), *((1, size) for size in sizes)))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], "--small" in sys.argv)))
