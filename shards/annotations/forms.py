"""Rows in the forms of other datasets -> rows in ours; a form is recognised by its fields.

    canonical({"video": "a.mp4", "question": "Who is it?", "answer": "she"})

Ours: `{id, video, start?, end?, task?, data_source?, conversations: [{from: human|gpt|system, value}]}`
with one `<video>` or `<image>` tag for each medium; a `timeline` in place of `video` is one medium.
A fault is a RowError, without its place yet; a row that could be read in two ways is refused.

Add a form: a function in `FORMS`, a row and its media -> turns, under the field that identifies it.
Encoding and training then both read it. A benchmark whose annotations are to be converted first is an
importer (`train/data/importers.py`).
"""

import re
from collections.abc import Callable, Collection, Sequence
from decimal import Decimal
from typing import Any

from shards.annotations.answers import asked_and_answered
from shards.annotations.fault import RowError, UnsupervisedError, json_type, short
from shards.annotations.fields import Fields, is_empty, listed
from shards.annotations.timeline import Cut, cuts_of

Json = dict[str, Any]

MEDIA_TAG = re.compile(r"(?<!\\)<(?:video|image)>")
"""The tag of a medium in a text; `\\<image>` is the literal text."""
COORDINATE_SLOT = re.compile(r"<(TEMP|HEIGHT|WIDTH)-(INPUT|OUTPUT)>")
VARIABLES = {
    ("TEMP", "INPUT"): "temporal_input_locations",
    ("TEMP", "OUTPUT"): "temporal_output_locations",
    ("HEIGHT", "INPUT"): "spatial_height_input_locations",
    ("HEIGHT", "OUTPUT"): "spatial_height_output_locations",
    ("WIDTH", "INPUT"): "spatial_width_input_locations",
    ("WIDTH", "OUTPUT"): "spatial_width_output_locations",
}
"""LLaVA-ST: the variable with the numbers of each kind of slot (LLaVA-ST, inference/src/utils.py)."""
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
"""Roles by their names in datasets, in lower case."""
TAGS = "tags do not fit the media"
TURNS = "turns of no known form"
SLOTS = "slots and variables do not fit"
DESCRIBE = "Describe this in detail."
"""The question of a row with a caption and no question."""


def tags_in(text: str) -> int:
    """Return the number of media tags in a text."""
    return len(MEDIA_TAG.findall(text)) if "<video>" in text or "<image>" in text else 0


def canonical(row: Any, *, media_only: bool = False, ignored: Collection[str] = ()) -> Json:
    """Return a row of any known form in our form; raises RowError if it has none, or two.

    media_only: a row needs no form, only media. ignored: fields that are not read.
    """
    if not isinstance(row, dict):
        raise RowError("no known form", f"expected an object, got {json_type(row)}")
    # which fields are read is recorded: what is left over and may matter is refused at the end
    fields = Fields(row, ignored)
    form = form_of(row, fields, media_only)
    out = {n: fields[n] for n in ("id", "start", "end", "task", "data_source") if n in fields}
    named = Media(fields)
    turns = FORMS[form](fields, named) if form else []
    said = "\n".join([turn["value"] for turn in turns])
    slots = "PUT>" in said and COORDINATE_SLOT.search(said)
    if "variables" in fields or (slots and not media_only):
        turns = filled_in(turns, fields.get("variables", {}))
    turns = [*system_turn(fields, turns), *turns]
    media = named.in_order(turns) if form else [path for _, path in named.listed]
    if named.part.keys() & out.keys():
        raise RowError("two readings", "start and end both in a message and in the row; keep one")
    out |= named.part
    if named.timeline:
        if extra := out.keys() & {"start", "end"}:
            name = min(extra)
            raise RowError(
                "two readings", f"`{name}` beside a timeline, whose parts have their own"
            )
        out["timeline"] = [cut.to_json() for cut in named.timeline]
    elif media:
        out["video"] = media[0] if len(media) == 1 else media
    if not media_only:
        fields.refuse_unread([turn["value"] for turn in turns], has_media=bool(media))
    return out | {"conversations": turns}


