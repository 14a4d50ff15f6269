"""Compare a run's inputs with the plan of its bank, and make the new plan.

survey = Survey.of(out, clips, options, known)      # without torch
survey.of_nothing(out, options, prune=False)        # where nothing is left to encode or to write
changes, options = make_plan(out, clips, tower, options)
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from model.tower.faults import GpuMemoryError
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.source import SourceReader
from preprocess.encode.features import EncodeOptions, feature_config, predicted_bytes
from preprocess.encode.tower import measured, tower_files
from preprocess.sources.changes import Changes, compare
from preprocess.sources.probe import probe
from shards.format.commits import (
    CommitRecord,
    committed,
    read_commits,
    refuse_missing_shards,
    refuse_unplanned_shards,
)
from shards.format.features import FeatureConfig
from shards.format.plan import (
    READER,
    ClipSource,
    Plan,
    TowerSettings,
    absolute_name,
    read_plan,
    refuse_other_features,
    refuse_other_reader,
    write_plan,
)
from shards.format.quarantine import Reason, read_entries, update_quarantine
from shards.write.finish import is_finished, new_failures

if TYPE_CHECKING:
    from model.tower.tower import Tower

ASKED = ("layer", "dtype", "tower_dtype", "sampling", "strides", "pool", "codec")
"""Fields of `FeatureConfig` that options give; the others come from the tower."""


@dataclass(frozen=True)
class Survey:
    """A run's clips in their current state, and the state of its bank."""

    known: Plan | None
    commits: list[CommitRecord]
    """Commit records of the finished units."""
    probed: list[ClipSource]

    @classmethod
    def of(
        cls,
        out: Path,
        clips: Sequence[ClipSource],
        options: EncodeOptions,
        known: Plan | None,
        probed: list[ClipSource] | None = None,
    ) -> "Survey":
        """Probe the clips, unless they were probed already (`probed`)."""
        if known is None:
            return cls(None, [], probe(clips, {}, options.sampling) if probed is None else probed)
        refuse_missing_shards(out, known)
        if probed is None:
            planned = {clip.key: clip for clip in known.clips}
            probed = probe(clips, planned, known.features.sampling)
        return cls(known, read_commits(out, known), probed)

    def changes(self, out: Path, plan: Plan) -> Changes:
        """Return how the clips differ from a plan."""
        return compare(out, plan, self.probed, lost_keys(out, plan, self.commits))

    def of_nothing(self, out: Path, options: EncodeOptions, *, prune: bool) -> Changes | None:
        """Return the changes if there is nothing to do, else None: a finished bank has all clips with the
        same features, made by unchanged files of the tower. This needs no torch."""
        plan = self.known
        # -- whatever could differ is looked at, from the cheapest on; the first doubt loads the tower
        if plan is None or plan.quality is None or plan.tower.files is None:
            return None
        # with --fit the processor's values are only known after loading the tower
        if options.fit is not None or plan.features.derived is not None:
            return None
        # whatever differs is refused by name later, with the tower loaded
        if any(getattr(options, name) != getattr(plan.features, name) for name in ASKED):
            return None
        # by names, sizes and times of its files: the digest of its weights needs them read
        same_tower = absolute_name(options.tower) == absolute_name(plan.tower.name)
        if not same_tower or tower_files(options.tower) != plan.tower.files:
            return None
        changes = self.changes(out, plan)
        if changes.todo or changed_of(changes, options, prune) != plan or units_left(out, plan):
            return None
        return changes if is_finished(out, plan, self.commits) else None


def units_left(out: Path, plan: Plan) -> dict[int, list[ClipSource]]:
    """Return the unfinished units, with the clips to bank in them."""
    return {unit: clips for unit, clips in enumerate(plan.work()) if not committed(out, unit)}


def changed_of(changes: Changes, options: EncodeOptions, prune: bool) -> Plan:
    """Return the plan of some changes with the options applied, without new units."""
    plan = changes.plan
    if prune:
        plan = replace(plan, pruned=plan.pruned | {clip.key for clip in changes.removed})
    return replace(plan, allow_truncated=options.allow_truncated or None)


def as_run(out: Path, plan: Plan, options: EncodeOptions) -> Plan:
    """Return the plan of a bank that has nothing yet with the batches and threads that are asked for now.

    Workers that join, later runs and `repair` take them from the plan.
    """
    if any((out / "shards").glob("*")):
        return plan  # what is there was made by the plan's
    tower = replace(plan.tower, batch_frames=options.batch_frames, threads=options.tower_threads)
    return replace(plan, tower=tower)


