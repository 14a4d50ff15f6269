"""Answers, token by token: greedy, with coordinates decoded between anchors and fed back exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from model.batch import Batch
from model.lape.tokens import TIME
from model.mask import additive_mask
from model.vlm import VLM

MARKUP = ("t", "y", "x")
"""The letter of each axis in coordinate markup."""


@dataclass(frozen=True)
class Piece:
    """A generated token: its id, or a coordinate in [0, 1] on an axis."""

    token: int
    axis: int = -1
    coord: float = 0.0


@torch.no_grad()
def generate(
    model: VLM, batch: Batch, *, stop: frozenset[int], max_new_tokens: int = 96
) -> list[list[Piece]]:
    """Return each row's answer to its prompt, without the token that ended it.

    The prompt is read once under the batch's own mask; each new token then sees its row's prompt
    and the tokens generated so far, never the padding between them.
    """
    rows, length = batch.input_ids.shape
    device = batch.input_ids.device
    cache = DynamicCache()
    decoder = model.llm.get_decoder()
    out = decoder(
        inputs_embeds=model.embed(batch),
        attention_mask=model.attention_mask(batch),
        position_ids=batch.position_ids,
        past_key_values=cache,
        use_cache=True,
    )
    hidden = out.last_hidden_state[torch.arange(rows, device=device), batch.lengths - 1]
    answers: list[list[Piece]] = [[] for _ in range(rows)]
    open_rows = set(range(rows))
    prompt = torch.arange(length, device=device)[None] < batch.lengths[:, None]
    for step in range(max_new_tokens):
        pieces = choose(model, hidden)
        for row in sorted(open_rows):
            if pieces[row].token in stop:
                open_rows.remove(row)
            else:
                answers[row].append(pieces[row])
        if not open_rows:
            break
        seen = torch.ones(rows, step + 1, dtype=torch.bool, device=device)
        mask = torch.cat([prompt, seen], dim=1)[:, None, None]
        if model.llm.config._attn_implementation == "eager":
            mask = additive_mask(mask, hidden.dtype)
        out = decoder(
            inputs_embeds=_embed_pieces(model, pieces, device)[:, None],
            attention_mask=mask,
            position_ids=(batch.lengths + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        hidden = out.last_hidden_state[:, 0]
    return answers


def choose(model: VLM, hidden: Tensor) -> list[Piece]:
    """Return the next token of each row: a text token, or a coordinate of the likeliest axis.

    An axis competes with its whole mass, since a coordinate's target is spread over anchors.
    """
    logits = model.logits(hidden)
    if model.lape is None:
        return [Piece(token) for token in logits.argmax(dim=-1).tolist()]
    counts = model.lape.tokens.counts
    text, *axes = logits.split([logits.shape[-1] - sum(counts), *counts], dim=-1)
    best, token = text.max(dim=-1)
    mass = torch.stack([best] + [axis.logsumexp(dim=-1) for axis in axes])
    winner = mass.argmax(dim=0).tolist()
    coords = [model.lape.decode(a, axes[a]).tolist() for a in range(len(axes))]
    tokens = token.tolist()
    pieces = []
    for row, win in enumerate(winner):
        if win == 0:
            pieces.append(Piece(tokens[row]))
        else:
            coord = coords[win - 1][row]
            pieces.append(Piece(model.lape.tokens.token_id(win - 1, coord), win - 1, coord))
    return pieces


def write_answer(model: VLM, pieces: list[Piece], duration: float) -> str:
    """Return the answer as text with coordinate markup, times in seconds of the clip."""
    # decoded after a line break, for SentencePiece drops the blank that its text begins with
    before = model.tokenizer("\n", add_special_tokens=False).input_ids
    head = len(model.tokenizer.decode(before))
    text, run = "", list[int]()
    for piece in [*pieces, Piece(-1, axis=-2)]:
        if piece.axis == -1:
            run.append(piece.token)
            continue
        text += model.tokenizer.decode(before + run)[head:]
        run = []
        if piece.axis >= 0:
            value = piece.coord * duration if piece.axis == TIME else piece.coord
            text += f"<{MARKUP[piece.axis]}:{value:.4f}>"
    return text.strip(" ")


def _embed_pieces(model: VLM, pieces: list[Piece], device: torch.device) -> Tensor:
    ids = torch.tensor([p.token if p.axis < 0 else 0 for p in pieces], device=device)
    embeds = model.llm.get_input_embeddings()(ids)
    for row, piece in enumerate(pieces):
        if piece.axis >= 0:
            assert model.lape is not None
            coord = torch.tensor([piece.coord], device=device)
            embeds[row] = model.lape.embed(piece.axis, coord)[0].to(embeds.dtype)
    return embeds
