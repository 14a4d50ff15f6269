"""Rows of the forms that people have -> rows of ours; each form is told by its shape.

    canonical({"video": "a.mp4", "question": "Who is it?", "answer": "she"})

Ours: `{id, video, start?, end?, task?, conversations: [{from: human|gpt|system, value}]}` with one
`<video>` or `<image>` tag for each medium. Every form is one function in `FORMS`: a row and its media
-> turns. What is wrong with a row is a UserError that does not yet say where; a row that could be
read in two ways is refused.
"""

import json
import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from shards.errors import UserError

Json = dict[str, Any]

MEDIA_TAG = re.compile(r"<(?:video|image)>")
COORDINATE_SLOT = re.compile(r"<(TEMP|HEIGHT|WIDTH)-(INPUT|OUTPUT)>")
VARIABLES = {
    ("TEMP", "INPUT"): "temporal_input_locations",
    ("TEMP", "OUTPUT"): "temporal_output_locations",
    ("HEIGHT", "INPUT"): "spatial_height_input_locations",
    ("HEIGHT", "OUTPUT"): "spatial_height_output_locations",
    ("WIDTH", "INPUT"): "spatial_width_input_locations",
    ("WIDTH", "OUTPUT"): "spatial_width_output_locations",
}
"""LLaVA-ST: the numbers that stand at each slot of its texts (LLaVA-ST, inference/src/utils.py)."""
DESCRIBE = "Describe this in detail."
"""What is asked where a row has a caption and no question."""


def canonical(row: Any, *, media_only: bool = False) -> Json:
    """Return a row of any known form as one of ours; UserError where it has none, or two.

    media_only: a row may have none, but for its media.
    """
    if not isinstance(row, dict):
        raise UserError(f"expected an object, got {type(row).__name__}")
    # parquet fills in what other rows have
    row = {name: value for name, value in row.items() if value is not None}
    forms = [name for name in FORMS if name in row]
    if len({"conversations", "messages"} & set(forms)) == 1:
        forms = forms[:1]  # what else it has is about the conversation, not another one
    if len(forms) != 1 and not (media_only and not forms):
        fields = _short(", ".join(map(str, row)) or "nothing")
        got = f"both {' and '.join(forms)}" if forms else fields
        raise UserError(f"expected an object with one of {', '.join(FORMS)}; got {got}")
    out = {name: row[name] for name in ("id", "start", "end", "task") if name in row}
    named = Media(row)
    turns = FORMS[forms[0]](row, named) if forms else []
    if forms and "variables" in row:
        turns = filled_in(turns, row["variables"])
    media = named.in_order(turns) if forms else [path for _, path in named.listed]
    if named.part.keys() & out.keys():
        raise UserError("start and end both in a message and in the row; keep one")
    out |= named.part
    if media:
        out["video"] = media[0] if len(media) == 1 else media
    return out | {"conversations": turns}


