"""One unit of clips -> one shard: decode, tower, pool, write; what fails stands in its commit record.

with Encoder(out, features, tower, options, codec) as encoder, Leases(out, "a command") as leases:
    for lease in leases.left(range(len(plan.units))):
        encoder.encode_unit(lease, plan.units[lease.unit])
"""

import errno
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from model.tower.pooling import FeatureRangeError, GpuMemoryError, Pooling
from model.tower.tower import Tower
from preprocess.decode.child import DecodeChild
from preprocess.decode.frames import Begin, ClipFacts
from preprocess.decode.source import Outcome, SourceReader
from preprocess.encode.ahead import ahead
from preprocess.encode.features import EncodeOptions, describe, pooling_of, provenance
from shards.format.codec import Codec
from shards.format.features import FeatureConfig
from shards.format.plan import ClipSource
from shards.format.quarantine import QuarantineEntry, Reason
from shards.write.lease import Lease
from shards.write.shard import OvertakenError, ShardWriter, resume_commit

PLAIN = Codec()
HELD_BYTES = 32 << 20
"""Of frames that are decoded before the tower takes them."""
PARTS_AHEAD = 64
"""Of one file, which a decoder that has to begin at its start is told of."""


def progress_bar(total: int | None = None) -> "tqdm[Any]":
    return tqdm(
        total=total,
        unit="clip",
        desc="encode",
        mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file wants few lines
    )


@dataclass
class Summary:
    """What a run did."""

    clips: int = 0
    frames: int = 0
    nbytes: int = 0
    skipped: int = 0
    """Clips that were in the bank already."""
    seconds: float = 0.0
    failures: list[QuarantineEntry] = field(default_factory=list)


