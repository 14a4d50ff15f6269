"""The story of `preprocess derive`: plan -> convert clip by clip from one bank to another -> finish.

derive(Path("bank"), Path("small"), Asked(strides=(8,), codec="int8", frames=8), 512 << 20, bar)

A rerun continues where the last one was stopped or killed, and adds clips that are new or changed in the
source bank, so a derived bank can follow its source. Several processes may run at once.
"""

import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.grid import Grid
from model.slow_fast import uniform_indices
from preprocess.derive.clip import as_stored, derive_arrays, described, kept_frames
from preprocess.derive.source import BankSource
from preprocess.derive.target import Asked, Target, target_of
from preprocess.encode.calibrate import CLIPS, FRAMES, Calibration, drawn, lossless, measured
from preprocess.encode.features import plan_codec
from preprocess.sources.changes import is_other
from shards.errors import UserError, disk_errors
from shards.format.commits import (
    committed,
    read_commits,
    refuse_missing_shards,
    refuse_unplanned_shards,
)
from shards.format.manifest import Manifest, TowerFacts
from shards.format.plan import (
    ClipSource,
    Plan,
    read_plan,
    refuse_other_features,
    write_plan,
)
from shards.write.finish import failed_clips, finish, refuse_unfinished
from shards.write.lease import Lease, Leases
from shards.write.lock import folder_lock
from shards.write.shard import OvertakenError, ShardWriter, resume_commit

COMMAND = "preprocess derive"


def derive(bank: Path, out: Path, asked: Asked, shard_bytes: int, bar: "tqdm[Any]") -> Manifest:
    """Derive a bank from a finished one, or update it; return its manifest.

    bar: counts the clips that this process makes. Raises UserError for settings that cannot be derived,
    for an `out` with other features, and if another process still holds some units.
    """
    with BankSource(bank) as source, disk_errors(out):
        target = target_of(source.features, asked, bank)
        # -- refused before a folder is made
        refuse_no_cells(source, target)
        if out.resolve() == bank.resolve():
            raise UserError("is the bank itself", where=f"--out {out}", fix="name another folder")
        with folder_lock(out, COMMAND):
            plan = make_plan(source, out, target, shard_bytes)
        deriver, work = Deriver(source, plan, target, bar), plan.work()
        units = [unit for unit in range(len(work)) if not committed(out, unit)]
        bar.reset(total=sum(len(work[unit]) for unit in units))
        with Leases(out, COMMAND) as leases, closing(leases.left(units)) as left:
            for lease in left:
                deriver.make_unit(lease, work[lease.unit])
        with folder_lock(out, COMMAND):
            # another process may have extended the plan meanwhile
            plan = read_plan(out) or plan
            refuse_unfinished(out, plan, "run the same command again when they are made")
            # what was no clip there is none here
            skips = bank / "skipped.jsonl"
            if skips.exists():
                shutil.copyfile(skips, out / skips.name)
            facts = source.manifest.provenance.tower, source.manifest.tower_width
            return finish(out, plan, TowerFacts(*facts))


def refuse_no_cells(source: BankSource, target: Target) -> None:
    """Raise UserError for strides and frames that some clip does not have; before a folder is made."""
    columns = source.columns
    grids = zip(columns["patch_rows"].tolist(), columns["patch_cols"].tolist(), strict=True)
    # Grid refuses a stride that leaves no cell; a bank has few sizes of frames
    for rows, cols in sorted(set(grids)):
        for stride in target.pooled:
            Grid(rows, cols, stride, target.features.pool)
    together = max(columns["frames_per_unit"].tolist(), default=1)
    if together > 1 and target.features.sampling.kept is not None:
        raise UserError(
            f"--frames: its tower saw {together} frames as one unit, which cannot be divided",
            where=source.bank,
            fix="leave out --frames; training takes fewer by max_frames_num",
        )


# -- plan


def make_plan(source: BankSource, out: Path, target: Target, shard_bytes: int) -> Plan:
    """Write and return the plan of the derived bank, with new units for clips new in the source."""
    known, theirs = read_plan(out), source.plan
    refuse_unplanned_shards(out, known)
    if known is not None:
        refuse_other_features(out, target.features, known.features)
        _refuse_other_scales(source, out, target, known)
        refuse_missing_shards(out, known)
    plan = known or Plan(
        target.features,
        [],
        theirs.tower,
        decoder=theirs.decoder,
        allow_truncated=theirs.allow_truncated,
    )
    todo, most = _todo(source, out, plan), target.features.sampling.kept
    if most is not None:
        todo = [replace(clip, frames=min(clip.frames or 0, most)) for clip in todo]
    plan = plan.extended(todo, shard_bytes, clip_bytes(source, target))
    # a derived bank follows its source: what is not served there is not served here
    there = {clip.key for clip in source.clips}
    plan = replace(plan, pruned=frozenset(c.key for c in plan.clips if c.key not in there))
    # once: every later unit has to have the same scales
    if plan.quality is None and plan.units:
        plan = calibration(source, target).kept_in(plan)
    if plan != known:
        write_plan(out, plan)
    return plan


