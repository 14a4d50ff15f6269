"""A mix of records in memory, models of any shape, and two ways to train on them.

Ours: rows packed by the plan, the head on supervised rows alone. The other: transformers' Trainer,
records padded to the longest of a batch, logits of every place, as its causal LMs take `labels`.
Both have the same weights, projector and records, plain causal attention, AdamW and clipping, and
count real tokens.
"""

import time
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from model.batch import Batch, to_device
from model.vlm import VLM, VLMConfig
from preprocess.toy_models import save_llm
from shards.read.bank import ClipInfo
from train.ask import FreshClip
from train.batches.chat import MEDIA, Encoded
from train.batches.collate import Row, collate, lay_out, pack
from train.batches.lengths import Clips, Lengths
from train.batches.plan import Cut, make_plan
from train.batches.run_plan import RunPlan
from train.loop.optimizer import make_optimizer, set_rates
from train.settings.config import OptimizerSettings

PATCHES = 24
"""Of a side: stride 4 gives 6 x 6 cells, stride 12 gives 2 x 2."""
STRIDES = (4, 12)
WIDTH = 64
RATIO = "0.2"
FRAMES, SHARES = (1, 16, 64, 128), (0.45, 0.3, 0.15, 0.1)
"""Images, short, middling and long clips."""
HEAD_SHARE = 0.38
"""FLOPs of Qwen2-0.5B's head over those of its layers, for a token."""


