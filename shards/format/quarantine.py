"""`quarantine.jsonl`: the clips of a bank that could not be encoded, one json object per line.

While units are encoded, their failures are kept in journals and commit records; the process that plans or
finishes a bank, one at a time, moves them here. The file is replaced atomically. Workers never append to
it: that would need a lock for every failure, and NFS refuses an exclusive flock on a folder.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from shards.errors import UserError
from shards.format.fields import parse
from shards.signed import Json, write_atomic
from shards.storage import open_files


class Reason(StrEnum):
    """Why a clip could not be encoded: a slug, what it means, and how to fix it."""

    meaning: str
    fix: str

    def __new__(cls, slug: str, meaning: str = "", fix: str = "") -> "Reason":
        # a str: the slug itself goes into json, and compares equal to what is read back
        reason = str.__new__(cls, slug)
        reason._value_ = slug
        reason.meaning, reason.fix = meaning, fix
        return reason

    CANNOT_OPEN = (
        "cannot-open",
        "The file is missing, empty, or no video or picture that can be read.",
        "Fetch it again, or remove it.",
    )
    CANNOT_UNPACK = (
        "cannot-unpack",
        "The archive is cut off, damaged, or another one than when it was planned.",
        "Fetch the archive again.",
    )
    NOT_AS_PLANNED = (
        "not-as-planned",
        "The file is another one than when it was planned.",
        "Run `preprocess encode` again, which plans it again, or `preprocess retry`.",
    )
    ENCRYPTED = (
        "encrypted",
        "The samples of the file are encrypted.",
        "Decrypt it, or leave it out.",
    )
    NO_VIDEO_STREAM = (
        "no-video-stream",
        "The file holds sound, subtitles or a cover picture only.",
        "Remove it.",
    )
    NO_PACKETS = (
        "no-packets",
        "There is a video stream, and nothing in it.",
        "Encode the file again.",
    )
    NO_PICTURES = (
        "no-pictures",
        "A folder without pictures.",
        "Fill or remove it.",
    )
    MIXED_SIZES = (
        "mixed-sizes",
        "The pictures of a folder differ in size.",
        "Bring them to one size, or into a folder for each.",
    )
    TRUNCATED = (
        "truncated",
        "The file ends before it says: fewer frames come than it promises.",
        "Fetch it again, or bank what comes: `preprocess retry --allow-truncated`.",
    )
    DAMAGED = (
        "damaged",
        "Frames are decoded with errors.",
        "Fetch it again, or bank what comes: `preprocess retry --allow-truncated`.",
    )
    APPENDED = (
        "appended",
        "Another file was appended to an MP4, QuickTime, ASF or FLV file: only the first is read.",
        "Cut or join them with FFmpeg, or bank what comes: `preprocess retry --allow-truncated`.",
    )
    DECODE_FAILED = (
        "decode-failed",
        "The file opens, and no reader can decode the frames that are asked for.",
        "Encode the file again.",
    )
    EMPTY_PART = (
        "empty-part",
        "No frame starts between the part's start and end.",
        "Correct the part in the annotation file.",
    )
    ODD_MATRIX = (
        "odd-matrix",
        "The file asks to be shown sheared or turned by an odd angle.",
        "Encode it again, turned as it is to be seen.",
    )
    CANNOT_RESIZE = (
        "cannot-resize",
        "The frames have a shape that the tower's image processor refuses.",
        "Leave it out.",
    )
    NOT_REPRESENTABLE = (
        "not-representable",
        "The tower's features exceed what the stored type holds.",
        "Bank with `--dtype bfloat16`.",
    )
    TIMEOUT = (
        "timeout",
        "Decoding took far more CPU time than the size of the video explains.",
        "Encode the file again, or remove it.",
    )
    STALLED = (
        "stalled",
        "The decoder waited, for a disk or the like, and did nothing, twice.",
        "Check the disk, then `preprocess retry`.",
    )
    DECODER_CRASHED = (
        "decoder-crashed",
        "The decoder died of a signal or ran out of memory, twice.",
        "`preprocess retry`; if it dies again, encode the file again or remove it.",
    )


@dataclass(frozen=True)
class QuarantineEntry:
    """One line: a clip that failed, and why."""

    id: str
    key: str
    path: str
    """Path of its source, on the machine that encoded."""
    stage: str
    """decode or tower."""
    reason: Reason
    message: str
    """One line: what is wrong, where, and how to fix it."""
    attempts: int
    """Attempts in all runs."""
    seconds: float
    """Time that the last run spent on reading it."""

    def to_json(self) -> Json:
        return asdict(self)

    def to_line(self) -> bytes:
        return json.dumps(self.to_json(), sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: object, where: str) -> "QuarantineEntry":
        return parse(cls, data, where)

    @classmethod
    def from_line(cls, line: bytes) -> "QuarantineEntry":
        """Return the entry in a line; raises ValueError, KeyError or TypeError for anything else."""
        data: Json = json.loads(line)
        return cls(**{**data, "reason": Reason(data["reason"])})


def read_quarantine(place: str | Path) -> list[QuarantineEntry]:
    """Return the last entry of each clip in a bank's `quarantine.jsonl`; none if there is no such file.

    A last line cut off by a power loss is ignored. Raises UserError for any other line that is not an
    entry.
    """
    files = open_files(place)
    try:
        lines = files.read("quarantine.jsonl").split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    entries = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = QuarantineEntry.from_line(line)
        except (ValueError, KeyError, TypeError):
            # without a line end: cut off while it was written
            if number == len(lines):
                break
            raise UserError(
                "not an entry of a quarantine",
                where=f"{files.where}/quarantine.jsonl:{number}",
                fix="remove the line, its clip is encoded again by `preprocess encode` into another bank",
            ) from None
        # the last line of a clip wins: its newest attempt
        entries[entry.id] = entry
    return list(entries.values())


def quarantine_path(bank: Path) -> Path:
    return bank / "quarantine.jsonl"


def read_entries(bank: Path) -> dict[str, QuarantineEntry]:
    """Return the last entry of each clip, by id."""
    return {entry.id: entry for entry in read_quarantine(bank)}


def update_quarantine(
    bank: Path, gone: Collection[str], failed: Iterable[QuarantineEntry] = ()
) -> None:
    """Rewrite the file with the last entry of each clip, adding `failed`.

    gone: keys of clips to remove. Only for the one process that plans or finishes the bank.
    """
    path = quarantine_path(bank)
    entries = read_entries(bank) | {entry.id: entry for entry in failed}
    kept = [entry for entry in entries.values() if entry.key not in gone]
    data = b"".join(entry.to_line() for entry in kept)
    if not kept:
        path.unlink(missing_ok=True)
    # equal content is not rewritten: a run that finds nothing to do changes no file
    elif not path.exists() or data != path.read_bytes():
        write_atomic(path, data)
