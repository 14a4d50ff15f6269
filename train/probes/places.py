"""Places in single frames: a small network from a frame's cells and a question's words to coordinates."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.batch import as_tensor
from shards.annotations.forms import MEDIA_TAG
from shards.errors import UserError
from shards.read.timeline import Medium, parts_of
from train.data.records import Record
from train.scores.predictions import Prediction

KINDS = {"point": "xy", "box": "xyxy"}
"""Kinds of answers, and the axes of their coordinates."""
WORDS = 2000
"""The most frequent words, which the network sees."""
WIDTH, STEPS, BATCH, RATE = 256, 3000, 256, 2e-3


class Example(NamedTuple):
    """A question about a medium of one frame, and its answer."""

    cells: Tensor
    """`(cell_rows, cell_cols, dim)`, as stored: a large set would fill the memory in fp32."""
    words: frozenset[str]
    blank: Prediction
    """Without an answer; `blank.asked.coordinates` are those that are asked for."""


class Places:
    """A network for each kind of answer, trained on records of media of one frame."""

    none = "no question about a point or a box in a medium of one frame"

    def __init__(
        self, media: Iterable[tuple[Record, Medium]], stride: int, counts: Sequence[int]
    ) -> None:
        """counts: anchors of each axis, by which those named in answers are read."""
        self.stride, self.anchors = stride, counts
        found = (examples_of(record, medium, stride, counts) for record, medium in media)
        examples = [one for own in found for one in own]
        words = Counter(word for one in examples for word in one.words)
        self.columns = {word: k for k, (word, _) in enumerate(words.most_common(WORDS))}
        shapes = {one.cells.shape for one in examples}
        if len(shapes) != 1:
            grids = ", ".join(sorted(f"{rows}x{cols}" for rows, cols, _ in shapes)) or "none"
            raise UserError(
                "frames of one grid are what places are learned from",
                got=f"grids {grids}",
                where="--places",
                fix="name records of single frames with points or boxes, of clips of one shape",
            )
        (self.shape,) = shapes
        # channels differ in scale by orders of magnitude
        mean, squares = torch.stack([_moments(one.cells) for one in examples]).mean(dim=0)
        self.mean = mean.float()
        self.spread = (squares - mean**2).clamp(min=1e-12).sqrt().float()
        by_kind = {k: [one for one in examples if one.blank.asked.kind == k] for k in KINDS}
        self.networks = {
            kind: self._trained(own, len(KINDS[kind])) for kind, own in by_kind.items() if own
        }

    def answer(self, record: Record, turn: int, medium: Medium) -> tuple[Prediction, None] | None:
        """Return the answer to a record's question; None where it is no question of this kind.

        turn: the answer's.
        """
        examples = examples_of(record, medium, self.stride, self.anchors)
        one = next((one for one in examples if one.blank.turn == turn), None)
        if (
            one is None
            or one.blank.asked.kind not in self.networks
            or one.cells.shape != self.shape
        ):
            return None
        kind = one.blank.asked.kind
        with torch.no_grad():
            places = self.networks[kind](self._inputs([one]))[0].clamp(0, 1).tolist()
        marks = "".join(f"<{a}:{u:.4f}>" for a, u in zip(KINDS[kind], places, strict=True))
        return replace(one.blank, answer=marks), None

    def _trained(self, examples: Sequence[Example], coordinates: int) -> nn.Module:
        wanted = torch.tensor([one.blank.asked.coordinates for one in examples])
        with torch.random.fork_rng(devices=[]):  # the same network each time
            torch.manual_seed(0)
            network = nn.Sequential(
                nn.Linear(self._inputs(examples[:1]).shape[1], WIDTH), nn.GELU(),
                nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, coordinates),
            )  # fmt: skip
            optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
            decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            for _ in range(STEPS):
                some = torch.randint(len(examples), (BATCH,))
                inputs = self._inputs([examples[k] for k in some.tolist()])
                # the mean absolute error, which is what is scored
                loss = (network(inputs) - wanted[some]).abs().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
        return network

    def _inputs(self, examples: Sequence[Example]) -> Tensor:
        """Return cells in deviations and which words are there: fp32 `(examples, inputs)`."""
        cells = torch.stack([one.cells for one in examples]).float()
        cells = ((cells - self.mean) / self.spread).flatten(1)
        words = torch.zeros(len(examples), len(self.columns))
        for row, one in enumerate(examples):
            words[row, [self.columns[word] for word in one.words if word in self.columns]] = 1
        return torch.cat([cells, words], dim=1)


def _moments(cells: Tensor) -> Tensor:
    """Return the means of a frame's channels and of their squares: fp64 `(2, dim)`."""
    flat = cells.flatten(0, 1).double()
    return torch.stack([flat.mean(dim=0), flat.square().mean(dim=0)])


def examples_of(
    record: Record, medium: Medium, stride: int, counts: Sequence[int]
) -> list[Example]:
    """Return a record's questions about a point or a box, if its medium has one frame."""
    parts = parts_of([medium])
    if len(medium.info.timestamps) != 1:
        return []
    cells = as_tensor(parts[0].read(stride, [0]))[0]
    found = []
    for turn, (before, said) in enumerate(pairwise(record.turns), 1):
        # what a system prompt says is no question, and a question is no answer to it
        if (before.role, said.role) != ("user", "assistant"):
            continue
        blank = Prediction.blank(record, turn, medium.info.duration, counts)
        if blank.asked.kind in KINDS:
            # without tags: a record's first question has one, and it would tell it from the others
            words = re.findall(r"\w+", MEDIA_TAG.sub("", before.text).lower())
            found.append(Example(cells, frozenset(words), blank))
    return found
