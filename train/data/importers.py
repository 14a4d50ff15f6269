"""Grounding benchmarks -> records with coordinate markup, and records -> LLaVA-ST's form.

    python -m train.grounding charades-sta charades_sta_train.txt --out train.jsonl
    python -m train.grounding to-llava-st train.jsonl --bank bank --out llava_st.json

An importer is a function of one annotation that returns rows of ours, or raises UserError without
saying where; a new one is that function and a line in `IMPORTERS`. Times are `<t:seconds>`, a box
is `<x><y><x><y>`, its corners as fractions of the frame.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.annotations.files import Rows, UnreadableRow, read_rows
from shards.annotations.forms import VARIABLES, Json, canonical
from shards.errors import UserError
from shards.format.samples import clip_id
from shards.text import printable
from train.convert import write_rows
from train.data.dataset import shorten
from train.data.markup import AXIS, MARKUP, MEDIA_TAGS, SHARE
from train.data.records import checked_rows, parse_record
from train.settings.config import refuse

WHEN = "<video>\nWhen does this happen: {}"
WHERE = "<image>\nWhere is this: {}"
WHEN_AND_WHERE = "<video>\nWhen does this happen, and where is who does it: {}"
SLACK = 1.0
"""Pixels by which a box may leave its frame: annotations round."""
TUBE_BOXES = 8
"""Boxes of a tube that are written, evenly."""
LLAVA_ST_ANCHORS = 100


def charades_sta(line: str) -> list[Json]:
    """`AO8RW 0.0 6.9##a person is putting a book on a shelf.` (Charades-STA, one a line)."""
    match = re.fullmatch(r"(\S+) ([\d.]+) ([\d.]+) ?##(.*\S.*)", line.strip())
    if not match:
        raise UserError(f"expected `VIDEO START END##SENTENCE`, got {ascii(line)[:80]}")
    video, start, end, sentence = match.groups()
    answer = span(float(start), float(end))
    return [asked(f"{video}_{start}_{end}", f"{video}.mp4", WHEN.format(sentence.strip()), answer)]


def qvhighlights(item: Json) -> list[Json]:
    """`{qid, query, duration, vid, relevant_windows: [[start, end], ...]}` (QVHighlights)."""
    windows = item.get("relevant_windows")
    if not windows:
        raise UserError("no relevant_windows; the test split is published without")
    spans = [span(start, end, item["duration"]) for start, end in windows]
    question = WHEN.format(item["query"])
    return [asked(item["qid"], f"{item['vid']}.mp4", question, ", ".join(spans))]


def refcoco(item: Json) -> list[Json]:
    """`{file_name, width, height, bbox, expression}`, pixels; `boxes` says what bbox holds.

    The file may be called image or img_path, the text sentence, caption or sents (a list or a text).
    """
    image = first(item, "file_name", "image", "img_path")
    texts = first(item, "expression", "sentence", "caption", "sents")
    where = box(item["bbox"], str(item.get("boxes")), float(item["width"]), float(item["height"]))
    name = item.get("id", image)
    texts = texts if isinstance(texts, list) else [texts]
    return [
        asked(f"{name}-{k}" if k else name, image, WHERE.format(text), where)
        for k, text in enumerate(texts)
    ]


def hc_stvg(item: Json) -> list[Json]:
    """`{video, bbox: [[x, y, w, h], ...], st_time, ed_time, img_size: [height, width], English}`.

    One box a frame from st_time to ed_time; the text may be called caption (HC-STVG, v1 and v2).
    """
    start, end = float(item["st_time"]), float(item["ed_time"])
    height, width = item["img_size"]
    boxes = item["bbox"]
    if not boxes:
        raise UserError("a tube without boxes")
    written = min(TUBE_BOXES, len(boxes))
    last = max(1, written - 1)
    places = [k * (len(boxes) - 1) // last for k in range(written)]
    seconds = (end - start) / max(1, len(boxes) - 1)
    tube = [
        f"{time(start + place * seconds)} {box(boxes[place], 'xywh', width, height)}"
        for place in places
    ]
    text = first(item, "English", "caption")
    answer = f"{span(start, end)}: {'; '.join(tube)}"
    return [asked(item["video"], item["video"], WHEN_AND_WHERE.format(text), answer)]


def llava_st(item: Json) -> list[Json]:
    """LLaVA-ST's conversations with slots, and `variables` with the numbers that stand there."""
    return [canonical(item)]


