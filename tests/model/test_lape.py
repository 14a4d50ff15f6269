"""Coordinates to weights, targets and back, against slow loops in double precision."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.grid import Grid, pool
from model.lape.tables import Lape, cell_hat_weights, hat_weights, kappa
from model.lape.tokens import AXES, HEIGHT, NAMES, PRESETS, TIME, WIDTH, LapeTokens
from shards.errors import UserError

WHOLE = (0.0, 0.0, 1.0, 1.0)
unit = st.floats(0, 1, width=32)


def tokens_of(num_temporal: int, num_spatial: int) -> LapeTokens:
    first = (406, 406 + num_temporal, 406 + num_temporal + num_spatial)
    counts = (num_temporal, num_spatial, num_spatial)
    return LapeTokens(counts, first=first, placeholders=tuple(range(400, 406)))


def make_lape(
    num_temporal: int = 11, num_spatial: int = 7, preset: str = "plus", width: int = 16
) -> Lape:
    lape = Lape(width, tokens_of(num_temporal, num_spatial), preset)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(300, width, generator=generator)
    lape.initialise(rows, 0.7 * rows)
    return lape


def hats(u: float, bins: int) -> np.ndarray:
    place = min(max(u, 0.0), 1.0) * (bins - 1)
    return np.array([max(0.0, 1 - abs(place - i)) for i in range(bins)])


def bell(u: float, bins: int, sigma: float) -> np.ndarray:
    place = min(max(u, 0.0), 1.0) * (bins - 1)

    def below(edge: float) -> float:
        return 0.5 * math.erfc(-(edge - place) / (sigma * math.sqrt(2)))

    mass = np.array([below(i + 0.5) - below(i - 0.5) for i in range(bins)])
    return mass / mass.sum()


@settings(deadline=None)
@given(st.floats(-0.5, 1.5, width=32), st.integers(2, 200))
def test_a_coordinate_is_a_blend_of_its_two_nearest_anchors(u: float, bins: int) -> None:
    weights = hat_weights(torch.tensor([u]), bins)[0]
    assert weights.dtype == torch.float32
    assert (weights > 0).sum() <= 2
    np.testing.assert_allclose(weights, hats(u, bins), atol=2e-5)
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-6)


@settings(deadline=None)
@given(unit, st.integers(2, 200), st.sampled_from(PRESETS), st.sampled_from([0.75, 1.0, 2.0]))
def test_targets_are_two_hot_or_a_bell_cut_at_the_borders(
    u: float, bins: int, preset: str, sigma: float
) -> None:
    lape = Lape(4, tokens_of(bins, 2), preset, sigma)
    target = lape.target(TIME, torch.tensor([u]))[0]
    expected = hats(u, bins) if preset == "st" else bell(u, bins, sigma)
    np.testing.assert_allclose(target, expected, atol=3e-5)
    np.testing.assert_allclose(target.sum(), 1, atol=1e-6)


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(unit, st.sampled_from([0.0, 1.0, 1e-4, 0.9999, 0.5])),
    st.integers(2, 200),
    st.sampled_from(PRESETS),
    st.floats(0, 1),
)
def test_decoding_a_perfect_prediction_gives_the_coordinate_back(
    u: float, bins: int, preset: str, width: float
) -> None:
    # from a quarter of a bin to a fifth of the axis; beyond that fp32 targets tell less
    sigma = 0.25 + width * (max(2, bins / 5) - 0.25)
    lape = Lape(4, tokens_of(bins, 2), preset, sigma)
    logits = lape.target(TIME, torch.tensor([u])).log() + 3.0
    assert lape.decode(TIME, logits).item() == pytest.approx(u, abs=5e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bins", [2, 3, 5, 50, 100, 200])
def test_the_round_trip_holds_all_along_the_axis(bins: int, preset: str) -> None:
    lape = Lape(4, tokens_of(bins, 2), preset)
    u = torch.linspace(0, 1, 1501)
    decoded = lape.decode(TIME, lape.target(TIME, u).log())
    np.testing.assert_allclose(decoded, u, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.05])
def test_a_target_that_is_one_anchor_decodes_to_the_middle_of_what_it_may_be(sigma: float) -> None:
    lape = Lape(4, tokens_of(11, 2), "plus", sigma)
    u = (torch.arange(11).repeat_interleave(3) + torch.tensor([-0.2, 0, 0.2]).repeat(11)) / 10
    decoded = lape.decode(TIME, lape.target(TIME, u).log())
    np.testing.assert_allclose(
        decoded[4:-4] * 10, torch.arange(11).repeat_interleave(3)[4:-4], atol=1e-3
    )


def mass_before(shares: np.ndarray, place: float) -> float:
    """Return the mass before a place in anchors, half of each anchor's on either side of it."""
    total = 0.0
    for anchor, share in enumerate(shares):
        for side in (-1, 1):
            if 0 <= anchor + side < len(shares):
                total += share / 2 * min(max(side * (place - anchor), 0.0), 1.0) * side
                total += share / 2 * (side < 0)
            else:
                total += share / 2 * (side < 0 or place >= anchor)
    return total


