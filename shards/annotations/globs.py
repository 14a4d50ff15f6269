"""Patterns such as `x/*.parquet` or `x/**/*.jsonl` -> the paths that match, in one order everywhere."""

import glob
import os
from pathlib import Path

from shards.errors import UserError


def is_glob(name: str) -> bool:
    """Return whether a name is a pattern: it contains `*`, `?` or `[`, and no such path exists."""
    # a file may be called a[1].json: what exists is meant as it is
    return glob.has_magic(name) and not Path(name).exists()


def matches(pattern: str) -> list[str]:
    """Return the files that match a pattern, else the folders; sorted by their parts.

    `**` matches any number of folders; `*` does not match hidden files. Raises UserError if nothing
    matches, naming the deepest folder that exists.
    """
    # in one order on every machine: the order of files is that of records, and so of the whole run
    found = sorted(glob.glob(pattern, recursive=True), key=lambda path: Path(path).parts)
    files = [path for path in found if not os.path.isdir(path)]
    if found:
        return files or found
    parts = Path(pattern).parts
    # the deepest folder before the pattern: what is there shows the typing mistake
    plain = next(k for k, part in enumerate(parts) if glob.has_magic(part))
    above = Path(*parts[:plain]) if plain else Path()
    if not above.is_dir():
        raise UserError("no file matches", where=pattern, fix=f"there is no folder {above}")
    names = sorted(path.name for path in above.iterdir())
    shown = ", ".join(names[:5]) or "nothing"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise UserError("no file matches", where=pattern, fix=f"{above} holds {shown}{more}")


def expanded(names: list[str], problems: list[str]) -> list[str]:
    """Return names with patterns replaced by their matches; adds a problem for each without any."""
    found: list[str] = []
    for name in names:
        try:
            found += matches(name) if is_glob(name) else [name]
        except UserError as error:
            problems.append(str(error))
    return found
