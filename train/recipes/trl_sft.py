"""TRL's SFTTrainer from a bank.

python train/recipes/trl_sft.py CHECKPOINT BANK train.jsonl OUT [MEDIA_DIR]
"""

import sys
from typing import Any

import datasets
import trl

from train.recipes.conversations import train_with


def make_trainer(
    model: Any, collator: Any, records: list[Any], out: str, **settings: Any
) -> trl.SFTTrainer:
    arguments = trl.SFTConfig(
        output_dir=out,
        remove_unused_columns=False,  # the collator needs the messages
        dataset_kwargs={"skip_prepare_dataset": True},  # the collator makes tokens
        max_length=None,  # cut nowhere: a cut in a video's tokens would not fit its features
        **settings,
    )
    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(records, on_mixed_types="use_json"),
        data_collator=collator,
        processing_class=collator.processor.tokenizer,
    )


if __name__ == "__main__":
    train_with(make_trainer, *sys.argv[1:])
