"""Encode one unit of clips into one shard: decode, tower, pool, write; failures go into its record.

with Encoder(out, features, tower, options, codec) as encoder, Leases(out, "a command") as leases:
    for lease in leases.left(range(len(plan.units))):
        encoder.encode_unit(lease, plan.units[lease.unit])

Several processes decode clips ahead of the tower, and a thread writes behind it. For any number and
speed of these, clips pass through the tower and into the shard in the order of the plan, so the bytes
are equal.
"""

import errno
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from model.tower.faults import FeatureRangeError, GpuMemoryError
from preprocess.decode.archive import Unpacker
from preprocess.decode.events import Begin, ClipFacts
from preprocess.decode.source import Outcome
from preprocess.encode.features import EncodeOptions, describe, pooling_of, provenance
from preprocess.encode.jobs import jobs_of
from preprocess.encode.pipeline.decoders import Decoders, decoders_for
from preprocess.encode.pipeline.summary import Summary, progress_bar, show_pace
from preprocess.encode.pipeline.writing import Writing
from shards.errors import UserError, disk_errors
from shards.format.codec import Codec
from shards.format.features import FeatureConfig
from shards.format.plan import ClipSource
from shards.format.quarantine import QuarantineEntry, Reason
from shards.write.lease import Lease
from shards.write.shard import OvertakenError, ShardWriter, resume_commit

if TYPE_CHECKING:
    from tqdm import tqdm

    from model.tower.pooling import Pooling
    from model.tower.tower import Tower

PLAIN = Codec()


