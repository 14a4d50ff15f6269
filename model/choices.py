"""What some values of the model's settings mean. Without torch: plans and settings ask too."""

import re

PROJECTORS = "linear, mlpNx_gelu, mlp_downsample, mlp_downsample_2x2_fix, mlp_downsample_3x3_fix"
JOINED = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
"""Cells on a side that become one token. VILA's first two differ in the order of tokens alone: the
older one's run down the columns; here tokens follow the rows in both."""
MLP = re.compile(r"mlp([1-9])x_gelu")

LAPE_AXES = {"all": (0, 1, 2), "time": (0,), "space": (1, 2)}
"""The axes (time, height, width) whose coordinates are tokens; on the others numbers stay text."""

TOWER_THREADS = 2
"""Of the CPU: the same on every machine, since sums may round otherwise; more work takes more
processes. Four on two cores took a third longer."""


def joined_cells(kind: str) -> int:
    """Return how many cells on a side a projector makes one token of; ValueError if it is unknown."""
    if kind != "linear" and not MLP.fullmatch(kind) and kind not in JOINED:
        raise ValueError(f"mm_projector_type must be one of {PROJECTORS}, got {kind!r}")
    return JOINED.get(kind, 1)
