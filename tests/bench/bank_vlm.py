"""transformers' own Qwen2.5-VL behind a bank, beside the same model with its tower: step time and memory.

One process for each, by turns; random weights of the proportions of the 3B checkpoint (a tower of about
a fifth of the language model), the tower frozen, AdamW over the rest, 8 frames of 224x224. Decoding
and the work of a processor are left out on both sides, and only the side without a bank has them.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from preprocess.encode.run import EncodeOptions, encode
from shards import Bank
from shards.format.features import Sampling
from train.bank_vlm.tower import use_bank

SIDE, FRAMES, STEPS, ROUNDS, WORDS = 224, 8, 3, 3, 64
WIDTH, VIDEO, FIRST, LAST = 512, 509, 508, 507


def run() -> list[dict[str, object]]:
    with TemporaryDirectory() as folder:
        place = Path(folder)
        _prepare(place)
        taken: dict[str, list[dict[str, float]]] = {"tower": [], "bank": []}
        for _ in range(ROUNDS):
            for name, found in taken.items():
                done = subprocess.run(
                    [sys.executable, "-m", __name__, name, folder],
                    capture_output=True,
                    check=True,
                    text=True,
                )
                found.append(json.loads(done.stdout.splitlines()[-1]))
    rows: list[dict[str, object]] = []
    for name, found in taken.items():
        times = {key: median(one[key] for one in found) for key in found[0]}
        rows.append({"what": f"Qwen2.5-VL, features of its {name}", **times})
    tower, bank = (row for row in rows)
    ratios = {key: bank[key] / tower[key] for key in taken["bank"][0]}  # type: ignore[operator]
    return [*rows, {"what": "bank / tower", **ratios}]


def _model(folder: Path) -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")


def _prepare(folder: Path) -> None:
    """Save a random checkpoint, and bank one clip with its tower."""
    torch.manual_seed(0)
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [8, 12, 12],
        },
    }
    vision = {
        "depth": 8,
        "num_heads": 8,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [3, 7],
    }
    ends = {"vision_start_token_id": FIRST, "vision_end_token_id": LAST, "video_token_id": VIDEO}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=510, **ends)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "model")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "model")
    (folder / "videos" / "a").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for k in range(FRAMES):
        pixels = noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "videos" / "a" / f"{k:03}.png")
    options = EncodeOptions(
        tower=str(folder / "model"),
        strides=(1,),
        sampling=Sampling(num_frames=FRAMES),
        layer="merged",
    )
    assert encode([str(folder / "videos")], folder / "bank", options).clips == 1


def _train(name: str, folder: Path) -> dict[str, float]:
    model = _model(folder)
    bank = Bank.open(folder / "bank")
    features = torch.from_numpy(bank.read(bank.row("a"), 1)).float()
    units, rows, cols, _ = features.shape
    grid = torch.tensor([[units, 2 * rows, 2 * cols]])
    tokens = units * rows * cols
    if name == "bank":
        use_bank(model, bank)
        pixels = features.flatten(0, 2)
    else:
        model.model.visual.requires_grad_(False)
        pixels = torch.randn(4 * tokens, 3 * 2 * 14 * 14)
    words = torch.arange(WORDS) % 400
    ids = torch.cat([torch.tensor([FIRST, *[VIDEO] * tokens, LAST]), words])[None]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids >= LAST, -100),
        "mm_token_type_ids": 2 * (ids == VIDEO).int(),
        "pixel_values_videos": pixels,
        "video_grid_thw": grid,
        "second_per_grid_ts": torch.tensor([1.0]),
    }
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    times = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds a step": median(times[1:]), "peak GB": peak}


if __name__ == "__main__":
    print(json.dumps(_train(sys.argv[1], Path(sys.argv[2]))))
