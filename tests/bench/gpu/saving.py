"""Seconds and memory of a sharded checkpoint, of reading it back, and of the model at a run's end.

Started in several processes by `tests.bench.gpu.fsdp`; the first one prints rows.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from model.fsdp.save import save_whole
from model.fsdp.together import is_first, on_all
from tests.bench._mix import Mix, make_vlm
from tests.bench.gpu.shapes import Size, llm_shape
from train.loop.checkpoint import save_sharded
from train.loop.gradients import make_reduction
from train.loop.optimizer import allocate, load_optimizer

NAME = "Qwen2.5-0.5B"


def main(out: Path, small: bool) -> list[dict[str, Any]]:
    size, accelerator = Size.of(small), Accelerator(cpu=small)
    if is_first():
        out.mkdir(parents=True)
    accelerator.wait_for_everyone()
    mix = Mix(size.records, size.vocab, scale=size.scale)
    tokenizer = out / f"tokenizer-{accelerator.process_index}"
    tokenizer.mkdir()
    shape = llm_shape(NAME, small)
    model = make_vlm(mix, tokenizer, **shape, tie_word_embeddings=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    made = torch.optim.AdamW(model.parameters())
    reduction = make_reduction("fast", accelerator, model, made)
    optimizer = reduction.optimizer.optimizer
    allocate(optimizer)
    processes = accelerator.num_processes
    what = f"FSDP 2, {processes} process{'es' * (processes > 1)}, {trained / 1e6:.3g} M parameters"
    state = 12 * trained / processes / 2**30
    folder = out / "checkpoint-1"
    acts: dict[str, Callable[[], object]] = {
        "save a checkpoint": lambda: save_sharded(out, 1, model, optimizer, {}),
        "read its moments": lambda: load_optimizer(optimizer, model, folder),
        "save the model": lambda: save_whole(model, out / "model"),
    }
    return [
        {
            "what": f"{what}: {name}, s",
            "value": seconds,
            "note": f"{most / 2**30:.2f} GiB of a process' memory more; its part is {state:.2f} GiB",
        }
        for name, act in acts.items()
        for seconds, most in [measured(act)]
    ]


def measured(act: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds that something takes, and the bytes by which a process' memory grows at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
    before, began = resident("VmRSS"), time.monotonic()
    act()
    seconds = time.monotonic() - began
    return seconds, max(on_all(lambda: resident("VmHWM") - before))


def resident(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    rows = main(Path(sys.argv[1]), "--small" in sys.argv)
    if is_first():
        print(json.dumps(rows))
