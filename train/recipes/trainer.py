"""transformers' Trainer from a bank.

python train/recipes/trainer.py CHECKPOINT BANK train.jsonl OUT [MEDIA_DIR]
"""

import sys
from typing import Any

from transformers import Trainer, TrainingArguments

from train.recipes.conversations import train_with


def make_trainer(model: Any, collator: Any, records: Any, out: str, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=out,
        remove_unused_columns=False,  # the collator needs the messages
        **settings,
    )
    return Trainer(model=model, args=arguments, train_dataset=records, data_collator=collator)


if __name__ == "__main__":
    train_with(make_trainer, *sys.argv[1:])
