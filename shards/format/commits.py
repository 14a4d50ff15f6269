"""The files of a shard by name, and the commit records (`.done`) of finished shards.

The commit record `bank-000000.done` alone says what is in `bank-000000.tar`: without it the shard does
not exist. Offsets are from the start of the tar. While a shard is written, the holder of its unit's lease
writes files whose names contain the lease's token, such as `bank-000000.tar.5e1f0c3a.part`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shards.errors import UserError
from shards.format.fields import parse
from shards.format.plan import Plan
from shards.format.quarantine import QuarantineEntry
from shards.signed import Json, read_signed_json, signed_json, write_atomic
from shards.text import some

# the token may be missing: a writer without a lease (of repair) has none
ATTEMPT_FILE = re.compile(
    r"(.+\.tar)(?:\.[0-9a-f]+)?\.(part|journal|record|index|holder|lease)(?:\.tmp)?"
)
"""Files of a unit's holders: the shard, then the token or the lease's number, then the kind."""
DONE_FILE = re.compile(r"bank-(\d+)\.done")
"""A commit record, with the number of its unit."""


@dataclass(frozen=True)
class ArrayRecord:
    """Where the values of an npy member are, without its header."""

    offset: int
    nbytes: int
    crc32c: int


@dataclass(frozen=True)
class StreamRecord(ArrayRecord):
    """The features of one clip and stride."""

    shape: tuple[int, int, int, int]
    """(frames, cell_rows, cell_cols, dim) of the decoded features."""
    frame_nbytes: list[int] | None = None
    """blosc: the compressed bytes of each frame."""
    scale: ArrayRecord | None = None
    """int8: the scale of each token, `(frames, cell_rows, cell_cols)`."""


@dataclass(frozen=True)
class SampleRecord:
    """One clip: a json member, then the array members of each stride."""

    key: str
    offset: int
    """Offset of its first tar header."""
    nbytes: int
    """Headers and padding included."""
    crc32c: int
    json: tuple[int, int]
    """Offset and bytes of its json, without the tar header."""
    streams: dict[int, StreamRecord]

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def frames(self) -> int:
        """Entries along axis 0 of its arrays."""
        return next(iter(self.streams.values())).shape[0]

    def moved(self, by: int) -> "SampleRecord":
        """Return the record of the same sample with offsets increased by `by` bytes."""

        def shift(stream: StreamRecord) -> StreamRecord:
            scale = stream.scale and replace(stream.scale, offset=stream.scale.offset + by)
            return replace(stream, offset=stream.offset + by, scale=scale)

        return replace(
            self,
            offset=self.offset + by,
            json=(self.json[0] + by, self.json[1]),
            streams={stride: shift(stream) for stride, stream in self.streams.items()},
        )

    def to_json(self) -> Json:
        streams = {
            str(stride): {
                # a plain bank's records stay short: they are one line for each clip and stride
                name: value
                for name, value in asdict(stream).items()
                if value is not None
            }
            for stride, stream in self.streams.items()
        }
        return self.__dict__ | {"streams": streams}

    @classmethod
    def from_json(cls, data: object, where: str) -> "SampleRecord":
        return parse(cls, data, where)


@dataclass(frozen=True)
class CommitRecord:
    """A finished shard: its checksums and the places of its samples; without samples there is no tar."""

    shard: str
    unit: int
    fingerprint: str
    nbytes: int
    sha256: str
    crc32c: int
    samples: list[SampleRecord]
    underflowed: int | None
    """Values that the stored type rounded to zero; None if the original record was lost."""
    provenance: Json
    """Libraries and hardware, on which the last bits may depend; empty if the record was lost."""
    failures: list[QuarantineEntry] | None = None
    """The unit's clips that could not be encoded; None if all could."""

    @property
    def keys(self) -> set[str]:
        """Keys of the samples."""
        return {sample.key for sample in self.samples}

    def to_json(self) -> Json:
        failures = [entry.to_json() for entry in self.failures or ()]
        return (
            {name: value for name, value in self.__dict__.items() if name != "failures"}
            | {"samples": [sample.to_json() for sample in self.samples]}
            | ({"failures": failures} if failures else {})
        )

    @classmethod
    def from_json(cls, data: object, where: str) -> "CommitRecord":
        return parse(cls, data, where)


