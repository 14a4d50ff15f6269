"""Greedy generation of answers; coordinates are decoded by their median and fed back unrounded."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from model.batch import Batch
from model.family.deepstack import Added
from model.family.head import decoder_of
from model.family.limits import check_context, context_length
from model.lape.tokens import TIME
from model.vlm import VLM

MARKUP = ("t", "y", "x")
"""The letter of each axis in coordinate markup."""


@dataclass(frozen=True)
class Piece:
    """A generated token: a text token's id, or a coordinate in [0, 1] on an axis."""

    token: int
    axis: int = -1
    coord: float = 0.0


@torch.no_grad()
def generate(
    model: VLM, batch: Batch, *, stop: frozenset[int], max_new_tokens: int = 96
) -> list[list[Piece]]:
    """Return each row's answer to its prompt, without the token that ended it.

    batch: prompts, without labels. stop: ids that end an answer. The prompt passes once under the
    batch's own mask; each new token then sees its row's prompt and the tokens generated so far, never
    the padding between them. Raises UserError where the LLM's context is too short.
    """
    # before the first token: an answer cut off by the context would look like a short answer
    check_room(model, int(batch.lengths.max()), max_new_tokens)
    reader = (Cached if model.masked else Reread)(model, batch)
    hidden = reader.prompt()
    answers: list[list[Piece]] = [[] for _ in batch.lengths]
    open_rows = set(range(len(answers)))
    for _ in range(max_new_tokens):
        pieces = choose(model, hidden)
        # rows that ended go on being computed beside the others, and what they give is dropped
        for row in sorted(open_rows):
            if pieces[row].token in stop:
                open_rows.remove(row)
            else:
                answers[row].append(pieces[row])
        if not open_rows:
            break
        hidden = reader.read(_embed_pieces(model, pieces, hidden.device))
    return answers


def check_room(model: VLM, prompt: int, new: int) -> None:
    """Raise UserError where `prompt` + `new` tokens are more than the LLM's context."""
    most = getattr(model.tokenizer, "model_max_length", None)
    limit = context_length(model.llm.config.to_dict(), most)
    fix = f"use fewer than {new} new tokens, or fewer frames (max_frames_num)"
    check_context(prompt + new, limit, f"a prompt with {new} new tokens", fix)


class Cached:
    """Runs rows over a cache of keys and values: the prompt at once, then one token of each row."""

    def __init__(self, model: VLM, batch: Batch) -> None:
        self.model, self.batch = model, batch
        # without a config, so that it keeps keys beyond a sliding window too: the masks cut them off
        self.cache = DynamicCache()
        length, device = batch.input_ids.shape[1], batch.input_ids.device
        self.seen = torch.arange(length, device=device)[None] < batch.lengths[:, None]
        self.positions = batch.position_ids
        self.rope_end = None
        """The greatest of the three M-RoPE positions of each row's last token: int64 `(rows,)`."""
        if batch.rope is not None:
            # text after frames goes on from the greatest of the three, see `model.family.mrope`
            rows = torch.arange(len(batch.lengths), device=device)
            self.rope_end = batch.rope[:, rows, batch.lengths - 1].amax(dim=0)

    def prompt(self) -> Tensor:
        """Return the last hidden state of each row's prompt, under the batch's own mask."""
        model, batch = self.model, self.batch
        mask = model.attention_mask(batch)
        positions = batch.position_ids, batch.rope
        states = self._decode(model.embed(batch), mask, *positions, model.added(batch))
        return states[torch.arange(len(states), device=states.device), batch.lengths - 1]

    def read(self, embeds: Tensor) -> Tensor:
        """Return the hidden state after one more token of each row, `(rows, width)`."""
        model = self.model
        read = self.positions.shape[1] - self.batch.input_ids.shape[1]
        # prompts differ in length and are padded on the right: a new token's position is its
        # record's, while in the cache it is behind the padding
        at = self.batch.lengths + read
        self.seen = torch.cat([self.seen, torch.ones_like(self.seen[:, :1])], dim=1)
        self.positions = torch.cat([self.positions, at[:, None]], dim=1)
        mask = model.step_mask(self.seen, self.positions, at, embeds.dtype)
        rope = None
        if self.rope_end is not None:
            rope = (self.rope_end + 1 + read).expand(3, -1)[..., None]
        return self._decode(embeds[:, None], mask, at[:, None], rope)[:, 0]

    def _decode(
        self,
        embeds: Tensor,
        mask: Any,
        positions: Tensor,
        rope: Tensor | None = None,
        added: Added | None = None,
    ) -> Tensor:
        known: dict[str, Any] = {} if added is None else {"deepstack": added}
        with self.model.turning_by(rope):
            states: Tensor = decoder_of(self.model.llm)(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                **known,
            ).last_hidden_state
        return states


