"""Conversations -> tokens: the tokenizer's own chat template, with every content kept as data.

The template is rendered around private markers and the contents are tokenised apart, with special
tokens switched off: text that spells `<|im_end|>` stays text and cannot forge a turn. What is
supervised - each answer and the token that closes it - follows from the same rendering.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

from model.lape.tokens import AXES, LapeTokens
from shards.errors import UserError
from train.data.markup import AXIS, MARKUP, MEDIA_TAGS, split_markup
from train.data.records import MEDIA_TAG, Turn

VERSION = 2
"""Raised whenever `Chat.encode` makes other tokens of the same text: cached lengths are then stale."""
MEDIA = -1
"""Stands in `Encoded.ids` for all tokens of one medium."""
MARKER = re.compile("(\x0b?)\ue000(\\d+)\ue001(\x0b?)")
"""Stands for a turn's text in a template, between blanks that a template which trims texts takes off."""
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens; the lists are parallel."""

    ids: list[int]
    """Token ids, `MEDIA` where a medium's tokens will stand."""
    axis: list[int]
    """The axis of a coordinate token, -1 elsewhere."""
    coord: list[float]
    supervised: list[bool]


class Piece(NamedTuple):
    """A stretch of a conversation: text of the template or of a turn, a medium, or a coordinate."""

    text: str
    """Empty for a medium and a coordinate."""
    template: bool = False
    supervised: bool = False
    """Of a piece of the template: an answer ends here, and its closing tokens are supervised."""
    axis: int = MEDIA
    """The axis of a coordinate, `MEDIA` for a medium."""
    coord: float = 0.0