@dataclass
class Mix:
    """Records with random features and tokens; `scale` divides their frames and texts."""

    count: int
    vocab: int
    frame_attention: str = "token"
    scale: int = 1
    seed: int = 0

    @property
    def config(self) -> VLMConfig:
        return VLMConfig(
            slow_stride=STRIDES[0],
            fast_stride=STRIDES[1],
            slow_frame_ratio=RATIO,
            max_frames_num=max(FRAMES),
            frame_attention=self.frame_attention,
            enable_lape=False,
            loss_weight=0.0,
        )

    @cached_property
    def frames(self) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        return np.maximum(1, rng.choice(FRAMES, self.count, p=SHARES) // self.scale)

    @cached_property
    def talks(self) -> list[Encoded]:
        rng = np.random.default_rng(self.seed + 1)
        talks = []
        for _ in range(self.count):
            asked, answered = (rng.integers((20, 10), (160, 80)) // self.scale).tolist()
            ids = rng.integers(5, self.vocab, asked + answered).tolist()
            supervised = [False] * (asked + 1) + [True] * answered
            length = len(supervised)
            talks.append(Encoded([MEDIA, *ids], [-1] * length, [0.0] * length, supervised))
        return talks

    @cached_property
    def clips(self) -> list[FreshClip]:
        rng = np.random.default_rng(self.seed + 2)
        return [self._clip(int(frames), rng) for frames in self.frames]

    def _clip(self, frames: int, rng: np.random.Generator) -> FreshClip:
        info = ClipInfo(
            id="clip",
            start=0.0,
            end=float(frames),
            timestamps=np.arange(frames, dtype=np.float64),
            frame_index=np.arange(frames),
            display_size=(384, 384),
            patch_grid=(PATCHES, PATCHES),
            covered=(0.0, 0.0, 1.0, 1.0),
        )
        sides = {stride: PATCHES // stride for stride in STRIDES}
        return FreshClip(
            info,
            {
                stride: rng.standard_normal((frames, side, side, WIDTH)).astype(np.float16)
                for stride, side in sides.items()
            },
        )

    @cached_property
    def rows(self) -> list[Row]:
        return [
            lay_out(talk, [clip.info], self.config, "average")
            for talk, clip in zip(self.talks, self.clips, strict=True)
        ]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def batch(self, rows: list[list[int]], length: int = 0) -> Batch:
        """Return rows of records as a batch."""
        laid = [pack([self.rows[k] for k in row]) for row in rows]
        clips = [[self.clips[k] for k in row] for row in rows]
        ids = [str(k) for row in rows for k in row]
        return collate(laid, clips, self.config, ids, length=length)

    def plan(self, pack_tokens: int, rows: int = 1) -> RunPlan:
        """Return the plan of one epoch of packed rows, so many a step, in one forward."""
        cut = Cut(rows, rows, pack_tokens, most_frames=max(FRAMES))
        return make_plan(lengths_of(self), cut)


def lengths_of(mix: Mix) -> Lengths:
    """Return what the plan knows of a mix: no feature is made for it."""
    cells = [np.full(mix.count, (PATCHES // stride) ** 2) for stride in STRIDES]
    clips = Clips(np.arange(mix.count), mix.frames, *cells, mix.frames.astype(float), "")
    text = np.array([len(talk.ids) - 1 for talk in mix.talks])
    supervised = np.array([sum(talk.supervised) for talk in mix.talks])
    return Lengths(text, supervised, clips, Fraction(RATIO))


def make_vlm(mix: Mix, folder: Path, attention: str = "sdpa", **shape: int) -> VLM:
    """Return a random model over a Qwen2 of these sizes."""
    if not (folder / "tokenizer.json").exists():
        save_llm(folder, ["a b c"], seed=0)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=mix.vocab, max_position_embeddings=32768, **shape)
    config._attn_implementation = attention
    return VLM.assemble(
        mix.config,
        Qwen2ForCausalLM(config),
        AutoTokenizer.from_pretrained(folder),
        width=WIDTH,
        features={"pool": "average"},
        tower="none",
    ).train()


def train_ours(
    mix: Mix, model: VLM, plan: RunPlan, device: torch.device, length: int = 0, bf16: bool = False
) -> float:
    """Take the plan's steps; return the seconds, batches being made on the way."""
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=1e-5))
    set_rates(optimizer, 0, plan.num_steps, warmup_ratio=0.0)
    began = _now(device)
    for step in range(plan.num_steps):
        batch = to_device(mix.batch(plan.pack(step, 0), length), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = model(batch)
        (out["ce"] / len(batch.labels)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return _now(device) - began


class Padded(nn.Module):
    """The same model as transformers' Trainer wants it: rows padded, labels for every place."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, labels: Tensor, attention_mask: Tensor, batch: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        embeds = self.model.embed(to_device(batch[0], labels.device))
        out = self.model.llm(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            labels=labels,
            num_items_in_batch=kwargs.get("num_items_in_batch"),
        )
        return {"loss": out.loss}


class Clock(TrainerCallback):
    """Times the loop alone, without what the Trainer does around it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = _now(args.device)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = _now(args.device) - self.began


def train_padded(mix: Mix, model: VLM, size: int, folder: Path, bf16: bool = False) -> float:
    """Train one epoch by transformers' Trainer in batches of `size` records; return the seconds."""
    clock = Clock()
    on_cuda = next(model.parameters()).is_cuda
    trainer = Trainer(
        model=Padded(model),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=size,
            num_train_epochs=1,
            learning_rate=1e-5,
            bf16=bf16,
            use_cpu=not on_cuda,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=on_cuda,
        ),
        train_dataset=list(range(mix.count)),  # type: ignore[arg-type]
        data_collator=lambda records: padded(mix, records),
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


def padded(mix: Mix, records: list[int]) -> dict[str, Any]:
    """Return what `Padded` takes, of records one a row."""
    batch = mix.batch([[k] for k in records])
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.predict_index + 1] = batch.labels
    real = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    # in a list the Trainer leaves it as it is
    return {"labels": labels.view_as(real), "attention_mask": real.long(), "batch": [batch]}


def assert_same_loss(mix: Mix, model: VLM, records: list[int], pack_tokens: int) -> None:
    """Assert that both ways have the same loss on some records, whatever the rows are."""
    row = [k for k in records if len(mix.rows[k]) < pack_tokens // 2][:2]
    with torch.no_grad():
        ours = model(mix.batch([row]))["ce"].item()
        theirs = Padded(model)(**padded(mix, row), num_items_in_batch=1)["loss"].item()
    assert abs(ours - theirs) < 1e-4 * abs(theirs), (ours, theirs)


def vocab_of(width: int, layers: int, mlp: int, kv_width: int) -> int:
    """Return the rows of a head that costs as much of its layers as in Qwen2-0.5B."""
    weights = layers * width * (2 * width + 2 * kv_width + 3 * mlp)
    return int(HEAD_SHARE * weights / width)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
