"""The story of `preprocess encode`: plan -> decode -> tower -> pool -> write.

    encode(["videos/"], Path("bank"), EncodeOptions(tower="google/siglip-so400m-patch14-384",
           strides=(4, 8), sampling=Sampling(fps="1", max_frames=64)))

Finished shards are skipped on a rerun; other features in the same folder are refused; a clip that
fails is named in `quarantine.jsonl` and never stops the run. `bank.json` is written last.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from model.grid import Grid
from model.pixels import Pixels
from model.tower import Tower
from preprocess.decode_child import DecodeChild
from preprocess.packets import VideoError
from preprocess.plan import (
    ClipSource,
    Plan,
    find_clips,
    read_plan,
    refuse_other_features,
    write_plan,
)
from preprocess.video import Clip
from shards.catalogue import build_columns, write_columns
from shards.reader import read_quarantine
from shards.schema import FeatureConfig, Json, SampleMeta, Sampling, digest
from shards.writer import (
    ShardWriter,
    done_path,
    read_signed_json,
    signed_json,
    write_atomic,
)

HEAD_TAIL = 64 * 1024


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
    video_roots: tuple[str, ...] = ()
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


def encode(inputs: Sequence[str], out: Path, options: EncodeOptions) -> Summary:
    """Bank the features of every clip of the inputs; returns what was done and what failed."""
    return encode_clips(find_clips(inputs, options.video_roots), out, options)


def encode_clips(clips: Sequence[ClipSource], out: Path, options: EncodeOptions) -> Summary:
    """Do what `encode` does, for clips that were found already."""
    tower = Tower.load(
        options.tower, layer=options.layer, dtype=options.tower_dtype, device=options.device
    )
    plan = make_plan(out, clips, tower, options)
    summary, started = Summary(), time.monotonic()
    quarantined = read_quarantine(out)
    failed = {entry["id"] for entry in quarantined}
    asked = {clip.id for clip in clips}
    summary.failures = [entry for entry in quarantined if entry["id"] in asked]
    todo = [(unit, sources) for unit, sources in enumerate(plan.units) if not committed(out, unit)]
    there = {clip.id for clip in plan.clips} - {clip.id for _, unit in todo for clip in unit}
    summary.skipped = len(there - failed)
    with (
        DecodeChild() as child,
        tqdm(
            total=sum(len(sources) for _, sources in todo),
            unit="clip",
            desc="encode",
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file wants few lines
        ) as bar,
    ):
        for unit, sources in todo:
            good = [source for source in sources if source.id not in failed]
            bar.update(len(sources) - len(good))
            encode_unit(out, unit, good, plan.features, tower, child, options, summary, bar)
    commits = [
        read_signed_json(done_path(shard_path(out, unit)))
        for unit in range(len(plan.units))
        if committed(out, unit)
    ]
    finish(out, plan, tower, commits)
    summary.seconds = time.monotonic() - started
    return summary


def make_plan(out: Path, clips: Sequence[ClipSource], tower: Tower, options: EncodeOptions) -> Plan:
    """Return the bank's plan with these clips in it, written before any decoding."""
    features = FeatureConfig(
        tower_type=tower.model_type,
        tower_digest=tower.digest,
        layer=options.layer,
        processor=tower.pixels.to_json(),
        dtype=options.dtype,
        tower_dtype=options.tower_dtype,
        attention=tower.attention,
        sampling=options.sampling,
        strides=options.strides,
        pool=options.pool,
    )
    known = read_plan(out)
    if known is not None:
        refuse_other_features(out, features, known.features)
        refuse_other_videos(out, clips, known.clips)
    grids = [Grid(*tower.patch_grid, stride, options.pool) for stride in options.strides]
    clip_bytes = options.sampling.most_frames * sum(grid.cells for grid in grids) * tower.width * 2
    plan = (known or Plan(features, [])).extended(clips, options.shard_bytes, clip_bytes)
    out.mkdir(parents=True, exist_ok=True)
    write_plan(out, plan)
    return plan


