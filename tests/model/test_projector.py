"""Projectors: shapes, which cells become which token, and VILA's names of weights."""

import numpy as np
import pytest
import torch

from model.batch import FrameGroup
from model.config import PROJECTORS, VLMConfig, joined_cells
from model.grid import Grid, pool
from model.projector import ChannelNorm, JoinCells, build_projector
from shards.errors import UserError

VILA = {
    "linear": {"weight": (8, 6)},
    "mlp1x_gelu": {"0.weight": (8, 6)},
    "mlp2x_gelu": {"0.weight": (8, 6), "2.weight": (8, 8)},
    "mlp3x_gelu": {"0.weight": (8, 6), "2.weight": (8, 8), "4.weight": (8, 8)},
    "norm_mlp2x_gelu": {"1.weight": (8, 6), "3.weight": (8, 8)},
    "mlp_downsample": {"1.weight": (24,), "2.weight": (8, 24), "4.weight": (8, 8)},
    "mlp_downsample_2x2_fix": {"1.weight": (24,), "2.weight": (8, 24), "4.weight": (8, 8)},
    "mlp_downsample_3x3_fix": {
        "1.weight": (54,),
        "2.weight": (18, 54),
        "4.weight": (18,),
        "5.weight": (8, 18),
        "7.weight": (8, 8),
    },
}
"""Weights by their names in VILA, behind `layers.`, of features of width 6 and an LLM of width 8."""


@pytest.mark.parametrize("kind", VILA)
def test_weights_have_the_names_and_shapes_of_vila(kind: str) -> None:
    own = build_projector(kind, 6, 8).state_dict()
    weights = {n: tuple(w.shape) for n, w in own.items() if n.endswith("weight")}
    assert weights == VILA[kind]
    biases = {n.replace("bias", "weight"): len(w) for n, w in own.items() if n.endswith("bias")}
    assert biases == {n: shape[0] for n, shape in weights.items()}


@pytest.mark.parametrize("kind", VILA)
@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 1)])
def test_a_projector_gives_a_token_for_each_block_of_cells(
    kind: str, grid: tuple[int, int]
) -> None:
    side = joined_cells(kind)
    tokens = build_projector(kind, 6, 8)(torch.randn(2, *grid, 6))
    assert tokens.shape == (2, -(-grid[0] // side), -(-grid[1] // side), 8)


def test_a_norm_is_measured_once_and_is_a_change_of_the_first_layer() -> None:
    """The same projector without it has the weights W / std and the bias b - W mean / std."""
    torch.manual_seed(0)
    features = torch.randn(5, 4, 4, 6) * torch.tensor([1.0, 3, 9, 0.2, 1, 0]) + torch.arange(6.0)
    own = build_projector("norm_mlp2x_gelu", 6, 8)
    norm = own[0]
    assert isinstance(norm, ChannelNorm)
    assert not norm.measured
    assert torch.equal(norm(features), features)
    norm.measure([features[:2], features[2:]])
    assert norm.measured
    flat = features.flatten(0, 2)
    torch.testing.assert_close(norm.mean, flat.mean(dim=0))
    std = flat.std(dim=0, unbiased=False)
    torch.testing.assert_close(norm.std[:5], std[:5])
    assert norm.std[5] == pytest.approx(0.1 * float(std.median()))
    plain = build_projector("mlp2x_gelu", 6, 8)
    weight = own[1].weight / norm.std
    plain[0].load_state_dict({"weight": weight, "bias": own[1].bias - weight @ norm.mean})
    plain[2].load_state_dict(own[3].state_dict())
    torch.testing.assert_close(own(features), plain(features))


@pytest.mark.parametrize("side", [2, 3])
def test_a_block_is_joined_row_by_row_and_padded_by_zero(side: int) -> None:
    cells = torch.randn(2, 5, 7, 3)
    joined = JoinCells(side)(cells)
    for row in range(joined.shape[1]):
        for col in range(joined.shape[2]):
            parts = []
            for y in range(side * row, side * (row + 1)):
                for x in range(side * col, side * (col + 1)):
                    inside = y < 5 and x < 7
                    parts.append(cells[:, y, x] if inside else torch.zeros(2, 3))
            assert torch.equal(joined[:, row, col], torch.cat(parts, dim=1))


@pytest.mark.parametrize("positions", ["plain", "mrope"])
@pytest.mark.parametrize(
    ("kind", "by_columns"),
    [("mlp_downsample", True), ("mlp_downsample_2x2_fix", False), ("mlp2x_gelu", False)],
)
def test_tokens_stand_in_the_order_of_vila(kind: str, by_columns: bool, positions: str) -> None:
    """Its first joining projector gives tokens column by column, those with `_fix` row by row: a
    permutation that `flat_square_2x2` undoes and `flat_square` does not (`base_projector.py`)."""
    config = VLMConfig(mm_projector_type=kind, frame_positions=positions)
    grid = Grid(5, 8, 2)
    assert (grid.rows, grid.cols) == (3, 4)
    expected = [
        [
            col * 3 + row if by_columns and positions == "plain" else row * 4 + col
            for col in range(4)
        ]
        for row in range(3)
    ]
    assert grid.order(by_columns=config.by_columns).view(3, 4).tolist() == expected


def test_a_row_has_the_tokens_of_a_frame_column_by_column(
    make_model, make_clip, make_batch
) -> None:
    sizes = {"slow_stride": 2, "fast_stride": 2, "max_frames_num": 2}
    model = make_model(mm_projector_type="mlp_downsample", **sizes)
    fixed = make_model(mm_projector_type="mlp_downsample_2x2_fix", **sizes)
    fixed.load_state_dict(model.state_dict())
    clip = make_clip(frames=2, patch_grid=(6, 8))
    patches = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 6, 8, 12)))
    for stride in (1, 2):
        clip.features[stride] = pool(patches, stride).half().numpy()
    found = []
    for own in (model, fixed):
        batch = make_batch(own, ([clip], "<video>\nWhen?", "now"))
        places = batch.groups[0].token_index[0].sort().values
        found.append(own.embed(batch)[0, places])
    by_columns, by_rows = found
    torch.testing.assert_close(by_columns.view(4, 3, -1).transpose(0, 1), by_rows.view(3, 4, -1))


