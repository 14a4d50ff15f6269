"""Identify files without records by their first bytes: failed downloads, archives, metadata."""

import json
import re
from pathlib import Path
from typing import Any

from shards.annotations.forms import FORMS
from shards.kinds import HEAD, is_text, kind_of

GZIP = b"\x1f\x8b"
AS_LINES = "write its records as JSON lines"
AS_PARQUET = "write it as parquet: pyarrow.parquet.write_table"
FIXES = {
    "a parquet file": "let its name end in .parquet",
    "an Arrow file": AS_PARQUET,
    "an Arrow stream": AS_PARQUET,
    "an HDF5 file": AS_LINES,
    "an SQLite database": AS_LINES,
    "a Python pickle": AS_LINES,
}
"""Fixes for kinds of files that may contain records."""
METADATA = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
    *("config.json", "metadata.json", "croissant.json", "package.json", "statistics.json"),
}
"""Names of files beside records that contain none."""


def not_records(data: bytes) -> str | None:
    """Return the kind of a file without records, and a fix, by its first bytes; None for others."""
    # before the kinds: to them it is plain text, as JSON lines are
    if re.match(rb"\S+ \d+(\.\d+)? \d+(\.\d+)? ?##", data):
        return "this is Charades-STA; python -m train.convert charades-sta makes records of it"
    kind = kind_of(data)
    if kind is None or (kind.family not in ("none", "archive") and is_text(data)):
        return None
    if kind.what == "empty":
        return "the file is empty"
    fix = kind.fix or FIXES.get(kind.what, "name the file with the records")
    wrong = ", not records" if kind.what.startswith(("a web page", "XML")) else ""
    return f"this is {kind.what}{wrong}; {fix}"


def object_kind(data: dict[str, Any]) -> str:
    """Return what a JSON object in place of a list of records probably is, and a fix."""
    keys = ", ".join(ascii(key) for key in list(data)[:4]) + (", ..." if len(data) > 4 else "")
    got = f"expected a list of records, got an object with {keys or 'nothing'}"
    # -- from the surest sign to the weakest; each names the command that reads it, or what to do by hand
    if {"images", "annotations"} <= data.keys():
        return f"{got}: a COCO file; python -m train.convert refcoco makes records of its boxes"
    if {"features", "splits"} & data.keys() or {"citation", "license"} <= data.keys():
        return f"{got}: the description of a dataset; name the files with its records"
    if set(data) <= {"error", "message", "detail", "status", "code"}:
        return f"{got}: a server's answer ({ascii(data)[:120]}); get the file again"
    # one list of objects beside plain facts: the usual wrapper of a data set
    lists = [k for k, v in data.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    if len(lists) == 1 and all(not isinstance(v, dict) for v in data.values()):
        return f"{got}: the records may be the list {lists[0]!a}; write it to a file of its own"
    values = list(data.values())
    if values and all(isinstance(value, dict) for value in values):
        inner = set(values[0])
        if {"timestamps", "sentences"} <= inner:
            return (
                f"{got}: ActivityNet Captions; python -m train.convert activitynet-captions makes "
                "records of it"
            )
        if "st_time" in inner:
            return f"{got}: HC-STVG; python -m train.convert hc-stvg makes records of it"
        return f"{got}: entries by name; write them as a list, the name as `id`"
    if values and all(isinstance(value, list | dict) for value in values):
        return f"{got}: a table by columns; write a list of its rows, or parquet"
    return got


def is_stray(file: Path) -> bool:
    """Return whether a .json file is metadata: by its name, or because it is one object and no record."""
    if file.suffix.lower() != ".json":
        return False
    if file.name.lower() in METADATA:
        return True
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    # a list, or lines of records: metadata is one object
    if head.startswith(GZIP) or not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return False
    # only the beginning is decoded: an annotation file may be gigabytes, and a character
    # cut at the end is replaced
    first, _, rest = head.decode("utf-8-sig", "replace").strip().partition("\n")
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return not rest_is_lines(head)
    # one object on the first line and others below it are JSON lines under the name .json
    return not rest.strip() and not is_record(row)


def rest_is_lines(head: bytes) -> bool:
    """Return whether a file whose first line cannot be parsed is probably JSON lines."""
    lines = head.decode("utf-8-sig", "replace").strip().split("\n")
    # 20 lines: a pretty-printed object has lines that begin with a quote or a bracket
    return len(lines) == 1 or all(line.lstrip().startswith("{") for line in lines[:20])


def is_record(row: Any) -> bool:
    """Return whether an object has a field of a known form, or one that names a medium."""
    known = {*FORMS, "video", "videos", "image", "images"}
    return isinstance(row, dict) and bool(row.keys() & known) and "annotations" not in row