def make_plan(
    out: Path,
    clips: Sequence[ClipSource],
    tower: "Tower",
    options: EncodeOptions,
    *,
    prune: bool = False,
    survey: Survey | None = None,
) -> tuple[Changes, EncodeOptions]:
    """Return the changes with the new plan, which is written before any decoding; and the options.

    These have the chosen `tower_dtype`, and `batch_frames` halved if the GPU ran out of memory while
    calibrating.
    """
    survey = survey or Survey.of(out, clips, options, read_plan(out))
    known = survey.known
    refuse_unplanned_shards(out, known)
    choice = measured(tower, options, known)
    if choice:
        options = replace(options, tower_dtype=choice.dtype, dtype_reason=choice.reason)
    features = feature_config(tower, options)
    plan = known or new_plan(tower, options, features)
    if known is not None:
        refuse_other_features(out, features, known.features)
    refuse_other_reader(out, plan)
    # absolute in an older plan, too, where it is the same folder from here
    if (name := absolute_name(options.tower)) == absolute_name(plan.tower.name):
        files = tower_files(options.tower)
        plan = replace(plan, tower=replace(plan.tower, name=name, files=files))
    changes = survey.changes(out, plan)
    plan = as_run(out, changed_of(changes, options, prune), options)
    clip_bytes = predicted_bytes(tower, options)
    # appended as new units: finished shards stay as they are
    plan = plan.extended(changes.todo, options.shard_bytes, clip_bytes)
    update_quarantine(out, {clip.key for clip in changes.todo})  # so that they are tried again
    # before any decoding: workers on other machines read what to do from it
    if plan != known:
        write_plan(out, plan)
    if options.dtype_reason and known is None:
        note(f"the tower computes in {options.tower_dtype}: {options.dtype_reason}")
    plan, options = fitting(
        out, plan, options, lambda plan, options: calibrated(out, plan, tower, options)
    )
    return replace(changes, plan=plan), options


def new_plan(tower: "Tower", options: EncodeOptions, features: FeatureConfig) -> Plan:
    """Return the plan of a new bank, without clips; raises UserError for a tower that cannot be run."""
    from model.tower.precision import arithmetic
    from model.tower.trial import check_size

    check_size(tower)
    settings = TowerSettings(
        options.batch_frames,
        options.tower_threads,
        absolute_name(tower.name),
        arithmetic(options.device, options.tower_dtype),
        options.dtype_reason,
    )
    return Plan(features, [], settings, decoder=READER)


T = TypeVar("T")


def fitting(
    out: Path, plan: Plan, options: EncodeOptions, do: Callable[[Plan, EncodeOptions], T]
) -> tuple[T, EncodeOptions]:
    """Return the result of `do`, and the options that it used.

    If the GPU runs out of memory, it is retried once with half the frames per batch; not if the bank
    has shards already, because all must be made with one batch shape.
    """
    try:
        return do(plan, options), options
    except GpuMemoryError as error:
        # `fewer` is 0 where a single frame does not fit: nothing smaller can be tried
        if not error.fewer or any((out / "shards").glob("*")):
            raise
        plan = _with_fewer_frames(out, plan, error.fewer)
    options = replace(options, batch_frames=plan.tower.batch_frames)
    return do(plan, options), options


def _with_fewer_frames(out: Path, plan: Plan, frames: int) -> Plan:
    """Write and return the plan of an empty bank with fewer frames per batch."""
    import torch

    # the failed batch's memory is still cached, in pieces of its own size
    torch.cuda.empty_cache()
    plan = replace(plan, tower=replace(plan.tower, batch_frames=frames))
    write_plan(out, plan)
    note(f"the GPU ran out of memory; the bank is made with --batch-frames {frames}")
    return plan


def note(words: str) -> None:
    tqdm.write(f"note: {words}", file=sys.stderr)


def calibrated(out: Path, plan: Plan, tower: "Tower", options: EncodeOptions) -> Plan:
    """Return the plan with the calibration of its codec, measured once and stored in it."""
    if plan.quality is not None or not plan.units:
        return plan
    from preprocess.encode.calibrate import calibrate

    with SourceReader(DecodeChild(), out) as reader:
        plan = calibrate(plan.clips, tower, options, reader).kept_in(plan)
    write_plan(out, plan)
    return plan


def lost_keys(bank: Path, plan: Plan, commits: Sequence[CommitRecord]) -> set[str]:
    """Return the keys of clips that a finished unit has neither banked nor put into quarantine.

    They were pruned when it was made, or have been removed from the quarantine since; or were found to
    be another file than was planned, which says nothing about the file that is there now.
    """
    banked = {commit.unit: commit.keys for commit in commits}
    entries = [*read_entries(bank).values(), *new_failures(bank, plan, commits)]
    failed = {one.key for one in entries if one.reason is not Reason.NOT_AS_PLANNED}
    return {
        key
        for key, unit in plan.counts.items()
        if unit in banked and key not in banked[unit] and key not in failed
    }
