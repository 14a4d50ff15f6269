"""Segments of a rendered conversation -> token ids, as if the whole had been tokenised at once.

    Segments(tokenizer).ids([Segment((("<|im_start|>user\\n", True), ("Hello", False)))])

A conversation is cut only where it must be: at media, coordinates, the start of each answer, and at
control tokens that are spelled in a turn's text. Two things would change the ids after a cut, and are
prevented here:

- SentencePiece tokenizers (Llama 2, Vicuna, Mistral) put a blank before any text. So the text before a
  segment is tokenised with it, and its ids are removed.
- Text that spells `<|im_end|>` must stay text, or a turn could close itself. It is tokenised with
  control tokens switched off, and each segment is checked to hold the template's control tokens alone.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

from shards.errors import UserError

ANCHORS = ("\n", "0", "\u00b6")
"""Texts to put before a segment: characters that do not merge with what follows, the usual one first."""


MEDIA = -1
"""Placeholder in `Encoded.ids` for all tokens of one medium."""


class Segment(NamedTuple):
    """The text between two cuts: parts of the template and of turns, side by side."""

    parts: tuple[tuple[str, bool], ...]
    """(text, whether it is of the template), in order."""
    before: str | None = None
    """None at the row's start; the control token that it follows; or empty, in the middle of text."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(text for text, _ in self.parts)


