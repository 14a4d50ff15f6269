"""What lies in a shard: its members as they are, beside what its commit record says of them.

    with Tar(path) as tar:
        tally = Tally(tar)
        sight = tally.look(sample)       # a sample's record out of `.done`
        sight.blob                       # its bytes, None where they are not all there
        sight.faults                     # [("stride4", "its values do not match their checksum")]

A sample's bytes hold no offsets, so one that was moved, or whose members were, is found again; its
checksum proves it.
"""

import io
import json
import os
import tarfile
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import google_crc32c
import numpy as np

from shards.format.samples import member_name, sample_key, scale_name
from shards.signed import Json
from shards.write.shard import BLOCK

PIECE = 1 << 20
MAGIC = b"ustar"
MAGIC_AT = 257

Fault = tuple[str, str]
"""Which part of a sample (`json`, `stride4`, `stride4_scale`), and what is wrong with it."""


class Tar:
    """A shard's file, read at any place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        self.nbytes = os.fstat(self._file).st_size

    def __enter__(self) -> "Tar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return these bytes; fewer where the file ends before."""
        pieces = []
        while nbytes > 0 and (piece := os.pread(self._file, nbytes, offset)):
            pieces.append(piece)
            offset, nbytes = offset + len(piece), nbytes - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@dataclass(frozen=True)
class Member:
    """A member of a tar: where its header begins, and how long its data are."""

    name: str
    begin: int
    nbytes: int

    @property
    def data(self) -> int:
        return self.begin + BLOCK

    @property
    def end(self) -> int:
        return self.data + self.nbytes + -self.nbytes % BLOCK

    def header(self) -> bytes:
        """Return the header that the writer gives such a member."""
        info = tarfile.TarInfo(self.name)
        info.size = self.nbytes
        return info.tobuf(tarfile.USTAR_FORMAT)


