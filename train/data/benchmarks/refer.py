"""RefCOCO, RefCOCO+ and RefCOCOg as they are published: `refs(unc).p` and `instances.json` beside it.

The pickle is a list of refs `{ref_id, ann_id, image_id, split, sentences: [{sent, ...}]}`; boxes, sizes
and names of pictures are those of instances.json (lichengunc/refer). A ref's own file_name is of no
file: it has the annotation's number at its end.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from shards.annotations.fault import lacking
from shards.annotations.files import Rows, UnreadableRow
from shards.annotations.forms import Json
from shards.errors import UserError

INSTANCES = "instances.json"
NEEDED = {"images": ("file_name", "width", "height"), "annotations": ("image_id", "bbox")}
"""List in it -> the fields of its entries that are read."""


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers: nothing that a pickle would have to import or call."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(
            f"holds {module}.{name}, which would run code; refs are lists, dicts, texts and numbers"
        )


def refs(path: Path) -> Rows:
    """Yield each ref as `{id, image, width, height, bbox, boxes, sents, split}`.

    Raises UserError where the pickle is not a list of refs, or instances.json is missing.
    """
    beside = path.with_name(INSTANCES)
    if not beside.exists():
        raise UserError(
            f"{beside}: missing: boxes and sizes of pictures stand there",
            fix="put both in a folder",
        )
    with open(path, "rb") as file:
        found = unpickled(file, path)
    instances = json.loads(beside.read_text("utf-8"))
    if what := lacking(instances, *NEEDED):
        raise UserError(f"{beside}: not a COCO file of boxes: {what}")
    images, boxes = (
        {entry["id"]: entry for entry in instances[name] if not lacking(entry, "id", *needed)}
        for name, needed in NEEDED.items()
    )
    yield from items(path, found, images, boxes)


def unpickled(file: IO[bytes], path: Path) -> list[Any]:
    """Return the list in a pickle of Python 2 or 3 without running anything in it."""
    try:
        # bytes that are not UTF-8 become surrogates, which are refused with their ref
        found = PlainUnpickler(file, encoding="utf-8", errors="surrogateescape").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: not readable as a pickle: {error}") from None
    if not isinstance(found, list):
        raise UserError(f"{path}: expected a list of refs, got a {type(found).__name__}")
    return found


def items(
    path: Path, found: list[Any], images: dict[Any, Json], boxes: dict[Any, Json]
) -> Iterator[tuple[str, Any]]:
    """Yield (place, item) of each ref; an UnreadableRow where its box or picture is not there."""
    for number, ref in enumerate(found):
        where = f"{path}[{number}]"
        if what := lacking(ref, "ann_id", "image_id", "ref_id", "split", "sentences"):
            yield where, UnreadableRow(what)
            continue
        annotation = boxes.get(ref["ann_id"])
        image = images.get(ref["image_id"])
        if annotation is None or image is None:
            missing = (
                f"annotation {ref['ann_id']}" if annotation is None else f"image {ref['image_id']}"
            )
            yield where, UnreadableRow(f"{INSTANCES} has no {missing}")
        elif annotation["image_id"] != ref["image_id"]:
            what = f"of image {ref['image_id']}, its box of image {annotation['image_id']}"
            yield where, UnreadableRow(what)
        else:
            yield (
                where,
                {
                    "id": f"{path.parent.name}-{ref['ref_id']}",
                    "image": image["file_name"],
                    "width": image["width"],
                    "height": image["height"],
                    "bbox": annotation["bbox"],
                    "boxes": "xywh",
                    "sents": [sentence["sent"] for sentence in ref["sentences"]],
                    "split": ref["split"],
                },
            )
