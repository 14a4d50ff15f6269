"""Conversations that name banked clips -> what a model of transformers is trained with.

A record is a line of a .jsonl file: {"messages": [{"role": "user", "content": [
{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What happens?"}]}, {"role": "assistant",
"content": [{"type": "text", "text": "A dog runs."}]}]}
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from train.bank_vlm.processor import bank_processor
from train.bank_vlm.tower import use_bank

CHATML = ("<|im_start|>assistant\n", "<|im_end|>")
"""What answers stand between in the templates of Qwen-VL and LLaVA-OneVision."""


def load(checkpoint: str, bank: str, media_dir: str = "") -> tuple[Any, Any]:
    """Return a model without its tower, and the processor that gives it banked features."""
    # in the type of the checkpoint: the tower's digest, which use_bank compares, is of its weights
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    plain = AutoProcessor.from_pretrained(checkpoint)
    processor = bank_processor(plain, bank, model_config=model.config, media_dir=media_dir)
    return use_bank(model, bank), processor


def train_with(
    make_trainer: Callable[..., Any],
    checkpoint: str,
    bank: str,
    records: str,
    out: str,
    media_dir: str = "",
) -> None:
    """Train a checkpoint from a bank with a Trainer of transformers' kind, and save it whole."""
    model, processor = load(checkpoint, bank, media_dir)
    settings = {} if torch.cuda.is_available() else {"use_cpu": True}
    trainer = make_trainer(model, Collator(processor), read(records), out, **settings)
    trainer.train()
    trainer.save_model()
    # a checkpoint without its processor cannot be asked anything; this one is saved as the plain one
    processor.save_pretrained(out)


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a .jsonl file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


class Collator:
    """Records -> a batch of which the answers are learned."""

    def __init__(self, processor: Any, around: tuple[str, str] = CHATML) -> None:
        """around: what stands before and after an answer in the chat template's text."""
        self.processor = processor
        self.before, self.after = (
            processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in around
        )

    def __call__(self, records: Sequence[dict[str, Any]]) -> Any:
        batch = self.processor.apply_chat_template(
            [record["messages"] for record in records],
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt", "padding": True},
        )
        batch["labels"] = self.labels(batch["input_ids"])
        return batch

    def labels(self, ids: Tensor) -> Tensor:
        """Return the ids of answers, with what ends them, and -100 elsewhere; `(rows, places)`."""
        # -100: the label that torch's cross-entropy leaves out
        out = torch.full_like(ids, -100)
        for row, tokens in enumerate(ids.tolist()):
            place = 0
            while (begin := _after(tokens, self.before, place)) is not None:
                # an answer that is cut off has no end: it is learned to the end of the row
                place = _after(tokens, self.after, begin) or len(tokens)
                out[row, begin:place] = ids[row, begin:place]
        # a template with other marks would otherwise train on nothing, with a loss of NaN
        assert (out >= 0).any(dim=1).all(), "a record without an answer between its marks"
        return out


def _after(tokens: list[int], mark: list[int], begin: int) -> int | None:
    """Return the place behind a mark, searched from `begin`; None if it does not come."""
    for place in range(begin, len(tokens) - len(mark) + 1):
        if tokens[place : place + len(mark)] == mark:
            return place + len(mark)
    return None
