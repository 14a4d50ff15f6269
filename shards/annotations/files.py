"""Annotation files -> rows: json, jsonl, csv (or .gz of them), parquet, folders, datasets of the Hub.

A row is one entry of a file, in the form of its dataset; `forms` turns it into ours.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.annotations.fault import json_type, short
from shards.annotations.forms import FORMS
from shards.annotations.sniff import GZIP, is_record, is_stray, not_records, object_kind
from shards.errors import UserError
from shards.hub import refusal
from shards.kinds import HEAD
from shards.text import some

UNREADABLE = "not readable as records"
Rows = Iterator[tuple[str, Any]]
"""(`file:line` or `file[index]`, row)."""

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w./-]+))?")
"""`owner/name`, or `owner/name:folder` for a part of it."""


class UnreadableRow(str):
    """The reason why a row could not be read, in place of the row."""


class UnparsedRow(NamedTuple):
    """A line of JSON lines, in place of the row: `parsed` makes the row of it."""

    text: str
    is_last: bool
    """Whether it is the last line of its file."""


@dataclass(frozen=True)
class Selection:
    """Which rows of a file are used: LLaVA's `sampling_strategy` (LLaVA-NeXT, llava/train/train.py)."""

    how: str = "all"
    """all, first, end or random."""
    rows: int = 0
    share: Fraction = Fraction(0)
    """Fraction of all rows, rounded up; used if `rows` is 0."""
    seed: int = 0

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "Selection":
        """Parse `all`, `first:N`, `end:N`, `random:N` (N rows or N%), or `N%`, which is random."""
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
        """Return the indices of the chosen rows among `count`, ascending.

        A larger random choice contains every smaller one of the same seed.
        """
        wanted = min(count, self.rows or ceil(self.share * count))
        if self.how == "first":
            return list(range(wanted))
        if self.how == "end":
            return list(range(count - wanted, count))
        if self.how == "random":
            # A prefix of one permutation: 10 % of the rows are among the 20 % of the same seed.
            chosen = np.random.default_rng(self.seed).permutation(count)[:wanted]
            return sorted(chosen.tolist())
        return list(range(count))


ALL = Selection()


def read_rows(path: str | Path) -> Rows:
    """Yield rows as `unparsed_rows`, but parsed: an `UnreadableRow` for each that cannot be read."""
    for where, row in unparsed_rows(path):
        yield where, parsed(row)


def unparsed_rows(path: str | Path) -> Rows:
    """Yield the rows of a file or folder, those of JSON lines as an `UnparsedRow` each.

    Raises UserError if reading cannot continue: a folder of several kinds of files, a damaged file, a
    file without records.
    """
    for file in annotation_files(Path(path)):
        try:
            if suffix_of(file) == ".parquet":
                yield from _parquet(file)
                continue
            text = read_text(file)
            if suffix_of(file) == ".csv":
                yield from _csv(file, text)
            else:
                yield from _json(file, text)
        except UnicodeDecodeError as error:
            raise UserError(f"{UNREADABLE}: not UTF-8: {error}", where=file) from None
        except (OSError, csv.Error, RecursionError) as error:  # the last: JSON nested too deeply
            raise UserError(f"{UNREADABLE}: {error}", where=file) from None


# -- files and folders


def suffix_of(file: Path) -> str:
    """Return a file's suffix without `.gz`: `.jsonl` for `a.jsonl` and `a.jsonl.gz`."""
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_text(file: Path) -> str:
    """Return the text of a file, unpacked if it is gzip; raises UserError for a file without records."""
    data = file.read_bytes()
    if data.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"not readable as gzip: {error}", where=file) from None
    if what := not_records(data[:HEAD]):
        raise UserError(what, where=file)
    return data.decode("utf-8").lstrip("\ufeff")


