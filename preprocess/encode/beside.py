"""`preprocess encode INPUT --stride 2` on a bank of strides 4 and 8: what lies beside it, and is to.

    for strides in strides_beside(bank, plan, asked=(2, 4, 8)):        # [(2,)]
        first_plan(plan, strides)                                      # of the bank beside/2

The bank is brought up to date with INPUT first; each side then takes those of its clips that it serves,
as its plan knows them, so that both are of the same videos. What is on the disk: `shards.format.beside`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from preprocess.sources.find import Found
from shards.errors import UserError
from shards.format.beside import sides_of
from shards.format.plan import Plan
from shards.format.quarantine import read_entries


def strides_beside(bank: Path, plan: Plan | None, asked: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the strides of each side that is asked for: of those that are there, and of a new one.

    None where no stride is asked for but some of the bank's own, all of which are made as ever.
    """
    if plan is None or plan.features.derived:
        return []
    wanted = set(asked) - set(plan.features.strides)
    there = [tuple(map(int, path.name.split("-"))) for path in sides_of(bank)]
    found = [strides for strides in there if wanted & set(strides)]
    new = wanted.difference(*found)
    if new and isinstance(plan.features.layer, str):
        raise UserError(
            f"layer {plan.features.layer}: merged tokens are banked with stride 1, and no tower is "
            "needed to pool them",
            got=f"--stride {','.join(map(str, sorted(new)))}",
            where=bank,
            fix=f"`preprocess derive {bank} --stride {','.join(map(str, sorted(new)))} --out NEW`",
        )
    return [*found, tuple(sorted(new))] if new else found


def first_plan(plan: Plan, strides: tuple[int, ...]) -> Plan:
    """Return a side's plan without clips: of the bank's features, its tower run as the bank's is."""
    features = replace(plan.features, strides=strides)
    truncated = plan.allow_truncated
    return Plan(features, [], plan.tower, decoder=plan.decoder, allow_truncated=truncated)


def served(bank: Path, plan: Plan, found: Found) -> Found:
    """Return what of the inputs a bank serves, as its plan knows it."""
    asked, failed = {clip.key for clip in found.clips}, read_entries(bank)
    clips = [
        clip
        for clip in plan.clips
        if clip.key in asked and clip.key not in plan.pruned and clip.id not in failed
    ]
    return replace(found, clips=clips)
