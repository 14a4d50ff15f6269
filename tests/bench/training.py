"""Training from a bank: against padded training, against the tower in the loop, against memory.

(a) `padded`: tokens/s of packed rows with the head on supervised rows, over those of transformers'
    Trainer on padded rows with all logits (tests/bench/_mix.py). (b) `online`: a step from the bank,
    against decoding and the frozen tower before each step; one after the other, as on one machine
    whose cores are busy. (c) `memory`: steps/s with data from the bank over data made beforehand.
(d) `plan`, `packing`, `resume`: seconds, and how full rows of twice the longest record are.
Interleaved, medians of rounds; ratios are what counts. On a GPU: `make gpu`.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from model.batch import Batch
from model.tower.pixels import Pixels
from model.tower.tower import Tower
from model.tower_kinds import find_kind
from model.vlm import VLM
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.encode.run import EncodeOptions, encode
from preprocess.toyworld import make_toyworld
from shards.format.features import Sampling
from tests.bench._mix import (
    Mix,
    assert_same_loss,
    lengths_of,
    make_vlm,
    train_ours,
    train_padded,
    vocab_of,
)
from tests.bench.decode import draw
from train.ask import load_tower
from train.batches.chat import Chat
from train.batches.loader import Loader, Share
from train.batches.plan import plan_run
from train.data.dataset import Dataset, open_dataset
from train.settings.config import TrainConfig, parse
from train.start.stage import build

ROUNDS = 3
PADDED_SIZE = 8
"""Records of the Trainer's batches."""
CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
HALF_B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""Qwen2.5-0.5B."""
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
"""SigLIP-so400m/14-384, but for its 27 layers, of which 26 are computed."""

Row = dict[str, object]


def run() -> list[Row]:
    with TemporaryDirectory() as folder, quiet():
        toy = Path(folder) / "toy"
        make_toyworld(toy, train_clips=64, test_clips=1)
        bank = Path(folder) / "bank"
        options = EncodeOptions(
            tower=str(toy / "tower"), strides=(4, 8), sampling=Sampling(num_frames=16)
        )
        encode([str(toy / "videos")], bank, options)
        return [
            against_padded(Path(folder)),
            online_toy(toy, bank),
            online_half_b(Path(folder)),
            against_memory(toy, bank),
            *planning(toy, bank, Path(folder)),
            packing(),
            resuming(toy, bank, Path(folder)),
        ]


def against_padded(folder: Path, records: int = 64, rounds: int = ROUNDS) -> Row:
    """(a) A model whose head has the share of Qwen2-0.5B's, records of a quarter of the length.

    A step of either holds about as many records. Rows are as long as the longest record, since on
    the CPU the mask is dense: its cost grows with the row.
    """
    vocab = vocab_of(512, SMALL["num_hidden_layers"], SMALL["intermediate_size"], 128)
    mix = Mix(records, vocab, scale=4)
    budget = max(map(len, mix.rows))
    plan = mix.plan(budget, rows=max(1, round(PADDED_SIZE * mix.tokens / records / budget)))
    model = make_vlm(mix, folder / "tokenizer", **SMALL)
    assert_same_loss(mix, model, list(range(records)), budget)
    tokens = sum(len(mix.rows[k]) for k in plan.uses)
    rates: dict[str, list[float]] = {"ours": [], "padded": []}
    for number in range(rounds + 1):
        ours = tokens / train_ours(mix, model, plan, CPU)
        theirs = mix.tokens / train_padded(mix, model, PADDED_SIZE, folder / "trainer")
        if number:  # the first warms both up
            rates["ours"].append(ours)
            rates["padded"].append(theirs)
    return {
        "what": "(a) packed, over HF Trainer padded: tokens/s (bar 3)",
        "ratio": statistics.median(rates["ours"]) / statistics.median(rates["padded"]),
        "note": f"rows {plan.efficiency:.0%} full of {budget}; head on "
        f"{plan.supervised.sum() / mix.tokens:.0%} of the tokens",
    }


def settings(toy: Path, bank: Path, out: Path, **more: object) -> TrainConfig:
    values = {
        "stage_path": toy / "llm",
        "bank": bank,
        "data_path": toy / "train.jsonl",
        "output_dir": out,
        "max_frames_num": 16,
        "per_device_train_batch_size": 16,
        "num_temporal_tokens": 50,
        "num_spatial_tokens": 50,
        **more,
    }
    return parse([f"--{name}={value}" for name, value in values.items()])


def toy_model(config: TrainConfig) -> tuple[Dataset, VLM, Loader]:
    dataset = open_dataset(config)
    model = build(config, dataset, lambda text: None).train()
    chat = Chat.of(model)
    return dataset, model, Loader(dataset, chat, model.config)


def online_toy(toy: Path, bank: Path) -> Row:
    """(b) The toy world: 16 records of a step, each with its clip of 16 frames."""
    dataset, model, loader = toy_model(settings(toy, bank, toy / "out"))
    tower = load_tower(dataset.banks.config, [str(toy / "tower")])
    records = dataset.records[:16]
    videos = [toy / "videos" / "train" / Path(record.clips[0]).name for record in records]
    sampling = dataset.banks.config.sampling
    with DecodeChild() as child:

        def decode() -> list[np.ndarray]:
            return [
                child.read_clip(ReadRequest(v, sampling, pixels=tower.pixels)).frames
                for v in videos
            ]

        frames = decode()
        seconds = medians(
            {
                "decode": lambda: decode(),
                "tower": lambda: [tower.features(f, (4, 8), threads=2) for f in frames],
                "read": lambda: loader.batch(records),
                "step": lambda: backward(model, loader.batch(records)),
            }
        )
    return shares("(b) toy world, tower in the loop over bank", seconds, "measured whole")


def online_half_b(folder: Path) -> Row:
    """(b) Qwen2.5-0.5B and SigLIP-so400m, random weights, on 16 frames; the tower is given two."""
    mix = Mix(1, 151936)
    mix.frames = np.array([16])  # 4 slow of 36 cells, 12 fast of 4
    model, tower = make_vlm(mix, folder / "tokenizer", **HALF_B), so400m()
    frames = np.zeros((2, 384, 384, 3), np.uint8)
    whole = medians(
        {
            "step": lambda: backward(model, mix.batch([[0]])),
            "tower": lambda: tower.encode(frames, batch_frames=2),
        }
    )
    video = draw(folder / "drawn.mp4")
    with DecodeChild() as child:
        request = ReadRequest(video, Sampling(num_frames=16), pixels=tower.pixels)
        read = lambda: child.read_clip(request)  # noqa: E731
        read()
        decode = medians({"decode": read}, rounds=2)["decode"]
    seconds = {
        "decode": decode,
        "tower": 8 * whole["tower"],
        "read": medians({"read": lambda: mix.batch([[0]])})["read"],
        "step": whole["step"],
    }
    note = f"{len(mix.rows[0])} tokens; tower scaled from 2 of 16 frames"
    return shares("(b) 0.5B and so400m, tower in the loop over bank", seconds, note)


def so400m() -> Tower:
    """Return a random SigLIP-so400m/14-384 without the layer that is not used."""
    config = SiglipVisionConfig(
        **SO400M, num_hidden_layers=26, image_size=384, patch_size=14, vision_use_head=False
    )
    pixels = Pixels(
        384, 384, False, Image.Resampling.BICUBIC, None, 1 / 255, (0.5,) * 3, (0.5,) * 3
    )
    model = SiglipVisionModel(config).eval().requires_grad_(False)
    return Tower(
        name="random",
        model_type="siglip_vision_model",
        digest="",
        layer=-1,
        dtype="float32",
        attention="sdpa",
        pixels=pixels,
        patch=14,
        width=config.hidden_size,
        model=model,
        device=CPU,
        kind=find_kind("siglip_vision_model"),
    )


def shares(what: str, seconds: dict[str, float], note: str) -> Row:
    """Return the speed-up of leaving decode and tower out; `step` contains `read`."""
    online = seconds["decode"] + seconds["tower"] + seconds["step"] - seconds["read"]
    parts = ", ".join(f"{name} {seconds[name] / online:.0%}" for name in ("decode", "tower"))
    return {"what": what, "ratio": online / seconds["step"], "note": f"online: {parts}; {note}"}


def against_memory(toy: Path, bank: Path, steps: int = 13) -> Row:
    """(c) The same steps by the run's own loader, and of batches that are there already."""
    config = settings(toy, bank, toy / "out", max_steps=steps)
    dataset, model, loader = toy_model(config)
    plan = plan_run(config, dataset, 16)
    share = Share(0, 1)
    ready = [loader.packs(plan, share, step)[0] for step in range(steps)]

    def seconds(batches: Iterator[Batch]) -> float:
        backward(model, next(batches))  # the first step of a run waits for its data anyhow
        began = time.perf_counter()
        for batch in batches:
            backward(model, batch)
        return time.perf_counter() - began

    times: dict[str, list[float]] = {"bank": [], "memory": []}
    for _ in range(ROUNDS + 1):
        stepped = loader.steps(plan, share, 0, copy_every=steps + 1)
        times["bank"].append(seconds(packs[0] for _, packs in stepped))
        times["memory"].append(seconds(iter(ready)))
    bank_time, memory_time = (statistics.median(times[name][1:]) for name in times)
    return {
        "what": "(c) steps/s from the bank, over from memory (bar 0.97)",
        "ratio": memory_time / bank_time,
        "note": f"{steps - 1} steps of 16 records, made ahead by threads on the same cores",
    }


