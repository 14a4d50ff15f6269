"""What the patches of a bank's tower cover of a frame, for banks that were made with a wrong word on it.

    correct = corrected(bank, plan, load=...)     # SampleMeta -> SampleMeta

Before format 3 a bank called the whole crop covered. A tower takes as many whole patches as fit: of
384 pixels, patches of 14 leave 6. How large the patches are follows from the grid that they make, in
most banks; else the tower has to say.
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
    """Return what gives a sample's description the part that is covered.

    load: returns the bank's own tower; called where the bank alone cannot tell the patch size.
    """
    known: dict[tuple[tuple[int, int], tuple[int, int]], int] = {}

    def correct(meta: SampleMeta) -> SampleMeta:
        try:
            pixels = Pixels.from_json(plan.features.processor)
        except TypeError as error:
            raise UserError(f"its image processor cannot be read: {error}", where=bank) from None
        place = pixels.output_size(*meta.display_size), meta.patch_grid
        if place not in known:
            known[place] = _patch(bank, pixels, *place, load)
        return replace(meta, covered=pixels.covered(*meta.display_size, known[place]))

    return correct


def patch_sizes(size: tuple[int, int], grid: tuple[int, int]) -> list[int]:
    """Return the patch sizes that make this grid (rows, columns) of so many pixels (height, width)."""
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
    """Return the pixels on a side of a patch."""
    if pixels.own_size:  # whole patches, always
        return size[0] // grid[0]
    found = patch_sizes(size, grid)
    if len(found) == 1:
        return found[0]
    try:
        return load().patch
    except UserError as error:
        shown = f"{grid[0]}x{grid[1]} patches of {size[0]}x{size[1]} pixels"
        raise UserError(
            f"{bank}: what part of a frame its patches cover cannot be told from the bank alone, as "
            f"patches of {', '.join(map(str, found)) or 'no'} pixels make its {shown}; the tower knows, "
            f"but: {error}",
            fix=f"`preprocess repair {bank} --tower FOLDER` with the folder of its tower",
        ) from None