def form_of(row: Json, fields: Fields, media_only: bool) -> str:
    """Return the name of a row's form, or "" where it may have none. fields: its non-empty fields."""
    forms = [name for name in FORMS if name in fields]
    if len({"conversations", "messages"} & set(forms)) == 1:
        forms = forms[:1]  # its other fields are about the conversation, not another one
    if len(forms) == 1:
        return forms[0]
    if not forms and media_only:
        return ""
    if not forms and (empty := [name for name in FORMS if name in row]):
        raise UnsupervisedError("no supervised text", f"`{empty[0]}` is empty")
    got = f"both {' and '.join(forms)}" if forms else short(", ".join(map(str, row)) or "nothing")
    raise RowError(
        "two readings" if forms else "no known form",
        f"expected an object with one of {', '.join(FORMS)}; got {got}",
        fix=next((fix for name, fix in ELSEWHERE.items() if name in row), None),
    )


_CONVERT = "this is an annotation of {0}: python -m train.convert {0} makes records of it"
ELSEWHERE = {
    "relevant_windows": _CONVERT.format("qvhighlights"),
    "timestamps": _CONVERT.format("activitynet-captions"),
    "st_time": _CONVERT.format("hc-stvg"),
    "bbox": _CONVERT.format("refcoco"),
    "captions": "write one text as `caption`, or a conversation about the captions",
}
"""Fixes for rows that no form reads, by a field of theirs."""
SYSTEM = ("system", "system_prompt", "system_message")
"""Fields whose text comes before the first turn."""


def system_turn(fields: Fields, turns: Sequence[Json]) -> list[Json]:
    """Return a row's system prompt as a turn, unless it has none or its turns contain it."""
    texts = {name: fields[name] for name in SYSTEM if name in fields}
    if not texts:
        return []
    for name, text in texts.items():
        if not isinstance(text, str):
            raise RowError("not a text", f"`{name}`", got=short(text), expected="a text")
    # a system prompt in both places is fine if it is one text: exporters repeat it
    own = [turn["value"] for turn in turns[:1] if turn["from"] == "system"]
    if len({text.strip() for text in [*own, *texts.values()]}) > 1:
        where = [*texts, *(["the first turn"] if own else [])]
        raise RowError("two readings", f"{' and '.join(where)} are different system prompts")
    return [] if own else [{"from": "system", "value": text} for text in [*texts.values()][:1]]


# -- media


