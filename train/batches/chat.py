"""Conversations -> tokens: the tokenizer's own chat template, with every content kept as data.

The template is rendered once for each pattern of roles, around private markers; the texts replace the
markers, and the whole is tokenised in as few pieces as possible (`segments`), since a tokenizer joins
letters across any border that is not a control token. The supervised tokens (each answer and the tokens
that close it) follow from the same rendering, and a prompt is the row cut where the answer begins:
whatever a template writes before an answer (a header, an empty think block, a channel) is in the prompt
exactly as it was in training.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from model.config import CHAT_TEMPLATES, TEMPLATE_DATE
from model.lape.tokens import LapeTokens
from shards.annotations.forms import MEDIA_TAG, tags_in
from shards.errors import UserError
from train.batches.segments import CLOSING, NOT, WHOLLY, Piece, Pieces, Segment, Segments
from train.batches.segments import MEDIA as MEDIA  # of all who read what it encodes
from train.data.coordinates import UNNAMED, anchor_share
from train.data.markup import MEDIA_TAGS, split_markup
from train.data.records import Turn
from train.start.templates import dated

if TYPE_CHECKING:
    from model.vlm import VLM

Stamp = Callable[[float], tuple[list[int], list[int]]]
"""Seconds of a clip -> the tokens before a frame at that time, and those after it."""
MARKER = re.compile("(\x0b?)\ue000(\\d+)\ue001(\x0b?)")
"""Placeholder for a turn's text, between blanks (vertical tabs) that a template which trims removes."""
OWN_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
"""The beginning of an answer that has a think block of its own."""
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*$")
"""The empty think block that a template writes before an answer without one."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens; the lists are parallel."""

    ids: list[int]
    """Token ids, `MEDIA` in the place of a medium's tokens."""
    axis: list[int]
    """The axis of a coordinate token, -1 elsewhere."""
    coord: list[float]
    """The coordinate of such a token, in [0, 1]; 0 elsewhere."""
    supervised: list[bool]
    """Whether the loss counts the token."""
    turns: tuple[int, ...] = ()
    """The place where each independent turn begins; all turns see the tokens before the first."""


Part = tuple[str, str, tuple[float, ...]]
"""The template's text before a turn; the turn's; seconds of the medium before it, then of its own."""


class Stretch(NamedTuple):
    """The turns of a conversation from one answer to where the next one begins.

    Its tokens depend on nothing else of the conversation but the control token that it follows.
    """

    answers: bool
    """Whether its first turn is an answer."""
    parts: tuple[Part, ...]
    end: str
    """The template's text after the last turn."""