class Media:
    """The media of a row: those in its own fields, and those that its messages bring."""

    def __init__(self, row: Json) -> None:
        self.listed: list[tuple[str, str]] = []
        """(`video` or `image`, path) of the row's own fields."""
        for kind in ("video", "image"):
            fields = [name for name in (kind, f"{kind}s") if name in row]
            if len(fields) > 1:
                raise UserError(f"both {' and '.join(fields)} name media; keep one")
            for name in fields:
                value = row[name] if isinstance(row[name], list) else [row[name]]
                self.listed += [(kind, path_of(medium)) for medium in value]
        self.brought: list[str] = []
        self.part: Json = {}
        """`start` and `end`, where a message says them."""

    def tag(self, part: Json) -> str:
        """Return the tag of a medium in a message's content, and keep its path if it names one."""
        kind = "image" if "image" in str(part["type"]) else "video"
        source = part.get(kind, part.get(f"{kind}_url", part.get("path", part.get("url"))))
        if isinstance(source, dict) and "url" in source:
            source = source["url"]
        if source is not None:
            self.brought.append(path_of(source))
        times = {name.removeprefix("video_"): part[name] for name in PART_TIMES if name in part}
        self.part |= times
        return f"<{kind}>"

    def in_order(self, turns: Sequence[Json]) -> list[str]:
        """Return the paths in the order of the tags; how many there are is not checked here."""
        if self.brought and self.listed:
            raise UserError("media both in the messages and in a field of the row; keep one")
        if self.part and len(self.brought or self.listed) > 1:
            raise UserError("video_start and video_end of several media; make a record of each")
        kinds = {kind for kind, _ in self.listed}
        if self.brought or len(kinds) < 2:
            return self.brought or [path for _, path in self.listed]
        tags = [tag[1:-1] for turn in turns for tag in MEDIA_TAG.findall(str(turn.get("value")))]
        if sorted(tags) != sorted(kind for kind, _ in self.listed):
            counts = ", ".join(
                f"{tags.count(kind)} <{kind}> tags for {sum(k == kind for k, _ in self.listed)}"
                for kind in ("video", "image")
            )
            raise UserError(f"{counts}: which tag is which medium? write one tag of its kind each")
        waiting = {kind: iter([p for k, p in self.listed if k == kind]) for kind in kinds}
        return [next(waiting[kind]) for kind in tags]


PART_TIMES = ("video_start", "video_end")


def path_of(medium: Any) -> str:
    """Return the path of a medium; UserError for what is none: a URL, frames, embedded bytes."""
    if isinstance(medium, dict) and isinstance(medium.get("path"), str):
        if medium.get("bytes") is not None:
            raise UserError("a medium's bytes are in the row; write them to a file and name that")
        medium = medium["path"]
    if isinstance(medium, list):
        raise UserError(
            f"a medium is a list of {len(medium)} frames; name the folder that they are in"
        )
    if not isinstance(medium, str) or not medium:
        raise UserError(f"a medium must be a path, got {_short(medium)}")
    if medium.startswith("file://"):
        return medium.removeprefix("file://")
    if re.match(r"data:|[a-z0-9]+://", medium):
        raise UserError(f"a medium must be a path, got {_short(medium)}; download it first")
    return medium


def turn_of(turn: Any, media: Media) -> Json:
    """Return a turn `{from, value}` or `{role, content}` as `{from, value}`."""
    if not isinstance(turn, dict):
        raise UserError(f"a turn needs `from` (human or gpt) and `value`, got {_short(turn)}")
    pairs = [pair for pair in (("from", "value"), ("role", "content")) if pair[0] in turn]
    if len(pairs) != 1 or turn.get(pairs[0][1]) is None:
        raise UserError(
            f"a turn needs `from` (human or gpt) and `value`, or `role` and `content`, got {_short(turn)}"
        )
    who, what = turn[pairs[0][0]], turn[pairs[0][1]]
    if isinstance(what, list):
        what = "".join(_content(part, media) for part in what)
    if not isinstance(what, str):
        raise UserError(f"a turn's {pairs[0][1]} must be a text or a list, got {_short(what)}")
    return {"from": str(who), "value": what}


