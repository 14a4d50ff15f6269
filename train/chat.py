"""Conversations -> tokens: the tokenizer's own chat template, with every content kept as data.

The template is rendered around private markers and the contents are tokenised apart, with special
tokens switched off: text that spells `<|im_end|>` stays text and cannot forge a turn. What is
supervised - each answer and the token that closes it - follows from the same rendering.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from train.records import MEDIA_TAG, Turn, split_markup

MEDIA = -1
"""Stands in `Encoded.ids` for all tokens of one medium."""
AXES = ("time", "height", "width")
MARKER = re.compile("\ue000(\\d+)\ue001")
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class AnchorIds(Protocol):
    """What is needed of LAPE's tokens here: how many anchors, and their ids."""

    @property
    def counts(self) -> tuple[int, int, int]: ...

    def token_id(self, axis: int, coord: float) -> int: ...


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens; the lists are parallel."""

    ids: list[int]
    """Token ids, `MEDIA` where a medium's tokens will stand."""
    axis: list[int]
    """The axis of a coordinate token, -1 elsewhere."""
    coord: list[float]
    supervised: list[bool]


class Chat:
    """Encodes conversations for one tokenizer, with coordinates as anchors or as plain numbers."""

    def __init__(self, tokenizer: Any, anchors: AnchorIds | None) -> None:
        self.tokenizer = tokenizer
        self.anchors = anchors
        self.template = None if tokenizer.chat_template else PLAIN_TEMPLATE
        # Llama 3's <|eot_id|> is special without being one of the tokenizer's named tokens
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(id_ for id_, token in added if token.special)}
        turns = [Turn("user", "?"), Turn("assistant", "!")]
        encoded = self.encode(turns, [])
        last = max(place for place, on in enumerate(encoded.supervised) if on)
        self.stop = frozenset({encoded.ids[last], tokenizer.eos_token_id} - {None})

    def encode(
        self, turns: Sequence[Turn], durations: Sequence[float], *, prompt: bool = False
    ) -> Encoded:
        """Return a conversation as tokens; `prompt` ends it where the next answer begins.

        durations: seconds of each medium, in the order of the tags; times are fractions of them.
        Raises ValueError where the tags do not fit the media, or a time has no clip to lie in.
        """
        tags = sum(len(MEDIA_TAG.findall(turn.text)) for turn in turns)
        if tags != len(durations):
            raise ValueError(
                f"{tags} <video>/<image> tags for {len(durations)} media; write one tag per medium"
            )
        messages = [
            {"role": turn.role, "content": f"\ue000{number}\ue001"}
            for number, turn in enumerate(turns)
        ]
        rendered = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=prompt,
            **({"chat_template": self.template} if self.template else {}),
        )
        found = [int(number) for number in MARKER.findall(rendered)]
        if found != list(range(len(turns))):
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path} shows the turns {found} of "
                f"{len(turns)}; use a tokenizer whose template keeps each turn once and in order"
            )
        out = Encoded([], [], [], [])
        media = iter(durations)
        duration = durations[0] if durations else 0.0
        closing = False
        for place, piece in enumerate(MARKER.split(rendered)):
            if place % 2:
                turn = turns[int(piece)]
                closing = turn.role == "assistant"
                for part in re.split(f"({MEDIA_TAG.pattern})", turn.text):
                    if MEDIA_TAG.fullmatch(part):
                        duration = next(media)
                        _append(out, MEDIA)
                    elif part:
                        self._content(out, part, duration, closing)
            else:
                self._template(out, piece, closing)
        return out

    def _template(self, out: Encoded, text: str, closing: bool) -> None:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        end = next((k for k, id_ in enumerate(ids) if id_ in self.special), None)
        if closing and end is None:
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path} closes an answer by no special "
                "token, so a model could not learn to stop; use another template"
            )
        for k, id_ in enumerate(ids):
            _append(out, id_, supervised=closing and end is not None and k <= end)

    def _content(self, out: Encoded, text: str, duration: float, supervised: bool) -> None:
        plain = ""
        for piece in split_markup(text):
            if isinstance(piece, str):
                plain += piece
                continue
            if piece.anchor is None:
                if piece.axis == 0 and not duration > 0:
                    raise ValueError(
                        f"<t:{piece.value:g}>: there is no clip with a duration that this time could "
                        "lie in; leave times out of text about pictures or about no medium"
                    )
                coord = piece.value / duration if piece.axis == 0 else piece.value
            else:
                bins = self.anchors.counts[piece.axis] if self.anchors else 100
                if piece.anchor >= bins:
                    raise ValueError(
                        f"anchor {piece.anchor:03d} of {AXES[piece.axis]}: the model has {bins}, "
                        f"000 to {bins - 1:03d}"
                    )
                coord = piece.anchor / (bins - 1)
            if self.anchors is None:
                value = coord * duration if piece.axis == 0 else coord
                plain += f"{value:.1f}" if piece.axis == 0 else f"{value:.3f} "
                continue
            self._text(out, plain, supervised)
            plain = ""
            id_ = self.anchors.token_id(piece.axis, coord)
            _append(out, id_, axis=piece.axis, coord=coord, supervised=supervised)
        self._text(out, plain, supervised)

    def _text(self, out: Encoded, text: str, supervised: bool) -> None:
        if text:
            tokens = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            for id_ in tokens.input_ids:
                _append(out, id_, supervised=supervised)


def _append(
    out: Encoded, id_: int, *, axis: int = -1, coord: float = 0.0, supervised: bool = False
) -> None:
    out.ids.append(id_)
    out.axis.append(axis)
    out.coord.append(coord)
    out.supervised.append(supervised)
