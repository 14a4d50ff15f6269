"""A tower's forward: it ends at the layer that is taken, and runs side by side in one thread each."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.tower.forward.hidden import hidden_state, layers_of
from model.tower.side_by_side import side_by_side
from tests.model.test_tower import KINDS, SIDE


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_ends_at_its_layer_with_the_bits_of_a_whole_one(kind: str) -> None:
    torch.manual_seed(0)
    whole = KINDS[kind].make().eval()
    model = getattr(whole, "vision_model", whole)
    model = getattr(model, "vision_tower", model)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    ran: list[int] = []
    for place, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(lambda *_, place=place: ran.append(place))
    depth = len(layers_of(model))
    with torch.inference_mode():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert len(states) == depth + 1 == 4
        for layer in range(-depth - 1, depth + 1):
            ran.clear()
            assert torch.equal(hidden_state(model, layer, pixel_values=pixels), states[layer])
            used = layer % (depth + 1)
            assert ran == list(range(used or depth)), "layers behind it are not run"
        after = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, after, states)), "nothing is left behind in the model"


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_run_in_threads_of_their_own_and_come_back_in_order(parts: int) -> None:
    batch, seen = np.arange(24).reshape(8, 3), []
    barrier = threading.Barrier(parts)

    def forward(rows: np.ndarray) -> Tensor:
        barrier.wait(30)  # all parts run at once, or none goes on
        seen.append((len(rows), torch.get_num_threads()))
        return torch.from_numpy(rows) * 2

    torch.testing.assert_close(side_by_side(forward, batch, parts), torch.from_numpy(batch) * 2)
    assert seen == [(8 // parts, 1)] * parts


def test_an_error_of_one_part_is_that_of_all() -> None:
    def forward(rows: np.ndarray) -> Tensor:
        if rows[0] == 4:
            raise ValueError("this part")
        return torch.from_numpy(rows)

    with pytest.raises(ValueError, match="this part"):
        side_by_side(forward, np.arange(8), 2)


@pytest.mark.parametrize("kind", ["siglip_vision", "dinov2"])
def test_threads_round_alike_wherever_they_run(kind: str, tmp_path: Any) -> None:
    """Two forwards of a thread have the same bits beside any number of threads of the process."""
    from model.tower.tower import Tower

    KINDS[kind].make().save_pretrained(tmp_path)
    KINDS[kind].processor().save_pretrained(tmp_path)
    tower = Tower.load(str(tmp_path))
    frames = np.random.default_rng(0).integers(0, 256, (11, SIDE, SIDE, 3), dtype=np.uint8)
    others, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(tower.encode(frames, threads=2))
    finally:
        torch.set_num_threads(others)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], tower.encode(frames), rtol=1e-5, atol=1e-5)