class Chat:
    """Encodes conversations for one tokenizer, with coordinates as anchors or as plain numbers."""

    def __init__(
        self,
        tokenizer: Any,
        anchors: LapeTokens | None,
        today: str = TEMPLATE_DATE,
        around: tuple[str, str] | None = None,
        frames: tuple[str, tuple[str, str] | None] = ("", None),
    ) -> None:
        """today: the date, as 2024-07-26, for templates that write one.

        around: control tokens before and after each medium. frames: the format of the time before each
        frame (`TIME_FORMS`), and control tokens before and after each frame.

        Raises UserError where the tokenizer has no chat template, or one that closes answers by no
        control token.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "its tokenizer has no chat template, which says how turns are written",
                where=tokenizer.name_or_path,
                fix=f"set chat_template to one of {', '.join(filter(None, CHAT_TEMPLATES))}",
            )
        self.tokenizer, self.anchors, self.around = tokenizer, anchors, around
        self.time_form, self.around_frames = frames
        tags = [*(around or ()), *(self.around_frames or ())]
        if unknown := [token for token in tags if token not in tokenizer.get_added_vocab()]:
            raise UserError(
                f"media_tags: {', '.join(unknown)} is no control token of its tokenizer",
                where=tokenizer.name_or_path,
                fix="set media_tags: none, or name tokens that it has",
            )
        self.template = dated(tokenizer.get_chat_template(), date.fromisoformat(today))
        self.segments = Segments(tokenizer)
        self.rendered = lru_cache(maxsize=1024)(self._render)
        self._stamped = lru_cache(maxsize=65536)(self._stamp)
        # two answers: a template may close the last one differently
        encoded = self.encode([Turn("user", "?"), Turn("assistant", "!")] * 2, [])
        following = [*encoded.supervised[1:], False]
        ends = {
            id_
            for id_, on, next_on in zip(encoded.ids, encoded.supervised, following, strict=True)
            if on and not next_on
        }
        self.stop = frozenset({*ends, tokenizer.eos_token_id} - {None})

    @classmethod
    def of(cls, model: "VLM") -> "Chat":
        """Return the chat of a model: its tokenizer, anchors, and the date that it was trained with."""
        anchors = model.lape.tokens if model.lape else None
        config = model.config
        frames = config.time_form, config.around_frames
        return cls(model.tokenizer, anchors, config.template_date, config.around_media, frames)

    def encode(
        self, turns: Sequence[Turn], durations: Sequence[float], *, answer: int | None = None
    ) -> Encoded:
        """Return a conversation as tokens.

        durations: seconds of each medium, in the order of the tags; times are fractions of them.
        answer: the number of an assistant's turn; the row then ends where its text would begin, and is
        a prefix of the row that is trained on. Raises UserError where the tags do not fit the media, or
        a time has no clip.
        """
        pieces = self.pieces(turns, durations, answer=answer)
        texts = iter(self.segments.ids([piece.segment for piece in pieces if piece.segment]))
        out = Encoded([], [], [], [])
        for piece in pieces:
            if piece.segment is not None:
                ids = next(texts)
                learned = self._learned(piece, ids)
                for k, id_ in enumerate(ids):
                    _append(out, id_, supervised=k < learned)
            elif piece.axis == MEDIA:
                _append(out, MEDIA)
            else:
                assert self.anchors is not None
                id_ = self.anchors.token_id(piece.axis, piece.coord)
                learns = piece.learned == WHOLLY
                _append(out, id_, axis=piece.axis, coord=piece.coord, supervised=learns)
        return out

    def count(self, talks: Sequence[Sequence[Piece]]) -> list[tuple[int, int]]:
        """Return (tokens without media, supervised tokens) of each conversation's pieces.

        The numbers are those of `encode`, many at a time: a piece that several share is tokenised once.
        """
        unique = list(dict.fromkeys(p.segment for talk in talks for p in talk if p.segment))
        known = dict(zip(unique, self.segments.ids(unique), strict=True))
        counts = []
        for talk in talks:
            total = supervised = 0
            for piece in talk:
                if piece.segment is None:
                    total += piece.axis != MEDIA
                    supervised += piece.learned == WHOLLY
                else:
                    ids = known[piece.segment]
                    total += len(ids)
                    supervised += self._learned(piece, ids)
            counts.append((total, supervised))
        return counts

    def pieces(
        self, turns: Sequence[Turn], durations: Sequence[float], *, answer: int | None = None
    ) -> list[Piece]:
        """Return a conversation in pieces, before anything is tokenised; raises as `encode`."""
        pieces: list[Piece] = []
        before = None
        for stretch in self.stretches(turns, durations, answer=answer):
            own, before = self.cut(stretch, before)
            pieces += own
        return pieces

    def stretches(
        self, turns: Sequence[Turn], durations: Sequence[float], *, answer: int | None = None
    ) -> Iterator[Stretch]:
        """Yield a conversation in stretches, each up to where an answer begins; raises as `encode`."""
        tags = [tags_in(turn.text) for turn in turns]
        if sum(tags) != len(durations):
            raise UserError(
                f"{sum(tags)} <video>/<image> tags for {len(durations)} media; write one tag per medium"
            )
        # times before the first tag belong to the first medium, later ones to the last before them
        duration, seen = durations[0] if durations else 0.0, 0
        rendered = self.rendered(tuple([turn.role for turn in turns]))
        head, parts, begun = rendered[0], list[Part](), False
        for number, turn in enumerate(turns):
            lead, _, trail, following = rendered[1 + 4 * number : 5 + 4 * number]
            if turn.role == "assistant":
                kept = head
                # what follows another answer closes that one, as it is
                if not (begun and len(parts) == 1):
                    if OWN_THOUGHT.match(turn.text):
                        head = EMPTY_THOUGHT.sub("", head)
                    # a blank before an answer belongs to its first token: `▁yes`, not `▁` and `yes`
                    kept = head.rstrip(" ")
                yield Stretch(begun, tuple(parts), kept)
                if number == answer:
                    return
                head, parts, begun = head[len(kept) :], [], True
            text = turn.text if lead else turn.text.lstrip()
            own: tuple[float, ...] = ()
            if "<" in text:
                own = (duration, *durations[seen : seen + tags[number]])
                duration, seen = own[-1], seen + tags[number]
            parts.append((head, text if trail else text.rstrip(), own))
            head = following
        yield Stretch(begun, tuple(parts), head)

    def cut(self, stretch: Stretch, before: str | None) -> tuple[list[Piece], str | None]:
        """Return a stretch's pieces, and the control token that ends it as in `Segment.before`.

        before: the control token that it follows. Raises UserError for a time without a clip.
        """
        out = Pieces(self.segments, before)
        out.learned = WHOLLY if stretch.answers else NOT
        heads = [head for head, _, _ in stretch.parts] + [stretch.end]
        for number, head in enumerate(heads):
            out.close(head) if stretch.answers and number == 1 else out.template(head)
            if number == len(stretch.parts):
                break
            _, text, seconds = stretch.parts[number]
            media = iter(seconds)
            duration = next(media, 0.0)
            for part in MEDIA_TAGS.split(text) if "<" in text else [text]:
                if MEDIA_TAG.fullmatch(part):
                    duration = next(media)
                    out.medium(self.around)
                elif part:
                    self.add_content(out, part, duration)
        out.cut()
        return out.pieces, out.before

    @property
    def counts(self) -> tuple[int, int, int]:
        """Anchors of each axis, by which those named in texts are read."""
        return self.anchors.counts if self.anchors else UNNAMED

    def stamp(self, seconds: float) -> tuple[list[int], list[int]]:
        """Return the tokens before a frame (its time, its tag), and those after it."""
        return self._stamped(self.time_form.format(seconds))

    def _stamp(self, text: str) -> tuple[list[int], list[int]]:
        before, behind = self.around_frames or ("", "")
        stretches = ((text, False), (before, True)), ((behind, True),)
        parts = [tuple(part for part in parts if part[0]) for parts in stretches]
        first, last = (self.segments.ids([Segment(own, "")])[0] if own else [] for own in parts)
        return first, last

    def _render(self, roles: tuple[str, ...]) -> list[str]:
        """Return the template's own text around turns of these roles, cut by `MARKER`.

        First the text before the first turn, then for each turn: a blank if the template keeps blanks
        before its text, the turn's number, a blank if it keeps them after it, the text that follows.
        """
        from jinja2 import TemplateError

        messages = [
            {"role": role, "content": f"\x0b\ue000{number}\ue001\x0b"}
            for number, role in enumerate(roles)
        ]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=self.template
            )
        except (TemplateError, ValueError) as error:
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

    def _learned(self, piece: Piece, ids: Sequence[int]) -> int:
        """Return how many of a piece's first tokens are supervised."""
        if piece.learned != CLOSING:
            return len(ids) if piece.learned == WHOLLY else 0
        end = next((k for k, id_ in enumerate(ids) if id_ in self.segments.controls), None)
        if end is None:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} closes an answer by no special "
                "token, so a model could not learn to stop; use another template"
            )
        return end + 1

    def add_content(self, out: Pieces, text: str, duration: float) -> None:
        """Add a turn's text between two media; duration: seconds of the medium of its times."""
        plain = ""
        for piece in split_markup(text):
            if isinstance(piece, str):
                plain += piece
                continue
            if piece.anchor is None:
                if piece.axis == 0 and not duration > 0:
                    raise UserError(
                        f"<t:{piece.value:g}>: there is no clip with a duration for this time; leave "
                        "times out of text about pictures or about no medium"
                    )
                coord = piece.value / duration if piece.axis == 0 else piece.value
            else:
                coord = anchor_share(piece.axis, piece.anchor, self.counts)
            if self.anchors is None or piece.axis not in self.anchors.axes:
                value = coord * duration if piece.axis == 0 else coord
                plain += f"{value:.1f}" if piece.axis == 0 else f"{value:.3f} "
                continue
            out.text(plain)
            plain = ""
            out.add(piece.axis, coord)
        out.text(plain)


def _append(
    out: Encoded, id_: int, *, axis: int = -1, coord: float = 0.0, supervised: bool = False
) -> None:
    out.ids.append(id_)
    out.axis.append(axis)
    out.coord.append(coord)
    out.supervised.append(supervised)
