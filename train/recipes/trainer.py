"""transformers' Trainer from a bank.

python train/recipes/trainer.py CHECKPOINT BANK train.jsonl OUT [MEDIA_DIR]
"""

import sys
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from train.recipes.conversations import Collator, load, read


def make_trainer(model: Any, collator: Any, records: Any, out: str, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=out,
        remove_unused_columns=False,  # the collator needs the messages
        **settings,
    )
    return Trainer(model=model, args=arguments, train_dataset=records, data_collator=collator)


def main(checkpoint: str, bank: str, records: str, out: str, media_dir: str = "") -> None:
    model, processor = load(checkpoint, bank, media_dir)
    settings = {} if torch.cuda.is_available() else {"use_cpu": True}
    trainer = make_trainer(model, Collator(processor), read(records), out, **settings)
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
