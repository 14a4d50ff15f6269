"""What tests of encoding share."""

import pytest

from model.tower.tower import Tower
from preprocess.encode.features import EncodeOptions, load_tower


@pytest.fixture(scope="module")
def tower(toy_options: EncodeOptions) -> Tower:
    """The tower of `toy_bank`. Do not change it."""
    return load_tower(toy_options)