class Media:
    """The media of a row: those in its fields, and those in its messages."""

    def __init__(self, row: Json) -> None:
        self.listed: list[tuple[str, str]] = []
        """(`video` or `image`, path) of the row's own fields."""
        self.folder = row.get("media_dir", "")
        """VILA's `media_dir`: the folder of the paths, relative to the root."""
        if not isinstance(self.folder, str):
            raise RowError("bad medium", f"media_dir must be a folder, got {short(self.folder)}")
        for kind in ("video", "image"):
            fields = [name for name in (kind, f"{kind}s") if name in row]
            if len(fields) > 1:
                raise RowError("two readings", f"both {' and '.join(fields)} name media; keep one")
            for name in fields:
                value = row[name] if isinstance(row[name], list) else [row[name]]
                media = [medium for medium in value if not is_empty(medium)]
                self.listed += [(kind, self._path(medium, name)) for medium in media]
        self.timeline: list[Cut] = []
        """The parts of a medium that is joined from parts."""
        if "timeline" in row:
            self.timeline = cuts_of(row, lambda video: self._path(video, "timeline"))
            if self.listed:
                named = f"both timeline and {self.listed[0][0]} name media; keep one"
                raise RowError("two readings", named)
            self.listed = [("video", "timeline")]
        self._apply_is_video(row.get("is_video"))
        self.brought: list[str] = []
        self.part: Json = {}
        """`start` and `end`, if a message has them."""

    def _path(self, medium: Any, field: str) -> str:
        path = path_of(medium, field)
        return f"{self.folder.rstrip('/')}/{path}" if self.folder else path

    def _apply_is_video(self, said: object) -> None:
        """Treat the image of a row with VILA's `is_video: true` as a video."""
        kinds = [kind for kind, _ in self.listed]
        if said is None or not kinds:
            return
        if said not in (True, False):
            raise RowError("bad medium", f"is_video must be true or false, got {short(said)}")
        if not said and "video" in kinds:
            raise RowError("two readings", "is_video is false, and `video` names one; keep one")
        if said and len(kinds) > 1:
            raise RowError(
                "bad medium",
                f"is_video with {len(kinds)} media: are they the frames of one?",
                fix="name the folder that they are in as `video`",
            )
        if said:
            self.listed = [("video", path) for _, path in self.listed]

    def tag(self, part: Json) -> str:
        """Return the tag of a medium in a message, and record its path if the message has one."""
        kind = "image" if "image" in str(part["type"]) else "video"
        source = part.get(kind, part.get(f"{kind}_url", part.get("path", part.get("url"))))
        if isinstance(source, dict) and "url" in source:
            source = source["url"]
        if not is_empty(source):
            self.brought.append(self._path(source, kind))
        # Qwen-VL's messages carry the part of a video beside its path
        times = {name.removeprefix("video_"): part[name] for name in PART_TIMES if name in part}
        self.part |= times
        return f"<{kind}>"

    def in_order(self, turns: Sequence[Json]) -> list[str]:
        """Return the paths in the order of the tags; their number is checked elsewhere."""
        if self.brought and self.listed:
            raise RowError(
                "two readings", "media both in the messages and in a field of the row; keep one"
            )
        if self.part and len(self.brought or self.listed) > 1:
            raise RowError(
                "two readings", "video_start and video_end of several media; make a record of each"
            )
        kinds = {kind for kind, _ in self.listed}
        if self.brought or len(kinds) < 2:
            return self.brought or [path for _, path in self.listed]
        tags = [tag[1:-1] for turn in turns for tag in MEDIA_TAG.findall(str(turn.get("value")))]
        if sorted(tags) != sorted(kind for kind, _ in self.listed):
            counts = ", ".join(
                f"{tags.count(kind)} <{kind}> tags for {sum(k == kind for k, _ in self.listed)}"
                for kind in ("video", "image")
            )
            raise RowError(
                TAGS, f"{counts}: which tag is which medium? write one tag of its kind each"
            )
        # pictures and videos in fields of their own: the tags alone say how they alternate
        waiting = {kind: iter([p for k, p in self.listed if k == kind]) for kind in kinds}
        return [next(waiting[kind]) for kind in tags]


PART_TIMES = ("video_start", "video_end")


def path_of(medium: Any, field: str) -> str:
    """Return the path of a field's medium; raises RowError for a URL, frames or embedded bytes."""
    if isinstance(medium, dict) and isinstance(medium.get("path"), str):
        if medium.get("bytes") is not None:
            raise RowError(
                "bad medium",
                f"`{field}`: a medium's bytes are in the row; write them to a file and name that",
            )
        medium = medium["path"]
    if isinstance(medium, list):
        raise RowError(
            "bad medium",
            f"`{field}`: a medium is a list of {len(medium)} frames; name the folder that they are in",
        )
    if not isinstance(medium, str) or not medium:
        raise RowError("bad medium", f"`{field}`: a medium must be a path, got {short(medium)}")
    if medium.startswith("file://"):
        return medium.removeprefix("file://")
    if re.match(r"data:|[a-z0-9]+://", medium):
        raise RowError(
            "bad medium",
            f"`{field}`: a medium must be a path, got {short(medium)}; download it first",
        )
    return medium


# -- turns


def turn_of(turn: Any, media: Media) -> Json:
    """Return a turn `{from, value}` or `{role, content}` as `{from, value}`; a null answer is empty."""
    needs = "a turn needs `from` (human or gpt) and `value`"
    if not isinstance(turn, dict):
        raise RowError(TURNS, f"{needs}, got {short(turn)}")
    who, what = turn.get("from"), turn.get("value")
    # nearly all turns: there is nothing else to read
    if len(turn) == 2 and isinstance(who, str) and who in ROLES and isinstance(what, str):
        return turn
    pairs = [
        pair for pair in (("from", "value"), ("role", "content")) if not is_empty(turn.get(pair[0]))
    ]
    if len(pairs) != 1 or pairs[0][1] not in turn:
        raise RowError(TURNS, f"{needs}, or `role` and `content`, got {short(turn)}")
    if more := [name for name in TURN_FIELDS if name in turn and not is_empty(turn[name])]:
        raise RowError(
            "a field that nothing reads", f"a turn's `{more[0]}`", got=short(turn[more[0]])
        )
    who, what = turn[pairs[0][0]], turn[pairs[0][1]]
    if isinstance(what, list):
        what = "".join(_content(part, media) for part in what)
    # OpenAI's form has null for an answer that is a tool call; as an empty answer
    # it is refused by name later
    if what is None and ROLES.get(str(who).lower()) == "assistant":
        what = ""
    if not isinstance(what, str):
        raise RowError(TURNS, f"a turn's {pairs[0][1]} must be a text or a list, got {short(what)}")
    return {"from": str(who), "value": what}


