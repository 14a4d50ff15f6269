"""Settings: precedence, types, and one line per problem with where and how to mend it."""

import dataclasses
from pathlib import Path

import pytest

from train.settings.config import TrainConfig, help_text, parse


@pytest.fixture
def good(tmp_path: Path) -> list[str]:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}")
    (tmp_path / "records.jsonl").write_text("")
    return [
        *("--stage_path", str(tmp_path / "llm")),
        *("--data_path", str(tmp_path / "records.jsonl")),
        *("--output_dir", str(tmp_path / "out")),
        *("--bank", str(tmp_path / "bank")),
    ]


def problems(argv: list[str], capsys: pytest.CaptureFixture[str], **environ: str) -> list[str]:
    """Return the lines that a refused command line prints."""
    with pytest.raises(SystemExit) as stop:
        parse(argv, environ)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


def test_flags_win_over_environment_over_yaml_over_defaults(
    good: list[str], tmp_path: Path
) -> None:
    yaml = tmp_path / "x.yaml"
    yaml.write_text("num_spatial_tokens: 60\nnum_temporal_tokens: 60\nmax_frames_num: 8\n")
    argv = [*good, "--config", str(yaml), "--num_spatial_tokens", "80"]
    environ = {"NUM_SPATIAL_TOKENS": "70", "NUM_TEMPORAL_TOKENS": "70", "ENABLE_LAPE": "false"}
    config = parse(argv, environ)
    assert (config.num_spatial_tokens, config.num_temporal_tokens) == (80, 70)
    assert (config.max_frames_num, config.enable_lape, config.loss_weight) == (8, False, 0.15)


def test_scientific_notation_in_yaml_is_a_number(good: list[str], tmp_path: Path) -> None:
    yaml = tmp_path / "x.yaml"
    yaml.write_text("learning_rate: 1e-5\n")
    assert parse([*good, "--config", str(yaml)], {}).learning_rate == 1e-5


@pytest.mark.parametrize("text", ["[a, b, c]", "a,b,c", "a, b, c", "[a, 'b, c']", '" a ,b,c,"'])
def test_lists_take_several_words_or_commas(good: list[str], tmp_path: Path, text: str) -> None:
    assert parse([*good[:-2], "--bank", "a", "b,c"], {}).bank == ["a", "b", "c"]
    (tmp_path / "x.yaml").write_text(f"bank: {text}\n")
    assert parse([*good[:-2], "--config", str(tmp_path / "x.yaml")], {}).bank == ["a", "b", "c"]