class Encoder(ExitStack):
    """Encodes the units of one bank, with decoder processes and a tower."""

    def __init__(
        self,
        out: Path,
        features: FeatureConfig,
        tower: "Tower",
        options: EncodeOptions,
        codec: Codec = PLAIN,
        bar: "tqdm[Any] | None" = None,
        failed: Mapping[str, QuarantineEntry] | None = None,
        retried: bool = False,
        decoders: Decoders | int | None = None,
    ) -> None:
        """failed: by id, clips that failed in earlier runs. They are tried again only if `retried`, even
        if an earlier holder of their unit has tried them. decoders: those of the caller, or a number of
        processes; None for one per core."""
        super().__init__()
        # another codec's bytes would be read by the bank's without an error
        assert (codec.name, codec.dtype) == (features.codec, features.dtype)
        self.out, self.features, self.tower, self.options = out, features, tower, options
        self.codec = codec
        self.summary = Summary()
        self.failed, self.retried = failed or {}, retried
        self._folders: set[Path] = set()
        """Folders of this run's clips, and their parents."""
        if not isinstance(decoders, Decoders):
            decoders = self.enter_context(Decoders(decoders or decoders_for(1), Unpacker(out)))
        self._decoders = decoders
        self._began = time.monotonic()
        self.bar = progress_bar() if bar is None else bar
        self.callback(self._stop)

    def _stop(self) -> None:
        self.summary.seconds = time.monotonic() - self._began
        self.bar.close()

    def encode_unit(
        self, lease: Lease, sources: Sequence[ClipSource], *, keep_empty: bool = True
    ) -> bool:
        """Make one shard; return whether it was committed. Without clips it is not, unless `keep_empty`.

        Clips that an earlier holder of the unit has written are not encoded again. The work is dropped if
        another process takes the unit. Raises OSError (one line) if the disk fails; and GpuMemoryError,
        after which nothing of the shard is kept, since all of its clips must have one batch shape.
        """
        with disk_errors(self.out):
            # -- an earlier holder may have died between the shard and its record: then the record
            # alone is written
            tokens, keys = [one.token for one in lease.earlier], {one.key for one in sources}
            fingerprint = self.features.fingerprint
            digests = {one.key: one.digest for one in sources if one.digest}
            record = resume_commit(lease.shard, fingerprint, keys, tokens, lease.token, digests)
            if record:
                self.summary.failures += record.failures or ()
                self.bar.update(len(sources))
                return True
            before = self.summary.copy()  # of a unit that is lost to another holder nothing counts
            with ShardWriter(
                lease.shard,
                lease.unit,
                fingerprint,
                self.codec,
                lease.token,
                lease.earlier,
                keys,
                digests,
                keep_failures=not self.retried,
            ) as writer:
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
        with Writing(writer) as writing:
            self._fill(writer, writing, lease, sources)
            with self._clocked("write"):
                # the last clips are still on their way to the disk
                writing.wait()
        # a retry in which all fail: an empty shard would only lengthen the plan
        if not writer.entries and not keep_empty:
            writer.abandon()
            return False
        # last look before the commit: a worker that slept for minutes may have lost its unit
        lease.check()
        with self._clocked("write"):
            writer.commit(provenance(self.tower, self.options))
        self.summary.nbytes += writer.nbytes
        return True

    def _fill(
        self, writer: ShardWriter, writing: Writing, lease: Lease, sources: Sequence[ClipSource]
    ) -> None:
        self.summary.failures += writer.failures
        done = set(writer.keys)
        for source in sources:
            if source.id in self.failed and source.key not in done and not self.retried:
                # a failure of an earlier run is written down once more: its unit is complete only
                # with all of its clips
                writing.fail(self.failed[source.id])
                done.add(source.key)
        todo = [source for source in sources if source.key not in done]
        self._see_folders(todo)
        self.bar.update(len(sources) - len(todo))
        with closing(self._encoded(todo, lease, writing)) as encoded:
            for source, outcome, pooling in encoded:
                if outcome.error:
                    self._refuse_gone_folder(Path(source.path))
                self._bank(source, outcome, pooling, writing)
                self.bar.update(1)
                show_pace(self.bar, self.summary)

    @contextmanager
    def _clocked(self, stage: str) -> Iterator[None]:
        """Add the elapsed time to this stage: decode, tower or write."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.summary.spent[stage] += time.monotonic() - began

    def _see_folders(self, sources: Sequence[ClipSource]) -> None:
        """Note the folders of these clips; raises UserError for inputs that are not on this machine."""
        # folders that hold files now: one that is empty later was unmounted, not mistaken
        for folder in {Path(source.path).parent for source in sources} - self._folders:
            if not _is_gone(folder):
                self._folders |= {folder, *folder.parents}
        # without a digest a clip could not be read when it was planned, either
        for root in {_root_of(source) for source in sources if source.digest} - self._folders:
            if _is_gone(root):
                raise UserError(
                    "no videos are here, where the plan has them: they have vanished, or are elsewhere",
                    where=root,
                    fix="mount it, name the folder here with `preprocess work --video-root`, or leave "
                    "its clips out with `preprocess encode --prune`",
                )

    def _refuse_gone_folder(self, path: Path) -> None:
        """Raise FileNotFoundError if a parent folder has vanished: the clip is not to blame."""
        for folder in self._folders.intersection(path.parents):
            if _is_gone(folder):
                raise FileNotFoundError(errno.ENOENT, "the videos here have vanished", str(folder))

    def _encoded(
        self, sources: Sequence[ClipSource], lease: Lease, writing: Writing
    ) -> Generator[tuple[ClipSource, Outcome[ClipFacts], "Pooling | FeatureRangeError | None"]]:
        """Yield each clip's outcome, with its pooled features or the range error of the stored type.

        Only a few frames are in memory at a time, for clips of any length.
        """
        pooling: Pooling | FeatureRangeError | None = None
        # the largest batch: a clip of any length is cut into whole batches
        together = self.tower.batch_shape(sys.maxsize, self.options.batch_frames)
        jobs = jobs_of(sources, self.options, self.tower.pixels)
        with closing(self._decoders.events(jobs, together)) as events:
            while True:
                with self._clocked("decode"):
                    source, event = next(events, (None, None))
                if source is None or event is None:
                    return
                if isinstance(event, Begin):
                    # before the expensive part: frames of a unit that another process has taken
                    # over are for nobody
                    lease.check()
                    pooling = pooling_of(self.tower, event.frames, self.options)
                elif isinstance(event, Outcome):
                    # the clip before it is on the disk by now, or is waited for: a kill costs one
                    # whole clip at most
                    with self._clocked("write"):
                        writing.wait()
                    yield source, event, self._pooled(pooling, None)
                    pooling = None
                else:
                    pooling = self._pooled(pooling, event)
                # its frames would stay in memory while the next ones are decoded
                del event

    def _pooled(
        self, pooling: "Pooling | FeatureRangeError | None", frames: np.ndarray | None
    ) -> "Pooling | FeatureRangeError | None":
        """Encode and pool a clip's next frames; None ends the clip. Return `pooling`, or its error."""
        if pooling is None or isinstance(pooling, FeatureRangeError):
            return pooling
        try:
            with self._clocked("tower"):
                pooling.end() if frames is None else pooling.add(frames)
        except FeatureRangeError as error:
            return error
        return pooling

    def _bank(
        self,
        source: ClipSource,
        outcome: Outcome[ClipFacts],
        pooling: "Pooling | FeatureRangeError | None",
        writing: Writing,
    ) -> None:
        """Queue a clip's features, or its failure, for writing."""
        with self._clocked("write"):
            if outcome.clip is None:
                assert outcome.error
                error = outcome.error
                writing.fail(self._failure(source, outcome, error.reason, str(error)))
                return
            if source.digest not in (None, outcome.digest):
                # replaced meanwhile, or another copy on this machine: a bank of both would not show it
                where = f"{source.where}: {Reason.NOT_AS_PLANNED.meaning}"
                writing.fail(self._failure(source, outcome, Reason.NOT_AS_PLANNED, where))
                return
            if isinstance(pooling, FeatureRangeError):
                where = f"{source.where}: {pooling}"
                writing.fail(self._failure(source, outcome, Reason.NOT_REPRESENTABLE, where))
                return
            assert pooling is not None
            meta = describe(source, outcome, outcome.clip, self.tower, pooling.stored)
            writing.write(source.key, meta, pooling.stored, pooling.underflowed)
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


def _root_of(source: ClipSource) -> Path:
    """Return the folder that a clip was found under; of a member, that of its archive."""
    path, relative = Path(source.path), PurePosixPath(source.relative)
    if source.offset is not None or path.parts[-len(relative.parts) :] != relative.parts:
        return path.parent
    return path.parents[len(relative.parts) - 1]


def _is_gone(folder: Path) -> bool:
    """Return whether a folder does not exist or is empty, as an unmounted one."""
    return not folder.is_dir() or not any(folder.iterdir())
