"""TRL's SFTTrainer from a bank.

python train/recipes/trl_sft.py CHECKPOINT BANK train.jsonl OUT [MEDIA_DIR]
"""

import sys
from typing import Any

import datasets
import torch
import trl

from train.recipes.conversations import Collator, load, read


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


def main(checkpoint: str, bank: str, records: str, out: str, media_dir: str = "") -> None:
    model, processor = load(checkpoint, bank, media_dir)
    settings = {} if torch.cuda.is_available() else {"use_cpu": True}
    trainer = make_trainer(model, Collator(processor), read(records), out, **settings)
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
