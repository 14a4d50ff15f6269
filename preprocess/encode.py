"""The story of `preprocess encode`: plan -> decode -> tower -> pool -> write.

    encode(["videos/"], Path("bank"), EncodeOptions(tower="google/siglip-so400m-patch14-384",
           strides=(4, 8), sampling=Sampling(fps="1", max_frames=64)))

Finished shards are skipped on a rerun; other features in the same folder are refused; a clip that
fails is named in `quarantine.jsonl` and never stops the run. `bank.json` is written last.
"""

import math
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from model.grid import Grid
from model.tower import Tower
from preprocess.calibrate import calibrate
from preprocess.changes import Changes, compare
from preprocess.decode_child import DecodeChild
from preprocess.launch import Work, encode_in_processes, encode_work
from preprocess.lock import BankLock
from preprocess.plan import (
    ClipSource,
    How,
    Plan,
    find_clips,
    read_plan,
    refuse_other_features,
    write_plan,
)
from preprocess.probe import probe
from preprocess.quarantine import read_entries, settle
from preprocess.sources import SourceReader
from preprocess.unit import EncodeOptions, Summary, committed, disk_errors, shard_path
from shards.catalogue import build_columns, checksums, write_columns
from shards.codec import Codec
from shards.schema import FeatureConfig, Json, canonical_json, shard_entries
from shards.writer import done_path, read_signed_json, signed_json, write_atomic


def encode(
    inputs: Sequence[str],
    out: Path,
    options: EncodeOptions,
    *,
    procs: int = 1,
    full: bool = False,
    prune: bool = False,
) -> Summary:
    """Bank the features of every clip of the inputs; returns what was done and what failed.

    procs: processes, each with a tower and a decoder of its own. full: hash whole sources, not only
    their heads and tails. prune: serve no longer the clips whose sources are gone.
    """
    clips = find_clips(
        inputs,
        options.video_roots,
        options.picture_fps,
        allow_outside=options.allow_outside,
    )
    return encode_clips(clips, out, options, procs=procs, full=full, prune=prune)[0]


def encode_clips(
    clips: Sequence[ClipSource],
    out: Path,
    options: EncodeOptions,
    *,
    procs: int = 1,
    full: bool = False,
    prune: bool = False,
) -> tuple[Summary, Changes]:
    """Do what `encode` does for clips that were found already; returns the changes, too."""
    tower = load_tower(options)
    predicted_bytes(tower, options)  # refuses what the tower cannot do before there is a folder
    with disk_errors(out), BankLock(out, "preprocess encode"):
        changes = make_plan(out, clips, tower, options, full=full, prune=prune)
        return execute(out, changes.plan, clips, tower, options, procs), changes


def plan_clips(
    clips: Sequence[ClipSource],
    out: Path,
    options: EncodeOptions,
    *,
    full: bool = False,
    prune: bool = False,
) -> tuple[Tower, Changes]:
    """Write the plan that `encode_clips` would execute, and encode nothing."""
    tower = load_tower(options)
    predicted_bytes(tower, options)
    with disk_errors(out), BankLock(out, "preprocess plan"):
        return tower, make_plan(out, clips, tower, options, full=full, prune=prune)


def load_tower(options: EncodeOptions) -> Tower:
    return Tower.load(
        options.tower, layer=options.layer, dtype=options.tower_dtype, device=options.device
    )


def make_plan(
    out: Path,
    clips: Sequence[ClipSource],
    tower: Tower,
    options: EncodeOptions,
    *,
    full: bool = False,
    prune: bool = False,
) -> Changes:
    """Return what the clips are to the bank, with its plan, written before any decoding."""
    features = feature_config(tower, options)
    known = read_plan(out)
    if known is not None:
        refuse_other_features(out, features, known.features)
        refuse_missing_shards(out, known)
    how = How(options.batch_frames, options.tower_threads, tower.name)
    plan = known or Plan(features, [], how)
    planned = {clip.key: clip for clip in plan.clips}
    probed = probe(clips, planned, features.sampling, full=full)
    changes = compare(out, plan, probed, lost_keys(out, plan))
    clip_bytes = predicted_bytes(tower, options)
    plan = changes.plan.extended(changes.todo, options.shard_bytes, clip_bytes)
    if prune:
        plan = replace(plan, pruned=plan.pruned | {clip.key for clip in changes.removed})
    with disk_errors(out):
        settle(out, {clip.key for clip in changes.changed})  # they are to be tried again
        if plan != known:
            write_plan(out, plan)
    return replace(changes, plan=plan)


def execute(
    out: Path,
    plan: Plan,
    clips: Sequence[ClipSource],
    tower: Tower,
    options: EncodeOptions,
    procs: int = 1,
) -> Summary:
    """Encode what is left of a plan. clips: of this run, whose old failures are told again."""
    plan = calibrated(out, plan, tower, options)
    quarantined = read_entries(out)
    left = [(n, work) for n, work in enumerate(plan.work()) if not committed(out, n)]
    undone = {clip.id for _, unit in left for clip in unit}
    good = [(n, [clip for clip in unit if clip.id not in quarantined]) for n, unit in left]
    work = Work(out, plan.features, plan_codec(plan), good)
    if min(procs, len(good)) > 1:
        tower.model.to("cpu")  # the workers need the room
        summary = encode_in_processes(work, options, min(procs, len(good)))
    else:
        summary = encode_work(work, tower, options)
    asked = {clip.id for clip in clips}
    earlier = [entry for id_, entry in quarantined.items() if id_ in asked]
    summary.failures = earlier + summary.failures
    served = plan.served()
    there = {clip.id for clip in plan.clips if clip.key in served}
    summary.skipped = len(there - undone - set(quarantined))
    with disk_errors(out):
        finish(out, plan, tower)
    return summary


