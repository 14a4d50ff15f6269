"""Annotation files -> rows: json, jsonl, csv and parquet, folders of them, datasets of the Hub.

A row is what a file holds for one record, in whatever form; `forms` makes records of it.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError
from shards.hub import refusal

Rows = Iterator[tuple[str, Any]]
"""(`file:line` or `file[index]`, row)."""

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w./-]+))?")
"""`owner/name`, or `owner/name:folder` for a part of it."""


class UnreadableRow(str):
    """Stands for a row that could not be read: the reason."""


@dataclass(frozen=True)
class Selection:
    """Which rows of a file are read: LLaVA's `sampling_strategy` (LLaVA-NeXT, llava/train/train.py)."""

    how: str = "all"
    """all, first, end or random."""
    rows: int = 0
    share: Fraction = Fraction(0)
    """Of all rows, rounded up; taken where `rows` is 0."""
    seed: int = 0

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "Selection":
        """Read `all`, `first:N`, `end:N`, `random:N` - N rows, or N% - and `N%`, which is random."""
        match = re.fullmatch(r"(?:(first|end|random):)?(\d+(?:\.\d+)?)(%?)", text.strip())
        if text.strip() == "all":
            return cls()
        how, number, percent = match.groups() if match else ("", "0", "")
        share = Fraction(number) / 100 if percent else Fraction(0)
        whole = number.isdigit() and int(number) > 0
        if (percent and 0 < share <= 1) or (how and whole and not percent):
            return cls(how or "random", 0 if percent else int(number), share, seed)
        raise UserError(
            f"sampling_strategy {text!r}: expected all, first:N, end:N, random:N or N%, N rows or N%"
        )

    def of(self, count: int) -> list[int]:
        """Return the places of the chosen rows among `count`, in their order.

        A larger random choice holds every smaller one of the same seed.
        """
        wanted = min(count, self.rows or ceil(self.share * count))
        if self.how == "first":
            return list(range(wanted))
        if self.how == "end":
            return list(range(count - wanted, count))
        if self.how == "random":
            chosen = np.random.default_rng(self.seed).permutation(count)[:wanted]
            return sorted(chosen.tolist())
        return list(range(count))


ALL = Selection()


def read_rows(path: str | Path) -> Rows:
    """Yield the rows of a file or folder; one that cannot be read as an `UnreadableRow`.

    Raises UserError where nothing can be read on: a folder of several kinds of files, a damaged file.
    """
    for file in annotation_files(Path(path)):
        reader = READERS.get(file.suffix.lower(), _json)
        try:
            yield from reader(file)
        except (OSError, csv.Error, RecursionError) as error:
            raise UserError(f"not readable as records: {error}", where=file) from None
        except UnicodeDecodeError as error:
            raise UserError(f"not readable as records: not UTF-8: {error}", where=file) from None


def annotation_files(path: Path) -> list[Path]:
    """Return a file itself, or the annotation files of a folder at any depth, all of one kind."""
    if not path.is_dir():
        return [path]
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.suffix.lower() in READERS and not hidden:
            found.setdefault(file.suffix.lower(), []).append(file)
    if not found:
        raise UserError(
            f"{path}: no annotation files in this folder (looked for {', '.join(READERS)})"
        )
    if len(found) > 1:
        kinds = ", ".join(f"{len(files)} {suffix}" for suffix, files in sorted(found.items()))
        raise UserError(f"{path}: this folder has {kinds}; name the files of one kind")
    return next(iter(found.values()))


def _json(file: Path) -> Rows:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not readable as records: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of records, got {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield f"{file}[{index}]", row


def _jsonl(file: Path) -> Rows:
    # not splitlines: JSON may hold U+2028 and its like as they are
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                row: Any = json.loads(line)
            except json.JSONDecodeError as error:
                row = UnreadableRow(f"not JSON: {error}")
            yield f"{file}:{number}", row


def _csv(file: Path) -> Rows:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, restkey="")
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if "" in row:
                yield where, UnreadableRow("more cells than the header names; quote the commas")
                continue
            try:
                yield where, {name: _cell(name, value) for name, value in row.items() if value}
            except ValueError as error:
                yield where, UnreadableRow(str(error))


def _cell(name: str, text: str) -> Any:
    """Return a cell: JSON where it is a list or an object, a number where one is due, else text."""
    if name in ("start", "end", "duration"):
        return float(text)
    if name in STRUCTURED and text.lstrip()[:1] in ("[", "{"):
        return json.loads(text)
    return text


STRUCTURED = (
    *("conversations", "messages", "options", "variables"),
    *("video", "videos", "image", "images"),
)


def _parquet(file: Path) -> Rows:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(f"{file}: parquet needs pyarrow; pip install pyarrow") from None
    try:
        opened = pq.ParquetFile(file)
        index = 0
        for batch in opened.iter_batches():
            for row in batch.to_pylist():
                yield f"{file}[{index}]", row
                index += 1
    except pa.ArrowException as error:
        raise UserError(f"{file}: not readable as parquet: {error}") from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def is_hub_name(name: str) -> bool:
    """Tell whether a name that is no path here could be a dataset of the Hub: `owner/name[:folder]`."""
    return (
        HUB_NAME.fullmatch(name) is not None
        and Path(name).suffix.lower() not in (*READERS, ".yaml", ".yml")
        and not Path(name).exists()
        and not Path(name).parts[0].startswith(".")
        and not Path(Path(name).parts[0]).exists()
    )


def local_copy(name: str) -> str:
    """Return where the annotations of a dataset lie: a path itself, a Hub dataset's after download.

    Videos of a Hub dataset are not downloaded. Raises UserError that says how to get what is
    missing.
    """
    match = HUB_NAME.fullmatch(name)
    if not match or not is_hub_name(name):
        return name
    repo, folder = match.groups()
    if folder and ".." in Path(folder).parts:
        raise UserError(f"{name}: a folder of the dataset is expected behind the colon")
    from huggingface_hub import snapshot_download

    under = f"{folder.strip('/')}/" if folder else ""
    patterns = [f"{under}*{suffix}" for suffix in READERS]
    try:
        if why := refusal(repo, "dataset"):
            raise UserError(why)
        found = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns)) / under
    except Exception as error:  # offline, unknown, gated: each means that it cannot be had
        reason = str(error) if isinstance(error, UserError) else type(error).__name__
        # `*` is quoted for the shell that this line is copied into
        wanted = " ".join(f"--include '{pattern}'" for pattern in patterns)
        raise UserError(
            f"{name}: no such path here, and the Hub did not give it "
            f"({reason}); where there is a network, run `hf download {repo} --repo-type "
            f"dataset {wanted} --local-dir {repo}`, bring the folder {repo} here, and name {repo}/{under}"
        ) from None
    if not found.is_dir():
        raise UserError(f"{name}: the dataset has no annotations under {under!r}")
    return str(found)