class Encoder(ExitStack):
    """What encodes the units of one bank: a decode child, and the tower."""

    def __init__(
        self,
        out: Path,
        features: FeatureConfig,
        tower: Tower,
        options: EncodeOptions,
        codec: Codec = PLAIN,
        bar: "tqdm[Any] | None" = None,
        failed: Mapping[str, QuarantineEntry] | None = None,
        retried: bool = False,
    ) -> None:
        """failed: by id, clips that have failed in earlier runs. They are tried again only if `retried`,
        and that also where an earlier holder of their unit has tried it."""
        super().__init__()
        assert (codec.name, codec.dtype) == (features.codec, features.dtype)
        self.out, self.features, self.tower, self.options = out, features, tower, options
        self.codec = codec
        self.summary = Summary()
        self.failed, self.retried = failed or {}, retried
        self._folders: set[Path] = set()
        """That held clips of this run, and those above them."""
        self._reader = self.enter_context(SourceReader(DecodeChild(), out))
        self._began = time.monotonic()
        self.bar = progress_bar() if bar is None else bar
        self.callback(self._stop)

    def _stop(self) -> None:
        self.summary.seconds = time.monotonic() - self._began
        self.bar.close()

    def encode_unit(
        self, lease: Lease, sources: Sequence[ClipSource], *, keep_empty: bool = True
    ) -> bool:
        """Make one shard, and return whether it is there; without a clip it is not, unless `keep_empty`.

        Decoding runs a little ahead of the tower, in another process. Clips that an earlier holder of
        the unit had written are not encoded again; what is done here is dropped where another takes the
        unit meanwhile. Raises OSError, of one line, where the disk fails, and GpuMemoryError, which
        leaves nothing of the shard: its clips are all to be of one batch shape.
        """
        with disk_errors(self.out):
            tokens, keys = [one.token for one in lease.earlier], {one.key for one in sources}
            fingerprint = self.features.fingerprint
            if resume_commit(lease.shard, fingerprint, keys, tokens, lease.token):
                self.bar.update(len(sources))
                return True
            before = replace(self.summary, failures=[*self.summary.failures])
            with self._writer(lease, sources) as writer:
                try:
                    return self._made(writer, lease, sources, keep_empty)
                except GpuMemoryError:
                    writer.abandon()
                    raise
                except OvertakenError:
                    writer.abandon()
                    vars(self.summary).update(vars(before))
                    return False

    def _made(
        self, writer: ShardWriter, lease: Lease, sources: Sequence[ClipSource], keep_empty: bool
    ) -> bool:
        self._fill(writer, lease, sources)
        if not writer.entries and not keep_empty:
            writer.abandon()
            return False
        lease.check()
        writer.commit(provenance(self.tower, self.options))
        self.summary.nbytes += writer.nbytes
        return True

    def _fill(self, writer: ShardWriter, lease: Lease, sources: Sequence[ClipSource]) -> None:
        self.summary.failures += writer.failures
        for source in sources:
            if source.id in self.failed and source.key not in writer.keys and not self.retried:
                writer.fail(self.failed[source.id])
        todo = [source for source in sources if source.key not in writer.keys]
        self._see_folders(todo)
        self.bar.update(len(sources) - len(todo))
        for source, outcome, taken in self._encoded(todo, lease):
            if outcome.error:
                self._refuse_gone_folder(Path(source.path))
            self._bank(source, outcome, taken, writer)
            self.bar.update(1)
            rate = self.summary.frames / max(self.bar.format_dict["elapsed"], 1e-9)
            self.bar.set_postfix({"frames/s": f"{rate:.1f}"}, refresh=False)

    def _writer(self, lease: Lease, sources: Sequence[ClipSource]) -> ShardWriter:
        return ShardWriter(
            lease.shard,
            lease.unit,
            self.features.fingerprint,
            self.codec,
            lease.token,
            lease.earlier,
            {source.key for source in sources},
            keep_failures=not self.retried,
        )

    def _see_folders(self, sources: Sequence[ClipSource]) -> None:
        for folder in {Path(source.path).parent for source in sources} - self._folders:
            if not _is_gone(folder):
                self._folders |= {folder, *folder.parents}

    def _refuse_gone_folder(self, path: Path) -> None:
        """Raise FileNotFoundError if a folder above is gone since: no clip is to blame for that."""
        for folder in self._folders.intersection(path.parents):
            if _is_gone(folder):
                raise FileNotFoundError(errno.ENOENT, "the videos here have vanished", str(folder))

    def _encoded(
        self, sources: Sequence[ClipSource], lease: Lease
    ) -> Iterator[tuple[ClipSource, Outcome[ClipFacts], "Pooling | FeatureRangeError | None"]]:
        """Yield what came of each clip, with its features or what the stored type cannot hold.

        A few frames are held at a time, whatever the clips' lengths.
        """
        taken: Pooling | FeatureRangeError | None = None
        with closing(ahead(self._events(sources), HELD_BYTES)) as events:
            for source, event in events:
                if isinstance(event, Begin):
                    lease.check()
                    taken = pooling_of(self.tower, event.frames, self.options)
                elif isinstance(event, Outcome):
                    yield source, event, taken
                    taken = None
                elif isinstance(taken, Pooling):
                    try:
                        taken.add(event)
                    except FeatureRangeError as error:
                        taken = error

    def _events(
        self, sources: Sequence[ClipSource]
    ) -> Iterator[tuple[ClipSource, Begin | np.ndarray | Outcome[ClipFacts]]]:
        together = self.tower.batch_shape(sys.maxsize, self.options.batch_frames)
        for place, source in enumerate(sources):
            request = self.options.request(source, self.tower.pixels)
            request = replace(request, next_parts=_next_parts(source, sources[place + 1 :]))
            for event in self._reader.events(source, request, together):
                yield source, event

    def _bank(
        self,
        source: ClipSource,
        outcome: Outcome[ClipFacts],
        taken: "Pooling | FeatureRangeError | None",
        writer: ShardWriter,
    ) -> None:
        """Write a clip's features, or why there are none."""
        if outcome.clip is None:
            assert outcome.error
            writer.fail(self._failure(source, outcome, outcome.error.reason, str(outcome.error)))
            return
        if isinstance(taken, FeatureRangeError):
            where = f"{source.where}: {taken}"
            writer.fail(self._failure(source, outcome, Reason.NOT_REPRESENTABLE, where))
            return
        assert taken is not None
        meta = describe(source, outcome, outcome.clip, self.tower, taken.stored)
        writer.write(source.key, meta, taken.stored, taken.underflowed)
        self.summary.clips += 1
        self.summary.frames += len(outcome.clip.frame_index)

    def _failure(
        self, source: ClipSource, outcome: Outcome[ClipFacts], reason: Reason, message: str
    ) -> QuarantineEntry:
        before = self.failed.get(source.id)
        entry = QuarantineEntry(
            id=source.id,
            key=source.key,
            path=source.path,
            stage="tower" if reason is Reason.NOT_REPRESENTABLE else "decode",
            reason=reason,
            message=message,
            attempts=(before.attempts if before else 0) + outcome.attempts,
            seconds=round(outcome.seconds, 3),
        )
        self.summary.failures.append(entry)
        return entry


@contextmanager
def disk_errors(bank: Path) -> Iterator[None]:
    """Turn an OSError into one that says where, and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # says so already
            raise
        raise OSError(
            f"{error.filename or bank}: {error.strerror or error}; what is committed is intact, "
            "free space or mend the disk and run the same command again"
        ) from None


def _is_gone(folder: Path) -> bool:
    """Tell whether there is no such folder, or nothing in it, as where a mount has vanished."""
    return not folder.is_dir() or not any(folder.iterdir())


def _next_parts(
    source: ClipSource, following: Sequence[ClipSource]
) -> tuple[tuple[float | None, float | None], ...]:
    """Return the parts of the same file that come right after a part."""
    file = source.path, source.offset
    same = takewhile(lambda other: (other.path, other.offset) == file, following)
    return tuple((other.start, other.end) for other in islice(same, PARTS_AHEAD))