def refuse_other_videos(
    bank: Path, clips: Sequence[ClipSource], banked: Sequence[ClipSource]
) -> None:
    """Raise ValueError naming each clip whose id stands for another video in the bank.

    A folder that was moved, or copied with its content, holds the same videos.
    """
    paths = {clip.id: Path(clip.path) for clip in banked}
    problems = [
        f"{clip.path}: has the id {clip.id!r}, as {path} in {bank} has; encode them from a common "
        "folder, or into two banks"
        for clip in clips
        if (path := paths.get(clip.id))
        and path.is_file()
        and not path.samefile(clip.path)
        and identity(path) != identity(Path(clip.path))
    ]
    if problems:
        raise ValueError("\n".join(problems))


def encode_unit(
    out: Path,
    unit: int,
    sources: Sequence[ClipSource],
    features: FeatureConfig,
    tower: Tower,
    child: DecodeChild,
    options: EncodeOptions,
    summary: Summary,
    bar: "tqdm[NoReturn]",
) -> None:
    """Make one shard: decoding runs a clip ahead of the tower, in another process."""
    writer = ShardWriter(shard_path(out, unit))
    underflows = 0
    try:
        for source, decoded in ahead(sources, lambda s: decode(child, s, options, tower.pixels)):
            try:
                clip, frames = decoded.result()
                arrays, underflowed = tower.features(
                    frames,
                    options.strides,
                    pool_mode=options.pool,
                    dtype=options.dtype,
                    batch_frames=options.batch_frames,
                )
            except ValueError as error:
                quarantine(out, source, error, summary)
            else:
                meta = describe(source, clip, tower, arrays)
                writer.write(source.key, meta, arrays)
                summary.clips += 1
                underflows += underflowed
                summary.frames += len(frames)
            bar.update(1)
            rate = summary.frames / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix({"frames/s": f"{rate:.1f}"}, refresh=False)
        summary.nbytes += writer.nbytes
        summary.underflowed += underflows
        writer.commit(unit, features.fingerprint, underflows)
    except BaseException:
        writer.abandon()
        raise


def decode(
    child: DecodeChild, source: ClipSource, options: EncodeOptions, pixels: Pixels
) -> tuple[Clip, np.ndarray]:
    """Return a clip, and its frames at the tower's size."""
    clip = child.read_clip(
        Path(source.path),
        options.sampling,
        start=source.start,
        end=source.end,
        decoder=options.decoder,
    )
    return clip, pixels.resize(clip.frames)


def describe(
    source: ClipSource, clip: Clip, tower: Tower, arrays: dict[int, np.ndarray]
) -> SampleMeta:
    """Return the json of a sample."""
    height, width = clip.display_size
    size, hash_ = identity(Path(source.path))
    return SampleMeta(
        id=source.id,
        path=source.relative,
        size=size,
        digest=hash_,
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


def identity(path: Path) -> tuple[int, str]:
    """Return a file's size, and a hash of its size, first and last 64 KiB."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(HEAD_TAIL)
        file.seek(max(0, size - HEAD_TAIL))
        return size, digest(str(size).encode() + head + file.read(HEAD_TAIL))


def quarantine(out: Path, source: ClipSource, error: ValueError, summary: Summary) -> None:
    """Append a clip that failed to `quarantine.jsonl`, with the reason."""
    entry: Json = {
        "id": source.id,
        "key": source.key,
        "path": source.path,
        "stage": "decode" if isinstance(error, VideoError) else "tower",
        "reason": error.reason if isinstance(error, VideoError) else "not-representable",
        "message": str(error),
    }
    summary.failures.append(entry)
    with open(out / "quarantine.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry, sort_keys=True) + "\n")


def finish(out: Path, plan: Plan, tower: Tower, commits: list[Json]) -> None:
    """Write the catalogue, and the manifest last."""
    columns = build_columns(out / "shards", commits, plan.features.strides)
    write_columns(out / "index.zarr", columns)
    manifest: Json = {
        "format_version": plan.features.format_version,
        "features": plan.features.to_json(),
        "fingerprint": plan.features.fingerprint,
        "tower_width": tower.width,
        "clips": len(columns["shard"]),
        "frames": len(columns["timestamps"]),
        "nbytes": sum(commit["nbytes"] for commit in commits),
        "shards": [
            {"name": commit["shard"], "nbytes": commit["nbytes"], "sha256": commit["sha256"]}
            for commit in commits
        ],
        "provenance": {
            "tower": tower.name,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "underflowed": sum(commit["underflowed"] for commit in commits),
        },
    }
    write_atomic(out / "bank.json", signed_json(manifest))


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
