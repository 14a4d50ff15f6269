"""A training step from the bank against the same step with video and tower in the loop.

Both make the same batch and take the same forward and backward pass; one reads the bank, the
other decodes each clip and runs the tower. Interleaved, medians; the ratio is what counts.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model.tower import Tower
from model.vlm import VLM, VLMConfig
from preprocess.decode_child import DecodeChild
from preprocess.encode import EncodeOptions, encode
from preprocess.toyworld import make_toyworld
from shards.reader import Banks, ClipInfo
from shards.schema import Sampling
from train.ask import fresh_clip
from train.chat import Chat
from train.packing import ClipFeatures, collate, lay_out
from train.records import Turn

ROUNDS = 5
CLIPS = ("bikes.mp4", "bunny_720p.mp4", "hiker_vp9_720p.webm", "pancake.mkv")
ANSWER = [Turn("user", "<video>\nWhat happens?"), Turn("assistant", "Something moves. " * 20)]


@dataclass(frozen=True)
class Case:
    name: str
    videos: list[Path]
    tower: str
    sampling: Sampling
    llm: torch.nn.Module


def run() -> list[dict[str, object]]:
    with TemporaryDirectory() as folder:
        return [measure(case, Path(folder) / f"bank-{k}") for k, case in enumerate(cases(folder))]


def cases(folder: str) -> list[Case]:
    """Return the toy world, and real clips with a SigLIP-base tower where they are at hand."""
    toy = Path(folder) / "toy"
    make_toyworld(toy, train_clips=8, test_clips=1)
    tokenizer = AutoTokenizer.from_pretrained(toy / "llm")
    tiny = AutoModelForCausalLM.from_pretrained(toy / "llm")
    videos = sorted((toy / "videos" / "train").glob("*.mp4"))
    found = [Case("toy", videos, str(toy / "tower"), Sampling(num_frames=16), tiny)]
    clips = os.environ.get("FRAMEBANK_CLIPS")
    if clips:
        base = Path(folder) / "base"
        SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                image_size=224,
                patch_size=16,
            )
        ).save_pretrained(base)
        SiglipImageProcessorPil(
            size={"height": 224, "width": 224}, resample=Image.Resampling.BICUBIC
        ).save_pretrained(base)
        llm = AutoModelForCausalLM.from_config(
            Qwen2Config(
                vocab_size=len(tokenizer) + 10,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=4,
                num_attention_heads=14,
                num_key_value_heads=2,
            )
        )
        real = [Path(clips) / name for name in CLIPS]
        sampling = Sampling(num_frames=16)
        found.append(
            Case("real clips, SigLIP-base, 4 layers of 0.5B", real, str(base), sampling, llm)
        )
    return found


def measure(case: Case, bank: Path) -> dict[str, object]:
    options = EncodeOptions(tower=case.tower, strides=(4, 8), sampling=case.sampling)
    began = time.perf_counter()
    encode([str(video) for video in case.videos], bank, options)
    encoding = time.perf_counter() - began
    banks = Banks.open([bank])
    tower = Tower.load(case.tower)
    model = VLM.assemble(
        VLMConfig(),
        case.llm,
        AutoTokenizer.from_pretrained(bank.parent / "toy" / "llm"),
        width=tower.width,
        features=banks.config.to_json(),
        tower=case.tower,
    )

    def from_bank() -> Sequence[ClipFeatures]:
        return [banks.clip(video.name) for video in case.videos]

    def online() -> Sequence[ClipFeatures]:
        return [fresh_clip(video, banks.config, tower, child) for video in case.videos]

    child = DecodeChild()
    for banked, fresh in zip(from_bank(), online(), strict=True):
        frames = range(len(banked.info.timestamps))
        assert np.array_equal(banked.read(4, frames), fresh.read(4, frames)), banked.info.id
    times: dict[str, list[float]] = {"bank": [], "online": []}
    for _ in range(ROUNDS):
        times["bank"].append(step(model, from_bank))
        times["online"].append(step(model, online))
    bank_step, online_step = (statistics.median(times[name]) for name in ("bank", "online"))
    return {
        "case": case.name,
        "clips": len(case.videos),
        "step from bank, s": bank_step,
        "step with tower, s": online_step,
        "speed-up": online_step / bank_step,
        "encoding once, s": encoding,
    }


def step(model: VLM, source: Callable[[], Sequence[ClipFeatures]]) -> float:
    """Return the seconds of one step: features, batch, forward, backward."""
    began = time.perf_counter()
    clips = source()
    chat = Chat(model.tokenizer, model.lape.tokens if model.lape else None)
    infos: list[ClipInfo] = [replace(clip.info) for clip in clips]
    rows = [
        lay_out(chat.encode(ANSWER, [info.duration]), [info], model.config, "average")
        for info in infos
    ]
    batch = collate(rows, [[clip] for clip in clips], model.config, [info.id for info in infos])
    out = model(batch)
    (out["ce"] + out["ar"].sum()).backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - began
