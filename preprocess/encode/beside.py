"""`preprocess encode INPUT --stride 2` on a bank of strides 4 and 8: which sides it has, and gets.

    own, beside = shared_out(bank, plan, options)      # options of the bank; beside/2 with its own
    clips, empty = beside[0].begun(plan, found)        # its clips, and its plan before there are any

The bank is brought up to date with INPUT first; each side then takes those of INPUT's clips that the bank
serves, as the bank's plan has them, so that both are of the same videos. On the disk:
`shards.format.beside`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from preprocess.encode.features import EncodeOptions
from preprocess.encode.tower import as_banked
from preprocess.sources.find import Found
from shards.errors import UserError
from shards.format.beside import side_path, sides_of
from shards.format.plan import Plan
from shards.format.quarantine import read_entries


@dataclass(frozen=True)
class Side:
    """Strides that are asked for beside a bank."""

    bank: Path
    options: EncodeOptions

    @property
    def path(self) -> Path:
        return side_path(self.bank, self.options.strides)

    def begun(self, plan: Plan, found: Found) -> tuple[Found, Plan]:
        """Return those of the inputs that the bank serves, as its plan has them; and a plan without
        clips, of the bank's features and tower.

        plan: of the bank, up to date with the inputs.
        """
        features = replace(plan.features, strides=self.options.strides)
        truncated = plan.allow_truncated
        empty = Plan(features, [], plan.tower, decoder=plan.decoder, allow_truncated=truncated)
        asked, failed = {clip.key for clip in found.clips}, read_entries(self.bank)
        # what the bank serves and no more: a side with other clips could not be read with it
        clips = [
            clip
            for clip in plan.clips
            if clip.key in asked and clip.key not in plan.pruned and clip.id not in failed
        ]
        return replace(found, clips=clips), empty


def shared_out(
    bank: Path, plan: Plan | None, options: EncodeOptions
) -> tuple[EncodeOptions, list[Side]]:
    """Return how to make the bank, and what to make beside it: nothing for most.

    plan: of the bank, None where there is none yet.
    """
    sides = strides_beside(bank, plan, options.strides)
    if not sides or plan is None:
        return options, []
    own = replace(options, strides=plan.features.strides)
    # run as the bank was, so that cells of all strides are of the same numbers
    run = replace(options, batch_frames=plan.tower.batch_frames, tower_threads=plan.tower.threads)
    run = as_banked(run, plan)
    return own, [Side(bank, replace(run, strides=strides)) for strides in sides]


def strides_beside(bank: Path, plan: Plan | None, asked: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the strides of each side that is asked for: of those that are there, and of a new one.

    None where only strides of the bank itself are asked for.
    """
    if plan is None or plan.features.derived:
        return []
    wanted = set(asked) - set(plan.features.strides)
    there = [tuple(map(int, path.name.split("-"))) for path in sides_of(bank)]
    # a side is made whole: asking for one of its strides makes them all
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
