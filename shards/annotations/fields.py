"""The fields of a row: which are empty, which were read, and which may not be ignored silently.

Datasets have fields that do not affect what is learned (`data_source`, `fps`, `qid`): they are ignored.
A field that could affect it (an answer, options, times, boxes) and that no form has read is a RowError.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from shards.annotations.fault import RowError, short

SAYS_MORE = re.compile(
    r"answers?|answer_(?:id|idx|index|key)|correct_\w+|labels?|gt|ground_truth|targets?"
    r"|option[ _]?\d?|options|candidates|choices|choice_list|a\d"
    r"|questions?|query|queries|prompts?|instructions?|input|output|responses?|chosen|rejected"
    r"|captions?|sentences?|descriptions?|system|system_prompt|system_message"
    r"|subtitles?|audios?|tools|variables|(?:sample_|loss_)?weight",
    re.IGNORECASE,
)
"""Names of fields with questions, answers, or weights of the loss."""
SAYS_WHEN = re.compile(
    r"(?:(?:clip|video|segment|moment|event|action|narration|parent)_)*(?:"
    r"(?:start|end|begin|st|ed|stop)(?:_?(?:times?|timestamps?|secs?|seconds?|ms|frames?|fid|idx|offset))*"
    r"|(?:gt_|relevant_)?(?:times?|time_?spans?|time_?stamps?|spans?|segments?|windows?|moments?"
    r"|intervals?|(?:time|frame)_range)(?:_(?:secs?|seconds?|ms|frames?))?)"
    r"|bbox(?:es)?|box(?:es)?(?:_\w+)?|crop|src|tgt",
    re.IGNORECASE,
)
"""Names of fields that select a part of a medium, if their values are numbers."""
SAID_TOO = {"src", "tgt"}
"""E.T. Instruct's times of a row's `<vid>`; its other file has them in the text as well."""
SLOT = re.compile(r"<[^<>]+>")
"""The name of a slot for a number in a text, such as VTimeLLM's `<s0>`."""
NUMBERS = re.compile(
    r"(?!\d{4}-\d\d-\d\d)(?:[\d\s\[\](){}.,;:'\"~|/>\u2013\u2014+-]|to|frames?|seconds?|secs?|m?s)+",
    re.IGNORECASE,
)
"""Numbers alone as a text: `3`, `5s`, `00:00:05 - 00:00:10`, `[3.0, 7.0]`; not a date."""
PART_IN_FRAMES = "split"
"""Inside of a `meta` of LLaVA-ST: first and last frame of the part that the row is about."""
NAMES_MEDIA = re.compile(
    r"(?:video|image|img|clip|frames?)_?(?:path|file|name|id|dir|folder|url)s?|vid|visuals?|medias?"
    r"|file_?name|frames|audio_path|youtube_id",
    re.IGNORECASE,
)
"""Names of fields that name media in other datasets; ignored where our fields also name media."""


