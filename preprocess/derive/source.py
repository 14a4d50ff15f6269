"""Read the clips of a finished bank, each as a whole and checked against its commit record.

with BankSource(Path("bank")) as source:
    clip = source.sample(plan_clip)         # None for one in quarantine
    clip.meta, clip.stored[4], clip.shapes[4]
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from shards.care.tar_scan import Tar
from shards.errors import UserError
from shards.format.beside import banks_of
from shards.format.codec import Codec, Stored
from shards.format.commits import SampleRecord, StreamRecord, read_commits, shard_path
from shards.format.manifest import read_manifest
from shards.format.plan import ClipSource, Plan, planned
from shards.format.quarantine import read_entries
from shards.format.samples import SampleMeta
from shards.read.bank import Bank

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class StoredClip:
    """One sample in stored form."""

    meta: SampleMeta
    stored: dict[int, Stored]
    shapes: dict[int, Shape]
    """(frames, cell_rows, cell_cols, dim) of the features that were stored."""

    @property
    def entries(self) -> int:
        """Entries along axis 0 of its streams: frames, or units of several frames."""
        return next(iter(self.shapes.values()))[0]


class BankSource(ExitStack):
    """A finished bank of this machine with what is read beside it, clip by clip. Holds a shard of each
    open."""

    def __init__(self, bank: Path) -> None:
        """Raises UserError if there is no bank, or its run is not finished."""
        super().__init__()
        self.bank = bank
        opened = Bank.open(bank)
        self.manifest, self.columns, self.plan = opened.whole, opened.columns, planned(bank)
        self.features, self.codec = opened.whole.features, opened.codec
        self.failed = read_entries(bank)
        """By id, what is in its quarantine."""
        read = set(self.features.strides)
        self._banks = [
            _OneBank(one, plan)
            for one in banks_of(bank)
            for plan in [planned(one)]
            if read.issuperset(plan.features.strides)
        ]
        for one in self._banks:
            self.push(one)

    @property
    def clips(self) -> list[ClipSource]:
        """The clips that are served, and those that failed."""
        pruned, first = self.plan.pruned, self._banks[0]
        return [
            clip
            for clip in self.plan.clips
            if clip.key not in pruned and (clip.key in first.samples or clip.id in self.failed)
        ]

    def __contains__(self, clip: ClipSource) -> bool:
        """Return whether a clip's features are served."""
        return clip.key in self._banks[0].samples

    def streams(self, clip: ClipSource) -> dict[int, StreamRecord]:
        """Return how each stride of a served clip is stored."""
        found: dict[int, StreamRecord] = {}
        for one in self._banks:
            found |= one.samples[clip.key][1].streams
        return found

    def sample(self, clip: ClipSource) -> StoredClip:
        """Return a served clip; raises UserError if its bytes do not match their checksum."""
        first, *others = (one.sample(clip.key, self.codec) for one in self._banks)
        for other in others:
            first.stored.update(other.stored)
            first.shapes.update(other.shapes)
        return first


class _OneBank(ExitStack):
    """A bank alone, or one beside it."""

    def __init__(self, bank: Path, plan: Plan) -> None:
        super().__init__()
        self.bank = bank
        served, commits = plan.served(), read_commits(bank, plan)
        # a clip that is planned again and not made yet would be left out here, though it is served there
        if not read_manifest(bank).is_of(plan, commits):
            raise UserError(
                "its run is not finished: plan and shards are newer than bank.json",
                where=bank,
                fix="run `preprocess encode` again, or `preprocess work` and `preprocess finish`",
            )
        self.samples: dict[str, tuple[int, SampleRecord]] = {
            sample.key: (commit.unit, sample)
            for commit in commits
            for sample in commit.samples
            if served.get(sample.key) == commit.unit
        }
        """By key, the unit and the record of each served sample."""
        self._open: tuple[int, Tar] | None = None

    def sample(self, key: str, codec: Codec) -> StoredClip:
        unit, record = self.samples[key]
        blob = self._tar(unit).read(record.offset, record.nbytes)
        # a damaged cell would be pooled into a sound one, and its new checksum would vouch for it
        if google_crc32c.value(blob) != record.crc32c:
            raise UserError(
                f"sample {record.key}: checksum does not match",
                where=shard_path(self.bank, unit),
                fix=f"`preprocess repair {self.bank}`, then run this again",
            )
        begin = record.json[0] - record.offset
        meta = SampleMeta.from_json(json.loads(blob[begin : begin + record.json[1]]))
        streams = record.streams.items()
        stored = {stride: _stored(blob, record, stream, codec) for stride, stream in streams}
        return StoredClip(meta, stored, {stride: stream.shape for stride, stream in streams})

    def _tar(self, unit: int) -> Tar:
        # clips come in the order of their shards: one open file is enough
        if self._open is None or self._open[0] != unit:
            self.close()
            self._open = unit, self.enter_context(Tar(shard_path(self.bank, unit)))
        return self._open[1]


def _stored(blob: bytes, record: SampleRecord, stream: StreamRecord, codec: Codec) -> Stored:
    """Return a stream without copying its bytes."""
    kinds = {"none": codec.stored_dtype, "blosc": np.dtype("u1"), "int8": np.dtype("i1")}
    at = stream.offset - record.offset
    data = np.frombuffer(blob, np.uint8, stream.nbytes, at).view(kinds[codec.name])
    if codec.name == "blosc":
        return Stored(data, frame_nbytes=stream.frame_nbytes)
    if stream.scale is None:
        return Stored(data.reshape(stream.shape))
    at = stream.scale.offset - record.offset
    scale = np.frombuffer(blob, np.uint8, stream.scale.nbytes, at).view(np.float32)
    return Stored(data.reshape(stream.shape), scale=scale.reshape(stream.shape[:3]))
