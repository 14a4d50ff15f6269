"""The whole command on a small trained model; what answers score is in tests/train/scores."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocess.encode.run import EncodeOptions, encode
from shards.format.features import Sampling
from train.data.markup import Coordinate, split_markup
from train.data.records import parse_record
from train.evaluate import main, questions_of

ROOT = Path(__file__).resolve().parents[2]


def test_every_answer_is_asked() -> None:
    turns = [("human", "<video> a?"), ("gpt", "b"), ("human", "c?"), ("gpt", "d")]
    data = {"video": "v.mp4", "conversations": [{"from": f, "value": v} for f, v in turns]}
    asked = questions_of([parse_record(data, "f:1")])
    assert [record.turns[turn].text for record, turn in asked] == ["b", "d"]


@pytest.fixture(scope="module")
def trained(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, to write scores into."""
    out = tmp_path_factory.mktemp("scored") / "out"
    return Path(shutil.copytree(trained_run, out, ignore=shutil.ignore_patterns("checkpoint-*")))


@pytest.fixture(scope="module")
def questions(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five records: one of each of five tasks, over two clips."""
    lines = [json.loads(line) for line in (toy / "test.jsonl").read_text().splitlines()]
    chosen = {line["task"]: line for line in lines}
    path = tmp_path_factory.mktemp("questions") / "test.jsonl"
    rows = [chosen[task] for task in ("span", "point", "box", "seen", "count")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def evaluate_here(trained: Path, toy_bank: Path, questions: Path) -> Callable[..., None]:
    """A function that runs the command in this process, on other arguments than these if given."""
    from accelerate.state import AcceleratorState

    def run(*extra: str, **changes: object) -> None:
        settings = {"model": trained, "bank": toy_bank, "data_path": questions} | changes
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            main(
                [*(word for name, v in settings.items() for word in (f"--{name}", str(v))), *extra]
            )
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


def apart(pieces: list[str | Coordinate]) -> tuple[list[str | int], list[float]]:
    """Return the words and axes of an answer, and its values."""
    words = [piece if isinstance(piece, str) else piece.axis for piece in pieces]
    return words, [piece.value for piece in pieces if not isinstance(piece, str)]


@pytest.mark.slow
def test_the_command_scores_a_model_alone_and_in_two_processes(
    evaluate_here: Callable[..., None],
    trained: Path,
    toy_bank: Path,
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate_here(batch_size=2)
    printed = capsys.readouterr().out
    report = json.loads((trained / "eval-test.json").read_text())
    assert "5 records, 5 answers" in printed
    assert f"written: {trained / 'eval-test.json'}" in printed
    for kind in ("span", "point", "box", "number", "text"):
        assert f"\n{kind} " in printed
    assert {kind: entry["count"] for kind, entry in report["tasks"].items()} == {
        "span": 1,
        "point": 1,
        "box": 1,
        "number": 1,
        "text": 1,
    }
    names = [json.loads(line)["id"] for line in questions.read_text().splitlines()]
    assert [example["record"] for example in report["examples"]] == names
    assert math.isfinite(report["losses"]["ar_skill"])
    assert 0 < report["constant_span_miou"] <= 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("accelerate")),
            *("launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"),
            *("--main_process_port", str(port), "train/evaluate.py", "--model", str(trained)),
            *("--bank", str(toy_bank), "--data_path", str(questions), "--batch_size", "2"),
            *("--output", str(tmp_path / "two.json")),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 records, 5 answers") == 1
    two = json.loads((tmp_path / "two.json").read_text())
    for one, other in zip(report["examples"], two["examples"], strict=True):
        pieces = [split_markup(example.pop("answer")) for example in (one, other)]
        assert one == other
        words, values = zip(*map(apart, pieces), strict=True)
        assert words[0] == words[1]
        assert values[0] == pytest.approx(values[1], abs=1e-5)  # batches differ, and so roundings
    assert two["losses"] == pytest.approx(report["losses"], rel=1e-5)
    for kind, entry in report["tasks"].items():
        assert two["tasks"][kind] == pytest.approx(entry, abs=1e-4)  # of such values


def test_the_untrained_model_is_scored_beside_it(
    evaluate_here: Callable[..., None], trained: Path
) -> None:
    evaluate_here("--untrained", max_records=2)
    evaluate_here(max_records=2, output=trained / "some.json")
    before, after = (
        json.loads((trained / name).read_text())
        for name in ("eval-test-untrained.json", "some.json")
    )
    assert before["records"] == 2
    assert before["losses"]["ce_loss"] > after["losses"]["ce_loss"] + 0.5


def test_the_model_is_scored_with_the_features_of_other_clips(
    evaluate_here: Callable[..., None], trained: Path, toy: Path, refused: Callable[..., str]
) -> None:
    """Which changes its losses, and nothing that is asked."""
    test_set = {"data_path": toy / "test.jsonl", "max_records": 4}
    evaluate_here(output=trained / "own.json", **test_set)
    evaluate_here("--shuffle_features", **test_set)
    own, other = (
        json.loads((trained / name).read_text()) for name in ("own.json", "eval-test-shuffled.json")
    )
    assert (own["shuffled"], other["shuffled"], other["untrained"]) == (False, True, False)
    assert own["losses"]["ce_loss"] != other["losses"]["ce_loss"]
    assert own["losses"]["autoregressive_loss"] != other["losses"]["autoregressive_loss"]
    lines = [
        (trained / f"predictions-{name}.jsonl").read_text() for name in ("own", "test-shuffled")
    ]
    asked = [[json.loads(line) for line in text.splitlines()] for text in lines]
    for name in ("record", "media", "question", "reference", "duration"):
        assert [row[name] for row in asked[0]] == [row[name] for row in asked[1]]
    line = refused(evaluate_here, "--shuffle_features")
    assert "no other clip has the grid of test/clip-" in line  # all five records are of one
    with pytest.raises(SystemExit):
        evaluate_here("--shuffle_features", "--untrained")


def test_what_cannot_be_scored_is_refused_in_one_line(
    evaluate_here: Callable[..., None],
    toy: Path,
    questions: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    line = refused(evaluate_here, model=tmp_path)
    assert f"{tmp_path}: no trained model here" in line
    line = refused(evaluate_here, bank=tmp_path)
    assert f"{tmp_path}: no bank here" in line
    line = refused(evaluate_here, data_path=tmp_path / "none.jsonl")
    assert "none.jsonl: not readable as records" in line
    late = json.loads(questions.read_text().splitlines()[0])
    late["conversations"][1]["value"] = "from <t:1> to <t:99>"
    (tmp_path / "late.jsonl").write_text(json.dumps(late) + "\n")
    line = refused(evaluate_here, data_path=tmp_path / "late.jsonl")
    assert "late.jsonl:1" in line
    assert "time 99 is outside" in line


def test_captions_without_the_library_that_compares_them_are_refused_before_the_model_is_loaded(
    evaluate_here: Callable[..., None],
    questions: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)  # as where the extra is not installed
    row = json.loads(questions.read_text().splitlines()[0])
    row["conversations"][1]["value"] = "a red circle moves " * 5
    (tmp_path / "captions.jsonl").write_text(json.dumps(row) + "\n")
    line = refused(evaluate_here, data_path=tmp_path / "captions.jsonl")
    assert "pycocoevalcap" in line
    assert "pip install 'framebank[scores]'" in line


def test_a_bank_that_the_model_was_not_made_for_is_refused_by_field(
    evaluate_here: Callable[..., None],
    trained_run: Path,
    toy: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    options = EncodeOptions(
        tower=str(toy / "tower"), strides=(4, 8), sampling=Sampling(num_frames=2), pool="max"
    )
    encode([str(toy / "videos")], tmp_path / "bank", options)
    for control in ([], ["--untrained"]):
        line = refused(evaluate_here, *control, model=trained_run, bank=tmp_path / "bank")
        assert "pool: 'max' here, 'average' there" in line


def test_a_bank_whose_tower_computed_in_another_type_is_scored_and_told(
    evaluate_here: Callable[..., None],
    toy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sampling = Sampling(num_frames=4)
    options = EncodeOptions(
        tower=str(toy / "tower"), strides=(4, 8), sampling=sampling, tower_dtype="bfloat16"
    )
    encode([str(toy / "videos")], tmp_path / "bank", options)
    output = tmp_path / "scores.json"
    evaluate_here("--max_records", "2", "--output", str(output), bank=tmp_path / "bank")
    note = f"computed in bfloat16 for {tmp_path / 'bank'}, float32 for the model's training"
    assert note in capsys.readouterr().out
    assert json.loads(output.read_text())["records"] == 2


def test_a_report_that_cannot_be_written_is_refused_before_the_scoring(
    trained_run: Path, toy_bank: Path, toy: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    records = tmp_path / "test.jsonl"
    shutil.copy(toy / "test.jsonl", records)
    words = ["--model", str(trained_run), "--bank", str(toy_bank), "--data_path", str(records)]
    lost = tmp_path / "gone" / "eval.json"
    for output, expected in {
        records: "holds something else than a report; name another file",
        tmp_path: "a folder; name a file",
        lost: f"its folder is not there; make {lost.parent}",
    }.items():
        line = refused(main, [*words, "--output", str(output)])
        assert line == f"error: {output}: {expected}"
    assert records.read_bytes() == (toy / "test.jsonl").read_bytes()


def test_an_llm_is_no_model_to_score(
    toy: Path, toy_bank: Path, refused: Callable[..., str]
) -> None:
    words = ["--bank", str(toy_bank), "--data_path", str(toy / "test.jsonl")]
    line = refused(main, ["--model", str(toy / "llm"), *words])
    assert line.startswith(f"error: {toy / 'llm' / 'config.json'}: not a framebank model of format")


def test_what_accelerate_is_asked_for_holds_for_answers_too(
    evaluate_here: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import model.generate

    under_bf16 = []
    whole = model.generate.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        under_bf16.append(torch.is_autocast_enabled("cpu"))
        return whole(*args, **kwargs)

    monkeypatch.setattr(model.generate, "generate", watched)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    evaluate_here(output=tmp_path / "bf16.json")
    assert set(under_bf16) == {True}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SystemExit):
        evaluate_here(output=tmp_path / "fp16.json")
    assert not (tmp_path / "fp16.json").exists()
