"""`from shards import Bank, Banks`: the public door, and what it does not pull in.

pytest tests/shards/test_door.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

import shards
from shards import Bank, Banks
from shards.read import bank, banks

ROOT = Path(__file__).resolve().parents[2]


def test_the_door_leads_to_the_readers(toy_bank: Path) -> None:
    assert (Bank, Banks) == (bank.Bank, banks.Banks)
    assert shards.__all__ == ["Bank", "Banks"]
    assert len(Bank.open(toy_bank)) == 9
    with pytest.raises(ImportError, match="Bonk"):
        from shards import Bonk  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize("module", ["shards", "shards.errors", "shards.text", "shards.signed"])
def test_light_modules_do_without_numpy(module: str) -> None:
    script = f"import sys, {module}; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_readers_do_without_torch_and_zarr() -> None:
    script = "import sys; from shards import Bank, Banks; print({'torch', 'zarr'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "set()\n"
