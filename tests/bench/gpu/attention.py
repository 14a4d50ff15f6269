"""flex_attention beside SDPA with a dense mask: the same loss and gradients, and how long each takes.

Frames that see themselves wholly, records of many lengths in one row. Off a GPU, eager takes
its place.

python -m tests.bench.gpu.attention [--small]
"""

import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from model.batch import Batch, to_device
from model.vlm import VLM
from tests.bench._mix import Mix, make_vlm
from tests.bench.gpu.shapes import Size, llm_shape

NEAR = {"cuda": 2e-2, "cpu": 1e-4}
"""How far gradients may be apart, by their norm: bfloat16's rounding, and float32's."""


def main(small: bool) -> list[dict[str, Any]]:
    size, shape = Size.of(small), llm_shape("Qwen2.5-0.5B", small)
    other = "flex_attention" if size.device.type == "cuda" else "eager"
    mix = Mix(size.records, size.vocab, frame_attention="block", scale=size.scale)
    plan = mix.plan(size.pack)
    found = {}
    with TemporaryDirectory() as folder:
        for kind in (other, "sdpa"):
            model = make_vlm(mix, Path(folder), kind, **shape).to(size.device)
            batch = to_device(mix.batch(plan.pack(0, 0), size.pack), size.device)
            loss, gradient = step(model, batch, size.bf16)
            times = [timed(model, batch, size) for _ in range(size.rounds)]
            found[kind] = (loss, gradient, statistics.median(times))
    (loss, gradient, seconds), (dense_loss, dense_gradient, dense_seconds) = found.values()
    apart = float((gradient - dense_gradient).norm() / dense_gradient.norm())
    assert apart < NEAR[size.device.type], f"gradients of {other} and sdpa are {apart:.1e} apart"
    return [
        {
            "what": f"{other} and sdpa on one row of {size.pack}: gradients apart",
            "value": apart,
            "note": f"losses {loss:.5f}, {dense_loss:.5f}",
        },
        {"what": f"sdpa's dense mask over {other}: seconds", "value": dense_seconds / seconds},
    ]


def step(model: VLM, batch: Batch, bf16: bool) -> tuple[float, Tensor]:
    """Return a row's loss, and the gradient of its first layer's queries."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=bf16):
        loss = model(batch)["ce"] / len(batch.labels)
    loss.backward()
    gradient = model.llm.model.layers[0].self_attn.q_proj.weight.grad
    return loss.item(), gradient.detach().float().clone()


def timed(model: VLM, batch: Batch, size: Size) -> float:
    began = time.perf_counter()
    step(model, batch, size.bf16)  # .item() waits for the device
    if size.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(main("--small" in sys.argv)))