class Segments:
    """Tokenises segments for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Llama 3's <|eot_id|> is special without being one of the tokenizer's named tokens
        added = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()
                 if token.special}  # fmt: skip
        named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        special = named | added
        self._spelled = _any_of(special)
        # an unknown word closes no turn; but some tokenizers have one id for it
        # and for the end of a text
        plain = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
        controls = {name: id_ for name, id_ in special.items() if id_ not in plain}
        self.controls_in = _any_of(controls)
        """Finds the control tokens in a template."""
        self.controls = frozenset(controls.values())
        """Ids that only the template may put into a row."""
        # of the template's own texts, of which there are few
        self._last_control = lru_cache(self._find_last_control)
        self._controls_of = lru_cache(lambda text: len(self.controls_in.findall(text)))
        self._one_at_a_time = Lock()
        newline, both = self._tokenise(["\n", "\na"], split=False)
        (alone,) = self._tokenise(["a"], split=False)
        self.prefixes = both != newline + alone
        """Whether the tokenizer puts something, such as a blank, before any text."""

    def cut(self, text: str) -> list[tuple[str, bool]]:
        """Return a turn's text as (piece, whether it spells a control token)."""
        # nearly all texts: none spells a control token
        if text and not self._spelled.search(text):
            return [(text, False)]
        pieces, at = [], 0
        for match in self._spelled.finditer(text):
            pieces += [(text[at : match.start()], False), (match.group(), True)]
            at = match.end()
        return [(piece, spells) for piece, spells in [*pieces, (text[at:], False)] if piece]

    def last_control(self, text: str) -> str:
        """Return the control token that a template's text ends with, empty where it ends otherwise."""
        return self._last_control(text)

    def _find_last_control(self, text: str) -> str:
        found = [match for match in self.controls_in.finditer(text) if match.end() == len(text)]
        return found[-1].group() if found else ""

    def ids(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Return the ids of segments, many at a time."""
        whole = [k for k, one in enumerate(segments) if not self._is_spelled(one)]
        found: list[list[int]] = [[] for _ in segments]
        texts = [(segments[k].text, segments[k].before) for k in whole]
        for k, ids in zip(whole, self._in_context(texts, split=False), strict=True):
            found[k] = ids if self._is_true(segments[k], ids) else self._piecewise(segments[k])
        for k in set(range(len(segments))) - set(whole):
            found[k] = self._plain(segments[k].text, segments[k].before)
        return found

    def _is_spelled(self, segment: Segment) -> bool:
        """Return whether a segment is a control token that a text spells, and nothing else."""
        (text, template), *more = segment.parts
        return not more and not template and self._spelled.fullmatch(text) is not None

    def _is_true(self, segment: Segment, ids: Sequence[int]) -> bool:
        """Return whether a segment's control tokens are those of the template."""
        template = "\n".join(text for text, of_template in segment.parts if of_template)
        return sum(id_ in self.controls for id_ in ids) == self._controls_of(template)

    def _piecewise(self, segment: Segment) -> list[int]:
        """Return the ids of a segment whose texts would give control tokens: part by part."""
        ids, before = [], segment.before
        for text, template in segment.parts:
            if template:
                ids += self._in_context([(text, before)], split=False)[0]
            else:
                ids += self._plain(text, before)
            before = self.last_control(text) if template else ""
        return ids

    def _plain(self, text: str, before: str | None) -> list[int]:
        """Return the ids of a text of which nothing may become a control token.

        Where one is in the plain vocabulary too, the text is cut in two until no part spells it.
        """
        # a control token before it would be tokenised as plain text as well
        (ids,) = self._in_context([(text, before and "")], split=True)
        if self.controls.isdisjoint(ids):
            return ids
        if len(text) == 1:
            raise UserError(f"the tokenizer reads {text!a} as a control token; leave it out")
        # in halves: the text stays as it is, only its tokens are shorter
        middle = len(text) // 2
        return [*self._plain(text[:middle], before), *self._plain(text[middle:], "")]

    def _in_context(
        self, texts: Sequence[tuple[str, str | None]], *, split: bool
    ) -> list[list[int]]:
        """Return the ids of texts, each given with the text before it, whose ids are removed."""
        if not self.prefixes:
            return self._tokenise([text for text, _ in texts], split=split)
        first = [before if before is None else before or ANCHORS[0] for _, before in texts]
        wholes = self._tokenise(
            [(anchor or "") + text for anchor, (text, _) in zip(first, texts, strict=True)],
            split=split,
        )
        heads = dict(zip(anchors := [*{a for a in first if a}],
                         self._tokenise(anchors, split=split), strict=True))  # fmt: skip
        found = []
        for (text, _), anchor, ids in zip(texts, first, wholes, strict=True):
            head = heads[anchor] if anchor else []
            # the anchor's ids must stand at the front unchanged, or it has merged with the text
            same = ids[: len(head)] == head
            found.append(ids[len(head) :] if same else self._after_another(text, split=split))
        return found

    def _after_another(self, text: str, *, split: bool) -> list[int]:
        """Return the ids of a text that merges with the usual anchor, by another one."""
        for anchor in ANCHORS[1:]:
            head, ids = self._tokenise([anchor, anchor + text], split=split)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        raise UserError(
            f"{text[:40]!a} cannot be tokenised in the middle of a text by "
            f"{self.tokenizer.name_or_path}: it merges with any text before it"
        )

    def _tokenise(self, texts: Sequence[str], *, split: bool) -> list[list[int]]:
        """Return the ids of texts; split: a special token that is spelled stays text."""
        if not texts:
            return []
        # `split_special_tokens` changes the tokenizer's own state during a call: one thread at a time
        with self._one_at_a_time:
            tokens = self.tokenizer(
                list(texts),
                add_special_tokens=False,
                split_special_tokens=split,
                return_attention_mask=False,
                verbose=False,
            )
        return list(tokens.input_ids)


NOT, WHOLLY, CLOSING = range(3)
"""Supervised tokens of a piece: none, all, or all up to the control token that closes the answer."""


class Piece(NamedTuple):
    """A part of a conversation between two cuts: text, a medium, or a coordinate."""

    segment: Segment | None
    """None for a medium and a coordinate."""
    learned: int = NOT
    axis: int = MEDIA
    """The axis of a coordinate, `MEDIA` for a medium."""
    coord: float = 0.0


class Pieces:
    """Collects a conversation's pieces, joining texts that need not be cut apart."""

    def __init__(self, segments: Segments, before: str | None = None) -> None:
        """before: the control token that the first piece follows, None at a row's start."""
        self.segments = segments
        self.pieces: list[Piece] = []
        self.learned = NOT
        """For the text that is added next: `NOT`, `WHOLLY` or `CLOSING`."""
        self._parts: list[tuple[str, bool]] = []
        self.before = before
        """The control token before the next piece, or empty."""

    def template(self, text: str) -> None:
        """Add text that the template writes, whose control tokens count as such."""
        if text:
            self._parts.append((text, True))

    def text(self, text: str) -> None:
        """Add text of a turn, in which a control token is spelled out, not one."""
        for piece, spells_control in self.segments.cut(text):
            if spells_control:
                self.cut()
            self._parts.append((piece, False))
            if spells_control:
                self.cut()

    def close(self, text: str) -> None:
        """Add what the template writes after an answer."""
        self.template(text)
        self.learned = CLOSING
        if not self._parts:
            self.pieces.append(Piece(Segment((("", True),), ""), CLOSING))

    def medium(self, around: tuple[str, str] | None) -> None:
        """Add a medium between control tokens, which are never supervised."""
        if around is None:
            self.add()
            return
        self.cut()
        before, self.learned = self.learned, NOT
        self.template(around[0])
        self.add()
        self.template(around[1])
        if before != NOT:
            self.cut()
            self.learned = before

    def add(self, axis: int = MEDIA, coord: float = 0.0) -> None:
        """Add a medium or a coordinate."""
        self.cut()
        learned = WHOLLY if self.learned == WHOLLY and axis != MEDIA else NOT
        self.pieces.append(Piece(None, learned, axis, coord))
        self.before = ""

    def cut(self) -> None:
        """End the current piece of text."""
        if self._parts:
            self.pieces.append(Piece(Segment(tuple(self._parts), self.before), self.learned))
            text, template = self._parts[-1]
            self.before = self.segments.last_control(text) if template else ""
            self._parts = []
        if self.learned == CLOSING:
            self.learned = NOT


def _any_of(names: Any) -> re.Pattern[str]:
    """Return a pattern of any of these strings, the longest first; of none, one that never matches."""
    alternatives = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, alternatives)) or r"(?!)")
