"""The LLM's head, with LAPE's anchors beside its rows: logits, and the loss of supervised tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.lape.tables import Lape

HEAD_ROWS = 1024
"""Supervised tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class LanguageHead:
    """Text and coordinates under one softmax; without LAPE, the LLM's own head.

    One softmax at text positions too: else untrained anchors could win there when the model writes.
    """

    text: Callable[[Tensor], Tensor]
    """The LLM's own head, `model.family.head.own_head`: `(n, width)` -> `(n, rows)`."""
    lape: Lape | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits `(n, rows of the head)`, followed by LAPE's anchors when it is on.

        The head's own columns at LAPE's ids are masked: an anchor has one logit, not two.
        """
        text: Tensor = self.text(hidden).float()
        if self.lape is None:
            return text
        own = [i for i in self.lape.tokens.all_ids if i < text.shape[-1]]
        # rows of a padded matrix may stand at these ids; -1e9, since infinite logits make NaN gradients
        text = text.index_fill(-1, torch.tensor(own, device=text.device, dtype=torch.long), -1e9)
        return torch.cat([text, self.lape.logits(hidden)], dim=-1)

    def loss(
        self, hidden: Tensor, labels: Tensor, label_axis: Tensor, label_coord: Tensor
    ) -> dict[str, Tensor]:
        """Return `ce` and `coordinate_ce`, sums over tokens, and `token_ce` `(supervised,)`.

        Only `ce` has a gradient; it includes `coordinate_ce`, the part of coordinate tokens.
        hidden: `(supervised, width)`; labels as in a `Batch`. More than `HEAD_ROWS` rows pass in chunks
        whose logits are recomputed in the backward pass: fp32 logits of 152k columns take 0.6 GB per
        1024 rows, twice with their gradient.
        """
        whole = (hidden, labels, label_axis, label_coord)
        if len(hidden) <= HEAD_ROWS:
            return self._loss_of_rows(*whole)
        chunks = zip(*(tensor.split(HEAD_ROWS) for tensor in whole), strict=True)
        parts = [
            # nothing is drawn at random here, so there is no RNG state to keep
            checkpoint(self._loss_of_rows, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
        out = {
            name: torch.stack([p[name] for p in parts]).sum() for name in ("ce", "coordinate_ce")
        }
        return out | {"token_ce": torch.cat([part["token_ce"] for part in parts])}

    def _loss_of_rows(
        self, rows: Tensor, labels: Tensor, label_axis: Tensor, label_coord: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of hidden states `(n, width)`; n may be 0.

        Text: log Z - logit of the label. Coordinate: log Z - sum of target x logit over its axis, that
        is cross-entropy against the soft target.
        """
        logits = self.logits(rows)
        if self.lape is None:
            each = F.cross_entropy(logits, labels, reduction="none")
            total = each.sum()
            return {"ce": total, "coordinate_ce": total.detach() * 0, "token_ce": each.detach()}
        # -sum q log softmax(l) = log Z - sum q l, where the target's shares q sum to 1
        log_z = logits.logsumexp(dim=-1)
        # anchors are the last columns, axis after axis
        offset = logits.shape[-1] - sum(self.lape.tokens.counts)
        # a coordinate's label is an anchor's id, beyond the head's columns: column 0 stands in, uncounted
        is_text = label_axis < 0
        picked = logits.gather(1, labels.where(is_text, 0)[:, None]).squeeze(1)
        losses = log_z - picked
        each = losses.detach().clone()
        loss = losses[is_text].sum()
        coordinates = loss.detach() * 0
        for axis, bins in enumerate(self.lape.tokens.counts):
            of_axis = torch.nonzero(label_axis == axis).flatten()
            target = self.lape.target(axis, label_coord[of_axis])
            expected = (target * logits[of_axis, offset : offset + bins]).sum(dim=-1)
            losses = log_z[of_axis] - expected
            each[of_axis] = losses.detach()
            part = losses.sum()
            loss, coordinates = loss + part, coordinates + part.detach()
            offset += bins
        return {"ce": loss, "coordinate_ce": coordinates, "token_ce": each}