# -- reading and writing records


def end_of(samples: Sequence[SampleRecord]) -> int:
    """Return the offset at which the members of a tar end."""
    return samples[-1].end if samples else 0


def write_commit(shard: Path, commit: CommitRecord) -> None:
    """Write the commit record of the shard at this path, atomically."""
    write_atomic(done_path(shard), signed_json(commit.to_json()))


def read_commit(shard: Path) -> CommitRecord:
    """Return the commit record of the shard at this path; raises UserError for a damaged one."""
    path = done_path(shard)
    return CommitRecord.from_json(read_signed_json(path), str(path))


def read_commits(bank: Path, plan: Plan) -> list[CommitRecord]:
    """Return the commit records of the finished units, in the order of the plan."""
    units = range(len(plan.units))
    return [read_commit(shard_path(bank, unit)) for unit in units if committed(bank, unit)]


def refuse_missing_shards(bank: Path, plan: Plan) -> None:
    """Raise UserError naming each finished shard whose tar no longer exists."""
    shards = [shard_path(bank, unit) for unit in range(len(plan.units)) if committed(bank, unit)]
    problems = [
        f"{shard}: was finished and is missing; restore it, or remove {done_path(shard)} and run again "
        "to encode its clips again"
        for shard in shards
        if not shard.is_file() and read_commit(shard).samples
    ]
    if problems:
        raise UserError.of(problems)


def refuse_unplanned_shards(bank: Path, plan: Plan | None) -> None:
    """Raise UserError for shards that a plan has not: new units of their names would pass for made."""
    if not (bank / "plan.json").exists() and any((bank / "shards").glob("*")):
        raise UserError(
            "has shards and no plan.json, which says what is in them",
            where=bank,
            fix="restore plan.json from a copy, or remove the folder `shards`",
        )
    planned = 0 if plan is None else len(plan.units)
    done = {path: DONE_FILE.fullmatch(path.name) for path in bank.glob("shards/*.done")}
    unplanned = sorted(path.name for path, name in done.items() if name and int(name[1]) >= planned)
    if unplanned:
        raise UserError(
            f"has shards of no unit of its plan: {some(unplanned)}",
            where=bank,
            fix=f"restore the plan.json that they are of, or remove them: `preprocess gc {bank}`",
        )


# -- files of a shard by name


def shard_name(unit: int) -> str:
    return f"bank-{unit:06d}.tar"


def shard_path(out: Path, unit: int) -> Path:
    return out / "shards" / shard_name(unit)


def attempt_path(shard: Path, token: str, kind: str) -> Path:
    """Return the path of a holder's file; a writer without a lease has no token."""
    return shard.with_name(".".join(filter(None, (shard.name, token, kind))))


def part_path(shard: Path, token: str = "") -> Path:
    return attempt_path(shard, token, "part")


def journal_path(shard: Path, token: str = "") -> Path:
    return attempt_path(shard, token, "journal")


def record_path(shard: Path, token: str = "") -> Path:
    """The file that becomes the commit record, unless another holder committed first."""
    return attempt_path(shard, token, "record")


def lease_path(shard: Path, number: int) -> Path:
    """The lease file of a unit's first, second ... holder."""
    return shard.with_name(f"{shard.name}.{number}.lease")


def attempt_files(shards: Path) -> Iterator[tuple[Path, Path, str]]:
    """Yield the files of holders in a folder of shards, each with its shard and its kind."""
    for path in shards.glob("*.tar.*"):
        if match := ATTEMPT_FILE.fullmatch(path.name):
            yield path, shards / match[1], match[2]


def index_path(shard: Path) -> Path:
    """The index of a shard: uint64 little-endian offsets of each sample's first header, then the end.

    The layout of Megatron-Energon and Lhotse, so that they find samples without reading the tar.
    """
    return shard.with_name(shard.name + ".idx")


def done_path(shard: Path) -> Path:
    return shard.with_suffix(".done")


def committed(out: Path, unit: int) -> bool:
    return done_path(shard_path(out, unit)).exists()