class Chat:
    """Encodes conversations for one tokenizer, with coordinates as anchors or as plain numbers."""

    def __init__(self, tokenizer: Any, anchors: LapeTokens | None) -> None:
        self.tokenizer = tokenizer
        self.anchors = anchors
        self.template = None if tokenizer.chat_template else PLAIN_TEMPLATE
        # Llama 3's <|eot_id|> is special without being one of the tokenizer's named tokens
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(id_ for id_, token in added if token.special)}
        self.controls = self.special - {tokenizer.unk_token_id}
        self._rendered = lru_cache(maxsize=1024)(self._render)
        self._stamped = lru_cache(maxsize=65536)(self._stamp)
        self._one_at_a_time = Lock()
        turns = [Turn("user", "?"), Turn("assistant", "!")]
        encoded = self.encode(turns, [])
        last = max(place for place, on in enumerate(encoded.supervised) if on)
        self.stop = frozenset({encoded.ids[last], tokenizer.eos_token_id} - {None})

    def encode(
        self, turns: Sequence[Turn], durations: Sequence[float], *, prompt: bool = False
    ) -> Encoded:
        """Return a conversation as tokens; `prompt` ends it where the next answer begins.

        durations: seconds of each medium, in the order of the tags; times are fractions of them.
        Raises UserError where the tags do not fit the media, or a time has no clip to lie in.
        """
        out = Encoded([], [], [], [])
        for piece in self.pieces(turns, durations, prompt=prompt):
            if piece.template:
                ids = self._tokenise([piece.text], split_special=False)[0]
                closing = self._closing(ids) if piece.supervised else 0
                for k, id_ in enumerate(ids):
                    _append(out, id_, supervised=k < closing)
            elif piece.text:
                for id_ in self._tokenise([piece.text], split_special=True)[0]:
                    _append(out, id_, supervised=piece.supervised)
            elif piece.axis == MEDIA:
                _append(out, MEDIA)
            else:
                assert self.anchors is not None
                id_ = self.anchors.token_id(piece.axis, piece.coord)
                _append(out, id_, axis=piece.axis, coord=piece.coord, supervised=piece.supervised)
        return out

    def count(self, talks: Sequence[Sequence[Piece]]) -> list[tuple[int, int]]:
        """Return (tokens without media, supervised tokens) of each conversation's pieces.

        Exactly what `encode` makes of them, many at a time: a text is tokenised once.
        """
        texts = list({p.text: None for talk in talks for p in talk if p.text and not p.template})
        tokens = self._tokenise(texts, split_special=True)
        plain = {text: len(ids) for text, ids in zip(texts, tokens, strict=True)}
        frame: dict[tuple[str, bool], tuple[int, int]] = {}
        counts = []
        for talk in talks:
            total = supervised = 0
            for piece in talk:
                if piece.template:
                    key = piece.text, piece.supervised
                    if key not in frame:
                        ids = self._tokenise([piece.text], split_special=False)[0]
                        frame[key] = len(ids), self._closing(ids) if piece.supervised else 0
                    tokens_here, closing = frame[key]
                    total += tokens_here
                    supervised += closing
                    continue
                here = plain[piece.text] if piece.text else int(piece.axis != MEDIA)
                total += here
                supervised += here * piece.supervised
            counts.append((total, supervised))
        return counts

    def pieces(
        self, turns: Sequence[Turn], durations: Sequence[float], *, prompt: bool = False
    ) -> list[Piece]:
        """Return a conversation in pieces, before anything is tokenised; raises as `encode`."""
        tags = sum(len(MEDIA_TAG.findall(turn.text)) for turn in turns)
        if tags != len(durations):
            raise UserError(
                f"{tags} <video>/<image> tags for {len(durations)} media; write one tag per medium"
            )
        out: list[Piece] = []
        media = iter(durations)
        duration = durations[0] if durations else 0.0
        closing = False
        around = self._rendered(tuple(turn.role for turn in turns), prompt)
        out.append(Piece(around[0], template=True))
        for turn, place in zip(turns, range(1, len(around), 4), strict=True):
            before, _, after, following = around[place : place + 4]
            text = turn.text if before else turn.text.lstrip()
            text = text if after else text.rstrip()
            closing = turn.role == "assistant"
            for part in MEDIA_TAGS.split(text):
                if MEDIA_TAG.fullmatch(part):
                    duration = next(media)
                    out.append(Piece(""))
                elif part:
                    out += self._content(part, duration, closing)
            out.append(Piece(following, template=True, supervised=closing))
        return out

    def in_numbers(self, text: str, duration: float) -> str:
        """Return a text whose anchors by name are written as the times and places that they mean."""

        def written(match: re.Match[str]) -> str:
            _, _, name, anchor = match.groups()
            if not name:
                return match.group()
            axis = AXIS[name]
            share = self._share(axis, int(anchor))
            return f"<{'tyx'[axis]}:{share * duration if axis == 0 else share:.6f}>"

        return MARKUP.sub(written, text)

    def _share(self, axis: int, anchor: int) -> float:
        """Return where an anchor lies on its axis, from 0 to 1; UserError where there is none."""
        bins = self.anchors.counts[axis] if self.anchors else 100
        if anchor >= bins:
            raise UserError(
                f"anchor {anchor:03d} of {AXES[axis]}: the model has {bins}, 000 to {bins - 1:03d}"
            )
        return anchor / (bins - 1)

    def stamp(self, seconds: float) -> list[int]:
        """Return the tokens of a time written before a frame, such as 12.5s, as times in text are."""
        return self._stamped(f"{seconds:.1f}s")

    def _stamp(self, text: str) -> list[int]:
        return self._tokenise([text], split_special=True)[0]

    def _render(self, roles: tuple[str, ...], prompt: bool) -> list[str]:
        """Return the template's own text around turns of these roles, cut by `MARKER`.

        What comes first, then for each turn: a blank if the template keeps those before a text, the
        turn's number, a blank if it keeps those after one, what follows.
        """
        from jinja2 import TemplateError

        messages = [
            {"role": role, "content": f"\x0b\ue000{number}\ue001\x0b"}
            for number, role in enumerate(roles)
        ]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=prompt,
                **({"chat_template": self.template} if self.template else {}),
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} refuses the turns "
                f"{', '.join(roles)}: {error}"
            ) from None
        found = [int(number) for _, number, _ in MARKER.findall(rendered)]
        if found != list(range(len(roles))):
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} shows the turns {found} of "
                f"{len(roles)}; use a tokenizer whose template keeps each turn once and in order"
            )
        return MARKER.split(rendered)

    def _tokenise(self, texts: list[str], *, split_special: bool) -> list[list[int]]:
        """Return the ids of texts; split, what spells a special token stays text."""
        if not texts:
            return []
        # a call switches the tokenizer itself between the two, so that threads must take turns
        with self._one_at_a_time:
            tokens = self.tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=split_special,
                return_attention_mask=False,
                verbose=False,
            )
        found = list(tokens.input_ids)
        if split_special:
            for k, ids in enumerate(found):
                if not self.controls.isdisjoint(ids):
                    found[k] = self._apart(texts[k])
        return found

    def _apart(self, text: str) -> list[int]:
        """Return the ids of a text that spells a control token which is in the plain vocabulary, too.

        Cut in two until no part spells one.
        """
        if len(text) == 1:
            raise UserError(f"the tokenizer reads {text!a} as a control token; leave it out")
        halves = [text[: len(text) // 2], text[len(text) // 2 :]]
        return [id_ for ids in self._tokenise(halves, split_special=True) for id_ in ids]

    def _closing(self, ids: list[int]) -> int:
        """Return how many tokens of the template close an answer: up to its first special one."""
        end = next((k for k, id_ in enumerate(ids) if id_ in self.special), None)
        if end is None:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} closes an answer by no special "
                "token, so a model could not learn to stop; use another template"
            )
        return end + 1

    def _content(self, text: str, duration: float, supervised: bool) -> list[Piece]:
        out: list[Piece] = []
        plain = ""
        for piece in split_markup(text):
            if isinstance(piece, str):
                plain += piece
                continue
            if piece.anchor is None:
                if piece.axis == 0 and not duration > 0:
                    raise UserError(
                        f"<t:{piece.value:g}>: there is no clip with a duration that this time could "
                        "lie in; leave times out of text about pictures or about no medium"
                    )
                coord = piece.value / duration if piece.axis == 0 else piece.value
            else:
                coord = self._share(piece.axis, piece.anchor)
            if self.anchors is None or piece.axis not in self.anchors.axes:
                value = coord * duration if piece.axis == 0 else coord
                plain += f"{value:.1f}" if piece.axis == 0 else f"{value:.3f} "
                continue
            if plain:
                out.append(Piece(plain, supervised=supervised))
                plain = ""
            out.append(Piece("", supervised=supervised, axis=piece.axis, coord=coord))
        if plain:
            out.append(Piece(plain, supervised=supervised))
        return out


def _append(
    out: Encoded, id_: int, *, axis: int = -1, coord: float = 0.0, supervised: bool = False
) -> None:
    out.ids.append(id_)
    out.axis.append(axis)
    out.coord.append(coord)
    out.supervised.append(supervised)
