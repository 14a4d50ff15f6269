"""What the tests of whole checkpoints share: one on disk beside a bank, and what becomes of its rows.

world.start()                       # the model that a run starts with, and what is said of it
as_theirs(model, rows, theirs)      # alone, padded and packed, rows have the checkpoint's logits
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.batch import Batch
from model.vlm import VLM
from shards.read.banks import Banks
from shards.read.timeline import Medium
from train.batches.chat import Chat
from train.batches.collate import Row, collate, lay_out, pack
from train.data.dataset import open_dataset
from train.data.records import Turn
from train.settings.config import TrainConfig
from train.start.stage import build

EXACT: Mapping[str, Any] = {
    "frame_attention": "token",
    "enable_lape": False,
    "loss_weight": 0.0,
    "slow_frame_ratio": "1",
    "max_frames_num": 64,
}
"""Settings under which nothing is added to what a checkpoint computes."""
Given = tuple[Row, Sequence[Medium]]


@dataclass(frozen=True)
class World:
    """A checkpoint on disk, transformers' model of it, and a bank of its tower's features."""

    folder: Path
    theirs: Any
    bank: Path
    data: Path
    exact: Mapping[str, Any] = field(default_factory=lambda: EXACT)

    def start(self, **settings: Any) -> tuple[VLM, str]:
        """Return the model that a run starts with, and the lines that are said of it."""
        config = self.config(**settings)
        lines: list[str] = []
        return build(config, open_dataset(config), lines.append).eval(), "\n".join(lines)

    def config(self, **settings: Any) -> TrainConfig:
        values = dict(self.exact) | {"stage_path": str(self.folder)} | settings
        return TrainConfig(bank=[str(self.bank)], data_path=[str(self.data)], **values)

    def clips(self, names: str) -> list[Medium]:
        banks = Banks.open([str(self.bank)])
        return [place.clip() for name in names if (place := banks.find(name))]


def laid_out(model: VLM, clips: Sequence[Medium], *texts: str, prompt: bool = False) -> Row:
    """Return a conversation's row; each clip is one `<video>` in the texts."""
    turns = [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)]
    turns += [Turn("assistant", "")] * prompt
    infos, chat = [clip.info for clip in clips], Chat.of(model)
    durations = [info.duration for info in infos]
    encoded = chat.encode(turns, durations, answer=len(turns) - 1 if prompt else None)
    return lay_out(encoded, infos, model.config, model.features["pool"], stamp=chat.stamp)


def batch_of(model: VLM, *rows: Given, packed: bool = False) -> Batch:
    if packed:
        media = [clip for _, clips in rows for clip in clips]
        return collate([pack([row for row, _ in rows])], [media], model.config, ["packed"])
    names = [f"record-{k}" for k in range(len(rows))]
    return collate([row for row, _ in rows], [clips for _, clips in rows], model.config, names)


def our_logits(model: VLM, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.logits(model.hidden_states(batch)).view(*batch.input_ids.shape, -1)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Assert that logits are equal to 1e-4 of their RMS."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * theirs.square().mean().sqrt()


def as_theirs(model: VLM, rows: Sequence[Given], theirs: Sequence[Tensor]) -> None:
    """Assert that rows have a checkpoint's logits: each alone, padded, and all packed in one."""
    for given, expected in zip(rows, theirs, strict=True):
        close(our_logits(model, batch_of(model, given))[0], expected)
    padded = our_logits(model, batch_of(model, *rows))
    for own, (row, _), expected in zip(padded, rows, theirs, strict=True):
        close(own[: len(row)], expected)
    close(our_logits(model, batch_of(model, *rows, packed=True))[0], torch.cat(list(theirs)))
