"""Grounding benchmarks -> records with coordinate markup, by `python -m train.convert NAME FILE`.

Rows that training is to read without conversion (conversations, questions, captions) need a form instead:
`shards/annotations/forms.py`. An importer is one function of one annotation, marked with
`@importer(NAME, READER)`: it returns rows in this project's form, or raises RowError without a place.
Times are `<t:seconds>`, a box is `<x><y><x><y>`, its corners as fractions of the frame.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shards.annotations.fault import RowError, lacking
from shards.annotations.files import Rows, UnreadableRow, read_rows
from shards.annotations.forms import Json, canonical
from shards.errors import UserError
from shards.text import printable
from train.data.benchmarks.coco import TEXTS, with_images
from train.data.benchmarks.refer import refs
from train.data.benchmarks.st_align import in_seconds
from train.data.benchmarks.vidstg import sentences
from train.data.records import parse_record

WHEN = "<video>\nWhen does this happen: {}"
WHERE = "<image>\nWhere is this: {}"
WHEN_AND_WHERE = "<video>\nWhen does this happen, and where is who does it: {}"
SLACK = 1.0
"""Pixels by which a box may leave its frame: annotations round."""
TUBE_BOXES = 8
"""Most boxes of a tube in an answer, evenly spaced."""
BOXES = ("xywh", "xyxy", "unit")
"""Meanings of a box's four numbers, see `box`."""
NOT_ONE = "not an annotation of this form"


Importer = Callable[[Any], list[Json]]
Reader = Callable[[Path], Rows]

IMPORTERS: dict[str, tuple[Reader, Importer]] = {}
"""Benchmark -> (reader of its file, importer of an annotation); filled by `importer`."""


def importer(name: str, read: Reader = read_rows) -> Callable[[Importer], Importer]:
    """Mark a function as the importer of a benchmark; read: yields the annotations of its file."""

    def register(convert: Importer) -> Importer:
        IMPORTERS[name] = read, convert
        return convert

    return register


def lines(path: Path) -> Rows:
    """Yield the lines of a text file."""
    # utf-8-sig: files saved on Windows begin with a mark of order, which would
    # be a part of the first name
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


def moments(path: Path) -> Rows:
    """Yield each moment of entries with `timestamps` and `sentences`, as an item of its own."""
    for where, entry in named_items(path):
        if what := lacking(entry, "video", "duration", "timestamps", "sentences"):
            yield where, UnreadableRow(what)
            continue
        times, sentences = entry["timestamps"], entry["sentences"]
        if not (isinstance(times, list) and isinstance(sentences, list)):
            yield where, UnreadableRow("timestamps and sentences must be lists")
            continue
        if len(times) != len(sentences):
            what = f"{len(times)} timestamps for {len(sentences)} sentences"
            yield where, UnreadableRow(what)
            continue
        for k, (timestamp, sentence) in enumerate(zip(times, sentences, strict=True)):
            yield (
                f"{where}[{k}]",
                {
                    "id": f"{entry['video']}-{k}",
                    "video": entry["video"],
                    "duration": entry["duration"],
                    "timestamp": timestamp,
                    "sentence": sentence,
                },
            )


def boxed_images(path: Path) -> Rows:
    """Yield boxes with their image, of any form.

    A COCO file joins `annotations` to `images`, its boxes xywh; `refs(unc).p` takes both from the
    instances.json beside it.
    """
    if path.suffix == ".p":
        yield from refs(path)
        return
    data = (
        json.loads(path.read_text(encoding="utf-8-sig")) if path.suffix.lower() == ".json" else []
    )
    if not isinstance(data, dict):
        yield from read_rows(path)
        return
    yield from with_images(path, data)


@importer("charades-sta", lines)
def charades_sta(line: str) -> list[Json]:
    """`AO8RW 0.0 6.9##a person is putting a book on a shelf.` (Charades-STA, one a line)."""
    match = re.fullmatch(r"(\S+) ([\d.]+) ([\d.]+) ?##(.*\S.*)", line.strip())
    if not match:
        raise RowError(NOT_ONE, f"expected `VIDEO START END##SENTENCE`, got {ascii(line)[:80]}")
    video, start, end, sentence = match.groups()
    answer = span(float(start), float(end))
    # Charades' files are all .mp4, and annotations name them without
    return [asked(f"{video}_{start}_{end}", f"{video}.mp4", WHEN.format(sentence.strip()), answer)]


@importer("qvhighlights")
def qvhighlights(item: Json) -> list[Json]:
    """`{qid, query, duration, vid, relevant_windows: [[start, end], ...]}` (QVHighlights)."""
    windows = item.get("relevant_windows")
    if not windows:
        raise RowError("no answer", "no relevant_windows; the test split is published without")
    clip = item.get("--times_past_end") == "clip"
    spans = [span(start, end, item["duration"], clip=clip) for start, end in windows]
    question = WHEN.format(item["query"])
    row = asked(item["qid"], f"{item['vid']}.mp4", question, ", ".join(spans))
    return [row | {"task": "windows"}]  # one window is scored as several are, as QVHighlights does