@pytest.mark.parametrize("patches", [24, 27, 32])
@pytest.mark.parametrize(("fine", "side"), [(1, 2), (1, 3), (2, 2), (2, 3), (4, 2)])
def test_joined_cells_of_a_finer_stride_are_the_cells_of_the_coarser(
    patches: int, fine: int, side: int
) -> None:
    cells = Grid(patches, patches, fine)
    tokens = Grid(patches, patches, fine * side)
    joined = JoinCells(side)(torch.zeros(1, cells.rows, cells.cols, 1))
    assert joined.shape[1:3] == (tokens.rows, tokens.cols)


def test_a_model_projects_the_finer_cells_and_predicts_the_coarser(
    make_model, make_clip, make_batch
) -> None:
    model = make_model(
        mm_projector_type="mlp_downsample_2x2_fix", slow_stride=2, fast_stride=4, max_frames_num=4
    )
    clip = make_clip(frames=4, patch_grid=(6, 8))
    patches = np.random.default_rng(0).normal(size=(4, 6, 8, 12))
    for stride in (1, 2, 4):
        clip.features[stride] = pool(torch.from_numpy(patches), stride).half().numpy()
    batch = make_batch(model, ([clip], "<video>\nWhen?", "now"))
    plain = make_batch(
        make_model(slow_stride=2, fast_stride=4, max_frames_num=4),
        ([clip], "<video>\nWhen?", "now"),
    )
    assert torch.equal(batch.input_ids, plain.input_ids)
    group: FrameGroup
    for group, same in zip(batch.groups, plain.groups, strict=True):
        assert group.finer is not None
        assert same.finer is None
        assert torch.equal(group.features, same.features)
        frames = [0, 2] if group.stream == 0 else [1, 3]
        stride = group.grid.stride // 2
        assert torch.equal(group.finer, torch.from_numpy(clip.features[stride][frames]))
        tokens = model.frame_tokens(group)
        assert tokens.shape[:3] == group.features.shape[:3]
    out = model(batch)
    assert out["ar_count"].sum() == 3
    (out["ce"] + out["ar"].sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "mlp_downsample_4x4", "mlp", ""])
def test_an_unknown_projector_is_refused_with_those_there_are(kind: str) -> None:
    with pytest.raises(UserError, match=f"one of {PROJECTORS}, got '{kind}'"):
        joined_cells(kind)


def test_an_identity_hands_on_features_of_the_llms_own_width() -> None:
    cells = torch.randn(2, 3, 4, 8)
    assert build_projector("identity", 8, 8)(cells) is cells
    with pytest.raises(
        UserError, match=r"the LLM's width 16, got features of width 8; take a bank"
    ):
        build_projector("identity", 8, 16)