def planning(toy: Path, bank: Path, folder: Path, records: int = 100_000) -> list[Row]:
    """(d) `--plan` of many records in a process of its own: first, and with lengths cached."""
    few = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
    path = folder / "many.jsonl"
    with open(path, "w") as file:
        for number in range(records):
            record = few[number % len(few)] | {"id": f"r{number}"}
            # as many different questions as a real file has
            talk = [dict(turn) for turn in record["conversations"]]
            talk[0]["value"] += f" {number}"
            file.write(json.dumps(record | {"conversations": talk}) + "\n")
    command = f"""--stage_path {toy / "llm"} --bank {bank} --data_path {path} --plan
        --output_dir {folder / "planned"} --pack_tokens 2048"""
    environ = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    rows: list[Row] = []
    for name in ("first", "lengths cached"):
        began = time.perf_counter()
        train_run(command.split(), environ)
        seconds = time.perf_counter() - began
        rows.append({"what": f"(d) --plan of {records} records, {name}: s", "seconds": seconds})
    return rows


def packing() -> Row:
    """(d) How full rows are that hold twice the longest record."""
    mix = Mix(20_000, 4096)
    lengths = lengths_of(mix)
    budget = 2 * int((lengths.text + lengths.visual(mix.frames)).max())
    began = time.perf_counter()
    plan = mix.plan(budget)
    return {
        "what": "(d) packing efficiency (bar 0.99)",
        "ratio": plan.efficiency,
        "note": f"20000 records in rows of {budget}, {time.perf_counter() - began:.1f} s",
    }


