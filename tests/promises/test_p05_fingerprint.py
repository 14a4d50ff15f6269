"""P5: what changes a feature is refused by name; how a bank is made is no part of what it is.

A change of tower, processor, layer, sampling, pooling, type or codec makes another bank, and so do fewer
strides; one more lies beside the bank, and is read with it. Batch, threads or shard size change nothing.
"""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from preprocess.encode.run import EncodeOptions, encode
from preprocess.toy_models import save_tower
from shards.errors import UserError
from shards.format.features import Sampling
from tests.folders import contents


def moments(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("bank-*")}


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_frames": 8},
        {"tower_threads": 1},
        {"shard_bytes": 1},
        {"allow_truncated": True},
        {"device": "cpu:0"},
    ],
    ids=str,
)
def test_how_a_bank_is_made_is_no_part_of_its_identity(
    toy: Path,
    toy_bank: Path,
    toy_options: EncodeOptions,
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    before = contents(bank)
    assert encode([str(toy / "videos")], bank, replace(toy_options, **changes)).skipped == 9
    after = contents(bank)
    if "allow_truncated" in changes:  # what every worker of this plan goes by
        assert b'"allow_truncated":true,' in after.pop("plan.json")
        before.pop("plan.json")
    assert after == before


def test_every_option_is_either_hashed_or_known_not_to_matter() -> None:
    hashed = {"tower", "strides", "sampling", "layer", "pool", "dtype", "codec", "tower_dtype"}
    hashed |= {"fit"}
    free = {"device", "devices", "batch_frames", "tower_threads", "shard_bytes", "dtype_reason"}
    free |= {"allow_truncated", "find"}  # which clips there are
    free |= {"processor"}  # how it is in the bank
    assert {field.name for field in fields(EncodeOptions)} == hashed | free


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strides": (8,)}, "strides: [8] here, [4, 8] there"),
        ({"strides": (4,)}, "strides: [4] here, [4, 8] there"),
        ({"layer": -1}, "layer: -1 here, -2 there"),
        ({"sampling": Sampling(num_frames=9)}, "sampling.num_frames: 9 here, 8 there"),
        ({"sampling": Sampling(fps="1", max_frames=8)}, "sampling.fps: '1' here, None there"),
        ({"pool": "max"}, "pool: 'max' here, 'average' there"),
        ({"dtype": "bfloat16"}, "dtype: 'bfloat16' here, 'float16' there"),
        ({"codec": "blosc"}, "codec: 'blosc' here, 'none' there"),
        ({"codec": "int8"}, "codec: 'int8' here, 'none' there"),
        ({"sampling": Sampling(fps="2", max_frames=9)}, "sampling.max_frames: 9 here, None there"),
        ({"tower_dtype": "bfloat16"}, "tower_dtype: 'bfloat16' here, 'float32' there"),
        ({"fit": "pad"}, "processor.pad: True here, None there"),
        ({"fit": "crop"}, "processor.shortest_edge: True here, False there"),
        ({"tower": "other"}, "tower_digest: "),
        ({"tower": "darker"}, "processor.mean: [0.4, 0.4, 0.4] here, [0.5, 0.5, 0.5] there"),
    ],
)
def test_other_features_are_refused_by_name_and_nothing_changes(
    toy: Path,
    toy_bank: Path,
    toy_options: EncodeOptions,
    tmp_path: Path,
    changes: dict[str, Any],
    named: str,
) -> None:
    if "tower" in changes:
        tower = tmp_path / changes["tower"]
        shutil.copytree(toy / "tower", tower)
        if changes["tower"] == "other":
            save_tower(tower, seed=1)
        else:
            config = json.loads((tower / "preprocessor_config.json").read_text())
            config["image_mean"] = [0.4] * 3
            (tower / "preprocessor_config.json").write_text(json.dumps(config))
        changes = {"tower": str(tower)}
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    before, written = contents(bank), moments(bank)
    with pytest.raises(UserError, match="holds other features") as caught:
        encode([str(toy / "videos")], bank, replace(toy_options, **changes))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(bank) == before
    assert moments(bank) == written


def test_a_tower_copied_elsewhere_is_the_same_tower(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    tower = shutil.copytree(toy / "tower", tmp_path / "moved")
    options = replace(toy_options, tower=str(tower))
    assert encode([str(toy / "videos")], bank, options).skipped == 9
