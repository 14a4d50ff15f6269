"""Count what is skipped among the inputs: each file, link, member or row that is not a clip.

    skipped: 3 links to folders (--follow-links), 2 unreadable folders, 14 files of unknown type: .mts 14

`BANK/skipped.jsonl` has a line for each of the last run's inputs: `{reason, where, text}`.
"""

# Nothing is left out silently: a folder that seems to be encoded completely, and is not, would be noticed
# in training, if at all.

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePath

from shards.signed import write_atomic
from shards.text import printable, some

LIST = "skipped.jsonl"
"""The file in a bank's folder."""
FIRST = 3
"""Examples that are shown per reason."""


class Why(StrEnum):
    """Why something is not a clip: a slug, its singular and plural in words, and advice."""

    one: str
    many: str
    advice: str

    def __new__(cls, slug: str, one: str = "", many: str = "", advice: str = "") -> "Why":
        why = str.__new__(cls, slug)
        why._value_ = slug
        why.one, why.many, why.advice = one, many, advice
        return why

    LINK = "link", "link to a folder", "links to folders", "--follow-links"
    LOOP = "loop", "link to a folder above it", "links to folders above them"
    DEAD_LINK = "dead-link", "broken link", "broken links"
    FOLDER = "unreadable-folder", "unreadable folder", "unreadable folders"
    FILE = (
        "unreadable-file",
        "unreadable file without an ending",
        "unreadable files without an ending",
    )
    SPECIAL = "special", "pipe, socket or device", "pipes, sockets or devices"
    NAME = "name", "name that is not UTF-8", "names that are not UTF-8", "rename them"
    SYSTEM = "system", "hidden or system file", "hidden or system files"
    PICTURE = (
        "picture",
        "picture beside other files",
        "pictures beside other files",
        "a folder of nothing but pictures is a clip",
    )
    ANNOTATIONS = "annotations", "annotation file", "annotation files", "name them themselves"
    ARCHIVE = "archive", "archive", "archives", "name them themselves"
    UNKNOWN = "unknown-type", "file of unknown type", "files of unknown type"
    ARCHIVED_PICTURE = (
        "archived-picture",
        "picture in an archive",
        "pictures in archives",
        "unpack them",
    )
    OUTSIDE = "outside", "member that leads outside", "members that lead outside"
    MEMBER_LINK = "member-link", "member that is a link", "members that are links"
    REPLACED = "replaced", "member that a later one replaces", "members that later ones replace"
    LOCKED = "locked", "member with a password", "members with a password", "unpack them"
    METHOD = (
        "method",
        "member packed in an unknown way",
        "members packed in an unknown way",
        "unpack them",
    )
    MISSING = "missing", "row whose video is not found", "rows whose videos are not found"
    BAD_ROW = "bad-record", "bad record", "bad records"
    NO_MEDIA = "no-media", "row without media", "rows without media"


@dataclass(frozen=True)
class Skip:
    """One input that is not a clip."""

    reason: Why
    where: str
    """A path; `archive: member`; `file:line` or `file[index]`."""
    text: str = ""
    """Details beside the reason."""


def report(skips: Sequence[Skip], out: Path | None = None) -> list[str]:
    """Return a line that counts the skips by reason; no line if there are none.

    out: the bank, whose `skipped.jsonl` lists them all.
    """
    if not skips:
        return []
    counts = []
    for why, count in Counter(skip.reason for skip in skips).most_common():
        words = f"{count:,} {why.one if count == 1 else why.many}"
        counts.append(words + _more(why, [skip for skip in skips if skip.reason is why]))
    where = f"; all in {out / LIST}" if out else ""
    return [printable(f"skipped: {', '.join(counts)}{where}")]


def _more(why: Why, skips: Sequence[Skip]) -> str:
    """Return the suffixes of unknown files, the names of missing videos, or advice."""
    if why is Why.UNKNOWN:
        # by ending: one line for a thousand files of one unknown kind
        endings = Counter(PurePath(skip.where).suffix.lower() or "no ending" for skip in skips)
        shown = [f"{ending} {count:,}" for ending, count in endings.most_common()]
        return f": {some(shown, 8, ' ')}"
    if why in (Why.MISSING, Why.BAD_ROW, Why.NAME):
        more = f" ({why.advice})" if why.advice else ""
        return f"{more}: {some([skip.text or skip.where for skip in skips], FIRST)}"
    return f" ({why.advice})" if why.advice else ""


def write_skips(out: Path, skips: Sequence[Skip]) -> None:
    """Write the list of skips, or remove it if there are none."""
    path = out / LIST
    if not skips:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps(skip.__dict__, sort_keys=True) + "\n" for skip in skips]
    write_atomic(path, "".join(lines).encode())