def resuming(toy: Path, bank: Path, folder: Path) -> Row:
    """(d) Start to end of a run of one step: resumed from a checkpoint, and fresh."""
    out = folder / "resumed"
    command = f"""--stage_path {toy / "llm"} --bank {bank} --data_path {toy / "train.jsonl"}
        --output_dir {out} --per_device_train_batch_size 2"""
    environ = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    train_run([*command.split(), "--max_steps", "1"], environ)
    seconds = []
    for words in (["--max_steps", "2"], ["--max_steps", "1", "--resume", "none"]):
        began = time.perf_counter()
        train_run([*command.split(), *words], environ)
        seconds.append(time.perf_counter() - began)
    return {
        "what": "(d) resume and one step, over a fresh start and one step",
        "ratio": seconds[0] / seconds[1],
        "seconds": seconds[0],
        "note": "whole processes, imports included",
    }


def train_run(words: list[str], environ: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train.run", *words], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def backward(model: VLM, batch: Batch) -> None:
    out = model(batch)
    loss = out["ce"] + out["ar"].sum() if "ar" in out else out["ce"]
    loss.backward()
    model.zero_grad(set_to_none=True)


def medians(works: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median seconds of each, interleaved; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(rounds) for name, rounds in times.items()}


@contextlib.contextmanager
def quiet():  # type: ignore[no-untyped-def]
    """Keep the Trainer's and the drawing's own lines out of the table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
