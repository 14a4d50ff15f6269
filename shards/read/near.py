"""Find banked ids that are similar to one that is not banked, and how they differ.

    near = NearIds(banks)
    near.like("clips\\\\A.MP4")     # ['x/clips/a.mp4'], within microseconds once the index is made

Ids are similar when their file names are equal, whatever the folder, the suffix, the case of letters,
the Unicode form, percent-encoding, the kind of slash, and the part of the video. The index is a hash per
id: a million take a few seconds once, and 16 MB.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple
from unicodedata import is_normalized, normalize
from urllib.parse import unquote

import numpy as np

from shards.format.catalogue import split_text
from shards.read.bank import Bank

PART = re.compile(r"#[\d.]+-[\d.]*$")
ENDING = re.compile(r"\.(?=[^.]*[A-Za-z])[A-Za-z0-9]{1,5}$")
MOST = 1000
"""Ids of one name that are compared, at most."""


class Difference(NamedTuple):
    """How a banked id differs from a requested one; empty or False where it does not."""

    wanted_folder: str
    """Leading folders of the requested id that the banked one does not have."""
    banked_folder: str
    """Leading folders of the banked id that the requested one does not have."""
    part: bool
    backslashes: bool
    percent: bool
    case: bool
    form: bool
    """Whether the Unicode forms differ: NFD, in which accents are separate characters, or NFC."""
    ending: bool


def split_part(id_: str) -> tuple[str, str]:
    """Return the path and the part of an id: `#3-7`, or empty."""
    match = PART.search(id_)
    return (id_[: match.start()], match.group()) if match else (id_, "")


def plain_name(id_: str) -> str:
    """Return the file name of an id in lower case, without folder, suffix, part and encoding."""
    path, _ = split_part(id_)
    if "%" in path:
        path = unquote(path)
    name = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return normalize("NFC", ENDING.sub("", name).casefold())


class NearIds:
    """The ids of some banks, indexed by their plain names."""

    def __init__(self, banks: Sequence[Bank]) -> None:
        self._banks = list(banks)
        self._first = np.cumsum([0, *map(len, banks)])
        # Python salts `hash` in each process, so this index can only be used in the one that made it.
        hashes = np.fromiter(
            (hash(plain_name(id_)) for bank in banks for id_ in split_text(bank.columns, "id")),
            np.int64,
            count=int(self._first[-1]),
        )
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def like(self, id_: str, most: int = 3) -> list[str]:
        """Return banked ids that are similar to this one, the most similar first."""
        name = plain_name(id_)
        begin = int(np.searchsorted(self._sorted, hash(name)))
        end = int(np.searchsorted(self._sorted, hash(name), side="right"))
        # bounded: "frame" or "video" may be the name of a million clips
        found = [self._id(int(k)) for k in self._order[begin : min(end, begin + MOST)]]
        found = [other for other in found if plain_name(other) == name]  # hashes may collide
        return sorted(found, key=lambda other: (_distance(difference(id_, other)), other))[:most]

    def _id(self, number: int) -> str:
        bank = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._banks[bank].ids[number - int(self._first[bank])]


def difference(wanted: str, banked: str) -> Difference:
    """Return how a banked id differs from a requested one of the same plain name."""
    (ours, our_part), (theirs, their_part) = split_part(wanted), split_part(banked)
    slashes = ("\\" in ours) != ("\\" in theirs)
    form = is_normalized("NFC", ours) != is_normalized("NFC", theirs)
    # macOS stores names with accents as separate characters (NFD): the same name, other bytes
    ours, theirs = normalize("NFC", ours), normalize("NFC", theirs)
    ours, theirs = ours.replace("\\", "/"), theirs.replace("\\", "/")
    endings = [found.group() if (found := ENDING.search(path)) else "" for path in (ours, theirs)]
    ours, theirs = ours.removesuffix(endings[0]), theirs.removesuffix(endings[1])
    # what more of the tail agrees once `%20` is a blank is due to percent-encoding
    written = _tail(ours, theirs)
    ours, theirs = unquote(ours), unquote(theirs)
    shared = _tail(ours, theirs)
    (our_folder, our_name), (their_folder, their_name) = (
        ("/".join(parts[:-shared]) or "/" * (len(parts) > shared), parts[-shared:])
        for parts in (ours.split("/"), theirs.split("/"))
    )
    return Difference(
        our_folder,
        their_folder,
        part=our_part != their_part,
        backslashes=slashes,
        percent=shared > written,
        form=form,
        case=our_name != their_name or (endings[0] != endings[1] and _same_ending(endings)),
        ending=not _same_ending(endings),
    )


def _same_ending(endings: Sequence[str]) -> bool:
    return endings[0].casefold() == endings[1].casefold()


def _tail(one: str, other: str) -> int:
    """Return how many trailing parts two paths share, ignoring case."""
    pairs = zip(one.casefold().split("/")[::-1], other.casefold().split("/")[::-1], strict=False)
    shared = 0
    for ours, theirs in pairs:
        if ours != theirs:
            break
        shared += 1
    return shared


def _distance(found: Difference) -> int:
    # 4: a folder less in common weighs more than a difference in writing
    folders = len(found.wanted_folder.split("/")) + len(found.banked_folder.split("/"))
    return 4 * folders + sum(map(int, found[2:]))
