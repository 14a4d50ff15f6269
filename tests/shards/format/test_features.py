"""The fingerprint covers all that the bytes depend on; keys and ids are what stock readers take.

pytest tests/shards/format/test_features.py
"""

import hashlib
import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.format.features import Derived, FeatureConfig, Sampling, check_strides, differences
from shards.format.samples import SampleMeta, clip_id, sample_key

CONFIG = FeatureConfig(
    tower_type="siglip_vision_model",
    tower_digest="00" * 16,
    layer=-2,
    processor={"height": 64, "width": 64, "crop": None, "mean": [0.5, 0.5, 0.5]},
    dtype="float16",
    tower_dtype="float32",
    attention="sdpa",
    sampling=Sampling(fps="1", max_frames=64),
    strides=(4, 8),
    pool="average",
)
OTHER: dict[str, Any] = {
    "tower_type": "clip_vision_model",
    "tower_digest": "01" * 16,
    "layer": -1,
    "processor": {**CONFIG.processor, "width": 65},
    "dtype": "bfloat16",
    "tower_dtype": "bfloat16",
    "attention": "eager",
    "sampling": Sampling(fps="2", max_frames=64),
    "strides": (4,),
    "pool": "max",
    "codec": "int8",
    "format_version": 4,
    "derived": Derived("02" * 16, (2, 4), "none"),
}
OTHER_SAMPLING = {
    "fps": Sampling(fps="1/2", max_frames=64),
    "max_frames": Sampling(fps="1", max_frames=63),
    "num_frames": Sampling(num_frames=8),
    "kept": Sampling(fps="1", max_frames=64, kept=8),
    "like": Sampling(fps="1", max_frames=64, like="qwen3_vl"),
}
OTHER_PROCESSOR: dict[str, Any] = {
    "height": 65,
    "width": 65,
    "crop": [64, 64],
    "mean": [0.5, 0.5, 0.4],
}
ids = st.text(max_size=200)


def test_the_tables_here_name_every_field() -> None:
    assert set(OTHER) == {field.name for field in fields(FeatureConfig)}
    assert set(OTHER_SAMPLING) == {field.name for field in fields(Sampling)}
    assert set(OTHER_PROCESSOR) == set(CONFIG.processor)


@pytest.mark.parametrize("name", OTHER)
def test_the_fingerprint_changes_with_every_field(name: str) -> None:
    changed = replace(CONFIG, **{name: OTHER[name]})
    assert changed.fingerprint != CONFIG.fingerprint
    lines = differences(changed.to_json(), CONFIG.to_json())
    assert lines
    assert all(re.match(rf"{name}[.:]", line) for line in lines), lines


@pytest.mark.parametrize("name", OTHER_SAMPLING)
def test_the_fingerprint_changes_with_every_field_of_the_sampling(name: str) -> None:
    changed = replace(CONFIG, sampling=OTHER_SAMPLING[name])
    assert changed.fingerprint != CONFIG.fingerprint
    lines = differences(changed.to_json(), CONFIG.to_json())
    assert any(line.startswith(f"sampling.{name}: ") for line in lines), lines


@pytest.mark.parametrize("name", OTHER_PROCESSOR)
def test_the_fingerprint_changes_with_every_value_of_the_processor(name: str) -> None:
    processor = {**CONFIG.processor, name: OTHER_PROCESSOR[name]}
    assert replace(CONFIG, processor=processor).fingerprint != CONFIG.fingerprint


def test_the_fingerprint_is_blake2b_of_sorted_compact_json() -> None:
    text = json.dumps(CONFIG.to_json(), sort_keys=True, separators=(",", ":"))
    assert CONFIG.fingerprint == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def test_the_fingerprint_holds_no_batch_worker_or_shard_size() -> None:
    names = " ".join(OTHER)
    assert not re.search("batch|worker|shard|device|thread|decoder|path|host|torch", names)


def test_the_fingerprint_does_not_depend_on_the_order_of_the_processor_values() -> None:
    turned = dict(reversed(CONFIG.processor.items()))
    assert list(turned) != list(CONFIG.processor)
    assert replace(CONFIG, processor=turned).fingerprint == CONFIG.fingerprint


@pytest.mark.parametrize("sampling", OTHER_SAMPLING.values())
def test_a_config_survives_json(sampling: Sampling) -> None:
    config = replace(CONFIG, sampling=sampling, derived=OTHER["derived"])
    again = FeatureConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert again.fingerprint == config.fingerprint


def test_merged_tokens_are_a_layer_whose_finest_stride_is_one() -> None:
    config = replace(CONFIG, layer="merged", strides=(1, 2))
    assert FeatureConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(UserError, match=r"finest stride of 4; use --stride 1,4,8, or --stride 1"):
        replace(CONFIG, layer="merged")
    with pytest.raises(UserError, match=r"layer must be an integer or merged, got 'last'"):
        replace(CONFIG, layer="last")
    with pytest.raises(UserError, match=r"layer must be an integer or a text, got 1.5"):
        FeatureConfig.from_json(CONFIG.to_json() | {"layer": 1.5})


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"newfangled.*update") as caught:
        FeatureConfig.from_json(CONFIG.to_json() | {"newfangled": 1})
    assert "\n" not in str(caught.value)


