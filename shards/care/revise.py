"""Replace the json of a shard's samples; their features are copied.

    record = revise(shard, record, correct)      # correct: SampleMeta -> SampleMeta

The new shard is written into `.repair` and then moved into place file by file, its commit record last;
after a kill `resume_move` completes the move. A shard in which no json changes is only read.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import google_crc32c

from shards.care.tar_scan import Member, ShardScan, Tar, fault_of_json, layout
from shards.errors import UserError
from shards.format.commits import (
    CommitRecord,
    SampleRecord,
    done_path,
    index_path,
    read_commit,
    write_commit,
)
from shards.format.samples import SampleMeta
from shards.signed import (
    canonical_json,
    file_facts,
    read_signed_json,
    signed_json,
    write_atomic,
    write_synced,
)
from shards.write.shard import end_of_archive, index_bytes

Correct = Callable[[SampleMeta], SampleMeta]
MOVE = "move.json"
"""In `.repair`: the commit record of the shard that is being moved from there."""


def revise(shard: Path, commit: CommitRecord, correct: Correct) -> CommitRecord:
    """Rewrite a shard with corrected json members; return its commit record, as it is now on disk.

    A sample whose features are damaged stays damaged: its record keeps the checksum of the undamaged
    bytes. A sample whose json is damaged is copied unchanged, and `verify` reports it.
    """
    with Tar(shard) as tar:
        revised = {
            sample.key: new
            for sample in commit.samples
            if (new := _corrected(tar, sample, correct)) is not None
        }
        if not revised:
            return commit
        folder = shard.parent / ".repair"
        # of an attempt that was killed before its commit record: nothing there is needed
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        beside = folder / shard.name
        samples = []
        with open(beside, "wb", buffering=0) as file:
            for blob, sample in _rewritten(tar, commit, revised):
                write_synced(file, blob)
                samples.append(sample)
            write_synced(file, end_of_archive(file.tell()))
    record = replace(commit, samples=samples, **file_facts(beside))
    write_atomic(index_path(beside), index_bytes(samples))
    write_commit(
        beside, record
    )  # last: with it the new shard replaces the old one, even after a kill
    resume_move(shard, commit.fingerprint)
    return record


def resume_move(shard: Path, fingerprint: str) -> bool:
    """Move a complete revised shard into place; return whether there was one."""
    beside = shard.parent / ".repair" / shard.name
    try:
        whole = read_commit(beside).fingerprint == fingerprint
    except (FileNotFoundError, UserError):
        return False
    if whole:
        # in the order of a commit; each move can be repeated, and a file that has moved is skipped
        for at in (lambda path: path, index_path, done_path):
            if at(beside).exists():
                os.replace(at(beside), at(shard))
        shutil.rmtree(beside.parent)
    return whole


# -- of a repair, whose new shard may hold samples that are still damaged


def move_rewritten(shard: Path, record: CommitRecord) -> list[str]:
    """Move a shard that was rewritten in `.repair` into place, with this commit record.

    Returns the paths below the bank that were written. After a kill `resume_rewritten` completes it:
    with the new tar beside the old record no sample would be where it is said to be.
    """
    write_atomic(shard.parent / ".repair" / MOVE, signed_json(record.to_json()))
    return resume_rewritten(shard.parent)


def is_being_moved(folder: Path) -> bool:
    """Return whether a `.repair` holds what is missing in a shard's place."""
    return (folder / MOVE).exists()


def resume_rewritten(shards: Path) -> list[str]:
    """Complete the move of a rewritten shard, if one had begun; return as `move_rewritten`."""
    folder = shards / ".repair"
    try:
        record = CommitRecord.from_json(read_signed_json(folder / MOVE), str(folder / MOVE))
    except (FileNotFoundError, UserError):
        return []
    shard, written = shards / record.shard, []
    for at in (lambda path: path, index_path):
        beside, target = at(folder / record.shard), at(shard)
        if beside.exists():
            os.replace(beside, target)
        elif not record.samples:  # without samples there is no tar
            target.unlink(missing_ok=True)
        written.append(f"shards/{target.name}")
    if (
        not done_path(shard).exists()
        or signed_json(record.to_json()) != done_path(shard).read_bytes()
    ):
        write_commit(shard, record)
        written.append(f"shards/{done_path(shard).name}")
    shutil.rmtree(folder)
    return written


def _corrected(tar: Tar, sample: SampleRecord, correct: Correct) -> SampleMeta | None:
    """Return a sample's corrected json; None if it is right already, or damaged."""
    data = tar.read(*sample.json)
    if fault_of_json(sample.key, data):
        return None
    meta = correct(SampleMeta.from_json(json.loads(data)))
    # compared as bytes: only what would be written otherwise is written
    return None if canonical_json(meta.to_json()) == data else meta


def _rewritten(
    tar: Tar, commit: CommitRecord, revised: dict[str, SampleMeta]
) -> Iterator[tuple[bytes, SampleRecord]]:
    """Yield the bytes and the record of each sample, in order from the start of the tar."""
    scan, end = ShardScan(tar), 0
    for sample in commit.samples:
        blob = scan.state(sample).blob
        if sample.key in revised:
            blob, sample = with_meta(blob, sample, revised[sample.key])
        yield blob, sample.moved(end - sample.offset)
        end += len(blob)


def with_meta(blob: bytes, sample: SampleRecord, meta: SampleMeta) -> tuple[bytes, SampleRecord]:
    """Return a sample's bytes and record with another json."""
    old = layout(sample)["json"]
    data = canonical_json(meta.to_json())
    new = Member(old.name, old.begin, len(data))
    # only the json changes its length; what follows moves by whole blocks, with its bytes as they are
    before = blob[: old.end - old.begin]
    after = new.header() + data + bytes(new.padding)
    by = len(after) - len(before)
    record = replace(
        sample.moved(by),
        offset=sample.offset,
        json=(sample.json[0], len(data)),
        nbytes=sample.nbytes + by,
        crc32c=_crc_with(after, before, sample.crc32c, len(blob) - len(before)),
    )
    return after + blob[len(before) :], record


def _crc_with(after: bytes, before: bytes, crc32c: int, rest: int) -> int:
    """Return the checksum of `after` and the rest, given that of `before` and the same rest.

    A CRC is linear over XOR: crc(after + rest) ^ crc(before + rest) depends only on the two beginnings
    and the length of the rest. So the true checksum is known even if the features are damaged.
    """
    # crc(a + rest) ^ crc(b + rest) = crc(a + zeros) ^ crc(b + zeros), for a rest of as many zeros
    zeros = bytes(rest)
    moved = [google_crc32c.extend(google_crc32c.value(piece), zeros) for piece in (before, after)]
    return int(crc32c ^ moved[0] ^ moved[1])
