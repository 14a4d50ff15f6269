"""The bank on disk: its format, writer, catalogue and reader. NumPy only, never torch.

from shards import Bank, Banks

bank = Bank.open("banks/toy")
features = bank.read(bank.row("train/clip-00000.mp4"), stride=4, frames=[0, 2])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.read.bank import Bank
    from shards.read.banks import Banks

# the public names; everything else in the package may move
__all__ = ["Bank", "Banks"]

HOMES = {"Bank": "shards.read.bank", "Banks": "shards.read.banks"}


def __getattr__(name: str) -> Any:
    """Import a reader on first use, so that `import shards.errors` does not import NumPy."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
