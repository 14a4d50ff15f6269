"""Where a worker begins, as its flags or its scheduler say.

pytest tests/preprocess/test_share.py
"""

import pytest

from preprocess.cli.share import start_of
from shards.errors import UserError

ARRAY = {
    "SLURM_ARRAY_TASK_ID": "14",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "10",
    "SLURM_ARRAY_TASK_STEP": "2",
}
TOLD = [
    ({}, 0.0),
    (ARRAY, 0.5),
    ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, 0.75),
    (ARRAY | {"RANK": "0", "WORLD_SIZE": "2"}, 0.5),
    ({"RANK": "1", "WORLD_SIZE": "2"}, 0.5),
    ({"SKYPILOT_NODE_RANK": "3", "SKYPILOT_NUM_NODES": "4"}, 0.75),
    ({"LSB_JOBINDEX": "1", "LSB_JOBINDEX_END": "8"}, 0.0),
    ({"LSB_JOBINDEX": "8", "LSB_JOBINDEX_END": "8"}, 0.875),
    ({"LSB_JOBINDEX": "0", "LSB_JOBINDEX_END": "0"}, 0.0),  # a job that is no array
    ({"JOB_COMPLETION_INDEX": "0"}, 0.0),
    ({"RANK": ""}, 0.0),
    ({"RANK": "0", "WORLD_SIZE": ""}, 0.0),
    (
        ARRAY
        | {"SLURM_ARRAY_TASK_MIN": "", "SLURM_ARRAY_TASK_STEP": "", "SLURM_ARRAY_TASK_ID": "3"},
        0.75,
    ),
]


@pytest.mark.parametrize(("environ", "start"), TOLD)
def test_a_scheduler_says_where_to_begin(environ: dict[str, str], start: float) -> None:
    assert start_of("auto", environ) == start


def test_processes_that_do_not_know_how_many_they_are_begin_apart() -> None:
    starts = sorted(start_of("auto", {"JOB_COMPLETION_INDEX": str(k)}) for k in range(64))
    gaps = [b - a for a, b in zip(starts, [*starts[1:], 1 + starts[0]], strict=True)]
    assert max(gaps) < 2.7 / 64


def test_an_array_with_holes_begins_somewhere() -> None:
    environ = {"SLURM_ARRAY_TASK_ID": "90", "SLURM_ARRAY_TASK_COUNT": "2"}
    assert 0 <= start_of("auto", environ | {"SLURM_ARRAY_TASK_MIN": "5"}) < 1


@pytest.mark.parametrize(("share", "start"), [("0/1", 0.0), ("0/4", 0.0), ("3/4", 0.75)])
def test_a_share_is_a_part_of_the_units(share: str, start: float) -> None:
    assert start_of(share, ARRAY) == start


@pytest.mark.parametrize("share", ["4/4", "1", "1/0", "-1/4", "1/4/2", "", "Auto", "1/ 4", "a/b"])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    with pytest.raises(UserError, match=r"--share, expected auto, or K/N with K from 0 to N - 1"):
        start_of(share, {})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_named(name: str) -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2"} | {name: "two"}
    with pytest.raises(UserError, match=f"the variable {name}, expected a whole number, got 'two'"):
        start_of("auto", environ)
