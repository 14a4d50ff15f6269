"""The story of `preprocess encode`: plan -> decode -> tower -> pool -> write.

    encode(["videos/"], Path("bank"), EncodeOptions(tower="google/siglip-so400m-patch14-384",
           strides=(4, 8), sampling=Sampling(fps="1", max_frames=64)))

Finished shards are skipped on a rerun; other features in the same folder are refused; a clip that
fails is named in `quarantine.jsonl` and never stops the run. `bank.json` is written last.
"""

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from model.grid import Grid
from model.tower import Tower
from preprocess.plan import (
    ClipSource,
    Plan,
    find_clips,
    read_plan,
    refuse_other_features,
    write_plan,
)
from preprocess.quarantine import read_entries, settle
from preprocess.sources import identity
from preprocess.unit import EncodeOptions, Encoder, Summary, committed, shard_path
from shards.catalogue import build_columns, write_columns
from shards.schema import FeatureConfig, Json
from shards.writer import done_path, read_signed_json, signed_json, write_atomic


def encode(inputs: Sequence[str], out: Path, options: EncodeOptions) -> Summary:
    """Bank the features of every clip of the inputs; returns what was done and what failed."""
    clips = find_clips(inputs, options.video_roots, options.picture_fps)
    return encode_clips(clips, out, options)


def encode_clips(clips: Sequence[ClipSource], out: Path, options: EncodeOptions) -> Summary:
    """Do what `encode` does, for clips that were found already."""
    tower = load_tower(options)
    plan = make_plan(out, clips, tower, options)
    refuse_missing_shards(out, plan)
    quarantined = read_entries(out)
    asked = {clip.id for clip in clips}
    todo = [unit for unit in range(len(plan.units)) if not committed(out, unit)]
    undone = {clip.id for unit in todo for clip in plan.units[unit]}
    with Encoder(out, plan.features, tower, options) as encoder:
        summary = encoder.summary
        summary.failures = [entry for id_, entry in quarantined.items() if id_ in asked]
        summary.skipped = len({clip.id for clip in plan.clips} - undone - set(quarantined))
        encoder.bar.total = sum(len(plan.units[unit]) for unit in todo)
        for unit in todo:
            good = [source for source in plan.units[unit] if source.id not in quarantined]
            encoder.bar.update(len(plan.units[unit]) - len(good))
            encoder.encode_unit(unit, good)
        finish(out, plan, tower)
    return summary


def load_tower(options: EncodeOptions) -> Tower:
    return Tower.load(
        options.tower, layer=options.layer, dtype=options.tower_dtype, device=options.device
    )


def make_plan(out: Path, clips: Sequence[ClipSource], tower: Tower, options: EncodeOptions) -> Plan:
    """Return the bank's plan with these clips in it, written before any decoding."""
    features = feature_config(tower, options)
    known = read_plan(out)
    if known is not None:
        refuse_other_features(out, features, known.features)
        refuse_other_videos(out, clips, known.clips)
    clip_bytes = predicted_bytes(tower, options)
    plan = (known or Plan(features, [])).extended(clips, options.shard_bytes, clip_bytes)
    out.mkdir(parents=True, exist_ok=True)
    write_plan(out, plan)
    return plan


def feature_config(tower: Tower, options: EncodeOptions) -> FeatureConfig:
    """Return all that the bytes of the bank will depend on."""
    return FeatureConfig(
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


def predicted_bytes(tower: Tower, options: EncodeOptions) -> int:
    """Return the most that one clip can take in a shard."""
    grids = [Grid(*tower.patch_grid, stride, options.pool) for stride in options.strides]
    return options.sampling.most_frames * sum(grid.cells for grid in grids) * tower.width * 2


def refuse_missing_shards(bank: Path, plan: Plan) -> None:
    """Raise ValueError naming each finished shard that is not there any more."""
    shards = [shard_path(bank, unit) for unit in range(len(plan.units)) if committed(bank, unit)]
    problems = [
        f"{shard}: was finished and is gone; restore it, or remove {done_path(shard)} and run again "
        "to encode its clips again"
        for shard in shards
        if not shard.is_file()
    ]
    if problems:
        raise ValueError("\n".join(problems))


def refuse_other_videos(
    bank: Path, clips: Sequence[ClipSource], banked: Sequence[ClipSource]
) -> None:
    """Raise ValueError naming each clip whose id stands for another video in the bank.

    A folder that was moved, or copied with its content, holds the same videos.
    """
    known = {clip.id: clip for clip in banked}
    problems = []
    for clip in clips:
        other = known.get(clip.id)
        path = Path(other.path) if other else None
        if other is None or path is None or not path.exists():
            continue
        if clip.picture_fps != other.picture_fps:
            problems.append(
                f"{clip.path}: {other.picture_fps} pictures per second in {bank}, "
                f"{clip.picture_fps} here; ask for the same, or write to another bank"
            )
        elif path.samefile(clip.path):
            if (clip.offset, clip.nbytes) != (other.offset, other.nbytes):
                problems.append(
                    f"{clip.where}: the archive is another than when {bank} was planned; "
                    "restore it, or write to another bank"
                )
        elif identity(path) != identity(Path(clip.path)):
            problems.append(
                f"{clip.where}: has the id {clip.id!r}, as {other.where} in {bank} has; encode "
                "them from a common folder, or into two banks"
            )
    if problems:
        raise ValueError("\n".join(problems))


def finish(out: Path, plan: Plan, tower: Tower) -> None:
    """Write the catalogue, let banked clips leave the quarantine, and write the manifest last."""
    commits = [
        read_signed_json(done_path(shard_path(out, unit)))
        for unit in range(len(plan.units))
        if committed(out, unit)
    ]
    columns = build_columns(out / "shards", commits, plan.features.strides)
    write_columns(out / "index.zarr", columns)
    settle(out, [sample["key"] for commit in commits for sample in commit["samples"]])
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