def _content(part: Any, media: Media) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UserError(f"a part of a message must be an object with `type`, got {_short(part)}")
    part = {name: value for name, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("video", "image", "video_url", "image_url"):
        return media.tag(part)
    raise UserError(
        f"a part of a message must have `type` text, video or image, got {_short(part)}"
    )


def one_round(media: Media, asked: str, answered: str) -> list[Json]:
    """Return the turns of a question and its answer, with tags of the row's media before it."""
    own = MEDIA_TAG.search(asked)
    tags = "" if own else "".join(f"<{kind}>\n" for kind, _ in media.listed)
    return [{"from": "human", "value": tags + asked}, {"from": "gpt", "value": answered}]


def conversations(row: Json, media: Media) -> list[Json]:
    return [turn_of(turn, media) for turn in _listed(row, "conversations")]


def messages(row: Json, media: Media) -> list[Json]:
    return [turn_of(turn, media) for turn in _listed(row, "messages")]


def question(row: Json, media: Media) -> list[Json]:
    return one_round(media, *asked_and_answered(row))


def caption(row: Json, media: Media) -> list[Json]:
    return one_round(media, str(row.get("prompt", DESCRIBE)), str(row["caption"]))


FORMS: dict[str, Callable[[Json, Media], list[Json]]] = {
    "conversations": conversations,
    "messages": messages,
    "question": question,
    "caption": caption,
}
"""The field that tells the form of a row, and what makes turns of it."""


def asked_and_answered(row: Json) -> tuple[str, str]:
    """Return the question and the answer of a row; with options, lettered, of a multiple choice."""
    if "answer" not in row:
        raise UserError("a question without `answer`")
    question, answer = str(row["question"]), row["answer"]
    numbered = sorted(name for name in row if re.fullmatch(r"a\d", name))
    if numbered and "options" in row:
        raise UserError("both options and a0, a1 ... name the options; keep one")
    options = [str(row[name]) for name in numbered]
    if "options" in row:
        options = [str(option) for option in _listed(row, "options")]
    if not options:
        return question, str(answer)
    plain = [re.sub(r"^\(?[A-Z][.):]\s*", "", option) for option in options]
    lines = [
        f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, plain, strict=False)
    ]
    said = str(answer).strip()
    meant = {
        k
        for k, names in enumerate(zip(options, plain, lines, strict=True))
        # a0 is answer 0, as the columns say; where options are a list, nothing says where 0 is
        if said in names
        or re.fullmatch(rf"\(?{lines[k][0]}[.)]?", said.upper())
        or (numbered and said == str(k))
    }
    if len(meant) != 1:
        many = "more than one of" if meant else "none of"
        raise UserError(
            f"answer {_short(answer)} is {many} the options; write its letter, A to {lines[-1][0]}"
        )
    asked = "\n".join([question, *lines, "Answer with the letter and the option."])
    return asked, lines[meant.pop()]


def filled_in(turns: Sequence[Json], variables: Any) -> list[Json]:
    """Return LLaVA-ST's turns with the numbers of `variables` at their slots, as markup.

    Times are shares of the clip there: `<TEMP-INPUT>` and 0.413 become `<t:41.3%>`.
    """
    if not isinstance(variables, dict):
        raise UserError(f"`variables` must be an object of lists, got {_short(variables)}")
    variables = {name: numbers for name, numbers in variables.items() if numbers is not None}
    lists = {slot: _listed({name: [], **variables}, name) for slot, name in VARIABLES.items()}
    waiting = {slot: iter(numbers) for slot, numbers in lists.items()}
    texts = "".join(turn["value"] for turn in turns)
    for slot, name in VARIABLES.items():
        slots, numbers = texts.count(f"<{'-'.join(slot)}>"), len(lists[slot])
        if slots != numbers:
            raise UserError(f"{slots} <{'-'.join(slot)}> for {numbers} numbers in {name}")

    def markup(match: re.Match[str]) -> str:
        axis, side = match.group(1), match.group(2)
        value = next(waiting[axis, side])
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            name = VARIABLES[axis, side]
            raise UserError(f"{name}: {_short(value)} is no share of the clip or frame, 0 to 1")
        exact = Decimal(repr(value))
        if axis == "TEMP":
            return f"<t:{(exact * 100).normalize():f}%>"
        return f"<{'x' if axis == 'WIDTH' else 'y'}:{exact:f}>"

    return [turn | {"value": COORDINATE_SLOT.sub(markup, turn["value"])} for turn in turns]


def _listed(row: Json, name: str) -> list[Any]:
    """Return a field that must be a list; json in a text is read, as csv and some parquet have it."""
    value = row[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise UserError(f"`{name}` must be a list, got {_short(value)}") from None
    if not isinstance(value, list):
        raise UserError(f"`{name}` must be a list, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
