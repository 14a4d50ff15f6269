"""Give the samples of a shard other descriptions: their json changes, their features are copied.

    record = revise(shard, record, correct)      # correct: SampleMeta -> SampleMeta

The shard is written beside its place, in `.repair`, and moved there file by file, its commit record
last; whoever is killed in between goes on with `resume_move`. A shard of which no description
changes is only looked at.
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
from shards.signed import canonical_json, file_facts, write_atomic, write_synced
from shards.write.shard import end_of_archive, index_bytes

Correct = Callable[[SampleMeta], SampleMeta]


def revise(shard: Path, commit: CommitRecord, correct: Correct) -> CommitRecord:
    """Rewrite a shard with corrected descriptions; return its commit record, as it is now on disk.

    A sample whose features are damaged stays damaged: its record keeps the checksum of what should be
    there. One whose description is damaged is copied as it is, and `verify` names it.
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
    write_commit(beside, record)  # last: from now on the new shard counts
    resume_move(shard, commit.fingerprint)
    return record


def resume_move(shard: Path, fingerprint: str) -> bool:
    """Move a revised shard that is whole to its place; whether there was one."""
    beside = shard.parent / ".repair" / shard.name
    try:
        whole = read_commit(beside).fingerprint == fingerprint
    except (FileNotFoundError, UserError):
        return False
    if whole:
        for at in (lambda path: path, index_path, done_path):
            if at(beside).exists():
                os.replace(at(beside), at(shard))
        shutil.rmtree(beside.parent)
    return whole


def _corrected(tar: Tar, sample: SampleRecord, correct: Correct) -> SampleMeta | None:
    """Return a sample's description as it is to be; None where it is so already, or damaged."""
    data = tar.read(*sample.json)
    if fault_of_json(sample.key, data):
        return None
    meta = correct(SampleMeta.from_json(json.loads(data)))
    return None if canonical_json(meta.to_json()) == data else meta


def _rewritten(
    tar: Tar, commit: CommitRecord, revised: dict[str, SampleMeta]
) -> Iterator[tuple[bytes, SampleRecord]]:
    """Yield the bytes and the record of each sample, one after the other from the tar's start."""
    scan, end = ShardScan(tar), 0
    for sample in commit.samples:
        blob = scan.state(sample).blob
        if sample.key in revised:
            blob, sample = with_meta(blob, sample, revised[sample.key])
        yield blob, sample.moved(end - sample.offset)
        end += len(blob)


def with_meta(blob: bytes, sample: SampleRecord, meta: SampleMeta) -> tuple[bytes, SampleRecord]:
    """Return a sample's bytes and record with another description."""
    old = layout(sample)["json"]
    data = canonical_json(meta.to_json())
    new = Member(old.name, old.begin, len(data))
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

    A CRC is linear: what two beginnings differ in passes through any rest of a length alike. So the
    true checksum is known of features that are damaged, too.
    """
    zeros = bytes(rest)
    moved = [google_crc32c.extend(google_crc32c.value(piece), zeros) for piece in (before, after)]
    return int(crc32c ^ moved[0] ^ moved[1])