def _refuse_other_scales(source: BankSource, out: Path, target: Target, known: Plan) -> None:
    """Raise UserError if int8 bytes would be copied into a bank that decodes them by other scales.

    Scales are no part of the fingerprint: a source that was encoded again from other clips has the same.
    """
    if known.calibration is None or not target.as_stored:
        return
    now = source.manifest.calibration or {}
    other = [stride for stride, scales in known.calibration.items() if now.get(stride) != scales]
    if other:
        raise UserError(
            f"its clips of stride {','.join(other)} are stored by other scales of int8 than those of "
            f"{source.bank}, which was calibrated anew",
            where=out,
            fix="derive into another folder",
        )


def _todo(source: BankSource, out: Path, plan: Plan) -> list[ClipSource]:
    """Return the clips of the source that the plan does not have, or has an older version of."""
    known = {clip.key: clip for clip in plan.clips}
    failed = {one.key for one in failed_clips(out, plan, read_commits(out, plan)).values()}
    made = {key for key, unit in plan.counts.items() if committed(out, unit)}
    return [
        clip
        for clip in source.clips
        if clip.key not in known
        or is_other(clip, known[clip.key])
        or (
            clip.key in failed & made and clip in source
        )  # a retry in the source has banked it since
    ]


def clip_bytes(source: BankSource, target: Target) -> Callable[[ClipSource], int]:
    """Return a function of a clip: the predicted bytes of its features, without headers."""
    most, is_int8 = target.features.sampling.kept, target.features.codec == "int8"

    def nbytes(clip: ClipSource) -> int:
        if clip not in source:
            return 0
        streams, total = source.streams(clip), 0
        for stride, finer in target.pooled.items():
            frames, rows, cols, dim = streams[finer or stride].shape
            together = stride // (finer or stride)
            cells = -(-rows // together) * -(-cols // together)
            # dim bytes and a float32 scale for each cell, or two bytes a value
            total += min(frames, most or frames) * cells * (dim + 4 if is_int8 else 2 * dim)
        return total

    return nbytes


def calibration(source: BankSource, target: Target) -> Calibration:
    """Return the calibration of the new bank's codec, on clips chosen as in `preprocess encode`."""
    features = target.features
    if features.codec != "int8":
        return lossless(features.strides)
    # bytes are copied, so the source's scales are theirs; fewer strides need no other ones
    if target.as_stored:
        facts = source.manifest.codec.strides
        return Calibration(
            {stride: source.codec.channel_scale[stride] for stride in features.strides},
            {stride: _quality(facts.get(str(stride), {})) for stride in features.strides},
        )
    found = []
    for clip in [clip for clip in drawn(source.clips) if clip in source][: 2 * CLIPS]:
        stored = source.sample(clip)
        kept = kept_frames(stored, features.sampling.kept) or range(stored.entries)
        few = [kept[k] for k in uniform_indices(len(kept), FRAMES // stored.meta.frames_per_unit)]
        found.append(derive_arrays(stored, source.codec, target, few)[0])
    if not found:
        raise UserError("--codec int8: holds no clip to calibrate on", where=source.bank)
    return measured(found, features.strides, features.dtype)


def _quality(facts: Mapping[str, float | None]) -> dict[str, float]:
    """Return a codec's losses as a plan has them, from a manifest's facts."""
    return {name: value for name, value in facts.items() if name != "ratio" and value is not None}


# -- units


class Deriver:
    """Makes the units of one derived bank."""

    def __init__(self, source: BankSource, plan: Plan, target: Target, bar: "tqdm[Any]") -> None:
        self.source, self.plan, self.target, self.bar = source, plan, target, bar
        self.codec = plan_codec(plan)
        self.provenance = {
            "derived_from": os.path.abspath(source.bank),
            "machine": platform.machine(),
        }

    def make_unit(self, lease: Lease, clips: Sequence[ClipSource]) -> None:
        """Make one shard; the work is dropped if another process takes the unit."""
        fingerprint, keys = self.plan.features.fingerprint, {clip.key for clip in clips}
        # -- an earlier holder may have died between writing the shard and
        # recording it: that is completed
        tokens = [one.token for one in lease.earlier]
        if resume_commit(lease.shard, fingerprint, keys, tokens, lease.token):
            self.bar.update(len(clips))
            return
        with ShardWriter(
            lease.shard, lease.unit, fingerprint, self.codec, lease.token, lease.earlier, keys
        ) as writer:
            self.bar.update(len(writer.keys))
            try:
                for clip in clips:
                    if clip.key not in writer.keys:
                        lease.check()
                        self._write(clip, writer)
                        self.bar.update(1)
                lease.check()
                writer.commit(self.provenance)
            except OvertakenError:
                writer.abandon()

    def _write(self, clip: ClipSource, writer: ShardWriter) -> None:
        if clip not in self.source:
            # with the entry of the source: a derived bank names the reason that was found there
            writer.fail(self.source.failed[clip.id])
            return
        stored, features = self.source.sample(clip), self.target.features
        frames = kept_frames(stored, features.sampling.kept)
        if self.target.as_stored:
            streams, shapes = as_stored(stored, self.target, frames)
            meta = described(stored, frames, shapes)
            writer.write_stored(clip.key, meta, streams, shapes)
            return
        arrays, underflowed = derive_arrays(stored, self.source.codec, self.target, frames)
        shapes = {stride: array.shape for stride, array in arrays.items()}
        meta = described(stored, frames, shapes)
        writer.write(clip.key, meta, arrays, underflowed)