@pytest.mark.parametrize("value", ["abc", "0", "-3", "1.5"])
@pytest.mark.parametrize("name", ["NUM_SPATIAL_TOKENS", "NUM_TEMPORAL_TOKENS"])
def test_a_bad_environment_override_says_which_and_what(
    good: list[str], capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    expected = f"{name} must be an integer in [2, 1000], got '{value}'"
    assert problems(good, capsys, **{name: value}) == [expected]


YAML_CASES = [
    ("lr_shedule: 3", ["x.yaml:1 lr_shedule: unknown setting"]),
    ("learning_rat: 3", ["did you mean learning_rate?"]),
    ("bf16: maybe", ["x.yaml:1 bf16 must be true, false or auto, got 'maybe'"]),
    ("seed: 1\nmax_frames_num: many", ["x.yaml:2 max_frames_num must be a positive integer"]),
    *[
        (f"seed: 1\n{line}", [f"x.yaml:2 {line.partition(':')[0]} is {word}; leave it out"])
        for word in ("null", "~", "Null")
        for line in (f"output_dir: {word}", f"media_dir: {word}", f"eval_path: [{word}]")
    ],
    ("seed: 1\nseed: 2", ["x.yaml:2 seed: already set in line 1"]),
    ("slow_frame_ratio: 1.5", ["x.yaml:1 slow_frame_ratio must be a number in [0, 1], got '1.5'"]),
    ("slow_frame_ratio: half", ["x.yaml:1 slow_frame_ratio must be a number in [0, 1]"]),
    (
        "gradient_checkpointing: often",
        ["x.yaml:1 gradient_checkpointing must be none, full or a positive integer, got 'often'"],
    ),
    ("mm_projector_type: mlp", ["x.yaml:1 mm_projector_type must be one of linear, mlpNx_gelu"]),
    ("frame_sampling_strategy: random", ["must be one of interleave, first_slow, uniform"]),
    ("tune_llm:\n  lora: 3", ["x.yaml:1 tune_llm: expected a value or a list, got a mapping"]),
    ("learning_rate: 0", ["x.yaml:1 learning_rate must be a positive number, got '0'"]),
    ("seed: [1, 2]", ["x.yaml:1 seed must be"]),
    *[
        (f"seed: 1\n{line}", [f"x.yaml:2 {line.partition(':')[0]}: expected texts in its list"])
        for line in (
            *("ignore_fields: [[a, b]]", "strip_prefix: [{a: b}]", "bank: [a, [b]]"),
            *("augment: [jitter, {drop: 0.3}]", "splice: [{records: 40}]"),
        )
    ],
    ("? [seed, plan]\n: 3", ["x.yaml:1 expected the name of a setting, got a list"]),
    ("a: [", ["x.yaml:", "not valid YAML"]),
    ("- 3", ["x.yaml:1 expected `setting: value` lines"]),
    (
        "num_temporal_tokens: 1",
        ["x.yaml:1 num_temporal_tokens must be an integer in [2, 1000], got '1'"],
    ),
]


@pytest.mark.parametrize(("text", "expected"), YAML_CASES)
def test_a_bad_yaml_line_is_named_with_its_place(
    good: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    expected: list[str],
) -> None:
    (tmp_path / "x.yaml").write_text(text + "\n")
    (line,) = problems([*good, "--config", str(tmp_path / "x.yaml")], capsys)
    for part in expected:
        assert part in line


def test_a_yaml_that_is_not_utf_8_is_a_users_error(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_bytes("output_dir: läufe".encode("latin-1"))
    (line,) = problems([*good, "--config", str(tmp_path / "x.yaml")], capsys)
    assert "x.yaml: not UTF-8" in line


def test_of_a_single_value_given_twice_the_last_one_wins(good: list[str]) -> None:
    assert parse([*good, "--seed", "1", "--seed=2"], {}).seed == 2


FLAG_CASES = [
    (["--lerning_rate", "3"], "--lerning_rate: unknown setting; did you mean learning_rate?"),
    (["--seed", "x"], "--seed must be an integer in [0, 4294967295], got 'x'"),
    (["--seed"], "--seed: needs a value"),
    (["--seed", "1", "2"], "--seed: takes one value, got 1 2"),
    (["--bank", "b"], "--bank: given twice; give all its values behind one --bank"),
    (["--data-path=b.json"], "--data_path: given twice"),
    (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
    (["a", "b", "c", "d"], "'d': expected --setting value (see --help)"),
    (["--stage_path", "/nowhere/llm"], "stage_path: no such folder: /nowhere/llm"),
    (["--stage_path=nowhere"], "stage_path: no such folder: nowhere"),
    (["--eval_path", "nowhere.json"], "eval_path: no such file: nowhere.json"),
    (["--resume", "nowhere"], "resume: nowhere is no checkpoint"),
    (["--data_mixture", "a+b"], "data_mixture: needs data_config"),
]


@pytest.mark.parametrize(("extra", "expected"), FLAG_CASES)
def test_a_bad_flag_is_one_line(
    good: list[str], capsys: pytest.CaptureFixture[str], extra: list[str], expected: str
) -> None:
    argv = good + extra if extra[0].startswith("--") else extra + good
    (line,) = problems(argv, capsys)
    assert expected in line


def test_all_problems_are_listed_together(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text("sed: 1\nbf16: 3\n")
    argv = [*good, "--config", str(tmp_path / "x.yaml"), "--max_steps", "-4"]
    assert len(problems(argv, capsys, NUM_SPATIAL_TOKENS="x")) == 4


def test_help_names_every_setting() -> None:
    text = help_text()
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name} " in text


FOLDER = Path(__file__).parents[2] / "train" / "presets"
PRESETS = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("fsdp2"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_every_preset_parses(preset: Path, good: list[str]) -> None:
    assert PRESETS
    parse([*good, "--config", str(preset)], {})
    assert preset.read_text().startswith("#"), "a preset says what it is for and how to run it"
