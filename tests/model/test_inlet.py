"""A GPU is given the next batch early, and makes of each what it makes of that batch alone.

pytest tests/model/test_inlet.py -m gpu
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.grid import pool
from model.tower.tower import Tower

pytestmark = pytest.mark.gpu


def test_batches_in_flight_are_the_batches_one_by_one(toy: Path) -> None:
    tower = Tower.load(str(toy / "tower"), device="cuda")
    plain, shape, strides = (
        replace(tower, inlet=None),
        (50, *tower.pixels.output_size(64, 64), 3),
        (2, 4),
    )
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    stored, _ = tower.features(frames, strides, threads=1)
    for cut in range(0, len(frames), 16):
        patches = plain.encode_batch(frames[cut : cut + 16], 16)
        torch.cuda.synchronize()
        for stride in strides:
            alone = pool(patches, stride, "average").half().cpu().numpy()
            np.testing.assert_array_equal(stored[stride][cut : cut + 16], alone)