def peaked(bins: int, rng: np.random.Generator) -> np.ndarray:
    return bell(rng.random(), bins, 0.4)


def flat(bins: int, rng: np.random.Generator) -> np.ndarray:
    return np.ones(bins) / bins


def two_peaked(bins: int, rng: np.random.Generator) -> np.ndarray:
    weight = rng.random()
    return weight * bell(rng.random(), bins, 1.5) + (1 - weight) * bell(rng.random(), bins, 0.7)


def noisy(bins: int, rng: np.random.Generator) -> np.ndarray:
    shares = rng.random(bins) ** 4
    return shares / shares.sum()


SHAPES = (peaked, flat, two_peaked, noisy)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(2, 120), st.integers(0, 10**6))
def test_st_decodes_to_where_half_of_the_mass_lies_on_either_side(
    shape: Callable[..., np.ndarray], bins: int, seed: int
) -> None:
    lape = Lape(4, tokens_of(bins, 2), "st")
    shares = shape(bins, np.random.default_rng(seed))
    decoded = lape.decode(TIME, torch.from_numpy(shares)[None].log()).item() * (bins - 1)
    assert mass_before(shares, decoded - 1e-4) <= 0.5 + 1e-6
    assert mass_before(shares, decoded + 1e-4) >= 0.5 - 1e-6


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.integers(2, 120),
    st.integers(0, 10**6),
    st.sampled_from([0.5, 1, 3]),
)
def test_plus_decodes_to_the_coordinate_whose_target_has_the_median(
    shape: Callable[..., np.ndarray], bins: int, seed: int, sigma: float
) -> None:
    shares = shape(bins, np.random.default_rng(seed))
    logits = torch.from_numpy(shares)[None].log()
    median = Lape(4, tokens_of(bins, 2), "st").decode(TIME, logits).item() * (bins - 1)
    u = Lape(4, tokens_of(bins, 2), "plus", sigma).decode(TIME, logits).item()
    # in bins, where its target's median is the prediction's, or as near as a border lets it be
    before, after = (mass_before(bell(u + d, bins, sigma), median) for d in (-1e-4, 1e-4))
    assert before >= 0.5 - 1e-5 or u == pytest.approx(0, abs=1e-6)
    assert after <= 0.5 + 1e-5 or u == pytest.approx(1, abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(SHAPES), st.integers(2, 120), st.integers(0, 10**6), st.sampled_from(PRESETS)
)
def test_a_mirrored_prediction_decodes_to_the_mirrored_coordinate(
    shape: Callable[..., np.ndarray], bins: int, seed: int, preset: str
) -> None:
    lape = Lape(4, tokens_of(bins, 2), preset)
    shares = torch.from_numpy(shape(bins, np.random.default_rng(seed)))[None]
    there, back = lape.decode(TIME, torch.cat([shares, shares.flip(-1)]).log())
    assert there.item() == pytest.approx(1 - back.item(), abs=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_of_two_peaks_the_heavier_is_read_and_of_equal_ones_the_middle(preset: str) -> None:
    lape = Lape(4, tokens_of(100, 2), preset)
    here, there = (
        lape.target(TIME, torch.tensor([30 / 99])),
        lape.target(TIME, torch.tensor([90 / 99])),
    )
    for weight, expected in ((0.7, 30), (0.3, 90)):
        decoded = lape.decode(TIME, (weight * here + (1 - weight) * there).log())
        assert decoded.item() * 99 == pytest.approx(expected, abs=1)
    equal = torch.zeros(1, 100)
    equal[0, [30, 90]] = 0.5
    assert lape.decode(TIME, equal.log()).item() * 99 == pytest.approx(60, abs=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_unsure_prediction_decodes_where_the_error_is_least_not_at_its_peak(preset: str) -> None:
    lape = Lape(4, tokens_of(100, 2), preset)
    shares = torch.full((1, 100), 0.9 / 100)
    shares[0, 3] += 0.1
    places = torch.linspace(0, 1, 991)
    error = (shares[0] * (places[:, None] - torch.arange(100) / 99).abs()).sum(dim=1)
    assert lape.decode(TIME, shares.log()).item() == pytest.approx(
        places[error.argmin()].item(), abs=0.006
    )


@pytest.mark.parametrize("role", ["input", "output"])
@pytest.mark.parametrize("axis", range(3))
def test_st_sends_half_of_each_gradient_to_the_neighbours_and_changes_no_value(
    role: str, axis: int
) -> None:
    lape = make_lape(preset="st")
    stored = (lape.input_tables if role == "input" else lape.output_tables)[axis]
    seen = lape.table(role, axis)
    np.testing.assert_allclose(seen.detach(), stored.detach(), atol=1e-6)
    seen[3].sum().backward()
    gradient = stored.grad[:, 0]
    assert gradient[1:6].tolist() == [0.25, 0.5, 2.0, 0.5, 0.25]
    assert (stored.grad == gradient[:, None]).all()


def test_plus_leaves_gradients_where_they_fall() -> None:
    lape = make_lape(preset="plus")
    lape.table("input", TIME)[3].sum().backward()
    assert lape.input_tables[TIME].grad[:, 0].tolist() == [0, 0, 0, 1] + [0] * 7


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("axis", range(3))
def test_each_axis_embeds_its_own_coordinates(axis: int, preset: str) -> None:
    lape = make_lape(preset=preset)
    u = torch.tensor([0.0, 0.31, 0.32, 1.0])
    got = lape.embed(axis, u).detach()
    table = lape.input_tables[axis].detach().double().numpy()
    for place, value in enumerate(u.tolist()):
        np.testing.assert_allclose(got[place], hats(value, len(table)) @ table, atol=1e-5)
    assert len({tuple(row.tolist()) for row in got}) == 4
    others = [lape.embed(a, u) for a in range(3) if a != axis]
    assert all((got - other).abs().max() > 0.1 for other in others)


def brute_force_positions(
    lape: Lape, grid: Grid, covered: tuple[float, ...], times: list[float]
) -> np.ndarray:
    """Return positions laid on every patch and then pooled, patch by patch."""
    tables = [
        (i.detach().double() + o.detach().double()).numpy() / 2
        for i, o in zip(lape.input_tables, lape.output_tables, strict=True)
    ]
    gamma = lape.gamma.detach().double().numpy()
    y0, x0, y1, x1 = covered
    counts = lape.tokens.counts
    full = np.zeros((len(times), grid.patch_rows, grid.patch_cols, tables[0].shape[1]))
    for f, time in enumerate(times):
        for r in range(grid.patch_rows):
            for c in range(grid.patch_cols):
                y = y0 + (y1 - y0) * (r + 0.5) / grid.patch_rows
                x = x0 + (x1 - x0) * (c + 0.5) / grid.patch_cols
                for axis, u in ((TIME, time), (HEIGHT, y), (WIDTH, x)):
                    full[f, r, c] += gamma[axis] * (hats(u, counts[axis]) @ tables[axis])
    rows, cols = (
        [cell_parts(patches, k, cells, grid) for k in range(cells)]
        for patches, cells in ((grid.patch_rows, grid.rows), (grid.patch_cols, grid.cols))
    )
    return np.array(
        [
            [
                [sum(p * q * of[r, c] for r, p in row for c, q in col) for col in cols]
                for row in rows
            ]
            for of in full
        ]
    )


def cell_parts(patches: int, cell: int, cells: int, grid: Grid) -> list[tuple[int, float]]:
    """Return (patch, share) of a cell along an axis."""
    if grid.mode != "bilinear":
        own = range(patches)[cell * grid.stride : (cell + 1) * grid.stride]
        return [(patch, 1 / len(own)) for patch in own]
    # the two patches around the cell's centre, at the border the outermost one alone
    place = min(max((cell + 0.5) * patches / cells - 0.5, 0), patches - 1)
    low = int(place)
    return [(low, 1 - (place - low)), (min(low + 1, patches - 1), place - low)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "covered",
    [WHOLE, (0.0, 0.21875, 1.0, 0.78125), (0.25, 0.0, 0.9, 1.0), (-0.4, 0.0, 1.4, 1.0)],
)
@pytest.mark.parametrize(
    ("rows", "cols", "stride", "mode"),
    [
        (27, 27, 8, "average"),
        (5, 9, 4, "average"),
        (9, 4, 4, "average_floor"),
        (7, 10, 3, "max"),
        (27, 3, 2, "bilinear"),
        (9, 14, 4, "bilinear"),
        (1, 1, 1, "average"),
        (1, 1, 1, "bilinear"),
    ],
)
def test_positions_of_cells_are_the_pooled_positions_of_patches(
    rows: int, cols: int, stride: int, mode: str, covered: tuple[float, ...], preset: str
) -> None:
    lape = make_lape(13, 9, preset, width=8)
    with torch.no_grad():
        lape.gamma.copy_(torch.tensor([0.5, -1.5, 2.0]))
    grid, times = Grid(rows, cols, stride, mode), [0.0, 0.4, 1.0]
    got = lape.positions(grid, covered, torch.tensor(times), torch.ones(3))
    assert got.shape == (3, grid.rows, grid.cols, 8)
    expected = brute_force_positions(lape, grid, covered, times)
    np.testing.assert_allclose(got.detach(), expected, atol=2e-5)


def test_slow_cells_pooled_again_have_the_positions_of_fast_cells() -> None:
    lape = make_lape(width=8)
    time, timed = torch.tensor([0.3]), torch.ones(1)
    slow = lape.positions(Grid(16, 24, 4), WHOLE, time, timed)
    fast = lape.positions(Grid(16, 24, 8), WHOLE, time, timed)
    torch.testing.assert_close(pool(slow, 2), fast, rtol=0, atol=1e-5)


def test_a_cut_last_cell_lies_at_the_centre_of_its_own_patches() -> None:
    weights = cell_hat_weights(27, Grid(27, 27, 8), HEIGHT, WHOLE, 100)
    centre = (weights * torch.linspace(0, 1, 100)).sum(dim=1)
    np.testing.assert_allclose(centre, [4 / 27, 12 / 27, 20 / 27, 25.5 / 27], atol=1e-5)


def test_a_clip_without_duration_has_no_place_in_time() -> None:
    lape = make_lape()
    grid, time = Grid(4, 4, 2), torch.tensor([0.0, 0.0])
    placed = lape.positions(grid, WHOLE, time, torch.tensor([1.0, 0.0]))
    first = lape.gamma[TIME] * (lape.input_tables[TIME][0] + lape.output_tables[TIME][0]) / 2
    torch.testing.assert_close(placed[0] - placed[1], first.expand(2, 2, -1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_rounds_no_coordinate(preset: str) -> None:
    lape = make_lape(150, 150, preset)
    u = torch.linspace(0, 1, 977)
    hidden = torch.randn(5, 16)
    grid = Grid(27, 27, 4)

    def everything() -> list[torch.Tensor]:
        values = [lape.embed(axis, u) for axis in range(3)]
        values += [lape.target(axis, u) for axis in range(3)]
        values += [lape.positions(grid, WHOLE, u, torch.ones(977)), lape.logits(hidden)]
        return [*values, lape.decode(TIME, lape.target(TIME, u).log())]

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        cast = everything()
    for one, other in zip(plain, cast, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)


def test_autocast_rounds_no_gradient_of_a_table() -> None:
    gradients = []
    for enabled in (False, True):
        lape = make_lape(preset="st")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = lape.embed(TIME, torch.tensor([0.123])).square().sum()
        loss.backward()
        gradients.append(lape.input_tables[TIME].grad)
    assert torch.equal(*gradients)


def test_coordinates_of_half_precision_are_placed_in_full_precision() -> None:
    # bfloat16 numbers between 64 and 128 lie half an anchor apart
    u = torch.tensor([0.6640625], dtype=torch.bfloat16)
    assert kappa(u, 150).dtype == torch.float32
    assert kappa(u, 150).item() == pytest.approx(0.6640625 * 149, abs=1e-4)


def test_neighbouring_anchors_start_alike_and_far_ones_apart() -> None:
    lape = Lape(256, tokens_of(100, 100))
    rows = 0.02 * torch.randn(500, 256, generator=torch.Generator().manual_seed(0)) + 0.01
    lape.initialise(rows, rows)
    centred = lape.input_tables[TIME].detach() - rows.mean(dim=0)
    unit_rows = torch.nn.functional.normalize(centred, dim=1)
    cosine = {d: (unit_rows[:-d] * unit_rows[d:]).sum(dim=1).mean().item() for d in (1, 2, 5, 20)}
    assert cosine[1] > 0.9
    assert 0.7 < cosine[2] < cosine[1]
    assert 0.2 < cosine[5] < 0.5
    assert abs(cosine[20]) < 0.15
    ordinary = (rows - rows.mean(dim=0)).square().mean().sqrt()
    for table, scale in ((lape.input_tables, 1.0), (lape.output_tables, 0.5)):
        for axis in range(3):
            spread = (table[axis] - rows.mean(dim=0)).square().mean().sqrt()
            np.testing.assert_allclose(spread.item(), scale * ordinary.item(), rtol=0.01)


@pytest.mark.parametrize(
    ("num_temporal", "num_spatial"), [(50, 100), (100, 50), (150, 150), (2, 3)]
)
def test_the_tokenizer_gets_the_published_strings_in_order(
    make_tokenizer: Callable[[], Any], num_temporal: int, num_spatial: int
) -> None:
    tokenizer = make_tokenizer()
    before = len(tokenizer)
    tokens = LapeTokens.add_to(tokenizer, num_temporal, num_spatial)
    expected = ["<TEMP-INPUT>", "<TEMP-OUTPUT>", "<HEIGHT-INPUT>", "<HEIGHT-OUTPUT>"]
    expected += ["<WIDTH-INPUT>", "<WIDTH-OUTPUT>"]
    for name, count in zip(NAMES, (num_temporal, num_spatial, num_spatial), strict=True):
        expected += [f"<{name}-{i:03d}>" for i in range(count)]
    assert tokenizer.convert_ids_to_tokens(tokens.all_ids) == expected
    assert tokens.all_ids == list(range(before, before + 6 + num_temporal + 2 * num_spatial))
    assert tokens.placeholders == tuple(range(before, before + 6))
    assert LapeTokens.add_to(tokenizer, num_temporal, num_spatial) == tokens  # again: found
    for axis, count in enumerate(tokens.counts):
        for i in (0, count // 2, count - 1):
            id_ = tokenizer.convert_tokens_to_ids(f"<{NAMES[axis]}-{i:03d}>")
            assert tokens.token_id(axis, i / (count - 1)) == id_
            assert tokenizer.decode([id_]) == f"<{NAMES[axis]}-{i:03d}>"
    assert len(AXES) == 3


def test_a_tokenizer_made_for_other_numbers_of_anchors_is_refused(
    make_tokenizer: Callable[[], Any],
) -> None:
    tokenizer = make_tokenizer()
    LapeTokens.add_to(tokenizer, 50, 50)
    for numbers in ((100, 50), (50, 49)):
        with pytest.raises(UserError, match=r"156 coordinate tokens that do not fit"):
            LapeTokens.add_to(tokenizer, *numbers)
