"""A tower that runs out of GPU memory: half the batch for a whole bank, or an end in words.

pytest tests/preprocess/encode/test_gpu_memory.py

The tower is real; it says that memory is gone as CUDA's allocator does, above a number of frames.
"""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.tower.pooling import GpuMemoryError
from model.tower.tower import Tower
from preprocess.encode.features import EncodeOptions, load_tower
from preprocess.encode.run import encode, execute, make_plan
from preprocess.encode.unit import Summary
from preprocess.sources.find import find_clips
from shards.format.commits import shard_path
from shards.format.plan import read_plan
from shards.read.bank import Bank
from shards.signed import read_signed_json


@pytest.fixture
def toy_options(toy_options: EncodeOptions) -> EncodeOptions:
    """With one forward for a batch, as on a GPU."""
    return replace(toy_options, tower_threads=1)


@pytest.fixture
def tower(toy_options: EncodeOptions) -> Tower:
    return load_tower(toy_options)


def hold_at_most(tower: Tower, frames: int) -> None:
    def allocate(_: Any, __: Any, given: dict[str, torch.Tensor]) -> None:
        if len(given["pixel_values"]) > frames:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    tower.model.register_forward_pre_hook(allocate, with_kwargs=True)


def run(
    toy: Path, out: Path, tower: Tower, options: EncodeOptions, most: int | None = None
) -> Summary:
    """Plan and encode. most: frames that the tower takes together from the plan on."""
    clips = find_clips([str(toy / "videos")]).clips
    out.mkdir(exist_ok=True)
    plan = make_plan(out, clips, tower, options)[0].plan
    if most is not None:
        hold_at_most(tower, most)
    return execute(out, plan, clips, tower, options)


@pytest.mark.parametrize("codec", ["none", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_bank_that_holds_nothing_yet_is_made_with_half_the_batch(
    codec: str,
    toy: Path,
    tower: Tower,
    toy_options: EncodeOptions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = replace(toy_options, codec=codec)
    encode([str(toy / "videos")], tmp_path / "asked", replace(options, batch_frames=4))
    capsys.readouterr()
    summary = run(toy, tmp_path / "halved", tower, options, most=4)  # of clips of eight
    said = capsys.readouterr().err
    assert (summary.clips, summary.failures) == (9, [])
    assert said.count("note: ") == 1
    assert "the bank is made with --batch-frames 4" in said
    asked, halved = (shard_path(tmp_path / name, 0) for name in ("asked", "halved"))
    assert asked.read_bytes() == halved.read_bytes()
    plan = read_plan(tmp_path / "halved")
    assert plan is not None
    assert plan.tower.batch_frames == 4
    provenance = read_signed_json(halved.with_suffix(".done"))["provenance"]
    assert provenance["batch_frames"] == 4


def test_what_calibration_found_is_kept_for_the_clips(
    toy: Path,
    tower: Tower,
    toy_options: EncodeOptions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Here the GPU has room again when they are encoded: they are made as plan.json says."""
    out, options = tmp_path / "bank", replace(toy_options, codec="int8", batch_frames=8)
    clips, room = find_clips([str(toy / "videos")]).clips, []

    def allocate(_: Any, __: Any, given: dict[str, torch.Tensor]) -> None:
        if len(given["pixel_values"]) > 4 and not room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    tower.model.register_forward_pre_hook(allocate, with_kwargs=True)
    out.mkdir()
    changes, fitted = make_plan(out, clips, tower, options)
    room.append("again")
    assert fitted.batch_frames == 4
    assert changes.plan.tower.batch_frames == 4
    assert execute(out, changes.plan, clips, tower, fitted).clips == 9
    assert capsys.readouterr().err.count("note: ") == 1
    provenance = read_signed_json(shard_path(out, 0).with_suffix(".done"))["provenance"]
    assert provenance["batch_frames"] == 4


@pytest.mark.parametrize(("most", "first", "fix"), [(2, 8, "--batch-frames 2"), (0, 1, "smaller")])
def test_the_second_time_ends_in_words(
    most: int,
    first: int,
    fix: str,
    toy: Path,
    tower: Tower,
    toy_options: EncodeOptions,
    tmp_path: Path,
) -> None:
    with pytest.raises(GpuMemoryError, match=f"got a batch of .* frames; encode with .*{fix}"):
        run(toy, tmp_path / "bank", tower, replace(toy_options, batch_frames=first), most)
    assert not list((tmp_path / "bank/shards").iterdir())


def test_a_bank_that_holds_clips_is_left_as_it_is_and_goes_on_as_told(
    toy: Path, tower: Tower, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    out, options = tmp_path / "bank", replace(toy_options, shard_bytes=1)
    clips = find_clips([str(toy / "videos")]).clips
    out.mkdir()
    plan = make_plan(out, clips, tower, options)[0].plan
    first = tower.model.register_forward_pre_hook(lambda *_: hold_at_most(tower, 4))
    with pytest.raises(GpuMemoryError, match="encode with --batch-frames 4"):
        execute(out, plan, clips, tower, options)
    first.remove()
    kept = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    assert sorted(kept) == [f"bank-000000.{end}" for end in ("done", "tar", "tar.idx")]
    run(toy, out, tower, replace(options, batch_frames=4))
    assert all((out / "shards" / name).read_bytes() == data for name, data in kept.items())
    shapes = [
        read_signed_json(shard_path(out, unit).with_suffix(".done"))["provenance"]["batch_frames"]
        for unit in range(9)
    ]
    assert shapes == [16] + 8 * [4]
    assert len(Bank.open(out)) == 9


def test_the_error_is_handed_on_by_workers() -> None:
    error = pickle.loads(pickle.dumps(GpuMemoryError(16, 8)))
    assert (error.fewer, str(error)) == (8, str(GpuMemoryError(16, 8)))
