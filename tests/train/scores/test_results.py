"""Where scores go: a name for each test set, nothing of other records lost, foreign files left alone."""

import json
from pathlib import Path

import pytest

from shards.errors import UserError
from train.scores.results import (
    absolute,
    distinct_names,
    predictions_beside,
    report_beside,
    results_of,
)

NAMES = [
    (["test.jsonl"], ["test"]),
    (["a/test.jsonl", "b/val.json"], ["test", "val"]),
    (["a/test.jsonl", "b/test.jsonl"], ["a-test", "b-test"]),
    (["x/a/test.jsonl", "y/a/test.jsonl", "b/test.jsonl"], ["x-a-test", "y-a-test", "b-test"]),
    (["a/test.jsonl", "a/test.json"], None),
    (["data/*.parquet"], ["data"]),
    (["hf://datasets/org/name-v1.0"], ["name-v1.0"]),
    (["a/Test.jsonl", "b/test.jsonl"], ["a-Test", "b-test"]),
    (["my set (1).jsonl"], ["my-set-1"]),
]


@pytest.mark.parametrize(("paths", "names"), NAMES, ids=str)
def test_each_test_set_has_a_name_of_its_own(paths: list[str], names: list[str] | None) -> None:
    found = distinct_names(paths)
    assert len({name.casefold() for name in found}) == len(paths)
    assert all(name and "/" not in name and not name.startswith(".") for name in found)
    if names is not None:
        assert found == names


def test_a_test_set_that_is_there_twice_and_two_for_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl: is there twice; leave one out"):
        distinct_names(["a.jsonl", "./a.jsonl"])
    with pytest.raises(UserError, match="--output names one file, and there are 2 test sets"):
        results_of(tmp_path, ["a.jsonl", "b.jsonl"], tmp_path / "x.json", untrained=False)


def test_reports_and_answers_know_each_other() -> None:
    for report, answers in {
        "r/eval-test.json": "r/predictions-test.jsonl",
        "r/eval-test-untrained.json": "r/predictions-test-untrained.jsonl",
    }.items():
        assert predictions_beside(Path(report)) == Path(answers)
        assert report_beside(Path(answers)) == Path(report)
    assert predictions_beside(Path("some.json")) == Path("predictions-some.jsonl")


def test_results_of_other_records_are_renamed_by_their_own_path(tmp_path: Path) -> None:
    for untrained, ending in ((False, ""), (True, "-untrained")):
        (own,) = results_of(tmp_path, ["b/test.jsonl"], None, untrained=untrained)
        assert own.report.name == f"eval-test{ending}.json"
        assert own.set_aside() == []
        other = {"tasks": {}, "data_path": absolute("a/test.jsonl")}
        own.report.write_text(json.dumps(other))
        own.predictions.write_text("{}\n")
        moved = own.set_aside()
        assert [path.name for path in moved] == [
            f"eval-a-test{ending}.json",
            f"predictions-a-test{ending}.jsonl",
        ]
        assert json.loads(moved[0].read_text()) == other
        assert not own.report.exists()
        own.report.write_text(json.dumps({"tasks": {}, "data_path": own.data_path}))
        assert own.set_aside() == []


def test_what_is_no_result_is_not_written_over(tmp_path: Path) -> None:
    data = tmp_path / "predictions-test.jsonl"
    data.write_text('{"conversations": []}\n')
    with pytest.raises(UserError, match="holds something else than answers"):
        results_of(tmp_path, ["test.jsonl"], None, untrained=False)
    (tmp_path / "eval-test.json").write_text("[]")
    with pytest.raises(UserError, match="holds something else than a report"):
        results_of(tmp_path, ["test.jsonl"], None, untrained=False)
    assert data.read_text() == '{"conversations": []}\n'
    with pytest.raises(UserError, match="its folder is not there"):
        results_of(tmp_path, ["a.jsonl"], tmp_path / "gone" / "x.json", untrained=False)
