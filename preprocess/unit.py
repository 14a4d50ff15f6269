"""One unit of clips -> one shard: decode, tower, pool, write; what fails goes into the quarantine.

with Encoder(out, features, tower, options) as encoder:
    encoder.encode_unit(0, plan.units[0])
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from model.tower import Tower
from preprocess.decode_child import DecodeChild
from preprocess.packets import VideoError
from preprocess.pictures import PICTURE_FPS
from preprocess.plan import ClipSource
from preprocess.quarantine import append_entry
from preprocess.readers import decord_trouble
from preprocess.sources import Outcome, SourceReader
from preprocess.video import Clip
from shards.schema import FeatureConfig, Json, SampleMeta, Sampling
from shards.writer import ShardWriter, done_path


@dataclass(frozen=True)
class EncodeOptions:
    """What to make of each clip, and how to go about it."""

    tower: str
    strides: tuple[int, ...]
    sampling: Sampling
    layer: int = -2
    pool: str = "average"
    dtype: str = "float16"
    tower_dtype: str = "float32"
    device: str = "cpu"
    batch_frames: int = 16
    decoder: str = "auto"
    allow_truncated: bool = False
    """Take what comes of a truncated or damaged video; its flags say so."""
    video_roots: tuple[str, ...] = ()
    picture_fps: str = PICTURE_FPS
    """Of folders of pictures."""
    shard_bytes: int = 512 * 1024**2


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
    underflowed: int = 0
    """Values that are not zero in the tower's output and zero in the bank."""


class Encoder:
    """What encodes the units of one bank: a decode child, the tower, the books."""

    def __init__(
        self, out: Path, features: FeatureConfig, tower: Tower, options: EncodeOptions
    ) -> None:
        trouble = decord_trouble()
        if trouble and options.decoder == "decord":
            raise ValueError(f"--decoder decord: {trouble}; leave it to auto")
        self.out, self.features, self.tower, self.options = out, features, tower, options
        self.summary = Summary()
        self.attempts: dict[str, int] = {}
        """Of earlier runs, by clip id."""
        self._reader = SourceReader(DecodeChild(), out)
        self._began = time.monotonic()
        self.bar = tqdm(
            unit="clip",
            desc="encode",
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file wants few lines
        )
        if trouble:
            self.bar.write(f"note: {trouble}; PyAV reads every video", file=sys.stderr)

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

        Decoding runs a clip ahead of the tower, in another process.
        """
        writer = ShardWriter(shard_path(self.out, unit))
        banked = underflows = 0
        try:
            for source, future in ahead(sources, self._read):
                outcome = future.result()
                underflowed = self._bank(source, outcome, writer)
                if underflowed is not None:
                    banked += 1
                    underflows += underflowed
                self.bar.update(1)
                rate = self.summary.frames / max(self.bar.format_dict["elapsed"], 1e-9)
                self.bar.set_postfix({"frames/s": f"{rate:.1f}"}, refresh=False)
            if not banked and not keep_empty:
                writer.abandon()
                return 0
            self.summary.nbytes += writer.nbytes
            self.summary.underflowed += underflows
            writer.commit(unit, self.features.fingerprint, underflows)
        except BaseException:
            writer.abandon()
            raise
        return banked

    def _read(self, source: ClipSource) -> Outcome:
        return self._reader.read(
            source,
            self.options.sampling,
            self.tower.pixels,
            decoder=self.options.decoder,
            allow_truncated=self.options.allow_truncated,
        )

    def _bank(self, source: ClipSource, outcome: Outcome, writer: ShardWriter) -> int | None:
        """Write a clip's features; return the underflows, None for a clip put into quarantine."""
        if outcome.clip is None:
            assert outcome.error
            self._quarantine(source, outcome, outcome.error)
            return None
        try:
            arrays, underflowed = self.tower.features(
                outcome.clip.frames,
                self.options.strides,
                pool_mode=self.options.pool,
                dtype=self.options.dtype,
                batch_frames=self.options.batch_frames,
            )
        except ValueError as error:
            self._quarantine(source, outcome, error)
            return None
        writer.write(
            source.key, describe(source, outcome, outcome.clip, self.tower, arrays), arrays
        )
        self.summary.clips += 1
        self.summary.frames += len(outcome.clip.frames)
        return underflowed

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
        patch_grid=tower.patch_grid,
        cell_grids={str(stride): array.shape[1:3] for stride, array in arrays.items()},
        tower_width=tower.width,
        frames_per_unit=1,
        decoder=clip.decoder,
        flags=list(clip.flags),
    )


def shard_path(out: Path, unit: int) -> Path:
    return out / "shards" / f"bank-{unit:06d}.tar"


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
