"""COCO files: boxes in `annotations`, their sizes and names in `images`, texts in either."""

from collections import Counter
from pathlib import Path
from typing import Any

from shards.annotations.fault import lacking
from shards.annotations.files import Rows, UnreadableRow
from shards.annotations.forms import Json

TEXTS = dict.fromkeys(("expression", "sentence", "caption", "sents")).keys()
"""Fields with the text of a box; the first that an annotation has is read."""


def with_images(path: Path, data: Json) -> Rows:
    """Yield each box of a COCO file with the facts of its image; an UnreadableRow where it has none."""
    images = {image["id"]: image for image in data.get("images", []) if not lacking(image, "id")}
    entries = data.get("annotations", [])
    numbers = [_image_of(entry) for entry in entries]
    counts = Counter(numbers)
    for index, (entry, number) in enumerate(zip(entries, numbers, strict=True)):
        where = f"{path}[annotations][{index}]"
        image = None if number is None else images.get(number)
        if what := lacking(entry):
            yield where, UnreadableRow(what)
        elif image is None:
            yield where, UnreadableRow(f"no image has the id {entry.get('image_id')!a}")
        elif counts[number] > 1 and TEXTS & image.keys() and not TEXTS & entry.keys():
            what = f"one text of image {number} for its {counts[number]} boxes: which box is meant?"
            yield where, UnreadableRow(what)
        else:
            # entry last: both have an `id`, and a record is an annotation
            yield where, {"boxes": "xywh", **image, **entry}


def _image_of(entry: Any) -> int | str | None:
    """Return the id of an annotation's image, None without one."""
    number = None if lacking(entry) else entry.get("image_id", entry.get("id"))
    return number if isinstance(number, int | str) else None
