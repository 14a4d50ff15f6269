"""Open a bank: read and check the manifest, the catalogue, and the sizes of its shards."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards.errors import UserError
from shards.format.catalogue import CatalogueMismatch, Columns, build_columns, read_columns
from shards.format.commits import CommitRecord, done_path, shard_name
from shards.format.manifest import Manifest, ShardEntry, TowerFacts, read_manifest, read_small
from shards.format.plan import Plan
from shards.storage import Files
from shards.text import some
from shards.write.lock import writer_of

TRIES = 5
PAUSE = 0.25
"""Seconds between tries: a writer renames catalogue and manifest within moments of each other."""
STATTERS = 8
"""Threads that ask for the sizes of shards: on a network file system each is a round trip."""


def load(files: Files) -> tuple[Manifest, Columns]:
    """Return the manifest and the catalogue that belongs to it.

    A writer replaces one shortly after the other, so both are read a second time if they disagree.
    """
    seen = []
    for left in reversed(range(TRIES)):
        # the manifest first: it has the checksums that its catalogue must have
        manifest = read_manifest(files)
        seen.append(manifest)
        try:
            return manifest, read_columns(files, manifest.catalogue)
        except CatalogueMismatch as error:
            if not left:
                written = any(other != manifest for other in seen)
                raise UserError(_diagnosis(files, manifest, error, written)) from None
            time.sleep(PAUSE)
    raise AssertionError


def _diagnosis(files: Files, manifest: Manifest, error: CatalogueMismatch, written: bool) -> str:
    """Return the most likely cause of a catalogue that does not match its manifest."""
    writer = writer_of(files)
    # a manifest that changed between two tries has a writer, even if its lock is not seen here
    if writer or written:
        return (
            f"{files.where}: is being written{f' by {writer}' if writer else ''}, its catalogue and "
            "bank.json change; open it when the writer has finished"
        )
    repair = f"run `preprocess repair {files.where}`"
    # three causes that look alike, distinguished by what is wrong: a writer at
    # work, mixed copies, lost files
    gone = [name for name, what in error.wrong.items() if what != "has another checksum"]
    if error.rows is not None and (error.rows != manifest.clips or len(error.wrong) > 2):
        return (
            f"{files.where}: the catalogue lists {error.rows} clips, bank.json "
            f"{manifest.clips}, and they do not belong together: a writer was stopped between "
            f"the two, or parts of two copies were mixed; {repair}, or copy the bank again"
        )
    if gone:
        return f"{error}: the bank was copied in part, or lost files; copy it again, or {repair}"
    return f"{error}: it was damaged or edited; {repair}"


def load_partial(files: Files) -> tuple[Manifest, Columns]:
    """Return a manifest and a catalogue of the shards that are finished now, from their commit records.

    If the run is finished, they are those of the bank. A clip that is planned again and not made yet is
    not served: what is there of it is of an older video.
    """
    planned = read_small(files, "plan.json")
    if planned is None:
        return load(files)
    plan = Plan.from_json(planned, files.where)
    commits = []
    for unit in range(len(plan.units)):
        name = f"shards/{done_path(Path(shard_name(unit)))}"
        record = read_small(files, name)
        if record is not None:
            commits.append(CommitRecord.from_json(record, f"{files.where}/{name}"))
    # read after the records: a run that finished meanwhile is opened as a whole bank
    finished = read_small(files, "bank.json")
    # by what it serves, not by its number of shards: a plan may be newer without a shard more
    if finished and Manifest.from_json(finished, files.where).is_of(plan, commits):
        return load(files)
    shards_dir = f"{files.where}/shards"
    columns = build_columns(shards_dir, commits, plan.features.strides, plan.served())
    return Manifest.of(plan, commits, columns, TowerFacts.of(plan, commits)), columns


def refuse_missing_shards(files: Files, shards: Sequence[ShardEntry]) -> None:
    """Raise UserError naming the shards that are missing or have another size."""
    # sizes alone: they find a copy that was cut short, and cost no reading
    with ThreadPoolExecutor(STATTERS) as pool:
        sizes = list(pool.map(files.size, (f"shards/{shard.name}" for shard in shards)))
    problems = [
        f"{shard.name} " + ("is missing" if got < 0 else f"has {got} of {shard.nbytes} bytes")
        for shard, got in zip(shards, sizes, strict=True)
        if got != shard.nbytes
    ]
    if problems:
        raise UserError(
            f"{files.where}/shards/{some(problems)}: the bank was copied in part, or a shard was "
            f"changed; copy it again, or run `preprocess repair {files.where}`"
        )
