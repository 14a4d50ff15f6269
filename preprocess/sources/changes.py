"""Compare a plan's sources with the inputs: which are new, changed, moved, removed or restored.

changes = compare(bank, plan, clips, banked)    # clips: probed, all that the inputs give
plan = changes.plan.extended(changes.todo, shard_bytes, clip_bytes)
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shards.errors import UserError
from shards.format.plan import ClipSource, Plan


@dataclass(frozen=True)
class Changes:
    """How the inputs of a run differ from a plan."""

    plan: Plan
    """The plan with current paths and times; clips among the inputs are no longer pruned."""
    new: list[ClipSource]
    changed: list[ClipSource]
    """Planned clips whose sources have other bytes now."""
    removed: list[ClipSource]
    """Planned clips whose sources no longer exist."""

    @property
    def todo(self) -> list[ClipSource]:
        """Clips that must be put into new units."""
        return [*self.new, *self.changed]


def compare(
    bank: Path, plan: Plan, clips: Sequence[ClipSource], lost: Collection[str] = ()
) -> Changes:
    """Return how the clips differ from the plan.

    lost: keys of planned clips that must be planned a second time. Raises UserError naming each clip
    whose id belongs to another source that still exists.
    """
    known = {clip.key: clip for clip in plan.clips}
    refuse_other_sources(bank, clips, known.values())
    new = [clip for clip in clips if clip.key not in known or clip.key in lost]
    changed = [
        clip
        for clip in clips
        if clip.key in known and clip.key not in lost and is_other(clip, known[clip.key])
    ]
    planned = {clip.key for clip in [*new, *changed]}
    current = {clip.key: _refreshed(clip, known.get(clip.key)) for clip in clips}
    # only paths and times are refreshed: units keep their clips, as their shards are made of them; and an
    # older unit of a clip keeps the video that it had then
    served = plan.counts
    units = [
        [
            current.get(clip.key, clip)
            if clip.key not in planned and served[clip.key] == number
            else clip
            for clip in unit
        ]
        for number, unit in enumerate(plan.units)
    ]
    archives = {clip.path for clip in clips if clip.offset is not None}
    removed = [
        clip
        for clip in known.values()
        if clip.key not in current and clip.key not in plan.pruned and _is_gone(clip, archives)
    ]
    # a clip among the inputs is there once more, whatever was pruned before
    refreshed = replace(plan, units=units, pruned=plan.pruned - set(current))
    return Changes(refreshed, new, changed, removed)


def is_other(clip: ClipSource, known: ClipSource) -> bool:
    """Return whether a source's digest differs from the planned one; False where one is unknown."""
    # unknown (unreadable now, or planned by an old version) is no evidence of a change
    return None not in (clip.digest, known.digest) and clip.digest != known.digest


def _refreshed(clip: ClipSource, known: ClipSource | None) -> ClipSource:
    """Return the clip with the predicted frames of the plan."""
    # units were cut by these predictions: another one would make the plan another, though no byte is
    return clip if known is None else replace(clip, frames=known.frames)


def _is_gone(clip: ClipSource, archives: Collection[str]) -> bool:
    """Return whether the path no longer exists, or the member in an archive among the inputs."""
    # a member is gone only if its archive was looked into
    return not Path(clip.path).exists() or (clip.offset is not None and clip.path in archives)


def refuse_other_sources(
    bank: Path, clips: Sequence[ClipSource], banked: Collection[ClipSource]
) -> None:
    """Raise UserError naming each clip whose id belongs to another source in the bank.

    A folder that was moved, or copied with its content, has the same sources.
    """
    known = {clip.id: clip for clip in banked}
    problems = []
    for clip in clips:
        other = known.get(clip.id)
        path = Path(other.path) if other else None
        # moved: the id is free for it
        if other is None or path is None or not path.exists():
            continue
        if clip.picture_fps and other.picture_fps and clip.picture_fps != other.picture_fps:
            problems.append(
                f"{clip.path}: {other.picture_fps} pictures per second in {bank}, "
                f"{clip.picture_fps} here; ask for the same, or write to another bank"
            )
        elif is_other(clip, other) and not path.samefile(clip.path):
            problems.append(
                f"{clip.where}: has the id {clip.id!r}, as {other.where} in {bank} has; encode "
                "them from a common folder, or into two banks"
            )
    if problems:
        raise UserError.of(problems)