def annotation_files(path: Path) -> list[Path]:
    """Return a file itself, or the annotation files of a folder at any depth, all of one kind.

    Metadata files beside them are left out: see `stray_files`.
    """
    if not path.is_dir():
        return [path]
    refuse_saved_dataset(path)
    every = _by_name(path)
    stray = {file for file in every if is_stray(file)}
    found: dict[str, list[Path]] = {}
    for file in every:
        if file not in stray:
            found.setdefault(suffix_of(file), []).append(file)
    if not found:
        beside = f", and metadata alone: {some(sorted(f.name for f in stray))}" if stray else ""
        raise UserError(
            f"{path}: no annotation files in this folder (looked for {', '.join(SUFFIXES)}){beside}"
        )
    # json beside parquet is often the same data twice: nothing is guessed
    if len(found) > 1:
        kinds = ", ".join(f"{len(files)} {suffix}" for suffix, files in sorted(found.items()))
        raise UserError(f"{path}: this folder has {kinds}; name the files of one kind")
    return next(iter(found.values()))


def stray_files(path: Path) -> list[Path]:
    """Return the files of a folder that are annotations by their suffix but contain only metadata."""
    return [file for file in _by_name(path) if is_stray(file)] if path.is_dir() else []


def _by_name(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if suffix_of(file) in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def refuse_saved_dataset(folder: Path) -> None:
    """Raise UserError for a folder that `datasets` wrote with `save_to_disk`, as Arrow files."""
    split = (folder / "dataset_dict.json").is_file()
    if not split and not ((folder / "state.json").is_file() and any(folder.glob("*.arrow"))):
        return
    one = "['train']" if split else ""
    raise UserError(
        "this folder was written by datasets' save_to_disk, as Arrow files",
        where=folder,
        fix='write parquet once: python -c "import datasets; '
        f"datasets.load_from_disk('{folder}'){one}.to_parquet('records.parquet')\"",
    )


# -- json and json lines


def _json(file: Path, text: str) -> Rows:
    """Yield the records of a JSON list or of JSON lines, decided by the content, not by the name."""
    begins = text.lstrip()[:1]
    if suffix_of(file) != ".jsonl" or begins == "[":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            if begins != "{" and suffix_of(file) != ".jsonl":
                raise unreadable(file, error) from None
            # Data after a complete object: JSON lines under the name .json, which many datasets have.
            if begins == "{" and error.msg != "Extra data":
                raise unreadable(file, error) from None
        else:
            yield from _listed(file, rows)
            return
    yield from _lines(file, text)


def _listed(file: Path, rows: Any) -> Rows:
    if isinstance(rows, dict) and is_record(rows):
        rows = [rows]
    if isinstance(rows, dict):
        raise UserError(object_kind(rows), where=file)
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of records, got {json_type(rows)}")
    for index, row in enumerate(rows):
        yield f"{file}[{index}]", row


def _lines(file: Path, text: str) -> Rows:
    # not splitlines: it also splits at U+2028 and others, which JSON may contain unescaped
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        line = line.strip("\ufeff \t\r")  # byte order marks remain inside of concatenated files
        if line:
            yield f"{file}:{number}", UnparsedRow(line, number == len(lines))


def parsed(row: Any) -> Any:
    """Return the row of an `UnparsedRow`, or an `UnreadableRow`; any other row as it is."""
    if not isinstance(row, UnparsedRow):
        return row
    try:
        return json.loads(row.text)
    except json.JSONDecodeError as error:
        last = "; it is the last line: is the file cut short?" * row.is_last
        return UnreadableRow(f"not JSON: {error.msg} (column {error.colno}){last}")
    except RecursionError:
        return UnreadableRow("JSON that is nested too deeply")


def unreadable(file: Path, error: json.JSONDecodeError) -> UserError:
    """Return the error for a file that is not JSON."""
    # where the parser ran out of text, a download that was cut short is likelier than a typing mistake
    at_end = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    last = "; is the file cut short?" * at_end
    problem = f"line {error.lineno}, column {error.colno}: {error.msg}{last}"
    return UserError(f"{UNREADABLE}: {problem}", where=file)


# -- csv


def _csv(file: Path, text: str) -> Rows:
    # newline="": csv itself handles line breaks inside of quoted cells
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
    header = [name.strip() for name in reader.fieldnames or []]
    if not is_record(dict.fromkeys(header)):
        raise UserError(
            f"the first line of a csv names its columns, got {ascii(', '.join(header))[:80]}",
            expected=f"one of {', '.join(FORMS)}, video, image among them",
            where=file,
            fix=csv_advice(header),
        )
    for row in reader:
        where = f"{file}:{reader.line_num}"
        if "" in row:
            yield where, UnreadableRow("more cells than the header names; quote the commas")
            continue
        try:
            yield where, {name: _cell(name, value) for name, value in row.items() if value}
        except ValueError as error:
            yield where, UnreadableRow(str(error))


def csv_advice(header: Sequence[str]) -> str:
    """Return the fix for a csv whose first line names no known column."""
    line = header[0] if len(header) == 1 else ""
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if separator in line:
            return f"its columns are separated by {name}; write commas"
    return (
        "a list of paths and labels is not a list of records; add a first line such as "
        "video,question,answer"
    )


def _cell(name: str, text: str) -> Any:
    """Return the value of a cell: a list or an object if it is JSON, seconds as a number, else text."""
    if name in ("start", "end", "duration"):
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{name} must be seconds, got {short(text)}") from None
    if name in STRUCTURED and text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{name}` is a list or an object, and no JSON ({error}): {ascii(text)[:60]}; write "
                "it with double quotes, as Python's json.dumps does and its print does not"
            ) from None
    return text


STRUCTURED = (
    *("conversations", "messages", "variables"),
    *("options", "candidates", "choices", "option", "answers"),
    *("video", "videos", "image", "images"),
)


# -- parquet


def _parquet(file: Path) -> Rows:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(f"{file}: parquet needs pyarrow; pip install pyarrow") from None
    with file.open("rb") as opening:
        head = opening.read(HEAD)
    if not head.startswith(b"PAR1") and (what := not_records(head)):
        raise UserError(what, where=file)
    try:
        opened = pq.ParquetFile(file)
        index = 0
        # in batches: a parquet file of millions of rows is larger as Python objects than as columns
        for batch in opened.iter_batches():
            for row in batch.to_pylist():
                yield f"{file}[{index}]", row
                index += 1
    except pa.ArrowException as error:
        raise UserError(f"{file}: not readable as parquet: {error}") from None


# -- datasets of the Hub

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
"""Suffixes of annotation files; all but .parquet may be followed by .gz."""


def is_hub_name(name: str) -> bool:
    """Return whether a name that is not a path may be a dataset of the Hub: `owner/name[:folder]`."""
    return (
        HUB_NAME.fullmatch(name) is not None
        and Path(name).suffix.lower() not in (*SUFFIXES, ".gz", ".yaml", ".yml")
        and not Path(name).exists()
        and not Path(name).parts[0].startswith(".")
        and not Path(Path(name).parts[0]).exists()
    )


def local_copy(name: str) -> str:
    """Return the path of a dataset's annotations: a path itself, or the download of a Hub dataset.

    Videos of a Hub dataset are not downloaded. Raises UserError with the command that gets what is
    missing.
    """
    match = HUB_NAME.fullmatch(name)
    if not match or not is_hub_name(name):
        return name
    repo, folder = match.groups()
    if folder and ".." in Path(folder).parts:
        raise UserError(f"{name}: expected a folder of the dataset after the colon")
    from huggingface_hub import snapshot_download

    under = f"{folder.strip('/')}/" if folder else ""
    patterns = [f"{under}*{suffix}" for suffix in (*SUFFIXES, ".jsonl.gz", ".json.gz")]
    try:
        if why := refusal(repo, "dataset"):
            raise UserError(why)
        found = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns)) / under
    except Exception as error:  # offline, unknown or gated, of any type: it is not available
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
