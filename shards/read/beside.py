"""A bank and the strides beside it, read as one: their columns in the order of the bank's rows.

beside = open_beside(files, manifest, columns)
beside.columns["stride2_offset"]        # of each row of the bank, in the shards of the side
beside.missing[16]                      # why a stride that is there is not read
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from shards.errors import UserError
from shards.format.beside import Side, joined, read_sides, state_of
from shards.format.catalogue import Columns, split_text
from shards.format.manifest import Manifest
from shards.read.opening import load, refuse_missing_shards
from shards.storage import Files, open_files


@dataclass(frozen=True)
class Beside:
    """A bank and those of its sides that are read with it."""

    manifest: Manifest
    """Of the bank alone."""
    whole: Manifest
    """Of the bank and all that is read with it, as if it were one bank."""
    columns: Columns
    """The bank's, and those of the other strides."""
    shards: dict[int, tuple[list[str], np.ndarray]]
    """By stride: names of shards below the bank's folder, and of each row which of them."""
    missing: dict[int, str] = field(default_factory=dict)
    """By stride, why one that is here is not read."""


def open_beside(files: Files, manifest: Manifest, columns: Columns) -> Beside:
    """Return a bank with its sides. manifest, columns: of the bank alone."""
    own = [f"shards/{shard.name}" for shard in manifest.shards], columns["shard"]
    shards, missing = dict.fromkeys(manifest.features.strides, own), dict[int, str]()
    columns_of_all = dict(columns)
    state, manifests = state_of(manifest), list[Manifest]()
    for side in read_sides(files):
        place = open_files(f"{files.where}/{side.folder}")
        try:
            # compared before the side is opened: a stale one costs nothing but this
            if side.bank != state:
                raise _behind(files.where, side)
            theirs, beside = load(place)
            if side.side != state_of(theirs):
                raise _behind(files.where, side)
            refuse_missing_shards(place, theirs.shards)
        except UserError as error:  # the bank's own strides can be read
            missing |= dict.fromkeys(side.strides, str(error))
            continue
        rows = rows_in(columns, beside)
        names = [f"{side.folder}/shards/{shard.name}" for shard in theirs.shards]
        for stride in side.strides:
            columns_of_all |= taken(beside, f"stride{stride}_", rows)
            shards[stride] = names, beside["shard"][rows]
        manifests.append(theirs)
    return Beside(manifest, joined(manifest, manifests), columns_of_all, shards, missing)


def _behind(where: str, side: Side) -> UserError:
    strides = ",".join(map(str, side.strides))
    return UserError(
        "is not of the clips that the bank holds now",
        where=f"{where}/{side.folder}",
        fix=f"`preprocess encode INPUT --stride {strides} --out {where}` brings it up to date",
    )


def rows_in(columns: Columns, beside: Columns) -> np.ndarray:
    """Return of each row of a bank the row of the same clip in a side, which holds all of them."""
    # by key: the side was planned on its own, and may have its clips in other shards and rows
    row_of = {key: row for row, key in enumerate(split_text(beside, "key"))}
    return np.asarray([row_of[key] for key in split_text(columns, "key")], np.int64)


def taken(columns: Columns, prefix: str, rows: np.ndarray) -> Columns:
    """Return the columns of some names with these rows, in this order."""
    found: Columns = {}
    for name in [name for name in columns if name.startswith(prefix)]:
        column = columns[name]
        # written with the values that they belong to
        if name.endswith("_frame_nbytes_offsets"):
            continue
        if name.endswith("_frame_nbytes"):
            found |= _ragged(name, column, columns[f"{name}_offsets"], rows.tolist())
        else:
            each = 4 if name.endswith("_shape") else 1
            found[name] = column.reshape(-1, each)[rows].reshape(-1)
    return found


def _ragged(name: str, values: np.ndarray, offsets: np.ndarray, rows: Sequence[int]) -> Columns:
    pieces = [values[a:b] for a, b in pairwise(offsets.tolist())]
    chosen = [pieces[row] for row in rows]
    flat = np.concatenate(chosen) if chosen else values[:0]
    return {name: flat, f"{name}_offsets": np.cumsum([0, *map(len, chosen)])}
