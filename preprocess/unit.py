"""One unit of clips -> one shard: decode, tower, pool, write; what fails goes into the quarantine.

with Encoder(out, features, tower, options, codec) as encoder:
    encoder.encode_unit(0, plan.units[0])
"""

import errno
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from model.choices import TOWER_THREADS
from model.tower import Tower
from preprocess.decode_child import DecodeChild
from preprocess.packets import VideoError
from preprocess.pictures import PICTURE_FPS
from preprocess.plan import ClipSource
from preprocess.quarantine import append_entry
from preprocess.readers import decord_trouble
from preprocess.sources import Outcome, SourceReader
from preprocess.video import Clip
from shards.codec import Codec
from shards.schema import FeatureConfig, Json, SampleMeta, Sampling, shard_name
from shards.writer import ShardWriter, done_path, journal_path, part_path

PLAIN = Codec()


@dataclass(frozen=True)
class EncodeOptions:
    """What to make of each clip, and how to go about it."""

    tower: str
    strides: tuple[int, ...]
    sampling: Sampling
    layer: int = -2
    pool: str = "average"
    dtype: str = "float16"
    codec: str = "none"
    tower_dtype: str = "float32"
    device: str = "cpu"
    batch_frames: int = 16
    tower_threads: int = TOWER_THREADS
    """While the tower runs: sums in another number of threads may round otherwise."""
    decoder: str = "auto"
    allow_truncated: bool = False
    """Take what comes of a truncated or damaged video; its flags say so."""
    video_roots: tuple[str, ...] = ()
    allow_outside: bool = False
    """Annotation files may name videos by absolute paths, or by `..`."""
    picture_fps: str = PICTURE_FPS
    """Of folders of pictures."""
    shard_bytes: int = 512 * 1024**2


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
    failures: list[Json] = field(default_factory=list)


class Encoder:
    """What encodes the units of one bank: a decode child, the tower, the books."""

    def __init__(
        self,
        out: Path,
        features: FeatureConfig,
        tower: Tower,
        options: EncodeOptions,
        codec: Codec = PLAIN,
        bar: "tqdm[Any] | None" = None,
    ) -> None:
        assert (codec.name, codec.dtype) == (features.codec, features.dtype)
        trouble = decord_trouble()
        if trouble and options.decoder == "decord":
            raise ValueError(f"--decoder decord: {trouble}; leave it to auto")
        self.out, self.features, self.tower, self.options = out, features, tower, options
        self.codec = codec
        self.summary = Summary()
        self.attempts: dict[str, int] = {}
        """Of earlier runs, by clip id."""
        self._folders: set[Path] = set()
        """That held clips of this run, and those above them."""
        self._reader = SourceReader(DecodeChild(), out)
        self._began = time.monotonic()
        self.bar = progress_bar() if bar is None else bar
        if trouble:
            self.bar.write(f"note: {trouble}; PyAV reads every video", file=sys.stderr)
        _drop_stale_journals(out / "shards")

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.summary.seconds = time.monotonic() - self._began
        self.bar.close()
        self._reader.__exit__(kind, error, at)

    def encode_unit(
        self, unit: int, sources: Sequence[ClipSource], *, keep_empty: bool = True
    ) -> int:
        """Make one shard, and return how many clips it holds; none at all may make no shard.

        Decoding runs a clip ahead of the tower, in another process. Clips that an earlier run had
        written are not encoded again. Raises OSError, of one line, where the disk fails.
        """
        with disk_errors(self.out), self._writer(unit, sources) as writer:
            todo = [source for source in sources if source.key not in writer.keys]
            self._see_folders(todo)
            self.bar.update(len(sources) - len(todo))
            for source, future in ahead(todo, self._read):
                outcome = future.result()
                if outcome.error:
                    self._refuse_gone_folder(Path(source.path))
                self._bank(source, outcome, writer)
                self.bar.update(1)
                rate = self.summary.frames / max(self.bar.format_dict["elapsed"], 1e-9)
                self.bar.set_postfix({"frames/s": f"{rate:.1f}"}, refresh=False)
            if not writer.entries and not keep_empty:
                writer.abandon()
                return 0
            self.summary.nbytes += writer.nbytes
            writer.commit(
                underflowed=sum(entry["note"]["underflowed"] for entry in writer.entries),
                provenance=provenance(self.tower, self.options),
            )
            return len(writer.entries)

    def _writer(self, unit: int, sources: Sequence[ClipSource]) -> ShardWriter:
        path = shard_path(self.out, unit)
        writer = ShardWriter(path, unit, self.features.fingerprint, self.codec)
        if writer.keys <= {source.key for source in sources}:
            return writer
        writer.abandon()  # left from when this unit was planned of other clips
        return ShardWriter(path, unit, self.features.fingerprint, self.codec)

    def _see_folders(self, sources: Sequence[ClipSource]) -> None:
        for folder in {Path(source.path).parent for source in sources} - self._folders:
            if not _is_gone(folder):
                self._folders |= {folder, *folder.parents}

    def _refuse_gone_folder(self, path: Path) -> None:
        """Raise FileNotFoundError if a folder above is gone since: no clip is to blame for that."""
        for folder in self._folders.intersection(path.parents):
            if _is_gone(folder):
                raise FileNotFoundError(errno.ENOENT, "the videos here have vanished", str(folder))

    def _read(self, source: ClipSource) -> Outcome:
        return self._reader.read(
            source,
            self.options.sampling,
            self.tower.pixels,
            decoder=self.options.decoder,
            allow_truncated=self.options.allow_truncated,
        )

    def _bank(self, source: ClipSource, outcome: Outcome, writer: ShardWriter) -> None:
        """Write a clip's features, or put it into quarantine."""
        if outcome.clip is None:
            assert outcome.error
            self._quarantine(source, outcome, outcome.error)
            return
        try:
            arrays, underflowed = encode_frames(self.tower, outcome.clip.frames, self.options)
        except ValueError as error:
            self._quarantine(source, outcome, ValueError(f"{source.where}: {error}"))
            return
        meta = describe(source, outcome, outcome.clip, self.tower, arrays)
        writer.write(source.key, meta, arrays, {"underflowed": underflowed})
        self.summary.clips += 1
        self.summary.frames += len(outcome.clip.frames)

    def _quarantine(self, source: ClipSource, outcome: Outcome, error: ValueError) -> None:
        """Append a clip that failed to `quarantine.jsonl`, with the reason."""
        entry: Json = {
            "id": source.id,
            "key": source.key,
            "path": source.path,
            "stage": "decode" if isinstance(error, VideoError) else "tower",
            "reason": error.reason if isinstance(error, VideoError) else "not-representable",
            "message": str(error),
            "attempts": self.attempts.get(source.id, 0) + outcome.attempts,
            "seconds": round(outcome.seconds, 3),
        }
        self.summary.failures.append(entry)
        append_entry(self.out, entry)


