"""Scores against brute force, and the whole command on a small trained model."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.encode.run import EncodeOptions, encode
from shards.format.features import Sampling
from train.data.records import parse_record
from train.evaluate import kind_of, main, questions_of
from train.scores import box_iou, constant_span, interval_iou, numbers_of, score, summarise_scores

ROOT = Path(__file__).resolve().parents[2]
SIDE = 12
SPANS = st.tuples(st.integers(0, SIDE), st.integers(0, SIDE))
BOXES = st.tuples(SPANS.map(sorted), SPANS.map(sorted))


def cells(low: int, high: int) -> set[int]:
    """Return the unit cells between two corners of a grid."""
    return set(range(min(low, high), max(low, high)))


def overlap(a: set, b: set) -> float:  # type: ignore[type-arg]
    return len(a & b) / len(a | b) if a | b else 0.0


@given(a=SPANS, b=SPANS)
def test_interval_iou_is_a_count_of_shared_cells(a: tuple[int, int], b: tuple[int, int]) -> None:
    assert interval_iou(a, b) == pytest.approx(overlap(cells(*a), cells(*b)))


@given(a=BOXES, b=BOXES)
def test_box_iou_is_a_count_of_shared_cells(a: list[list[int]], b: list[list[int]]) -> None:
    grids = [set(product(cells(*box[0]), cells(*box[1]))) for box in (a, b)]
    (ax, ay), (bx, by) = a, b
    found = box_iou([ax[0], ay[0], ax[1], ay[1]], [bx[0], by[0], bx[1], by[1]])
    assert found == pytest.approx(overlap(*grids))


def test_a_box_turned_inside_out_covers_nothing() -> None:
    assert box_iou([0, 0, 1, 1], [1, 1, 0, 0]) == 0.0


@given(a=SPANS, b=SPANS)
def test_iou_is_one_for_equals_and_the_same_both_ways(
    a: tuple[int, int], b: tuple[int, int]
) -> None:
    assert interval_iou(a, a) == (1.0 if a[0] != a[1] else 0.0)
    assert interval_iou(a, b) == interval_iou(b, a)


KINDS = [
    ("from <t:1.0> to <t:2.5>", "span"),
    ("<t:1.0>", "time"),
    ("<x:0.5><y:0.2>", "point"),
    ("<x:0.1><y:0.2><x:0.3><y:0.4>", "box"),
    ("red circle", "text"),
    ("at 1.0 and 2.0", "text"),
    ("<y:0.5><x:0.2>", "text"),
    ("<TEMP-003> to <TEMP-009>", "span"),
    ("<t:1><t:2><t:3>", "text"),
    ("", "text"),
]


@pytest.mark.parametrize(("reference", "kind"), KINDS)
def test_the_kind_is_read_off_the_references_markup(reference: str, kind: str) -> None:
    assert kind_of(reference) == kind


def test_numbers_are_those_in_markup_or_else_the_plain_ones() -> None:
    assert numbers_of("frame 7: <t:1.5> to <t:2>") == [1.5, 2.0]
    assert numbers_of("from 1.5 to -2 s") == [1.5, -2.0]
    assert numbers_of("no idea") == []


SCORES = [
    ("<t:0> <t:4>", "<t:0> <t:2>", {"iou": 0.5, "r@0.3": 1, "r@0.5": 1, "r@0.7": 0, "error": 1}),
    ("<t:0> <t:4>", "0.0 to 4.0", {"iou": 1.0, "r@0.3": 1, "r@0.5": 1, "r@0.7": 1, "error": 0}),
    ("<t:0> <t:4>", "<t:1.25>", {"parsed": 0, "iou": 0, "r@0.3": 0, "error": 8}),
    ("<t:0> <t:4>", "it is not there", {"parsed": 0, "iou": 0, "r@0.7": 0, "error": 8}),
    ("<t:0> <t:4>", "<t:3> <t:7>", {"iou": 1 / 7, "r@0.3": 0, "error": 3}),
    ("<t:2>", "<t:2.5>", {"parsed": 1, "error": 0.5}),
    ("<t:2>", "", {"parsed": 0, "error": 8}),
    ("<x:0.5><y:0.5>", "<x:0.6><y:0.2>", {"parsed": 1, "error": 0.2}),
    ("<x:0.5><y:0.5>", "", {"parsed": 0, "error": 1.0}),
    ("<x:0><y:0><x:1><y:1>", "<x:0><y:0><x:1><y:0.5>", {"iou": 0.5, "error": 0.125}),
    ("<x:0><y:0><x:1><y:1>", "<x:0><y:0><x:1>", {"iou": 0, "parsed": 0, "error": 1.0}),
    ("red  circle", "Red circle", {"exact": 1}),
    ("red circle", "red", {"exact": 0}),
]


@pytest.mark.parametrize(("reference", "said", "expected"), SCORES)
def test_an_answer_is_scored_by_what_was_asked(
    reference: str, said: str, expected: dict[str, float]
) -> None:
    found = score(reference, said, duration=8.0)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@given(st.text(max_size=20), st.sampled_from([r for r, _ in KINDS]), st.floats(0.1, 100))
@settings(deadline=None)
def test_any_answer_gets_finite_scores(said: str, reference: str, duration: float) -> None:
    found = score(reference, said, duration)
    assert all(math.isfinite(value) for name, value in found.items() if name != "kind")
    if found.get("parsed") == 0:
        assert found.get("iou", 0.0) == 0


def test_scores_are_averaged_by_kind() -> None:
    entries = [score("<t:0> <t:4>", said, 8.0) for said in ("<t:0> <t:2>", "?")]
    entries.append(score("yes", "yes", 8.0))
    found = summarise_scores(entries)
    assert set(found) == {"span", "text"}
    assert found["span"]["count"] == 2
    assert found["span"]["iou"] == pytest.approx(0.25)
    assert found["span"]["r@0.5"] == pytest.approx(0.5)
    assert found["text"] == {"count": 1, "exact": 1.0}


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=20)
def test_the_constant_guess_is_the_best_of_all_single_answers(spans: list[tuple[int, int]]) -> None:
    # clips of 10 s, so that references lie on the twentieths that are tried
    found = constant_span([(f"<t:{a / 2}> <t:{b / 2}>", 10.0) for a, b in spans])
    truth = [cells(*span) for span in spans]
    means = [
        sum(overlap(cells(start, end), own) for own in truth) / len(truth)
        for start in range(21)
        for end in range(start + 1, 21)
    ]
    assert found == pytest.approx(max(means))


def test_the_constant_guess_counts_in_shares_of_each_clip() -> None:
    assert constant_span([("<t:1> <t:2>", 4.0), ("<t:4> <t:2>", 8.0)]) == pytest.approx(1.0)


def test_every_answer_is_asked() -> None:
    turns = [("human", "<video> a?"), ("gpt", "b"), ("human", "c?"), ("gpt", "d")]
    data = {"video": "v.mp4", "conversations": [{"from": f, "value": v} for f, v in turns]}
    asked = questions_of(parse_record(data, "f:1"))
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
    report = json.loads((trained / "eval.json").read_text())
    assert "5 records, 5 answers" in printed
    assert f"written: {trained / 'eval.json'}" in printed
    for kind in ("span", "point", "box", "text"):
        assert f"\n{kind} " in printed
    assert {kind: entry["count"] for kind, entry in report["tasks"].items()} == {
        "span": 1,
        "point": 1,
        "box": 1,
        "text": 2,
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
    assert two["examples"] == report["examples"]
    assert two["losses"] == pytest.approx(report["losses"], rel=1e-5)
    for kind, entry in report["tasks"].items():
        assert two["tasks"][kind] == pytest.approx(entry)


def test_the_untrained_model_is_scored_beside_it(
    evaluate_here: Callable[..., None], trained: Path
) -> None:
    evaluate_here("--untrained", max_records=2)
    evaluate_here(max_records=2, output=trained / "some.json")
    before, after = (
        json.loads((trained / name).read_text()) for name in ("eval-untrained.json", "some.json")
    )
    assert before["records"] == 2
    assert before["losses"]["ce_loss"] > after["losses"]["ce_loss"] + 0.5


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


def test_a_bank_that_the_model_was_not_made_for_is_refused_by_field(
    evaluate_here: Callable[..., None],
    toy: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    options = EncodeOptions(
        tower=str(toy / "tower"), strides=(4, 8), sampling=Sampling(num_frames=2), pool="max"
    )
    encode([str(toy / "videos")], tmp_path / "bank", options)
    line = refused(evaluate_here, bank=tmp_path / "bank")
    assert "pool: 'max' here, 'average' there" in line


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
