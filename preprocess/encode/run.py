"""The story of `preprocess encode`: plan -> work (decode -> tower -> pool -> write) -> finish.

    encode(["videos/"], Path("bank"), EncodeOptions(tower="google/siglip-so400m-patch14-384",
           strides=(4, 8), sampling=Sampling(fps="1", max_frames=64)))

Finished shards are skipped on a rerun; other features in the same folder are refused; a clip that
fails is named in `quarantine.jsonl` and never stops the run. `bank.json` is written last.

The three are commands, too: one process plans, any number on any machines work, one finishes.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from model.tower.pooling import GpuMemoryError
from model.tower.tower import Tower
from model.tower.trial import check_size
from preprocess.decode.child import DecodeChild
from preprocess.decode.source import SourceReader
from preprocess.encode.calibrate import calibrate
from preprocess.encode.features import (
    EncodeOptions,
    feature_config,
    load_tower,
    plan_codec,
    predicted_bytes,
)
from preprocess.encode.unit import Summary, disk_errors
from preprocess.encode.workers import Work, encode_in_processes, encode_work
from preprocess.sources.changes import Changes, compare
from preprocess.sources.find import Found, clips_under, find_clips
from preprocess.sources.probe import probe
from preprocess.sources.skips import write_skips
from shards.errors import UserError
from shards.format.commits import committed, read_commits, refuse_missing_shards
from shards.format.plan import (
    READER,
    ClipSource,
    Plan,
    TowerSettings,
    planned,
    read_plan,
    refuse_derived,
    refuse_other_features,
    write_plan,
)
from shards.format.quarantine import read_entries, settle
from shards.write.finish import finish, refuse_unfinished, untold_failures
from shards.write.lock import folder_lock


def encode(
    inputs: Sequence[str],
    out: Path,
    options: EncodeOptions,
    *,
    procs: int = 1,
    prune: bool = False,
) -> Summary:
    """Bank the features of every clip of the inputs; returns what was done and what failed.

    procs: processes, each with a tower and a decoder of its own. prune: serve no longer the
    clips whose sources are gone.
    """
    found = find_clips(inputs, options.find)
    return encode_clips(found, out, options, procs=procs, prune=prune)[0]


def encode_clips(
    found: Found,
    out: Path,
    options: EncodeOptions,
    *,
    procs: int = 1,
    prune: bool = False,
) -> tuple[Summary, Changes]:
    """Do what `encode` does for clips that were found already; returns the changes, too."""
    tower = load_tower(options)
    predicted_bytes(tower, options)  # refuses what the tower cannot do before there is a folder
    with disk_errors(out), folder_lock(out, "preprocess encode"):
        changes, options = make_plan(out, found.clips, tower, options, prune=prune)
        write_skips(out, found.skips)
        return execute(out, changes.plan, found.clips, tower, options, procs), changes


def plan_clips(
    found: Found,
    out: Path,
    options: EncodeOptions,
    *,
    prune: bool = False,
) -> tuple[Tower, Changes, EncodeOptions]:
    """Write the plan that `encode_clips` would execute, and encode nothing."""
    tower = load_tower(options)
    predicted_bytes(tower, options)
    with disk_errors(out), folder_lock(out, "preprocess plan"):
        changes, options = make_plan(out, found.clips, tower, options, prune=prune)
        write_skips(out, found.skips)
        return tower, changes, options


def make_plan(
    out: Path,
    clips: Sequence[ClipSource],
    tower: Tower,
    options: EncodeOptions,
    *,
    prune: bool = False,
) -> tuple[Changes, EncodeOptions]:
    """Return what the clips are to the bank, with its plan, written before any decoding; and the
    options, of which `batch_frames` is halved where the GPU had no memory for calibrating."""
    features = feature_config(tower, options)
    known = read_plan(out)
    if known is not None:
        refuse_other_features(out, features, known.features)
        refuse_missing_shards(out, known)
    else:
        check_size(tower)
    settings = TowerSettings(options.batch_frames, options.tower_threads, tower.name)
    plan = known or Plan(features, [], settings, decoder=READER)
    if plan.decoder not in (None, READER):
        raise UserError(
            f"{out}: its videos are read by {plan.decoder}, which this version cannot; encode with the "
            "version that began the bank, or into another folder"
        )
    planned = {clip.key: clip for clip in plan.clips}
    probed = probe(clips, planned, features.sampling)
    changes = compare(out, plan, probed, lost_keys(out, plan))
    clip_bytes = predicted_bytes(tower, options)
    plan = changes.plan.extended(changes.todo, options.shard_bytes, clip_bytes)
    if prune:
        plan = replace(plan, pruned=plan.pruned | {clip.key for clip in changes.removed})
    plan = replace(plan, allow_truncated=options.allow_truncated or None)
    with disk_errors(out):
        settle(out, {clip.key for clip in changes.changed})  # they are to be tried again
        if plan != known:
            write_plan(out, plan)
        plan, options = fitting(
            out, plan, options, lambda plan, options: calibrated(out, plan, tower, options)
        )
    return replace(changes, plan=plan), options


def execute(
    out: Path,
    plan: Plan,
    clips: Sequence[ClipSource],
    tower: Tower,
    options: EncodeOptions,
    procs: int = 1,
) -> Summary:
    """Encode what is left of a plan. clips: of this run, whose old failures are told again.

    A tower that the GPU has no memory for is tried once more with half the frames together, while the
    bank holds nothing: plan.json then says so, and all features are made alike. Else, and the second
    time, GpuMemoryError is for the user.
    """
    return fitting(
        out, plan, options, lambda plan, options: _execute(out, plan, clips, tower, options, procs)
    )[0]


T = TypeVar("T")


def fitting(
    out: Path, plan: Plan, options: EncodeOptions, do: Callable[[Plan, EncodeOptions], T]
) -> tuple[T, EncodeOptions]:
    """Return what `do` makes, if need be at the second try with half the frames together; and the
    options that it was made with."""
    try:
        return do(plan, options), options
    except GpuMemoryError as error:
        plan = _with_fewer_frames(out, plan, error)
    options = replace(options, batch_frames=plan.tower.batch_frames)
    return do(plan, options), options


def _with_fewer_frames(out: Path, plan: Plan, error: GpuMemoryError) -> Plan:
    """Write and return the plan of a bank that holds nothing, with frames that there is memory for."""
    if not error.fewer or any((out / "shards").glob("*")):
        raise error
    torch.cuda.empty_cache()
    plan = replace(plan, tower=replace(plan.tower, batch_frames=error.fewer))
    write_plan(out, plan)
    tqdm.write(
        "note: the GPU has no memory for so many frames; the bank is made with --batch-frames "
        f"{error.fewer}",
        file=sys.stderr,
    )
    return plan


def _execute(
    out: Path,
    plan: Plan,
    clips: Sequence[ClipSource],
    tower: Tower,
    options: EncodeOptions,
    procs: int,
) -> Summary:
    undone = {clip.id for unit in _units_left(out, plan).values() for clip in unit}
    summary = _encode_left(out, plan, tower, options, procs, "preprocess encode")
    refuse_unfinished(out, plan, f"`preprocess finish {out}` when they are made")
    with disk_errors(out):
        finish(out, plan, tower)
    entries, asked = read_entries(out), {clip.id for clip in clips}
    summary.failures = [entry for id_, entry in entries.items() if id_ in asked]
    served = plan.served()
    there = {clip.id for clip in plan.clips if clip.key in served}
    summary.skipped = len(there - undone - set(entries))
    return summary


def _encode_left(
    out: Path,
    plan: Plan,
    tower: Tower,
    options: EncodeOptions,
    procs: int,
    command: str,
    start: float = 0.0,
) -> Summary:
    """Encode what nobody else has or is at."""
    left = _units_left(out, plan)
    work = Work(
        out, plan.features, plan_codec(plan), left, command, failed=read_entries(out), start=start
    )
    if min(procs, len(left)) > 1:
        tower.model.to("cpu")  # the workers need the room
        return encode_in_processes(work, options, min(procs, len(left)))
    return encode_work(work, tower, options) if left else Summary()


def _units_left(out: Path, plan: Plan) -> dict[int, list[ClipSource]]:
    return {n: clips for n, clips in enumerate(plan.work()) if not committed(out, n)}


def work(
    bank: Path,
    tower: str | None = None,
    roots: Sequence[str] = (),
    device: str = "cpu",
    *,
    procs: int = 1,
    start: float = 0.0,
) -> Summary:
    """Encode units of a plan until none is left to take; any number of processes may do so at once.

    tower: where it lies on this machine, if not where it lay when the bank was planned; another one is
    refused. roots: where videos may lie here that are not where they lay. start: the part of the units
    after which to begin, so that others begin elsewhere.
    """
    plan = planned(bank)
    refuse_derived(bank, plan.features)
    if not _units_left(bank, plan):
        return Summary()
    if plan.quality is None:
        raise UserError(
            "its plan was not measured to its end", where=bank, fix="run `preprocess plan` again"
        )
    how = {"tower": tower} if tower else {}
    options = EncodeOptions.of_plan(plan, device=device, **how)
    loaded = load_tower(options)
    refuse_other_features(bank, feature_config(loaded, options), plan.features)
    if roots:
        plan = replace(plan, units=[clips_under(unit, roots) for unit in plan.units])
    return _encode_left(bank, plan, loaded, options, procs, "preprocess work", start)


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


def lost_keys(bank: Path, plan: Plan) -> set[str]:
    """Return the clips that a finished unit should hold or have put into quarantine, and did not.

    It had been pruned then, or its line was taken out of the quarantine since.
    """
    commits = read_commits(bank, plan)
    banked = {commit.unit: commit.keys for commit in commits}
    failed = {entry.key for entry in read_entries(bank).values()}
    failed |= {entry.key for entry in untold_failures(bank, plan, commits)}
    return {
        key
        for key, unit in plan.counts.items()
        if unit in banked and key not in banked[unit] and key not in failed
    }
