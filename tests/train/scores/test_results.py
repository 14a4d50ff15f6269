"""Where scores go: a name for each test set, nothing of other records lost, foreign files left alone."""

import json
from pathlib import Path

import pytest

from shards.errors import UserError
from train.scores.results import (
    CONTROLS,
    absolute,
    distinct_names,
    predictions_beside,
    report_beside,
    results_of,
)

ENDINGS = {"": "", "untrained": "-untrained", "shuffled": "-shuffled"}
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
    with pytest.raises(UserError, match=r"a\.jsonl: is given twice; leave one out"):
        distinct_names(["a.jsonl", "./a.jsonl"])
    with pytest.raises(UserError, match="--output names one file, and there are 2 test sets"):
        results_of(tmp_path, ["a.jsonl", "b.jsonl"], tmp_path / "x.json")


def test_reports_and_answers_know_each_other() -> None:
    for report, answers in {
        "r/eval-test.json": "r/predictions-test.jsonl",
        "r/eval-test-untrained.json": "r/predictions-test-untrained.jsonl",
        "r/eval-test-shuffled.json": "r/predictions-test-shuffled.jsonl",
    }.items():
        assert predictions_beside(Path(report)) == Path(answers)
        assert report_beside(Path(answers)) == Path(report)
    assert predictions_beside(Path("some.json")) == Path("predictions-some.jsonl")


def test_results_of_other_records_are_renamed_by_their_own_path(tmp_path: Path) -> None:
    for control, ending in ENDINGS.items():
        (own,) = results_of(tmp_path, ["b/test.jsonl"], None, control=control)
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
        results_of(tmp_path, ["test.jsonl"], None)
    (tmp_path / "eval-test.json").write_text("[]")
    with pytest.raises(UserError, match="holds something else than a report"):
        results_of(tmp_path, ["test.jsonl"], None)
    assert data.read_text() == '{"conversations": []}\n'
    with pytest.raises(UserError, match="its folder is not there"):
        results_of(tmp_path, ["a.jsonl"], tmp_path / "gone" / "x.json")


def test_the_table_of_runs_has_a_row_for_each_test_set(tmp_path: Path) -> None:
    from train.pages.read.runs import read_runs
    from train.pages.table import table

    run = tmp_path / "run"
    run.mkdir()
    config = {"frame_sampling_strategy": "uniform", "slow_frame_ratio": "0.5", "enable_lape": True}
    (run / "run.json").write_text(json.dumps({"config": config}))
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 7, "seconds": 2.0}\n')
    assert table(read_runs([run])).splitlines()[1].split()[-9:] == ["-"] * 9
    for name, iou in {"a": 0.25, "b": 0.5}.items():
        for number, (control, ending) in enumerate(ENDINGS.items(), 1):
            (own,) = results_of(run, [f"{name}.jsonl"], None, control=control)
            assert own.report.name == f"eval-{name}{ending}.json"
            about = {"test_set": own.name, "data_path": own.data_path}
            about |= {name: name == control for name in CONTROLS}
            scores = {"tasks": {"span": {"iou": iou / number}}}
            own.report.write_text(json.dumps(about | scores))
    header, *rows = (line.split("  ") for line in table(read_runs([run])).splitlines())
    found = [[cell.strip() for cell in row if cell.strip()] for row in (header, *rows)]
    columns = ("test set", "span mIoU", "untrained", "shuffled")
    places = [found[0].index(name) for name in columns]
    assert [[row[k] for k in places] for row in found[1:]] == [
        ["a", "0.250", "0.125", "0.083"],
        ["b", "0.500", "0.250", "0.167"],
    ]


@pytest.mark.parametrize("output", ["eval-0.json", "eval-test2.json", "eval-zz.json"])
@pytest.mark.parametrize("control", ENDINGS)
def test_a_report_that_was_kept_apart_is_not_taken_for_the_test_sets(
    tmp_path: Path, output: str, control: str
) -> None:
    """`evaluate --output RUN/eval-x.json --max_records 9`: whatever its name, it is not the whole."""
    from train.pages.read.runs import test_sets

    (whole,) = results_of(tmp_path, ["a/test.jsonl"], None, control=control)
    (apart,) = results_of(tmp_path, ["a/test.jsonl"], tmp_path / output, control=control)
    about = {"test_set": whole.name, "data_path": whole.data_path}
    about |= {name: name == control for name in CONTROLS}

    def seen() -> object:
        (found,) = test_sets(tmp_path)
        return (found.controls[control] if control else found.report)["records"]

    apart.report.write_text(json.dumps(about | {"records": 9}))
    assert seen() == 9  # of no other scores it is what there is
    for name in ("test", "a-test"):  # as it is called first, and once another file of its name came
        report = whole.report.with_name(whole.report.name.replace("test", name, 1))
        report.write_text(json.dumps(about | {"records": 400}))
        assert seen() == 400
        report.unlink()
