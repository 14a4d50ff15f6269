"""Correct `covered`, the part of a frame that the patches cover, in banks older than format 3.

    correct = corrected(bank, plan, load=...)     # SampleMeta -> SampleMeta

Before format 3 `covered` was the whole crop. But a tower takes only whole patches: of 384 pixels, patches
of 14 leave 6 uncovered. In most banks the patch size follows from the patch grid; otherwise the tower
must be loaded for it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from model.tower.pixels import Pixels
from model.tower.tower import Tower
from shards.errors import UserError
from shards.format.plan import Plan
from shards.format.samples import SampleMeta


def corrected(
    bank: Path, plan: Plan, load: Callable[[], Tower]
) -> Callable[[SampleMeta], SampleMeta]:
    """Return a function that corrects `covered` in a sample's json.

    load: returns the bank's tower; called if the patch size does not follow from the bank.
    """
    known: dict[tuple[tuple[int, int], tuple[int, int]], int] = {}

    def correct(meta: SampleMeta) -> SampleMeta:
        try:
            pixels = Pixels.from_json(plan.features.processor)
        except TypeError as error:
            raise UserError(f"its image processor cannot be read: {error}", where=bank) from None
        place = pixels.output_size(*meta.display_size), meta.patch_grid
        # one search per frame size: a bank has few
        if place not in known:
            known[place] = _patch(bank, pixels, *place, load)
        return replace(meta, covered=pixels.covered(*meta.display_size, known[place]))

    return correct


def patch_sizes(size: tuple[int, int], grid: tuple[int, int]) -> list[int]:
    """Return the patch sizes that give this grid (rows, columns) for a size (height, width) in pixels."""
    return [
        patch
        for patch in range(1, min(size) + 1)
        if (size[0] // patch, size[1] // patch) == tuple(grid)
    ]


def _patch(
    bank: Path,
    pixels: Pixels,
    size: tuple[int, int],
    grid: tuple[int, int],
    load: Callable[[], Tower],
) -> int:
    """Return the side of a patch in pixels."""
    if pixels.own_size:  # frames are resized to whole patches
        return size[0] // grid[0]
    found = patch_sizes(size, grid)
    if len(found) == 1:
        return found[0]
    try:
        # only where several patch sizes give this grid: loading a tower takes far longer
        return load().patch
    except UserError as error:
        shown = f"{grid[0]}x{grid[1]} patches of {size[0]}x{size[1]} pixels"
        raise UserError(
            f"{bank}: the covered part of its frames does not follow from the bank alone: patches of "
            f"{', '.join(map(str, found)) or 'no'} pixels give its {shown}; the tower is needed, but: "
            f"{error}",
            fix=f"`preprocess repair {bank} --tower FOLDER` with the folder of its tower",
        ) from None