TURN_FIELDS = (
    *("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking"),
    *("image", "images", "video", "videos", "audio", "weight"),
)
"""Fields of a turn that would change what is learned and that are not supported: refused."""


def _content(part: Any, media: Media) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError(
            TURNS, f"a part of a message must be an object with `type`, got {short(part)}"
        )
    # Arrow gives every part all fields that any part has, null where it has none
    part = {name: value for name, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("video", "image", "video_url", "image_url"):
        return media.tag(part)
    raise RowError(
        TURNS, f"a part of a message must have `type` text, video or image, got {short(part)}"
    )


def one_round(media: Media, asked: str, answered: str) -> list[Json]:
    """Return the turns of a question and its answer, with tags of the row's media before it."""
    own = MEDIA_TAG.search(asked)
    tags = "" if own else "".join(f"<{kind}>\n" for kind, _ in media.listed)
    return [{"from": "human", "value": tags + asked}, {"from": "gpt", "value": answered}]


def conversations(row: Json, media: Media) -> list[Json]:
    return [turn_of(turn, media) for turn in listed(row, "conversations")]


def messages(row: Json, media: Media) -> list[Json]:
    return [turn_of(turn, media) for turn in listed(row, "messages")]


def question(row: Json, media: Media) -> list[Json]:
    return one_round(media, *asked_and_answered(row))


def caption(row: Json, media: Media) -> list[Json]:
    asked, said = row.get("prompt", DESCRIBE), row["caption"]
    for name, value in (("prompt", asked), ("caption", said)):
        if not isinstance(value, str):
            raise RowError("not a text", f"`{name}`", got=short(value), expected="a text")
    return one_round(media, asked, said)


FORMS: dict[str, Callable[[Json, Media], list[Json]]] = {
    "conversations": conversations,
    "messages": messages,
    "question": question,
    "caption": caption,
}
"""By the field that identifies a form: the function that returns its turns."""


# -- LLaVA-ST's variables


def filled_in(turns: Sequence[Json], variables: Any) -> list[Json]:
    """Return LLaVA-ST's turns with the numbers of `variables` at their slots, as markup.

    Times are fractions of the clip there: `<TEMP-INPUT>` and 0.413 become `<t:41.3%>`.
    """
    if not isinstance(variables, dict):
        raise RowError(SLOTS, f"`variables` must be an object of lists, got {short(variables)}")
    # Arrow gives every row all variables, null where it has none
    variables = {name: numbers for name, numbers in variables.items() if numbers is not None}
    lists = {slot: listed({name: [], **variables}, name) for slot, name in VARIABLES.items()}
    waiting = {slot: iter(numbers) for slot, numbers in lists.items()}
    texts = "".join(turn["value"] for turn in turns)
    for slot, name in VARIABLES.items():
        # one number too few and each later slot would get its neighbour's
        slots, numbers = texts.count(f"<{'-'.join(slot)}>"), len(lists[slot])
        if slots != numbers:
            raise RowError(SLOTS, f"{slots} <{'-'.join(slot)}> for {numbers} numbers in {name}")

    def markup(match: re.Match[str]) -> str:
        axis, side = match.group(1), match.group(2)
        value = next(waiting[axis, side])
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            name = VARIABLES[axis, side]
            raise RowError(
                SLOTS, f"{name}: {short(value)} is no share of the clip or frame, 0 to 1"
            )
        # decimal: 0.57 x 100 is 57, and 56.99999999999999 as floats
        exact = Decimal(repr(value))
        if axis == "TEMP":
            return f"<t:{(exact * 100).normalize():f}%>"
        return f"<{'x' if axis == 'WIDTH' else 'y'}:{exact:f}>"

    return [turn | {"value": COORDINATE_SLOT.sub(markup, turn["value"])} for turn in turns]
