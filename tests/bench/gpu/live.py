"""A training step from banked features beside the same step with the tower in it, and the ratio by FLOPs.

SigLIP-so400m and Qwen2.5-0.5B by their shapes, 16 frames a clip; decoding is left out, so that the tower
is all that the bank saves here.

python -m tests.bench.gpu.live [--small]
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from model.batch import to_device
from model.tower_kinds import frame_flops
from tests.bench._mix import Mix, make_vlm
from tests.bench.gpu.shapes import Size, llm_shape, tower_shape
from train.flops import LlmShape, attended_pairs, step_flops

FRAMES, CLIPS = 16, 4


def main(small: bool) -> list[dict[str, Any]]:
    size = Size.of(small)
    mix = Mix(CLIPS, size.vocab, scale=size.scale)
    mix.frames = np.full(CLIPS, FRAMES)
    config = SiglipVisionConfig(**tower_shape(small), vision_use_head=False)
    dtype = torch.bfloat16 if size.bf16 else torch.float32
    tower = SiglipVisionModel(config).eval().requires_grad_(False).to(size.device, dtype)
    side = config.image_size
    pixels = torch.zeros(CLIPS * FRAMES, 3, side, side, device=size.device, dtype=dtype)
    with TemporaryDirectory() as folder:
        model = make_vlm(mix, Path(folder), **llm_shape("Qwen2.5-0.5B", small)).to(size.device)
        batch = to_device(mix.batch([list(range(CLIPS))]), size.device)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(size.device.type, torch.bfloat16, enabled=size.bf16):
                loss = model(batch)["ce"] / len(batch.labels)
            loss.backward()

        def live() -> None:
            with torch.inference_mode():
                tower(pixels)
            step()

        cached, whole = (median(act, size) for act in (step, live))
    sizes = LlmShape.of(model.llm.config.to_dict())
    each = frame_flops(config.to_dict(), (side // config.patch_size) ** 2)
    assert sizes
    assert each
    tokens, pairs = mix.tokens, sum(int(attended_pairs(len(row))) for row in mix.rows)
    supervised = sum(int(row.supervised.sum()) for row in mix.rows)
    ours = step_flops(sizes, tokens, pairs, supervised, "full")
    theory = (ours + each * CLIPS * FRAMES) / ours
    return [
        {
            "what": f"step with the tower over one from the bank, {FRAMES} frames a clip",
            "value": whole / cached,
            "note": f"{theory:.2f} by FLOPs; {cached * 1e3:.0f} ms from the bank",
        }
    ]


def median(act: Callable[[], None], size: Size) -> float:
    """Return the median of the seconds that something takes, once it is warm."""
    times = []
    for _ in range(size.rounds + 2):
        if size.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        act()
        if size.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


if __name__ == "__main__":
    print(json.dumps(main("--small" in sys.argv)))