class Fields(dict[str, Any]):
    """A row without its empty fields, which records the fields that are read."""

    def __init__(self, row: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        super().__init__(
            {n: value for n, value in row.items() if n not in ignored and not is_empty(value)}
        )
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def items(self) -> Any:
        # whoever iterates over all fields has read them
        self.read |= set(self)
        return super().items()

    def refuse_unread(self, texts: Sequence[str], *, has_media: bool) -> None:
        """Raise RowError for an unread field that may affect what is learned.

        texts: of the row's turns; a field whose values occur in them is not refused.
        """
        for name in (name for name in self if name not in self.read):
            value = super().__getitem__(name)
            if isinstance(value, dict):
                refuse_part(name, value)
            says_more, says_when, names_media = kinds_of(name)
            more = says_more and not is_said(value, texts)
            when = says_when and any_number(value)
            when = when and not (name in SAID_TOO and is_said(value, texts))
            where = names_media and not has_media
            if more or when or where:
                raise unread(name, value, medium=bool(where))


@lru_cache(maxsize=1024)
def kinds_of(name: str) -> tuple[bool, bool, bool]:
    """Return whether a field's name matches `SAYS_MORE`, `SAYS_WHEN` and `NAMES_MEDIA`."""
    more, when, media = (p.fullmatch(name) for p in (SAYS_MORE, SAYS_WHEN, NAMES_MEDIA))
    return more is not None, when is not None, media is not None


def is_said(value: Any, texts: Sequence[str]) -> bool:
    """Return whether all texts and numbers in a value occur in texts, each as whole words."""
    # `answer` beside a conversation that ends with it says nothing more
    said = "\n".join(texts).casefold()
    return all(
        re.search(rf"(?<!\w){re.escape(leaf.strip().casefold())}(?!\w)", said)
        for leaf in leaves(value)
    )


def refuse_part(name: str, value: Mapping[str, Any]) -> None:
    """Raise RowError where an unread object of a row says which part of its medium the row is about."""
    for inner, place in value.items():
        if isinstance(place, dict):
            refuse_part(f"{name}.{inner}", place)
        if SLOT.fullmatch(inner) and any_number(place):
            raise RowError(
                "a field that nothing reads",
                f"`{short(name)[1:-1]}`: the number for {short(inner)[1:-1]} in the text",
                got=short(place),
                fix="write times into the text as <t:12.5>, seconds of the clip",
            )
        split = inner == PART_IN_FRAMES and isinstance(place, list)
        # whole numbers: VTimeLLM has its parts in seconds
        in_frames = split and all(isinstance(number, int) for number in place)
        if (split or SAYS_WHEN.fullmatch(inner)) and any_number(place):
            unit = "a part of the video, in frames" if in_frames else "a part of the medium"
            hint = "`train.convert llava-st --rates` makes seconds of it; else " * in_frames
            raise RowError(
                "a field that nothing reads",
                f"`{short(name)[1:-1]}.{short(inner)[1:-1]}`: {unit}, and this form of row does not "
                "read it",
                got=short(place),
                fix=f"{hint}{fix_of(name, medium=False, part=True)}",
            )


def refuse_parts(row: Mapping[str, Any], read: Collection[str]) -> None:
    """Raise RowError where a field other than those read says which part of the medium is meant."""
    for name, value in row.items():
        if name in read or is_empty(value):
            continue
        if isinstance(value, dict):
            refuse_part(name, value)
        elif kinds_of(name)[1] and any_number(value):
            raise unread(name, value, medium=False)


def unread(name: str, value: Any, *, medium: bool) -> RowError:
    """Return the error of a field that may affect what is learned and that no form has read."""
    return RowError(
        "a field that nothing reads",
        f"`{short(name)[1:-1]}`: this form of row does not read it",
        got=short(value),
        fix=fix_of(name, medium=medium),
    )


def fix_of(name: str, *, medium: bool, part: bool = False) -> str:
    """Return the fix for a field that nothing reads; part: it says which part of the medium is meant."""
    if name in SAID_TOO:
        return f"write times into the text as <t:12.5>, or set ignore_fields: [{name}]"
    hint = "name the medium `video` or `image`, " if medium else ""
    if part or SAYS_WHEN.fullmatch(name):
        hint = "name a part of a video by `start` and `end`, in seconds, "
    return f"{hint}write it into the text, or set ignore_fields: [{short(name)[1:-1]}]"


def is_empty(value: Any) -> bool:
    """Return whether a field is empty: null, blank text, or a list or object of such values only.

    Arrow and parquet give every row all columns, and every object all fields, that any row has.
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None


def leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a value, at any depth."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    elif value is not None:
        yield str(value)


def any_number(value: Any) -> bool:
    """Return whether a value is a number, also as text, or holds one at any depth."""
    if isinstance(value, list | dict):
        return any(map(any_number, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return any(map(str.isdecimal, value)) and NUMBERS.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def listed(row: Mapping[str, Any], name: str) -> list[Any]:
    """Return a field that must be a list; a text is parsed as json, as in csv and some parquet files."""
    value = row[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            hint = (
                "this looks like a list as Python prints it; write JSON, with double quotes"
                if value.lstrip()[:1] in "[("
                else None
            )
            raise RowError(
                "not a list", f"`{name}` must be a list", got=short(value), fix=hint
            ) from None
    if not isinstance(value, list):
        raise RowError("not a list", f"`{name}` must be a list", got=short(value))
    return value
