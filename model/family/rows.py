"""Rows of text alone, as a batch, for checks of LLM families."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import Batch
from model.mask import intervals, other_turns


def text_batch(
    *rows: list[Tensor],
    causal: bool = False,
    block: np.ndarray | None = None,
    turns: Sequence[int] = (),
) -> Batch:
    """Return a batch of rows of token ids, each row a list of records `(tokens,)`.

    causal: as `Batch.causal`. block: for a single row, as in `model.mask.intervals`. turns: for a single
    record, the number of tokens that its turns share, then that of each independent turn.
    """
    length = max(sum(map(len, row)) for row in rows)
    device = rows[0][0].device
    none = torch.zeros(0, dtype=torch.int64, device=device)
    ids = torch.stack([F.pad(torch.cat(row), (0, length - sum(map(len, row)))) for row in rows])
    position, bounds = [], []
    for row in rows:
        sizes = [len(record) for record in row]
        padding = length - sum(sizes)
        sample = np.repeat([*range(len(row)), -1], [*sizes, padding])
        bounds.append(intervals(sample, np.full(length, -1) if block is None else block))
        position.append(
            np.concatenate([*map(np.arange, sizes), np.arange(length - padding, length)])
        )
    others: dict[str, Tensor] = {}
    if turns:
        turn = np.repeat(np.arange(len(turns)), turns)
        ends = np.cumsum(turns)
        # each turn goes on from the end of what is shared, as if the turns before it were not there
        position = [np.arange(length) - np.where(turn > 0, (ends - turns)[turn] - turns[0], 0)]
        names = "others_start", "others_end"
        found = other_turns(np.zeros(length, np.int64), turn)
        others = {
            n: torch.from_numpy(bound)[None].to(device)
            for n, bound in zip(names, found, strict=True)
        }
    start, end, places = (
        torch.from_numpy(np.stack(arrays)).to(device)
        for arrays in (*zip(*bounds, strict=True), position)
    )
    return Batch(
        input_ids=ids,
        axis=torch.full_like(ids, -1),
        coord=torch.zeros(ids.shape, device=device),
        position_ids=places,
        mask_start=start,
        mask_end=end,
        predict_index=none,
        labels=none,
        label_axis=none,
        label_coord=none.float(),
        lengths=torch.tensor([sum(map(len, row)) for row in rows], device=device),
        groups=(),
        transitions=(),
        record_ids=(),
        causal=causal,
        **others,
    )