@importer("activitynet-captions", moments)
def activitynet_captions(item: Json) -> list[Json]:
    """`{video: {duration, timestamps: [[start, end], ...], sentences}}` (ActivityNet Captions)."""
    start, end = item["timestamp"]
    clip = item.get("--times_past_end") == "clip"
    said = span(start, end, float(item["duration"]), clip=clip)
    return [asked(item["id"], f"{item['video']}.mp4", WHEN.format(item["sentence"].strip()), said)]


@importer("refcoco", boxed_images)
def refcoco(item: Json) -> list[Json]:
    """`{file_name, width, height, bbox, expression}`, pixels; `boxes` says what bbox holds.

    The file may be called image or img_path, the text sentence, caption or sents (a list or a text).
    `--split` chooses those of a split, where annotations name one; refs(unc).p has train, val, testA and
    testB, refs(umd).p test.
    """
    split, wanted = item.get("split"), item.get("--split")
    if split is None and wanted is not None:
        what = f"no field 'split', and --split {wanted} is asked for"
        raise RowError("no split", what, fix="leave --split out where a file is of one split")
    if split != wanted:
        if wanted is not None:
            return []
        what = f"a ref of the split {split!a}: the file holds those to train and to test on"
        raise RowError("no split chosen", what, fix=f"--split {split}")
    image = first(item, "file_name", "image", "img_path")
    texts = first(item, *TEXTS)
    where = box(item["bbox"], str(item.get("boxes")), float(item["width"]), float(item["height"]))
    name = item.get("id", image)
    texts = texts if isinstance(texts, list) else [texts]
    if not texts:
        raise RowError(NOT_ONE, "a box with an empty list of texts")
    return [
        asked(f"{name}-{k}" if k else name, image, WHERE.format(text), where)
        for k, text in enumerate(texts)
    ]


@importer("hc-stvg", named_items)
def hc_stvg(item: Json) -> list[Json]:
    """`{video, bbox: [[x, y, w, h], ...], st_time, ed_time, img_size: [height, width], English}`.

    One box a frame from st_time to ed_time. HC-STVG v1 has width, height and caption in the place of
    img_size and English.
    """
    start, end = float(item["st_time"]), float(item["ed_time"])
    height, width = item["img_size"] if "img_size" in item else (item["height"], item["width"])
    boxes = item["bbox"]
    # boxes are one a frame from start to end, and the annotation gives no frame rate
    seconds = (end - start) / max(1, len(boxes) - 1)
    answer = tube(
        start,
        end,
        [(start + k * seconds, corners) for k, corners in enumerate(boxes)],
        "xywh",
        (width, height),
    )
    text = first(item, "English", "caption")
    return [asked(item["video"], item["video"], WHEN_AND_WHERE.format(text), answer)]


@importer("vidstg")
def vidstg(item: Json) -> list[Json]:
    """`{vid, fps, used_segment, temporal_gt, captions, questions, ...}` (VidSTG), a record a sentence.

    Boxes are those of VidOR (`--vidor` its annotation folder). Videos are `FOLDER/VID.mp4`, as there; a
    used_segment that is not the whole video becomes the record's start and end.
    """
    return [
        asked(
            said.id,
            said.video,
            WHEN_AND_WHERE.format(said.text),
            tube(*said.span, said.boxes, "xyxy", said.size),
        )
        | said.part.bounds()
        for said in sentences(item, item.get("--vidor", ""))
    ]


@importer("llava-st")
def llava_st(item: Json) -> list[Json]:
    """LLaVA-ST's conversations with slots, and `variables` with the numbers for them.

    `meta.split`, a part of the video in frames, takes the videos' rates: `--rates` a file of VidSTG, or
    `{video: frames a second}`.
    """
    return [canonical(in_seconds(item))]


