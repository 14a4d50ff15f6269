"""Scan a shard: each sample at its recorded offset, and the members by name.

with Tar(path) as tar:
    scan = ShardScan(tar)
    state = scan.state(sample)       # a SampleRecord of the commit record
    state.sound                      # whether its bytes are those that were committed
    state.faults                     # [("stride4", "its values do not match their checksum")]
    scan.names                       # the number of members by name, of those with undamaged headers
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path

import google_crc32c
import numpy as np

from shards.format.commits import ArrayRecord, CommitRecord, SampleRecord, StreamRecord
from shards.format.samples import SampleMeta, member_name, sample_key, scale_name
from shards.signed import Json, file_facts
from shards.write.shard import BLOCK

Fault = tuple[str, str]
"""A part of a sample (`json`, `stride4`, `stride4_scale`), and its fault."""


class Tar:
    """A shard's file, read at any offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        self.nbytes = os.fstat(self._file).st_size

    def __enter__(self) -> "Tar":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return these bytes; fewer if the file ends early."""
        pieces = []
        while nbytes > 0 and (piece := os.pread(self._file, nbytes, offset)):
            pieces.append(piece)
            offset, nbytes = offset + len(piece), nbytes - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@dataclass(frozen=True)
class Member:
    """A member of a tar: the offset of its header, and the bytes of its data."""

    name: str
    begin: int
    nbytes: int

    @property
    def data(self) -> int:
        return self.begin + BLOCK

    @property
    def padding(self) -> int:
        return -self.nbytes % BLOCK

    @property
    def end(self) -> int:
        return self.data + self.nbytes + self.padding

    def header(self) -> bytes:
        """Return the header that `ShardWriter` writes for this member."""
        info = tarfile.TarInfo(self.name)
        info.size = self.nbytes
        return info.tobuf(tarfile.USTAR_FORMAT)


def layout(sample: SampleRecord) -> dict[str, Member]:
    """Return the members of a sample by part, at the offsets in its record."""
    key, (offset, nbytes) = sample.key, sample.json
    parts = {"json": Member(f"{key}.json", offset - BLOCK, nbytes)}
    at = parts["json"].end
    for stride, stream in sorted(sample.streams.items()):
        arrays: list[tuple[str, str, ArrayRecord]] = [
            (f"stride{stride}", member_name(key, stride), stream)
        ]
        if stream.scale:
            arrays.append((f"stride{stride}_scale", scale_name(key, stride), stream.scale))
        for part, name, values in arrays:
            parts[part] = Member(name, at, values.offset + values.nbytes - at - BLOCK)
            at = parts[part].end
    return parts


@dataclass
class SampleState:
    """State of one sample in a shard."""

    sound: bool
    """Whether its bytes are those that were committed."""
    blob: bytes
    """Its bytes; if damaged, as many: correct headers, the data that is in place, zeros for the rest."""
    faults: list[Fault] = field(default_factory=list)
    displaced: bool = False
    """Whether none of its members is at its offset."""


class ShardScan:
    """A shard's samples, each at its recorded offset, and the names of its members."""

    def __init__(self, tar: Tar) -> None:
        self.tar = tar

    @cached_property
    def names(self) -> Counter[str]:
        """Number of members by name, as the standard library's tarfile finds them."""
        found: Counter[str] = Counter()
        try:
            # ignore_zeros: also continue after damaged headers and after the zeros that end an archive.
            with tarfile.open(self.tar.path, "r:", ignore_zeros=True) as opened:
                for info in opened:
                    found[info.name] += 1
        except tarfile.TarError:  # it ends within a member
            pass
        return found

    def state(self, sample: SampleRecord) -> SampleState:
        """Return the state of a sample at its recorded offset, with the faults of its parts."""
        parts = layout(sample)
        blob = self.tar.read(sample.offset, sample.nbytes)
        lost = sample.nbytes - len(blob)
        if (
            0 < lost <= list(parts.values())[-1].padding
        ):  # only zeros of the last sample are missing
            blob += bytes(lost)
        # one checksum settles the usual case; members are looked at only where it fails
        if google_crc32c.value(blob) == sample.crc32c:
            return SampleState(True, blob)
        faults: list[Fault] = []
        pieces, away = [], 0
        for part, member in parts.items():
            data, fault, in_place = self._look(sample, part, member)
            if fault:
                faults.append((part, fault))
            away += not in_place
            data = data if in_place else b""
            # a blob of the right length in any case, so that what is copied keeps its place
            pieces += [member.header(), data, bytes(member.end - member.data - len(data))]
        if not faults:
            faults = [("json", "its bytes do not match the checksum of the sample")]
        return SampleState(False, b"".join(pieces), faults, away == len(parts))

    def _look(
        self, sample: SampleRecord, part: str, member: Member
    ) -> tuple[bytes, str | None, bool]:
        """Return a member's data, its fault, and whether it is at its offset at all."""
        data = self.tar.read(member.data, member.nbytes)
        # headers are a function of name and size, so that a changed one is found
        # without a checksum of its own
        there = self.tar.read(member.begin, BLOCK) == member.header()
        if member.begin >= self.tar.nbytes:
            return data, "is lost: the shard ends before it", False
        fault = _fault_of_data(sample, part, data, member.nbytes)
        if there:
            padding = self.tar.read(member.data + member.nbytes, member.padding)
            if not fault and padding.strip(b"\0"):
                fault = "the zeros after it are changed"
            return data, fault, True
        if not fault:
            return data, "its tar header is changed", True
        if len(data) < member.nbytes:
            return data, fault, False
        # by name: a member that moved is still there, under another offset
        return data, "is not in its place" if self.names[member.name] else "is missing", False


