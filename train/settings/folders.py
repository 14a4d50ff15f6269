"""The folders between the names of media in records and the ids of banked clips.

A clip's id is its path under the folder that was encoded; records may name it relative to another one.
An exact id always wins. Without one, other names are tried: under the dataset's `media_dir` (its last
folders, as many as ids have), under the row's own `data_source`, and without `strip_prefix`. Where two of
them are banked, the record is refused: a guess would train on another clip.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath

from shards.errors import UserError
from shards.read.banks import Banks
from shards.read.near import difference, split_part


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


def advice(id_: str, banks: Banks) -> str:
    """Return the fix for a clip that no bank has: similar banked ids, and how they differ."""
    # beside: banks of other datasets of this run
    holder = next((bank for bank in banks.beside if id_ in bank), None)
    if holder:
        return (
            f"{holder.where} has it, which these records do not draw on: name it in their `banks`"
        )
    near = banks.near.like(id_)
    if not near:
        return "encode it, name its bank"
    found = difference(id_, near[0])
    said = []
    if found.part:
        said.append(_about_parts(id_, near[0]))
    if found.wanted_folder or found.banked_folder:
        said.append(_about_folders(found.wanted_folder, found.banked_folder))
    what = {
        "with / instead of \\": found.backslashes,
        "with other letters in its percent-encoding": found.percent,
        "in capitals and small letters as they are there": found.case,
        "in the Unicode form that it has there (NFC or NFD)": found.form,
        "with the ending of the file": found.ending,
    }
    if any(what.values()):
        said.append(f"write it {', '.join(text for text, is_so in what.items() if is_so)}")
    return f"the bank has {', '.join(map(repr, near))}: {'; '.join(said)}"


def _about_folders(wanted: str, banked: str) -> str:
    """Return the settings that replace one leading folder by another."""
    settings = [f"strip_prefix: {wanted}"] if wanted else []
    settings += [f"media_dir: {banked}"] if banked else []
    return (
        "are the records' paths relative to another root? Set "
        f"{' and '.join(settings)}, or encode with another --video-root"
    )


def _about_parts(wanted: str, banked: str) -> str:
    """Return the fix where another part of a video is banked than the record asks for."""
    asked, there = split_part(wanted)[1], split_part(banked)[1]
    if not there:
        return f"the whole video is banked; for its part {asked[1:]} encode the records' file too"
    if not asked:
        return "parts of it are banked; give the record their start and end, or encode the whole"
    return "other parts of it are banked; encode the records' file too"
