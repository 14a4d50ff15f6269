"""A plain loop of PyTorch from a bank.

python train/recipes/loop.py CHECKPOINT BANK train.jsonl OUT [MEDIA_DIR]
"""

import sys
from typing import Any

import torch
from torch.utils.data import DataLoader

from train.recipes.conversations import Collator, load, read


def train(
    model: Any,
    collator: Any,
    records: Any,
    steps: int,
    rate: float = 1e-5,
    batch: int = 2,
    workers: int = 2,
) -> list[float]:
    """Train some steps; return the loss of each."""
    device = model.device
    loader = DataLoader(
        records,
        batch_size=batch,
        shuffle=True,
        collate_fn=collator,
        num_workers=workers,
    )
    # of the model without its tower: use_bank has taken it out before
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    losses: list[float] = []
    while len(losses) < steps:
        for inputs in loader:
            loss = model(**inputs.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return losses


def main(checkpoint: str, bank: str, records: str, out: str, media_dir: str = "") -> None:
    model, processor = load(checkpoint, bank, media_dir)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = read(records)
    print(*train(model, Collator(processor), rows, steps=3 * len(rows)))  # noqa: T201
    # an ordinary checkpoint: the tower's weights are put back while it is saved
    model.save_pretrained(out)
    processor.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