def calibrated(out: Path, plan: Plan, tower: Tower, options: EncodeOptions) -> Plan:
    """Return the plan with what its codec needs to know, measured once and kept there."""
    if plan.quality is not None or not plan.units:
        return plan
    with SourceReader(DecodeChild(), out) as reader:
        found = calibrate(plan.clips, tower, options, reader)
    scales = {str(stride): scale.tolist() for stride, scale in found.channel_scale.items()}
    quality = {str(stride): facts for stride, facts in found.quality.items()}
    plan = replace(plan, calibration=scales or None, quality=quality)
    write_plan(out, plan)
    return plan


def plan_codec(plan: Plan) -> Codec:
    scales = plan.calibration or {}
    return Codec(
        plan.features.codec,
        plan.features.dtype,
        {int(stride): np.asarray(scale, np.float32) for stride, scale in scales.items()},
    )


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
        codec=options.codec,
    )


PREDICTED_SIZE = 720, 1280
"""(height, width) that frames are taken to have, where the grid follows it: no plan has seen them."""


def frame_bytes(tower: Tower, options: EncodeOptions) -> dict[int, int]:
    """Return the bytes of a frame per stride; of blosc, what it takes before it is compressed."""
    each = tower.width + 4 if options.codec == "int8" else 2 * tower.width
    patches = tower.grid_of(*PREDICTED_SIZE)
    grids = [Grid(*patches, stride, options.pool) for stride in options.strides]
    return {grid.stride: grid.cells * each // tower.frames_per_unit for grid in grids}


def predicted_bytes(tower: Tower, options: EncodeOptions) -> Callable[[ClipSource], int]:
    """Return what tells how many bytes the features of a clip will take, headers left out."""
    frame = sum(frame_bytes(tower, options).values())
    most = options.sampling.most_frames
    return lambda clip: frame * (most if clip.frames is None else clip.frames)


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


def read_commits(bank: Path, plan: Plan) -> list[Json]:
    """Return the commit records of the finished units, in the order of the plan."""
    return [
        read_signed_json(done_path(shard_path(bank, unit)))
        for unit in range(len(plan.units))
        if committed(bank, unit)
    ]


def lost_keys(bank: Path, plan: Plan) -> set[str]:
    """Return the clips that a finished unit should hold or have put into quarantine, and did not.

    It had been pruned then, or its line was taken out of the quarantine since.
    """
    commits = {commit["unit"]: commit for commit in read_commits(bank, plan)}
    banked = {unit: {s["key"] for s in commit["samples"]} for unit, commit in commits.items()}
    failed = {entry.get("key") for entry in read_entries(bank).values()}
    return {
        key
        for key, unit in plan.counts.items()
        if unit in banked and key not in banked[unit] and key not in failed
    }


class NamedTower(Protocol):
    """What the manifest tells of a tower beside the `FeatureConfig`."""

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...


def finish(out: Path, plan: Plan, tower: NamedTower) -> None:
    """Write the catalogue, let banked clips leave the quarantine, and write the manifest last."""
    commits = read_commits(out, plan)
    served = plan.served()
    columns = build_columns(out / "shards", commits, plan.features.strides, served)
    write_columns(out / "index.zarr", columns)
    banked: list[Json] = []
    superseded: dict[str, list[str]] = {}
    for commit in commits:
        for sample in commit["samples"]:
            if served.get(sample["key"]) == commit["unit"]:
                banked.append(sample)
            else:
                superseded.setdefault(commit["shard"], []).append(sample["key"])
    settle(out, {sample["key"] for sample in banked} | plan.pruned)
    manifest: Json = {
        "format_version": plan.features.format_version,
        "features": plan.features.to_json(),
        "fingerprint": plan.features.fingerprint,
        "tower_width": tower.width,
        "clips": len(columns["shard"]),
        "frames": len(columns["timestamps"]),
        "nbytes": sum(commit["nbytes"] for commit in commits),
        "shards": shard_entries(commits),
        "catalogue": checksums(columns),
        "superseded": superseded,
        "codec": {
            "name": plan.features.codec,
            "strides": {
                stride: {"ratio": ratio, **(plan.quality or {}).get(stride, {})}
                for stride, ratio in compression(banked, plan.features.strides).items()
            },
        },
        "calibration": plan.calibration,
        "provenance": {
            "tower": tower.name,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "underflowed": sum(commit["underflowed"] for commit in commits),
            "encoded": distinct([commit.get("provenance", {}) for commit in commits]),
        },
    }
    write_atomic(out / "bank.json", signed_json(manifest))


def compression(samples: Sequence[Json], strides: Sequence[int]) -> dict[str, float | None]:
    """Return stored bytes / bytes of the plain features per stride, as text; None of no samples."""
    stored: dict[str, int] = defaultdict(int)
    plain: dict[str, int] = defaultdict(int)
    for sample in samples:
        for stride, stream in sample["streams"].items():
            stored[stride] += stream["nbytes"] + stream.get("scale", {"nbytes": 0})["nbytes"]
            plain[stride] += 2 * math.prod(stream["shape"])
    return {
        str(stride): stored[str(stride)] / plain[str(stride)] if plain[str(stride)] else None
        for stride in strides
    }


def distinct(records: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return the records that differ, in an order of their own."""
    unique = {canonical_json(dict(record)): record for record in records}
    return [unique[text] for text in sorted(unique)]