def asked(id_: object, video: str, question: str, answer: str) -> Json:
    """Return a row of ours: a question about a medium, and its answer."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": str(id_), "video": video, "conversations": turns}


def first(item: Json, *names: str) -> Any:
    """Return the first of some fields that an annotation has."""
    found = next((item[name] for name in names if item.get(name) is not None), None)
    if found is None:
        raise UserError(f"none of {', '.join(names)}")
    return found


def time(seconds: float) -> str:
    return f"<t:{seconds:.3f}>"


def span(start: float, end: float, duration: float | None = None) -> str:
    """Return `from <t:start> to <t:end>`; UserError where it is none, or ends behind the video."""
    if not 0 <= start < end:
        raise UserError(f"start {start:g} is not before end {end:g}")
    if duration is not None and end > duration:
        raise UserError(f"end {end:g} is behind the video's {duration:g} seconds")
    return f"from {time(start)} to {time(end)}"


def box(values: Sequence[float], boxes: str, width: float, height: float) -> str:
    """Return a box as markup: corners over width and height.

    boxes: `xywh` or `xyxy` in pixels, or `unit`, corners that are fractions already.
    """
    if len(values) != 4:
        raise UserError(f"a box needs four numbers, got {len(values)}")
    if boxes not in BOXES:
        raise UserError(f"what is a bbox here? say --boxes {', '.join(BOXES)}")
    if not (width > 0 and height > 0):
        raise UserError(f"width and height must be positive, got {width:g} and {height:g}")
    x1, y1, x2, y2 = (float(value) for value in values)
    if boxes == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    if boxes == "unit":
        x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
    corners = f"{x1:g} {y1:g} {x2:g} {y2:g}"
    if not (x1 < x2 and y1 < y2):
        raise UserError(f"box {corners}: its corners are not in order; are boxes {boxes} here?")
    if min(x1, y1) < -SLACK or x2 > width + SLACK or y2 > height + SLACK:
        raise UserError(
            f"box {corners} leaves its frame of {width:g} x {height:g}; are boxes {boxes} here?"
        )
    pairs = [("x", x1 / width), ("y", y1 / height), ("x", x2 / width), ("y", y2 / height)]
    return "".join(f"<{axis}:{min(max(value, 0.0), 1.0):.4f}>" for axis, value in pairs)


BOXES = ("xywh", "xyxy", "unit")


def lines(path: Path) -> Rows:
    """Yield the lines of a text file."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def named_items(path: Path) -> Rows:
    """Yield the entries of `{name: entry}` as items with `video`, and the items of a list."""
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(data, dict):
        yield from read_rows(path)
        return
    for name, entry in data.items():
        yield f"{path}[{name!a}]", {"video": name, **entry} if isinstance(entry, dict) else entry


def boxed_images(path: Path) -> Rows:
    """Yield boxes with their image; a COCO file joins `annotations` to `images`, its boxes xywh."""
    data = (
        json.loads(path.read_text(encoding="utf-8-sig")) if path.suffix.lower() == ".json" else []
    )
    if not isinstance(data, dict):
        yield from read_rows(path)
        return
    images = {image["id"]: image for image in data.get("images", [])}
    for index, entry in enumerate(data.get("annotations", [])):
        image = images.get(entry.get("image_id", entry.get("id")))
        where = f"{path}[annotations][{index}]"
        if image is None:
            yield where, UnreadableRow(f"no image has the id {entry.get('image_id')!a}")
        else:
            yield where, {"boxes": "xywh", **image, **entry}


Importer = Callable[[Any], list[Json]]
IMPORTERS: dict[str, tuple[Callable[[Path], Rows], Importer]] = {
    "charades-sta": (lines, charades_sta),
    "qvhighlights": (read_rows, qvhighlights),
    "refcoco": (boxed_images, refcoco),
    "hc-stvg": (named_items, hc_stvg),
    "llava-st": (read_rows, llava_st),
}
"""How a benchmark's file is read, and what a record of it becomes."""


def imported(name: str, path: Path, problems: list[str], boxes: str | None = None) -> list[Json]:
    """Return the rows of ours that a benchmark's file becomes; what is wrong goes to `problems`."""
    read, convert = IMPORTERS[name]
    rows = []
    try:
        for where, item in read(path):
            if isinstance(item, UnreadableRow):
                problems.append(f"{where}: {item}")
                continue
            try:
                known = {"boxes": boxes} | item if boxes and isinstance(item, dict) else item
                made = convert(known)
                for row in made:
                    parse_record(row, where)
                rows += made
            except KeyError as error:
                problems.append(f"{where}{named(item)}: no field {error}")
            except (AttributeError, TypeError) as error:
                problems.append(f"{where}{named(item)}: not a record of {name}: {error}")
            except (ValueError, UserError) as error:
                text = str(error)
                problems.append(text if text.startswith(where) else f"{where}{named(item)}: {text}")
    except (OSError, ValueError, UserError) as error:
        text = str(error)
        problems.append(text if text.startswith(str(path)) else f"{path}: not readable: {text}")
    return rows


