"""Write `beside.json`: which sides of a bank have its very clips, and may be read with it.

for why in pair(Path("bank")): ...      # a line for each that may not yet
"""

import json
from collections.abc import Sequence
from pathlib import Path

from shards.errors import UserError, disk_errors
from shards.format.beside import FOLDER, Side, read_sides, sides_of, state_of, write_sides
from shards.format.commits import read_commit
from shards.format.features import differences
from shards.format.manifest import Manifest, read_manifest
from shards.signed import canonical_json, digest
from shards.storage import LocalFiles
from shards.text import counted, some
from shards.write.lock import folder_lock

OF_CELLS = ("cell_grids", "frame_nbytes")
"""What a sample's description says of its strides."""


def pair(bank: Path, command: str) -> list[str]:
    """Compare a bank with its sides and write `beside.json`; return a line for each side that is not read
    with the bank, and why.

    Does nothing for a bank without sides. What was compared, and is as it was, is not compared again.
    """
    # an unfinished bank is paired when it is finished
    if not sides_of(bank) or not (bank / "bank.json").exists():
        return []
    with disk_errors(bank), folder_lock(bank, command):
        there = _known(bank)
        known = {side.folder: side for side in there or ()}
        ours = read_manifest(bank)
        described: dict[str, str] = {}
        sides, problems = [], []
        for path in sides_of(bank):
            try:
                theirs = read_manifest(path)
                now = _side(path, ours, theirs)
                if known.get(now.folder) != now:
                    # only once something has changed: it reads the json of every sample
                    described = described or descriptions(bank, ours)
                    refuse_other_clips(path, theirs, ours, described)
            except UserError as error:
                problems.append(str(error))
                old = known.get(f"{FOLDER}/{path.name}")
                sides += [old] if old else []  # readers see that it is out of date, and say so
            else:
                sides.append(now)
        # written only if it says something else: a run with nothing to do changes no file
        if there is None or sides != [*there]:
            write_sides(bank, sides)
        return problems


def _known(bank: Path) -> Sequence[Side] | None:
    """Return what `beside.json` says, None where it is damaged."""
    try:
        return read_sides(LocalFiles(bank))
    except UserError:
        return None


def _side(path: Path, ours: Manifest, theirs: Manifest) -> Side:
    folder = f"{FOLDER}/{path.name}"
    return Side(folder, theirs.features.strides, state_of(ours), state_of(theirs))


def refuse_other_clips(
    path: Path, theirs: Manifest, ours: Manifest, described: dict[str, str]
) -> None:
    """Raise UserError where a side is of another tower or sampling, or lacks a clip of the bank."""
    lines = differences(ours.features.to_json(), theirs.features.to_json())
    if other := [line for line in lines if not line.startswith("strides: ")]:
        raise UserError(f"is of other features than the bank: {'; '.join(other)}", where=path)
    beside = descriptions(path, theirs)
    lacking = sorted(key for key in described if key not in beside)
    other = sorted(key for key in described if beside.get(key, described[key]) != described[key])
    strides = ",".join(map(str, theirs.features.strides))
    if lacking or other:
        what = [f"lacks {counted(len(lacking), 'clip')} ({some(lacking)})"] * bool(lacking)
        what += [f"has other frames of {some(other)}"] * bool(other)
        raise UserError(
            f"stride {strides} is not read with the bank yet: it {' and '.join(what)}, of "
            f"{counted(len(described), 'clip')} there",
            where=path,
            fix=f"encode all inputs of the bank with --stride {strides}; a clip that fails there is in "
            f"{path / 'quarantine.jsonl'}",
        )


def descriptions(bank: Path, manifest: Manifest) -> dict[str, str]:
    """Return, by key, a hash of the description of each sample that a bank serves, but for the grids of
    its cells: which video it is, which frames, and what the tower saw of them."""
    files, found = LocalFiles(bank / "shards"), {}
    for shard in manifest.shards:
        superseded = manifest.superseded.get(shard.name, ())
        for sample in read_commit(bank / "shards" / shard.name).samples:
            if sample.key not in superseded:
                facts = json.loads(files.read(shard.name, *sample.json))
                # grids differ with the stride; video, frames, times and crop may not
                same = {name: value for name, value in facts.items() if name not in OF_CELLS}
                found[sample.key] = digest(canonical_json(same))
    return found