class Reread:
    """Runs whole rows from the start for each token: for LLMs with a recurrent state in place of keys."""

    def __init__(self, model: VLM, batch: Batch) -> None:
        assert batch.rope is None, "LLMs with M-RoPE have keys to cache"
        assert not model.config.deepstack, "LLMs with DeepStack have keys to cache"
        self.model, self.lengths = model, batch.lengths
        self.embeds = model.embed(batch)

    def prompt(self) -> Tensor:
        """Return the last hidden state of each row's prompt."""
        places = torch.arange(self.embeds.shape[1], device=self.embeds.device)
        states = self.model.decode(self.embeds, None, places.expand(len(self.embeds), -1))
        return states[torch.arange(len(states), device=states.device), self.lengths - 1]

    def read(self, embeds: Tensor) -> Tensor:
        """Return the hidden state after one more token of each row, `(rows, width)`."""
        rows = torch.arange(len(embeds), device=embeds.device)
        self.embeds = F.pad(self.embeds, (0, 0, 0, 1))
        self.embeds[rows, self.lengths] = embeds  # in place of the row's first padding
        self.lengths = self.lengths + 1
        return self.prompt()


def choose(model: VLM, hidden: Tensor) -> list[Piece]:
    """Return the next token of each row: the likeliest text token, or a coordinate of an axis.

    hidden: `(rows, width)`. An axis competes by the sum of its anchors' probabilities: a coordinate's
    target is spread over several anchors, none of which need be likelier than a text token.
    """
    logits = model.logits(hidden)
    if model.lape is None:
        return [Piece(token) for token in logits.argmax(dim=-1).tolist()]
    counts = model.lape.tokens.counts
    # anchors stand behind the text's columns, axis after axis, as `LanguageHead.logits` lays them
    text, *axes = logits.split([logits.shape[-1] - sum(counts), *counts], dim=-1)
    best, token = text.max(dim=-1)
    mass = torch.stack([best] + [axis.logsumexp(dim=-1) for axis in axes])
    winner = mass.argmax(dim=0).tolist()
    pieces = [Piece(text_token) for text_token in token.tolist()]
    for axis in range(len(axes)):
        rows = [row for row, win in enumerate(winner) if win == axis + 1]
        coords = model.lape.decode(axis, axes[axis][rows]).tolist() if rows else []
        for row, coord in zip(rows, coords, strict=True):
            pieces[row] = Piece(model.lape.tokens.token_id(axis, coord), axis, coord)
    return pieces


def write_answer(model: VLM, pieces: list[Piece], duration: float) -> str:
    """Return the answer as text with coordinate markup, times in seconds of the clip.

    Six decimals: with four a box of a hundredth of the frame would lose 2 % of its IoU.
    """
    # decoded after a line break: SentencePiece drops a blank at the beginning of its text
    before = model.tokenizer("\n", add_special_tokens=False).input_ids
    head = len(model.tokenizer.decode(before))
    text, run = "", list[int]()
    # a run of text tokens is decoded as one: a letter of several bytes may be cut between two
    # tokens; the last piece is none, and ends the last run
    for piece in [*pieces, Piece(-1, axis=-2)]:
        if piece.axis == -1:
            run.append(piece.token)
            continue
        text += model.tokenizer.decode(before + run)[head:]
        run = []
        if piece.axis >= 0:
            value = piece.coord * duration if piece.axis == TIME else piece.coord
            text += f"<{MARKUP[piece.axis]}:{value:.6f}>"
    return text.strip(" ")


def _embed_pieces(model: VLM, pieces: list[Piece], device: torch.device) -> Tensor:
    ids = torch.tensor([p.token if p.axis < 0 else 0 for p in pieces], device=device)
    embeds = model.llm.get_input_embeddings()(ids)
    for row, piece in enumerate(pieces):
        if piece.axis >= 0:
            assert model.lape is not None
            coord = torch.tensor([piece.coord], device=device)
            # the decoded coordinate itself, as in training; its nearest anchor would
            # be off by up to half a bin
            embeds[row] = model.lape.embed(piece.axis, coord)[0].to(embeds.dtype)
    return embeds