def asked(id_: object, video: str, question: str, answer: str) -> Json:
    """Return a row: a question about a medium, and its answer."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": str(id_), "video": video, "conversations": turns}


def first(item: Json, *names: str) -> Any:
    """Return the first of some fields that an annotation has."""
    found = next((item[name] for name in names if item.get(name) is not None), None)
    if found is None:
        raise RowError(NOT_ONE, f"none of {', '.join(names)}")
    return found


def time(seconds: float) -> str:
    """Return a time as markup, to the millisecond."""
    return f"<t:{seconds:.3f}>"


def span(start: float, end: float, duration: float | None = None, *, clip: bool = False) -> str:
    """Return `from <t:start> to <t:end>`; RowError where it is backwards, or ends after the video.

    clip: whether a span that begins in the video and ends after it is ended with the video.
    """
    if clip and duration is not None and start < duration < end:
        end = duration
    if not 0 <= start < end:
        raise RowError("span backwards", f"start {start:g} is not before end {end:g}")
    if duration is not None and end > duration:
        raise RowError(
            "time past the end of its clip",
            f"end {end:g} is after the video's {duration:g} seconds",
            fix="--times_past_end clip ends it with the video",
        )
    return f"from {time(start)} to {time(end)}"


def tube(
    start: float,
    end: float,
    boxes: Sequence[tuple[float, Sequence[float]]],
    kind: str,
    size: tuple[float, float],
) -> str:
    """Return a span and at most `TUBE_BOXES` of its boxes, evenly spaced, as markup.

    boxes: (seconds, four numbers) in the order of time. kind: as `box` has it. size: width and height.
    """
    if not boxes:
        raise RowError("no answer", "a tube without boxes")
    written = min(TUBE_BOXES, len(boxes))
    # evenly from the first box to the last one, both included; max: a tube of one box has no steps
    last = max(1, written - 1)
    chosen = [boxes[k * (len(boxes) - 1) // last] for k in range(written)]
    parts = [f"{time(seconds)} {box(corners, kind, *size)}" for seconds, corners in chosen]
    return f"{span(start, end)}: {'; '.join(parts)}"


def box(values: Sequence[float], boxes: str, width: float, height: float) -> str:
    """Return a box as markup: corners over width and height.

    boxes: `xywh` or `xyxy` in pixels, or `unit`, corners that are fractions already. Raises RowError
    for a box that is backwards or outside its frame.
    """
    if len(values) != 4:
        raise RowError("bad box", f"a box needs four numbers, got {len(values)}")
    if boxes not in BOXES:
        raise RowError(
            "bad box", f"the meaning of bbox is unknown; give --boxes {', '.join(BOXES)}"
        )
    if not (width > 0 and height > 0):
        raise RowError(
            "bad box", f"width and height must be positive, got {width:g} and {height:g}"
        )
    x1, y1, x2, y2 = (float(value) for value in values)
    # read as pixels, all fractions would be one corner of the frame
    if boxes != "unit" and max(x1, y1, x2, y2) <= 1:
        what = f"box {x1:g} {y1:g} {x2:g} {y2:g} is smaller than a pixel; are boxes {boxes} here?"
        raise RowError("bad box", what)
    if boxes == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    if boxes == "unit":
        x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
    corners = f"{x1:g} {y1:g} {x2:g} {y2:g}"
    if not (x1 < x2 and y1 < y2):
        raise RowError(
            "box backwards", f"box {corners}: its corners are not in order; are boxes {boxes} here?"
        )
    if min(x1, y1) < -SLACK or x2 > width + SLACK or y2 > height + SLACK:
        raise RowError(
            "box outside its frame",
            f"box {corners} leaves its frame of {width:g} x {height:g}; are boxes {boxes} here?",
        )
    pairs = [("x", x1 / width), ("y", y1 / height), ("x", x2 / width), ("y", y2 / height)]
    # clamped: what leaves the frame by less than SLACK is rounding
    return "".join(f"<{axis}:{min(max(value, 0.0), 1.0):.4f}>" for axis, value in pairs)


def imported(
    name: str,
    path: Path,
    problems: list[str],
    bad: list[RowError],
    *,
    boxes: str | None = None,
    **flags: object,
) -> list[Json]:
    """Return the rows of a benchmark's file in this project's form.

    Faults of annotations are added to `bad`, faults of the file to `problems`. boxes: the meaning of
    four numbers where the file does not say. flags: of the command line; an importer finds each in every
    annotation as `--NAME`, which no annotation has of its own.
    """
    read, convert = IMPORTERS[name]
    settings: Json = {"boxes": boxes} if boxes else {}
    settings |= {f"--{flag}": value for flag, value in flags.items() if value is not None}
    rows = []
    try:
        for where, item in read(path):
            try:
                if isinstance(item, UnreadableRow):
                    raise RowError("not readable", str(item))
                # what an annotation says of itself wins over the command line
                made = convert(settings | item if isinstance(item, dict) else item)
                for row in made:
                    # read as training will read it: what it would refuse is found now, with its place
                    parse_record(row, where)
            except RowError as error:
                bad.append(error if error.place else error.at(where, id_of(item)))
            # whatever an annotation lacks is its fault, and the others are still read
            except KeyError as error:
                bad.append(RowError(NOT_ONE, f"no field {error}").at(where, id_of(item)))
            except (AttributeError, TypeError, ValueError, UserError) as error:
                what = f"not a record of {name}: {error}"
                bad.append(RowError(NOT_ONE, what).at(where, id_of(item)))
            else:
                rows += made
    except (OSError, ValueError, UserError) as error:
        text = str(error)
        problems.append(text if text.startswith(str(path)) else f"{path}: not readable: {text}")
    return rows


def id_of(item: Any) -> str:
    """Return the id of an annotation, empty if it has none."""
    fields = item if isinstance(item, dict) else {}
    ids = [str(fields[name]) for name in ("id", "qid", "video") if name in fields]
    return printable(ids[0]) if ids else ""