def named(item: Any) -> str:
    """Return ` (id ...)` of an annotation that has one."""
    fields = item if isinstance(item, dict) else {}
    ids = [str(fields[name]) for name in ("id", "qid", "video") if name in fields]
    return f" (id {printable(ids[0])})" if ids else ""


def to_llava_st(row: Json, durations: Sequence[float | None]) -> Json:
    """Return a row of ours in LLaVA-ST's form; durations: seconds of each medium, None if not known.

    Coordinates become slots, INPUT in questions and OUTPUT in answers, and their numbers `variables`.
    """
    numbers: dict[str, list[float]] = {name: [] for name in VARIABLES.values()}
    media: Iterator[float | None] = iter(durations)
    duration = durations[0] if durations else None
    turns = []
    for turn in row["conversations"]:
        side = "OUTPUT" if turn["from"] == "gpt" else "INPUT"
        text = ""
        for place, part in enumerate(MEDIA_TAGS.split(turn["value"])):
            if place % 2:
                duration = next(media)
                text += part
                continue
            end = 0
            for match in ANY_MARKUP.finditer(part):
                axis, share = share_of_range(match.group(), duration)
                slot = ("TEMP", "HEIGHT", "WIDTH")[axis]
                numbers[VARIABLES[slot, side]].append(share)
                text += f"{part[end : match.start()]}<{slot}-{side}>"
                end = match.end()
            text += part[end:]
        turns.append({"from": turn["from"], "value": text})
    return row | {"conversations": turns, "variables": numbers}


ANY_MARKUP = re.compile(f"{SHARE.pattern}|{MARKUP.pattern}")


def share_of_range(markup: str, duration: float | None) -> tuple[int, float]:
    """Return the axis of a coordinate, and where it lies from 0 to 1."""
    percent = SHARE.fullmatch(markup)
    if percent:
        return 0, round(float(percent[1]) / 100, 9)
    match = MARKUP.fullmatch(markup)
    assert match
    letter, number, name, anchor = match.groups()
    if name:
        return AXIS[name], round(int(anchor) / (LLAVA_ST_ANCHORS - 1), 5)
    if letter != "t":
        return AXIS[letter], float(number)
    if not duration:
        raise UserError(f"{markup}: how long is its clip? give --bank")
    return 0, round(float(number) / duration, 5)


def main(argv: Sequence[str]) -> None:
    """Write the records of a benchmark, or records in LLaVA-ST's form; or say what is wrong."""
    parser = argparse.ArgumentParser("train.data.importers", description=__doc__.splitlines()[0])
    parser.add_argument("form", choices=[*IMPORTERS, "to-llava-st"])
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--out", required=True, type=Path, help=".jsonl; .json of to-llava-st")
    parser.add_argument("--boxes", choices=BOXES, help="refcoco: what bbox holds")
    parser.add_argument("--bank", nargs="+", default=[], help="to-llava-st: how long clips are")
    args = parser.parse_args(argv)
    problems: list[str] = []
    if args.form == "to-llava-st":
        rows = exported(args.annotations, args.bank, problems)
    else:
        rows = imported(args.form, args.annotations, problems, args.boxes)
    if problems:
        refuse(shorten(problems))
    if args.form == "to-llava-st":
        args.out.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        write_rows(args.out, rows)
    print(f"written: {args.out}: {len(rows)} records")  # noqa: T201


def exported(path: Path, banks: Sequence[str], problems: list[str]) -> list[Json]:
    """Return records in LLaVA-ST's form, with the durations that banks know."""
    from shards.read.banks import Banks

    opened = None
    try:
        opened = Banks.open(banks) if banks else None
    except UserError as error:
        problems.append(str(error))
    rows = []
    for row in checked_rows(path, problems):
        media = row.get("video", [])
        media = media if isinstance(media, list) else [media]
        ids = [clip_id(medium, row.get("start"), row.get("end")) for medium in media]
        durations = [
            opened.clip(id_).info.duration if opened and id_ in opened else None for id_ in ids
        ]
        try:
            rows.append(to_llava_st(row, durations))
        except UserError as error:
            problems.append(f"{path} (id {row.get('id', '?')}): {error}")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