def test_an_unknown_field_of_the_sampling_is_refused_by_name() -> None:
    data = CONFIG.to_json()
    data["sampling"]["jitter"] = 1
    with pytest.raises(UserError, match=r"sampling\.jitter.*update"):
        FeatureConfig.from_json(data)


def test_equal_configs_have_no_differences() -> None:
    assert differences(CONFIG.to_json(), json.loads(json.dumps(CONFIG.to_json()))) == []


@pytest.mark.parametrize("strides", [(), (0,), (-4, 8), (4, 4), (8, 4), (2, 4, 3)])
def test_strides_that_do_not_rise_are_refused(strides: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="stride"):
        check_strides(strides)
    with pytest.raises(UserError, match="stride"):
        replace(CONFIG, strides=strides)


@pytest.mark.parametrize("strides", [(1,), (4, 8), (2, 3, 5, 7)])
def test_one_or_more_rising_strides_are_taken(strides: tuple[int, ...]) -> None:
    assert replace(CONFIG, strides=strides).strides == strides


@pytest.mark.parametrize("name", ["pool", "dtype"])
def test_an_unknown_pool_or_dtype_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} must be one of .*, got 'median'"):
        replace(CONFIG, **{name: "median"})


@pytest.mark.parametrize(
    "fields_",
    [
        {},
        {"num_frames": 8, "fps": "1"},
        {"num_frames": 0},
        {"fps": "0", "max_frames": 4},
        {"fps": "-1", "max_frames": 4},
        {"fps": "nan", "max_frames": 4},
        {"fps": "1/0", "max_frames": 4},
        {"fps": "fast", "max_frames": 4},
        {"fps": "1", "max_frames": 0},
        {"fps": "1", "max_frames": 4, "like": "qwen"},
    ],
)
def test_a_sampling_that_means_nothing_is_refused(fields_: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"frames|fps"):
        Sampling(**fields_)


@given(ids)
@example("")
@example("....")
@example("клип 1.5 к.mp4")
@example("a" * 300 + ".mp4#1-2")
def test_any_id_has_a_key_that_stock_readers_take(id_: str) -> None:
    key = sample_key(id_)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key)
    assert sample_key(str(id_)) == key


@given(st.sets(ids, min_size=2, max_size=20))
@example({"a.b/c", "a/b.c", "a-b-c", "a b c"})
@example({"x" * 200 + ".mp4", "y" + "x" * 199 + ".mp4"})
def test_different_ids_have_different_keys(some: set[str]) -> None:
    assert len({sample_key(id_) for id_ in some}) == len(some)


def test_a_key_is_a_readable_slug_and_sixteen_digits_of_the_id() -> None:
    id_ = "train/clip-00000.mp4"
    digits = hashlib.blake2b(id_.encode(), digest_size=8).hexdigest()
    assert sample_key(id_) == f"train-clip-00000-mp4-{digits}"


@pytest.mark.parametrize(
    ("path", "start", "end", "expected"),
    [
        ("a/b.mp4", None, None, "a/b.mp4"),
        ("./a//b.mp4", None, None, "a/b.mp4"),
        ("b.mp4", 1.5, 2, "b.mp4#1.5-2"),
        ("b.mp4", 10, 200.0, "b.mp4#10-200"),
        ("b.mp4", 0, 0.04, "b.mp4#0-0.04"),
        ("b.mp4", None, 7.25, "b.mp4#0-7.25"),
        ("b.mp4", 7.25, None, "b.mp4#7.25-"),
        ("b.mp4", 0.12345, 1.9996, "b.mp4#0.123-2"),
        ("b.mp4", 0, None, "b.mp4#0-"),
    ],
)
def test_a_clip_id_is_its_path_and_its_bounds_in_seconds(
    path: str, start: float | None, end: float | None, expected: str
) -> None:
    assert clip_id(path, start, end) == expected


def test_a_sample_meta_survives_json() -> None:
    meta = SampleMeta(
        id="a.mp4#1-2",
        path="a.mp4",
        size=10,
        digest="ab",
        start=1.0,
        end=2.0,
        fps=30000 / 1001,
        frame_count=30,
        frame_index=[30, 45],
        timestamps=[1.001, 1.5015],
        display_size=(272, 640),
        covered=(0.0, 0.25, 1.0, 0.75),
        patch_grid=(8, 8),
        cell_grids={"4": (2, 2), "8": (1, 1)},
        tower_width=64,
        frames_per_unit=1,
        decoder="pyav-seek",
        flags=["short"],
    )
    assert SampleMeta.from_json(json.loads(json.dumps(meta.to_json()))) == meta
