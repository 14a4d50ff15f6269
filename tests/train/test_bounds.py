"""Every numeric setting takes what lies within its bounds as it is written, and refuses the rest."""

import contextlib
import io
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import FORMAT, ModelSettings, VLMConfig, read_model_config
from shards.errors import UserError
from train.settings.config import TrainConfig, parse
from train.settings.foreign import ENVIRONMENT

INTEGERS = 2**31 - 1
BOUNDS = {
    "mm_spatial_pool_stride": (0, INTEGERS),
    "fast_stride": (0, INTEGERS),
    "max_frames_num": (1, INTEGERS),
    "num_temporal_tokens": (2, 1000),
    "num_spatial_tokens": (2, 1000),
    "lape_sigma": (0.01, 1000.0),
    "lape_share": (math.ulp(0), math.inf),
    "loss_weight": (0.0, math.inf),
    "lora_r": (1, INTEGERS),
    "lora_alpha": (1, INTEGERS),
    "learning_rate": (math.ulp(0), math.inf),
    "projector_lr": (0.0, math.inf),
    "lape_lr": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "adam_beta2": (math.ulp(0), math.nextafter(1, 0)),
    "warmup_ratio": (0.0, 1.0),
    "lape_warmup_steps": (0, INTEGERS),
    "max_grad_norm": (math.ulp(0), math.inf),
    "per_device_train_batch_size": (1, INTEGERS),
    "gradient_accumulation_steps": (1, INTEGERS),
    "pack_tokens": (0, INTEGERS),
    "max_tokens": (0, INTEGERS),
    "prefetch": (1, INTEGERS),
    "num_train_epochs": (math.ulp(0), math.inf),
    "max_steps": (0, INTEGERS),
    "seed": (0, 2**32 - 1),
    "assumed_mfu": (math.ulp(0), 1.0),
    "device_flops": (0.0, math.inf),
    "plan_devices": (0, INTEGERS),
    "logging_steps": (1, INTEGERS),
    "eval_steps": (0, INTEGERS),
    "save_steps": (0, INTEGERS),
    "save_minutes": (0.0, math.inf),
    "save_total_limit": (1, INTEGERS),
    "num_threads": (0, 1024),
}
"""Least and most, both inclusive; without a greatest number, infinity stands for it."""
MAY_BE_INFINITE = ("max_grad_norm",)
KINDS = {item.name: item.type for item in fields(TrainConfig) if item.type in (int, float)}
WRITTEN = ("nan", "inf", "-inf", "1e400", "-1e400", "1_000", " 3 ", "0x10", "1e3", "3.0", "0.5")
WRITTEN += (
    "",
    "-0",
    "+7",
    "07",
    "three",
    "1,5",
    "1e-5",
    "\u0663",
    "9" * 5000,
    "True",
    ".inf",
    "-1",
)


def meant(name: str, text: str) -> int | float | None:
    """Return the value that a text means, None where the setting does not take it."""
    try:
        value = KINDS[name](text)
    except ValueError:
        return None
    if text == "1e-400":  # no number: it would be read as 0
        return None
    least, most = BOUNDS[name]
    finite = math.isfinite(value) if isinstance(value, float) else True
    return value if least <= value <= most and (finite or name in MAY_BE_INFINITE) else None


def assert_taken_or_refused(base: list[str], name: str, text: str, yaml: Path) -> None:
    """Write a setting in YAML, as a flag and in the environment where it is read there."""
    yaml.write_text(f"# one line above\n{name}: {json.dumps(text)}\n")
    ways = [
        ([*base, "--config", str(yaml)], {}, f"{yaml}:2 {name}"),
        ([*base, f"--{name}={text}"], {}, f"--{name}"),
    ]
    # an empty variable is an unset one
    ways += [
        (base, {key: text}, key) for key, value in ENVIRONMENT.items() if text and value == name
    ]
    expected = meant(name, text)
    for argv, environ, subject in ways:
        errors = io.StringIO()
        if expected is None:
            with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stop:
                parse(argv, environ)
            assert stop.value.code == 2
            (line,) = errors.getvalue().splitlines()
            assert line.startswith(f"error: {subject} must be ")
            assert line.endswith(f", got {text!r}")
        else:
            value = getattr(parse(argv, environ), name)
            assert (type(value), value) == (KINDS[name], expected)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that are complete but for the one in question."""
    folder = tmp_path_factory.mktemp("bounds")
    (folder / "config.json").write_text("{}")
    (folder / "records.jsonl").write_text("")
    return [
        *("--stage_path", str(folder)),
        *("--data_path", str(folder / "records.jsonl")),
        *("--output_dir", str(folder / "out")),
    ]


def test_every_numeric_setting_has_its_bounds_here() -> None:
    assert set(BOUNDS) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_just_inside_is_taken_and_just_outside_is_refused(
    base: list[str], name: str, tmp_path: Path
) -> None:
    least, most = BOUNDS[name]
    if KINDS[name] is int:
        inside, outside = [least, least + 1, most - 1, most], [least - 1, most + 1, 10**30]
    else:
        inside = [least, math.nextafter(least, math.inf), math.nextafter(most, 0)]
        outside = [math.nextafter(least, -math.inf)]
        outside += [] if math.isinf(most) else [math.nextafter(most, math.inf)]
    for value in inside:
        assert meant(name, repr(value)) == value
    for value in outside:
        assert meant(name, repr(value)) is None
    for value in [*inside, *outside]:
        assert_taken_or_refused(base, name, repr(value), tmp_path / "x.yaml")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", WRITTEN, ids=lambda text: ascii(text[:8]))
def test_an_odd_spelling_is_read_exactly_or_refused_by_name(
    base: list[str], name: str, text: str, tmp_path: Path
) -> None:
    assert_taken_or_refused(base, name, text, tmp_path / "x.yaml")


@given(
    name=st.sampled_from(sorted(KINDS)),
    text=st.one_of(st.integers(), st.floats(), st.decimals(places=9), st.fractions()).map(str),
)
def test_any_number_is_read_exactly_or_refused_by_name(
    base: list[str], tmp_path_factory: pytest.TempPathFactory, name: str, text: str
) -> None:
    yaml = tmp_path_factory.getbasetemp() / "any.yaml"
    assert_taken_or_refused(base, name, text, yaml)


def test_a_plain_number_in_yaml_needs_no_quotes(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("learning_rate: 1e-5\nwarmup_ratio: .5\nseed: 3\n")
    config = parse([*base, "--config", str(tmp_path / "x.yaml")], {})
    assert (config.learning_rate, config.warmup_ratio, config.seed) == (1e-5, 0.5, 3)


WRONG = {"loss_weight": -0.5, "num_spatial_tokens": 1, "lape_sigma": math.nan}
WRONG |= {"slow_frame_ratio": "1.5", "enable_lape": 1, "predictor": "mlp", "max_frames_num": "8"}


@pytest.mark.parametrize("name", WRONG)
def test_a_saved_model_is_held_to_the_same_bounds(name: str, tmp_path: Path) -> None:
    settings = asdict(VLMConfig()) | {name: WRONG[name]}
    (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT, "model": settings}))
    with pytest.raises(UserError, match=rf"config\.json: {name} must be .*, got ") as refusal:
        read_model_config(tmp_path)
    assert len(refusal.value.problems) == 1


def test_a_runs_model_settings_are_the_models_own() -> None:
    ours = {item.name: item for item in fields(TrainConfig)}
    for item in fields(ModelSettings):
        assert ours[item.name] is item
