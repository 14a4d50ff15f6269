"""Features of an int8 bank travel as int8, and are to the bit what the bank's codec decodes.

pytest tests/train/batches/test_int8.py
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import FrameGroup, Quantised, as_tensor, joined, pinned, to_device
from model.grid import Grid
from shards.format.codec import Int8, from_float32
from shards.format.features import FeatureConfig
from shards.read.bank import Bank
from shards.read.banks import Banks

Make = Callable[..., Path]
CPU = torch.device("cpu")


def arrays(seed: int, dtype: str, largest: float = 3.0) -> dict[int, np.ndarray]:
    """Two strides of 5 frames; more values than are made floats at once."""
    rng = np.random.default_rng(seed)
    sizes = rng.gamma(1, 2, size=900)
    drawn = {s: rng.normal(size=(5, n, n, 900)) * sizes for s, n in ((4, 6), (8, 3))}
    return {
        s: from_float32((x * largest / np.abs(x).max()).astype(np.float32), dtype)
        for s, x in drawn.items()
    }


@pytest.fixture(params=["float16", "bfloat16"])
def config(features: FeatureConfig, request: pytest.FixtureRequest) -> FeatureConfig:
    return replace(features, codec="int8", dtype=request.param)


def group(clips: Banks, grid: Grid, frames: list[int]) -> FrameGroup:
    reads = [clips.clip(id_).read(grid.stride, frames) for id_ in ("a", "b")]
    assert all(isinstance(read, Int8) for read in reads)
    count = 2 * len(frames)
    return FrameGroup(
        stream=0,
        grid=grid,
        covered=(0.0, 0.0, 1.0, 1.0),
        features=joined(reads),
        token_index=torch.zeros(count, grid.cells, dtype=torch.int64),
        end_index=torch.zeros(count, dtype=torch.int64),
        time=torch.zeros(count),
        timed=torch.zeros(count),
    )


@pytest.mark.parametrize("largest", [3.0, 60000.0])
def test_what_reaches_the_model_is_what_the_codec_decodes(
    make_bank: Make, config: FeatureConfig, tmp_path: Path, largest: float
) -> None:
    made = {id_: arrays(k, config.dtype, largest) for k, id_ in enumerate("ab")}
    bank = Bank.open(make_bank(tmp_path / "bank", made, config=config, width=900))
    frames = [4, 0, 1]
    for grid in (Grid(24, 24, 4), Grid(24, 24, 8)):
        before = group(Banks([bank]), grid, frames)
        assert isinstance(before.features, Quantised)
        after = to_device(before, CPU).features
        assert after.dtype == getattr(torch, config.dtype)
        decoded = np.concatenate([bank.read(bank.row(id_), grid.stride, frames) for id_ in "ab"])
        assert torch.equal(after, as_tensor(decoded))
        with pytest.raises((AttributeError, TypeError)):
            _ = before.features + 1  # nobody takes the integers for features


def test_a_damaged_int8_stream_is_still_found(
    make_bank: Make, features: FeatureConfig, tmp_path: Path
) -> None:
    config = replace(features, codec="int8")
    out = make_bank(tmp_path / "bank", {"a": arrays(0, "float16")}, config=config, width=900)
    bank = Bank.open(out)
    for column in ("stride4_offset", "stride8_scale_offset"):
        raw = bytearray((out / "shards" / "bank-000000.tar").read_bytes())
        raw[int(bank.columns[column][0]) + 7] ^= 1
        damaged = tmp_path / column
        damaged.mkdir()
        (damaged / "shards").mkdir()
        for name in ("bank.json", "index.zarr"):
            (damaged / name).symlink_to(out / name)
        (damaged / "shards" / "bank-000000.tar").write_bytes(raw)
        clip = Banks.open([damaged]).clip("a")
        with pytest.raises(Exception, match="checksum does not match"):
            clip.read(int(column[6]), [0])


def test_banks_of_other_scales_and_of_no_codec_join_as_floats(
    make_bank: Make, features: FeatureConfig, tmp_path: Path
) -> None:
    ids = {"a": (0, "int8"), "b": (1, "int8"), "c": (2, "none")}
    banks = [
        Bank.open(
            make_bank(
                tmp_path / id_,
                {id_: arrays(seed, "float16")},
                config=replace(features, codec=codec),
                width=900,
            )
        )
        for id_, (seed, codec) in ids.items()
    ]
    reads = [Banks([bank]).clip(id_).read(4, [0, 3]) for bank, id_ in zip(banks, ids, strict=True)]
    whole = np.concatenate([bank.read(0, 4, [0, 3]) for bank in banks])
    assert torch.equal(joined(reads), torch.from_numpy(whole))
    assert torch.equal(joined(reads[:2]), torch.from_numpy(whole[:4]))


@pytest.mark.gpu
def test_on_a_gpu_they_are_the_same_bits(
    make_bank: Make, config: FeatureConfig, tmp_path: Path
) -> None:
    made = {id_: arrays(k, config.dtype) for k, id_ in enumerate("ab")}
    bank = Bank.open(make_bank(tmp_path / "bank", made, config=config, width=900))
    before = group(Banks([bank]), Grid(24, 24, 4), [0, 1])
    there = to_device(pinned(before), torch.device("cuda"))
    assert there.features.is_cuda
    assert torch.equal(there.features.cpu(), to_device(before, CPU).features)
