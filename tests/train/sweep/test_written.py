"""Sweeps as they are written: what a YAML means, and that what is wrong is said with its line."""

from dataclasses import fields
from pathlib import Path

import pytest

from train.settings.config import TrainConfig
from train.sweep.written import NOT_OF_A_RUN, Sweep, read_sweep


def read(path: Path, text: str, **environ: str) -> tuple[Sweep, list[str]]:
    """Return the sweep of a text, and the problems with the path taken out."""
    file = path / "s.yaml"
    file.write_text(text)
    problems: list[str] = []
    return read_sweep(str(file), environ, problems), [
        problem.replace(f"{file}", "s.yaml") for problem in problems
    ]


FULL = """
about: what it is worth
config: base.yaml
settings: {bank: "${WORLD}/bank", data_path: [a.jsonl, b.jsonl]}
seeds: [0, 7]
cpu_hours: 0.5
test_path: test.jsonl
controls: [shuffled]
max_records: 12
baseline: on
runs:
  off: {enable_lape: false, about: plain numbers}
  on:
  long: {max_steps: 800, seeds: [7], cpu_hours: 2, stage: on, against: off}
"""


def test_a_sweep_says_its_runs_seed_by_seed(tmp_path: Path) -> None:
    sweep, problems = read(tmp_path, FULL, WORLD="w")
    assert not problems
    order = [(own.name, seed) for own, seed in sweep.in_order()]
    assert order == [("off", "0"), ("on", "0"), ("off", "7"), ("on", "7"), ("long", "7")]
    assert [s[:2] for s in sweep.settings] == [
        ("bank", "w/bank"),
        ("data_path", ["a.jsonl", "b.jsonl"]),
    ]
    off, on, long = sweep.variants
    assert [s[:2] for s in off.settings] == [("enable_lape", "false")]
    assert off.settings[0][2].endswith("s.yaml:12")
    assert (off.about, off.cpu_hours, on.settings) == ("plain numbers", 0.5, ())
    assert (long.stage, long.against, long.cpu_hours) == ("on", "off", 2.0)
    assert (sweep.baseline, sweep.test_path, sweep.controls) == (
        "on",
        ("test.jsonl",),
        ("shuffled",),
    )
    assert (sweep.name, sweep.about, sweep.max_records) == ("s", "what it is worth", 12)


def test_a_grid_crosses_its_lists_and_the_runs(tmp_path: Path) -> None:
    sweep, problems = read(
        tmp_path,
        "seeds: [1]\nruns: {a: {}, b: {bf16: true}}\n"
        "grid: {lape_sigma: [1, 2], augment: [[jitter, drop=0.3]]}",
    )
    assert not problems
    assert [own.name for own in sweep.variants] == [
        f"{run},lape_sigma={sigma},augment=jitter+drop=0.3" for run in "ab" for sigma in "12"
    ]
    assert [s[:2] for s in sweep.variants[3].settings] == [
        ("bf16", "true"),
        ("lape_sigma", "2"),
        ("augment", ["jitter", "drop=0.3"]),
    ]
    alone, problems = read(tmp_path, "seeds: [1, 2]\ngrid: {lape_sigma: [1e-1]}")
    assert not problems
    assert [(own.name, seed) for own, seed in alone.in_order()] == [
        ("lape_sigma=1e-1", "1"),
        ("lape_sigma=1e-1", "2"),
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("runs: {a: {}}\nrun: {b: {}}", "s.yaml:2 run: expected one of about, config, settings"),
        ("runs:\n  a: {}\n  a: {}", "s.yaml:3 a: there already"),
        ("runs:\n  a:\n    bf16: true\n    bf16: false", "s.yaml:4 bf16: there already"),
        ("runs: [a, b]", "s.yaml:1 runs: expected `name: {setting: value}` lines"),
        ("runs:\n  a: 3", "s.yaml:2 a: expected settings"),
        ("runs: {a: {bf16: {x: 1}}}", "s.yaml:1 expected a value, got a list or a mapping"),
        ("about: x", "s.yaml: no runs; name them under `runs` or `grid`"),
        ("grid: {lape_sigma: 1}", "s.yaml:1 lape_sigma: expected a list of values to try"),
        ("grid: {seed: [1, 2]}", "s.yaml:1 seed: list it under seeds"),
        ("runs: {a: {seed: 1}}", "s.yaml:1 seed: list it under seeds"),
        ("runs: {a: {output_dir: x}}", "s.yaml:1 output_dir: runs write below that of all"),
        (
            "runs: {a: {}, b: {agianst: a}}",
            "s.yaml:1 agianst: unknown setting; did you mean against,",
        ),
        (
            "runs: {a: {Stge: a}}",
            "s.yaml:1 Stge: unknown setting; did you mean stage, a key of a run",
        ),
        ("runs: {a: {controls: x}}", "s.yaml:1 controls: no setting, a key at the top of the file"),
        (
            "grid: {sedes: [1]}",
            "s.yaml:1 sedes: unknown setting; did you mean seeds, a key of a run",
        ),
        ("grid: {stage: [x]}", "s.yaml:1 stage: no setting, a key of a run, under `runs`"),
        (
            "settings: {basline: a}",
            "s.yaml:1 basline: unknown setting; did you mean baseline, a key",
        ),
        ("runs: {a/b: {}}", "s.yaml:1 'a/b': a run's name is a folder's"),
        ("runs: {a: {}}\nbaseline: b", "s.yaml:2 baseline: no run is called b"),
        ("runs: {a: {against: b}}", "s.yaml:1 against: no run is called b"),
        ("runs:\n  a: {stage: b}\n  b: {}", "s.yaml:2 stage: b is no run above a"),
        ("runs: {a: {}}\ncontrols: [shuffle]", "s.yaml:2 controls: shuffle; expected shuffled"),
        ("runs: {a: {}}\ncpu_hours: x", "s.yaml:2 cpu_hours: expected a number, got 'x'"),
        ("runs: {a: {}}\nmax_records: -1", "s.yaml:2 max_records: expected a whole number"),
        ("runs: {a: {bank: '${NO}/b'}}", "s.yaml:1 ${NO}: no such variable in the environment"),
        ("runs: {a: {}", "s.yaml:1 not valid YAML"),
        ("- a", "s.yaml:1 expected `runs:` and other keys"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    _, problems = read(tmp_path, text)
    assert any(problem.startswith(line) for problem in problems), problems


def test_a_slip_in_a_setting_is_left_to_the_settings(tmp_path: Path) -> None:
    settings = [item.name for item in fields(TrainConfig)]
    slips = [name[:-1] for name in settings if len(name) > 6]
    for name in [*settings, *slips, "lr", "vs", "epochs"]:
        if name not in NOT_OF_A_RUN:
            sweep, problems = read(tmp_path, f"runs: {{a: {{{name}: x}}}}")
            assert (problems, [s[0] for s in sweep.variants[0].settings]) == ([], [name])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    problems: list[str] = []
    read_sweep(str(tmp_path / "no.yaml"), {}, problems)
    assert problems == [f"--sweep {tmp_path / 'no.yaml'}: No such file or directory"]