def encode_frames(
    tower: Tower, frames: np.ndarray, options: EncodeOptions
) -> tuple[dict[int, np.ndarray], int]:
    """Return `Tower.features` of frames at the tower's size, as the options ask."""
    return tower.features(
        frames,
        options.strides,
        pool_mode=options.pool,
        dtype=options.dtype,
        batch_frames=options.batch_frames,
        threads=options.tower_threads,
    )


def provenance(tower: Tower, options: EncodeOptions) -> Json:
    """Return what, beside the `FeatureConfig`, the last bits of features may depend on."""
    import torch
    import transformers

    cuda = tower.device.type == "cuda"
    return {
        "batch_frames": options.batch_frames,
        "tower_threads": options.tower_threads,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "machine": torch.cuda.get_device_name(tower.device) if cuda else platform.machine(),
    }


def describe(
    source: ClipSource, outcome: Outcome, clip: Clip, tower: Tower, arrays: dict[int, np.ndarray]
) -> SampleMeta:
    """Return the json of a sample."""
    height, width = clip.display_size
    return SampleMeta(
        id=source.id,
        path=source.relative,
        size=outcome.size,
        digest=outcome.digest,
        start=clip.start,
        end=clip.end,
        fps=clip.fps,
        frame_count=clip.frame_count,
        frame_index=clip.frame_index.tolist(),
        timestamps=clip.timestamps.tolist(),
        display_size=(height, width),
        covered=tower.pixels.covered(height, width),
        patch_grid=tower.grid_of(height, width),
        cell_grids={str(stride): array.shape[1:3] for stride, array in arrays.items()},
        tower_width=tower.width,
        frames_per_unit=tower.frames_per_unit,
        decoder=clip.decoder,
        flags=list(clip.flags),
    )


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


def _drop_stale_journals(shards: Path) -> None:
    """Remove what a writer left that was killed between its commit and its last step."""
    for done in shards.glob("*.done"):
        shard = done.with_suffix(".tar")
        if not part_path(shard).exists():
            journal_path(shard).unlink(missing_ok=True)


def shard_path(out: Path, unit: int) -> Path:
    return out / "shards" / shard_name(unit)


def committed(out: Path, unit: int) -> bool:
    return done_path(shard_path(out, unit)).exists()


Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    items: Sequence[Item], work: Callable[[Item], Result], depth: int = 2
) -> Iterator[tuple[Item, "Future[Result]"]]:
    """Yield (item, its finished work), with up to `depth` items being worked on meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as pool_:
        waiting = iter(items)
        running = [(item, pool_.submit(work, item)) for item in islice(waiting, depth)]
        while running:
            item, future = running.pop(0)
            future.exception()  # waits; the caller asks for the result
            running += [(nxt, pool_.submit(work, nxt)) for nxt in islice(waiting, 1)]
            yield item, future