def walk(tar: Tar) -> list[Member]:
    """Return the members that have a sound header, whatever lies between them."""
    members, at = [], 0
    while at + BLOCK <= tar.nbytes:
        try:
            info = tarfile.TarInfo.frombuf(tar.read(at, BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            at = _next_header(tar, at + BLOCK)
            continue
        members.append(Member(info.name, at, info.size if _has_data(info) else 0))
        at = members[-1].end
    return members


def _has_data(info: tarfile.TarInfo) -> bool:
    return info.isreg() or info.type not in tarfile.SUPPORTED_TYPES


def _next_header(tar: Tar, at: int) -> int:
    """Return the next block that may be a header, or the end of the file."""
    while at < tar.nbytes:
        piece = tar.read(at, PIECE)
        found = piece.find(MAGIC)
        while found >= 0:
            if found % BLOCK == MAGIC_AT:
                return at + found - MAGIC_AT
            found = piece.find(MAGIC, found + 1)
        at += PIECE
    return tar.nbytes


def layout(sample: Json) -> dict[str, Member]:
    """Return, part by part, the members of a sample as its record places them."""
    key, (offset, nbytes) = sample["key"], sample["json"]
    parts = {"json": Member(f"{key}.json", offset - BLOCK, nbytes)}
    at = parts["json"].end
    for stride in sorted(map(int, sample["streams"])):
        entry = sample["streams"][str(stride)]
        arrays = [(f"stride{stride}", member_name(key, stride), entry)]
        if "scale" in entry:
            arrays.append((f"stride{stride}_scale", scale_name(key, stride), entry["scale"]))
        for part, name, values in arrays:
            parts[part] = Member(name, at, values["offset"] + values["nbytes"] - at - BLOCK)
            at = parts[part].end
    return parts


@dataclass
class Sight:
    """What is left of one sample."""

    blob: bytes | None
    """Its bytes as they were committed, put together from wherever they lie."""
    faults: list[Fault] = field(default_factory=list)
    rest: bytes = b""
    """Without a blob: as many bytes, with true headers, what was found, and zeros for the rest."""
    lost: bool = False
    """Nothing of it was found."""


class Tally:
    """A shard's members, to find samples among."""

    def __init__(self, tar: Tar) -> None:
        self.tar = tar
        self.members = walk(tar)
        self.by_name: dict[str, list[Member]] = defaultdict(list)
        for member in self.members:
            self.by_name[member.name].append(member)
        self._headers = np.asarray([member.begin for member in self.members], np.int64)

    def look(self, sample: Json) -> Sight:
        """Find a sample, and say what is wrong with it, part by part."""
        starts = [sample["offset"]]
        starts += [member.begin for member in self.by_name.get(f"{sample['key']}.json", ())]
        for start in starts:
            blob = self.tar.read(start, sample["nbytes"])
            if google_crc32c.value(blob) == sample["crc32c"]:
                return Sight(blob)
        return self._look_closer(sample)

    def _look_closer(self, sample: Json) -> Sight:
        parts = layout(sample)
        # In its place, unless none of its headers is: then a damaged header is that of a member.
        at_home = any(self._is_home(member) for member in parts.values())
        faults: list[Fault] = []
        pieces, sound, lost = [], True, True
        for part, member in parts.items():
            place, fault = self._place(member, at_home)
            data = b"" if place is None else self.tar.read(place, member.nbytes)
            fault = fault or _fault_of_data(sample, part, data, member.nbytes)
            if fault is None and place is not None:
                padding = self.tar.read(place + member.nbytes, -member.nbytes % BLOCK)
                if padding.strip(b"\0"):
                    fault = "the zeros after it are changed"
            if fault:
                faults.append((part, fault))
            if place is None or len(data) < member.nbytes:
                sound = False
            lost = lost and place is None
            padded = data + bytes(member.end - member.data - len(data))
            pieces += [member.header(), padded]
        blob = b"".join(pieces)
        if sound and google_crc32c.value(blob) == sample["crc32c"]:
            return Sight(blob, faults or self._out_of_order(parts) or self._apart(parts))
        if not faults:
            faults = [("json", "its bytes do not match the checksum of the sample")]
        return Sight(None, faults, blob, lost)

    def _is_home(self, member: Member) -> bool:
        return self.tar.read(member.begin, BLOCK) == member.header()

    def _place(self, member: Member, at_home: bool) -> tuple[int | None, str | None]:
        """Return where a member's data lie, and what is wrong with its header."""
        if self._is_home(member):
            return member.data, None
        found = self.by_name.get(member.name)
        if found:
            other = next((one for one in found if one.nbytes == member.nbytes), found[0])
            if self.tar.read(other.begin, BLOCK) != member.header():
                if other.nbytes != member.nbytes:
                    return other.data, f"is {other.nbytes} bytes, {member.nbytes} were committed"
                return other.data, "its tar header is changed"
            return other.data, None
        if member.begin >= self.tar.nbytes:
            return None, "is gone: the shard ends before it"
        block = self.tar.read(member.begin, BLOCK)
        if not at_home or self._is_of_another(member.begin) or not block.strip(b"\0"):
            return None, "is missing"
        return member.data, "its tar header is changed"

    def _is_of_another(self, offset: int) -> bool:
        number = int(np.searchsorted(self._headers, offset, side="right")) - 1
        return number >= 0 and offset < self.members[number].end

    def _out_of_order(self, parts: dict[str, Member]) -> list[Fault]:
        """Return the parts of a whole sample that stand in another's place."""
        names = {member.name: part for part, member in parts.items()}
        if any(len(self.by_name[name]) > 1 for name in names):
            return []
        there = sorted(names, key=lambda name: self.by_name[name][0].begin)
        return [
            (names[name], "stands in the wrong place among the sample's members")
            for name, other in zip(there, names, strict=True)
            if name != other
        ]

    def _apart(self, parts: dict[str, Member]) -> list[Fault]:
        """Return the parts of a whole sample that something else stands before."""
        places = [(part, self.by_name[member.name][0]) for part, member in parts.items()]
        return [
            (part, "does not follow the sample's member before it")
            for (_, before), (part, place) in pairwise(places)
            if place.begin != before.end
        ]


def _fault_of_data(sample: Json, part: str, data: bytes, nbytes: int) -> str | None:
    if len(data) < nbytes:
        return f"is cut off after {len(data)} of {nbytes} bytes"
    if part == "json":
        return fault_of_json(sample["key"], data)
    entry = sample["streams"][part.removeprefix("stride").removesuffix("_scale")]
    values = entry["scale"] if part.endswith("_scale") else entry
    head = nbytes - values["nbytes"]
    if google_crc32c.value(data[head:]) != values["crc32c"]:
        return "its values do not match their checksum"
    if data[:head] not in npy_heads(entry, part):
        return "its npy header is changed"
    return None


def fault_of_json(key: str, data: bytes) -> str | None:
    """Return what is wrong with a sample's json, None where it is the description of this key."""
    try:
        id_ = json.loads(data)["id"]
        other = sample_key(id_)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is not a description of a clip"
    return None if other == key else f"describes another clip, {id_!r}"


def npy_heads(entry: Json, part: str) -> list[bytes]:
    """Return the npy headers that the values of a stream may have."""
    shape, kinds = entry["shape"], ["<f2", "<u2"]
    if part.endswith("_scale"):
        shape, kinds = shape[:3], ["<f4"]
    elif "frame_nbytes" in entry:
        shape, kinds = [entry["nbytes"]], ["|u1"]
    elif "scale" in entry:
        kinds = ["|i1"]
    heads = []
    for kind in kinds:
        head = io.BytesIO()
        facts = {"descr": kind, "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(head, facts)
        heads.append(head.getvalue())
    return heads


def records(tar: Tar) -> list[Json]:
    """Return the records that a commit would have of the samples in a tar, read off the tar alone.

    A sample that is not one json followed by its arrays has no record.
    """
    groups: list[list[Member]] = []
    for member in walk(tar):
        same = groups and groups[-1][0].name.split(".")[0] == member.name.split(".")[0]
        if same and not member.name.endswith(".json"):
            groups[-1].append(member)
        else:
            groups.append([member])
    found = []
    for group in groups:
        try:
            found.append(_record(tar, group))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            continue
    return found


def _record(tar: Tar, group: list[Member]) -> Json:
    first, *arrays = group
    key, _, kind = first.name.partition(".")
    if kind != "json" or not arrays:
        raise ValueError(first.name)
    meta = json.loads(tar.read(first.data, first.nbytes))
    streams: dict[str, Json] = {}
    for member in arrays:
        part = member.name.removeprefix(f"{key}.stride").removesuffix(".npy")
        stride = part.removesuffix("_scale")
        head = io.BytesIO(tar.read(member.data, min(member.nbytes, 4096)))
        np.lib.format.read_magic(head)
        shape, _, _ = np.lib.format.read_array_header_1_0(head)
        values = tar.read(member.data + head.tell(), member.nbytes - head.tell())
        entry: Json = {
            "offset": member.data + head.tell(),
            "nbytes": len(values),
            "crc32c": google_crc32c.value(values),
        }
        if part != stride:
            streams[stride]["scale"] = entry
            continue
        streams[stride] = entry | {"shape": list(shape)}
        frames = meta.get("frame_nbytes", {}).get(stride)
        if frames:
            cells = meta["cell_grids"][stride]
            entry = {"frame_nbytes": frames, "shape": [len(frames), *cells, meta["tower_width"]]}
            streams[stride] |= entry
    nbytes = arrays[-1].end - first.begin
    return {
        "key": key,
        "json": [first.data, first.nbytes],
        "streams": streams,
        "offset": first.begin,
        "nbytes": nbytes,
        "crc32c": google_crc32c.value(tar.read(first.begin, nbytes)),
    }