# -- faults


def _fault_of_data(sample: SampleRecord, part: str, data: bytes, nbytes: int) -> str | None:
    if len(data) < nbytes:
        return f"is cut off after {len(data)} of {nbytes} bytes"
    if part == "json":
        return fault_of_json(sample.key, data)
    stream = sample.streams[int(part.removeprefix("stride").removesuffix("_scale"))]
    values = stream.scale if part.endswith("_scale") and stream.scale else stream
    head = nbytes - values.nbytes
    if google_crc32c.value(data[head:]) != values.crc32c:
        return "its values do not match their checksum"
    if data[:head] not in npy_heads(stream, part):
        return "its npy header is changed"
    return None


def fault_of_json(key: str, data: bytes) -> str | None:
    """Return the fault of a sample's json; None if it describes the clip of this key."""
    try:
        id_ = json.loads(data)["id"]
        other = sample_key(id_)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is not a description of a clip"
    return None if other == key else f"describes another clip, {id_!r}"


def npy_heads(stream: StreamRecord, part: str) -> list[bytes]:
    """Return the npy headers that a stream's member may have."""
    shape: tuple[int, ...] = stream.shape
    # float16, or bfloat16 in uint16
    kinds = ["<f2", "<u2"]
    if part.endswith("_scale"):
        shape, kinds = shape[:3], ["<f4"]
    elif stream.frame_nbytes is not None:
        shape, kinds = (stream.nbytes,), ["|u1"]
    elif stream.scale:
        kinds = ["|i1"]
    heads = []
    for kind in kinds:
        head = io.BytesIO()
        facts = {"descr": kind, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, facts)
        heads.append(head.getvalue())
    return heads


# -- records of an undamaged shard, from its bytes


def commit_of(
    shard: Path, unit: int, fingerprint: str, underflowed: int | None, provenance: Json
) -> CommitRecord:
    """Return the commit record of a shard that is known to be undamaged, from its bytes."""
    facts, samples = file_facts(shard), records(shard)
    return CommitRecord(
        shard=shard.name,
        unit=unit,
        fingerprint=fingerprint,
        **facts,
        samples=samples,
        underflowed=underflowed,
        provenance=provenance,
    )


def records(path: Path) -> list[SampleRecord]:
    """Return the sample records of a shard that is known to be undamaged, from its bytes."""
    with tarfile.open(path, "r:") as opened, Tar(path) as tar:
        members = [Member(info.name, info.offset, info.size) for info in opened]
        # as webdataset groups them: up to the first dot of a name
        samples = groupby(members, lambda member: member.name.partition(".")[0])
        return [_record(tar, key, group) for key, group in samples]


def _record(tar: Tar, key: str, group: Iterator[Member]) -> SampleRecord:
    first, *arrays = group
    meta = SampleMeta.from_json(json.loads(tar.read(first.data, first.nbytes)))
    streams: dict[int, StreamRecord] = {}
    for member in arrays:
        part = member.name.removeprefix(f"{key}.stride").removesuffix(".npy")
        stride = int(part.removesuffix("_scale"))
        # far more than the npy header of an array of four dimensions takes
        head = io.BytesIO(tar.read(member.data, min(member.nbytes, 4096)))
        np.lib.format.read_magic(head)
        shape, _, _ = np.lib.format.read_array_header_1_0(head)
        values = tar.read(member.data + head.tell(), member.nbytes - head.tell())
        place = member.data + head.tell(), len(values), google_crc32c.value(values)
        if part.endswith("_scale"):
            stream = streams[stride]
            streams[stride] = StreamRecord(
                stream.offset, stream.nbytes, stream.crc32c, stream.shape, None, ArrayRecord(*place)
            )
            continue
        frames = meta.frame_nbytes.get(str(stride))
        if frames:
            shape = (len(frames), *meta.cell_grids[str(stride)], meta.tower_width)
        count, rows, cols, dim = shape
        streams[stride] = StreamRecord(*place, (count, rows, cols, dim), frames)
    nbytes = (arrays or [first])[-1].end - first.begin
    return SampleRecord(
        key=key,
        offset=first.begin,
        nbytes=nbytes,
        crc32c=google_crc32c.value(tar.read(first.begin, nbytes)),
        json=(first.data, first.nbytes),
        streams=streams,
    )
