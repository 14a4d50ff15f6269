"""The folders between the names of media in records and the ids of banked clips.

A clip's id is its path under the folder that was encoded; records may name it relative to another one.
An exact id always wins. Without one, other names are tried: under the dataset's `media_dir` (its last
folders, as many as ids have), under the row's own `data_source`, and without `strip_prefix`. Where two of
them are banked, the record is refused: a guess would train on another clip.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from shards.errors import UserError
from shards.read.banks import Banks
from shards.read.near import difference, split_part
from shards.text import counted, some

Move = tuple[str, str]
"""(leading folders that a record's name has and the banked id has not, those that the id has)"""
MOST_FOLDERS = 16
"""Banked ids of one file name that are looked at."""


@dataclass(frozen=True)
class Folders:
    """How a dataset's names of media become ids."""

    media_dir: str = ""
    """The folder that the names are relative to, its whole path or the part that the ids have."""
    strip_prefix: tuple[str, ...] = ()
    """Leading folders that the names have and the ids lack; the first that fits is removed."""

    def stripped(self, path: str) -> str:
        """Return a path without the first of the prefixes that it begins with."""
        for prefix in self.strip_prefix:
            folder = PurePosixPath(prefix).as_posix()
            under = folder if folder == "/" else f"{folder}/"
            if path.startswith(under) and len(path) > len(under):
                return path[len(under) :]
        return path

    def other_names(self, id_: str, source: str = "") -> list[str]:
        """Return other ids that a clip may have in a bank, beside the one that its record gives.

        source: the row's `data_source`, empty where it has none.
        """
        short = self.stripped(id_)
        names = [short]
        if not short.startswith("/"):
            folders = PurePosixPath(self.media_dir).parts if self.media_dir else ()
            own = PurePosixPath(source).parts if source else ()
            # several datasets of LLaVA-Video name the folder of a row in data_source
            names += ["/".join([*own, short])]
            # every ending of the folder's path: ids begin at whatever root was encoded
            for k in range(len(folders)):
                above = PurePosixPath(*folders[k:])
                names += [(above / short).as_posix(), above.joinpath(*own, short).as_posix()]
        # the exact id was tried before: it always wins
        return [name for name in dict.fromkeys(names) if name != id_]


def several(id_: str, names: list[str]) -> UserError:
    """Return the error for a clip that may be any of several banked ones."""
    return UserError(
        f"the clip {id_!r} may be {' or '.join(map(repr, names))} of the bank",
        fix="choose one by a longer media_dir, by a strip_prefix, or by exact ids in the records",
    )


def unknown_clips(records: Sequence[tuple[str, str]], banks: Banks) -> list[str]:
    """Return the problems of a file's records whose clips no bank has; records: (which, id).

    Records that the same settings would find are one problem.
    """
    moves = [_moves(id_, banks) for _, id_ in records]
    fits = Counter(move for own in moves for move in own)
    alike: dict[object, list[tuple[str, str, tuple[Move, ...]]]] = {}
    for (which, id_), own in zip(records, moves, strict=True):
        # of several folders with a file of that name the one that fits most records; of equals none is
        # chosen: a guess would train on other clips
        most = max((fits[move] for move in own), default=0)
        best = tuple(sorted(move for move in own if fits[move] == most))
        alike.setdefault(best or (which, id_), []).append((which, id_, best))
    lines = []
    for (which, id_, best), *others in alike.values():
        nor = f", nor those of {counted(len(others), 'more record')}" if others else ""
        lines.append(f"{which}: no bank knows the clip {id_!r}{nor}; {advice(id_, banks, best)}")
    return lines


def _moves(id_: str, banks: Banks) -> list[Move]:
    """Return the other folders under which a clip may be banked; none where more differs than these."""
    found = [difference(id_, near) for near in banks.near.like(id_, MOST_FOLDERS)]
    if any(id_ in bank for bank in banks.beside) or not found or any(found[0][2:]):
        return []
    wanted = found[0].wanted_folder
    return [d[:2] for d in found if d.wanted_folder == wanted and not any(d[2:])]


def advice(id_: str, banks: Banks, moves: Collection[Move] = ()) -> str:
    """Return the fix for a clip that no bank has: similar banked ids, and how they differ.

    moves: the folders that may be meant; the nearest ones where none are given.
    """
    # beside: banks of other datasets of this run
    holder = next((bank for bank in banks.beside if id_ in bank), None)
    if holder:
        return (
            f"{holder.where} has it, which these records do not draw on: name it in their `banks`"
        )
    near = banks.near.like(id_, MOST_FOLDERS)
    near = [other for other in near if difference(id_, other)[:2] in moves] or near
    if not near:
        return "encode it, name its bank"
    found = difference(id_, near[0])
    said = []
    if found.part:
        said.append(_about_parts(id_, near[0]))
    if found.wanted_folder or found.banked_folder:
        said.append(_about_folders(moves or [found[:2]]))
    what = {
        "with / instead of \\": found.backslashes,
        "with other letters in its percent-encoding": found.percent,
        "in capitals and small letters as they are there": found.case,
        "in the Unicode form that it has there (NFC or NFD)": found.form,
        "with the ending of the file": found.ending,
    }
    if any(what.values()):
        said.append(f"write it {', '.join(text for text, is_so in what.items() if is_so)}")
    return f"the bank has {', '.join(map(repr, near[:3]))}: {'; '.join(said)}"


def _about_folders(moves: Collection[Move]) -> str:
    """Return the settings that replace one leading folder by another."""
    ways = []
    for wanted, banked in moves:
        settings = [f"strip_prefix: {wanted}"] if wanted else []
        settings += [f"media_dir: {banked}"] if banked else []
        ways.append(" and ".join(settings))
    if len(ways) == 1:
        asked = f"are the records' paths relative to another root? Set {ways[0]}"
    else:
        asked = (
            f"which of these folders do the records mean? Set {some(ways, separator=', or ')}, "
            "as is right"
        )
    return f"{asked}, or encode with another --video-root"


def _about_parts(wanted: str, banked: str) -> str:
    """Return the fix where another part of a video is banked than the record asks for."""
    asked, there = split_part(wanted)[1], split_part(banked)[1]
    if not there:
        return f"the whole video is banked; for its part {asked[1:]} encode the records' file too"
    if not asked:
        return "parts of it are banked; give the record their start and end, or encode the whole"
    return "other parts of it are banked; encode the records' file too"
