"""A run that finds nothing to do is over at once: no tower, no torch, no file written.

pytest tests/preprocess/encode/test_again.py
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.encode.features import EncodeOptions
from preprocess.encode.planning import Survey
from preprocess.encode.run import encode
from preprocess.sources.find import find_clips
from preprocess.toy_models import save_tower
from shards.errors import UserError
from shards.format.plan import read_plan

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def made(toy: Path, toy_options: EncodeOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, tower, and the bank of both. Read it only."""
    world = tmp_path_factory.mktemp("made") / "world"
    for name in ("videos", "tower"):
        shutil.copytree(toy / name, world / name)
    options = replace(toy_options, tower=str(world / "tower"))
    assert encode([str(world / "videos")], world / "bank", options).clips == 9
    return world


@pytest.fixture
def world(made: Path) -> Iterator[Path]:
    """The same, for a test to change; plans name videos and towers by their paths, which stay."""
    kept = shutil.copytree(made, made.with_name("kept"))
    yield made
    shutil.rmtree(made)
    kept.rename(made)


@pytest.fixture
def options(toy_options: EncodeOptions, world: Path) -> EncodeOptions:
    return replace(toy_options, tower=str(world / "tower"))


def files(bank: Path) -> dict[str, tuple[int, int]]:
    stats = {path: path.stat() for path in bank.rglob("*") if path.is_file()}
    return {str(path): (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def finds_nothing(world: Path, options: EncodeOptions, *, prune: bool = False) -> bool:
    bank = world / "bank"
    clips = find_clips([str(world / "videos")]).clips
    survey = Survey.of(bank, clips, options, read_plan(bank))
    return survey.of_nothing(bank, options, prune=prune) is not None


def test_nothing_is_loaded_and_nothing_written(world: Path, options: EncodeOptions) -> None:
    before = files(world / "bank")
    words = ["encode", "videos", "--out", "bank", "--tower", "tower", "--frames", "8"]
    words = [str(world / word) if word in ("videos", "bank", "tower") else word for word in words]
    code = (
        "import sys; from preprocess.cli.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit as left: assert left.code == 0, left.code\n"
        "assert not {'torch', 'transformers', 'zarr', 'av'} & set(sys.modules)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert told.returncode == 0, told.stderr
    assert "0 clips" in told.stdout
    assert "9 clips there already" in told.stdout
    assert files(world / "bank") == before


def lose_a_column(world: Path) -> None:
    shutil.rmtree(world / "bank" / "index.zarr" / "timestamps")


def lose_the_manifest(world: Path) -> None:
    (world / "bank" / "bank.json").unlink()


def lose_a_record(world: Path) -> None:
    next((world / "bank" / "shards").glob("*.done")).unlink()


def add_a_video(world: Path) -> None:
    shutil.copy(world / "videos/test/clip-00000.mp4", world / "videos/test/more.mp4")


def change_a_video(world: Path) -> None:
    with open(world / "videos/test/clip-00000.mp4", "ab") as file:
        file.write(bytes(1000))


def remove_a_video(world: Path) -> None:
    (world / "videos/test/clip-00000.mp4").unlink()


def touch_the_tower(world: Path) -> None:
    os.utime(next((world / "tower").glob("*.safetensors")))


@pytest.mark.parametrize(
    "change",
    [
        *(lose_a_column, lose_the_manifest, lose_a_record),
        *(add_a_video, change_a_video, touch_the_tower),
    ],
)
def test_whatever_is_left_to_do_is_seen(
    world: Path, options: EncodeOptions, change: Callable[[Path], None]
) -> None:
    assert finds_nothing(world, options)
    change(world)
    assert not finds_nothing(world, options)


def test_other_features_another_name_and_pruning_are_looked_into(
    world: Path, options: EncodeOptions
) -> None:
    assert not finds_nothing(world, replace(options, layer=-1))
    assert not finds_nothing(world, replace(options, tower_dtype="bfloat16"))
    moved = shutil.copytree(world / "tower", world / "moved")
    assert not finds_nothing(world, replace(options, tower=str(moved)))
    remove_a_video(world)
    assert finds_nothing(world, options), "it stays in the bank"
    assert not finds_nothing(world, options, prune=True)


def test_a_tower_that_was_changed_in_its_place_is_refused_though_nothing_is_left(
    world: Path, options: EncodeOptions
) -> None:
    save_tower(world / "tower", seed=1)
    with pytest.raises(UserError, match="tower_digest"):
        encode([str(world / "videos")], world / "bank", options)
