"""What evaluate finds before it generates, the limits it keeps, and the answers it writes down."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.evaluate import main
from train.scores.summary import table


@pytest.fixture(scope="module")
def limited(
    train_here: Callable[..., Path], toy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run whose records were cut to 42 tokens, and that answers in coordinates."""
    out = tmp_path_factory.mktemp("limited") / "out"
    return train_here(
        out,
        data_path=toy / "test.jsonl",
        max_tokens=42,
        max_steps=40,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
    )


@pytest.fixture(scope="module")
def sets(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two test sets of one name in two folders: six records, and two."""
    rows = (toy / "test.jsonl").read_text().splitlines()
    paths = []
    for name, own in {"a": rows[:6], "b": rows[6:8]}.items():
        path = tmp_path_factory.mktemp(name) / name / "test.jsonl"
        path.parent.mkdir()
        path.write_text("".join(row + "\n" for row in own))
        paths.append(path)
    return paths


@pytest.fixture
def evaluate_here(limited: Path, toy_bank: Path, sets: list[Path]) -> Callable[..., None]:
    from accelerate.state import AcceleratorState

    def run(*extra: str, **changes: Any) -> None:
        settings = {"model": limited, "bank": toy_bank, "data_path": sets[0]} | changes
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            main([*words, *extra])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def never_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer may be begun."""

    def fail(*args: Any, **settings: Any) -> None:
        raise AssertionError("an answer was generated")

    monkeypatch.setattr("model.generate.generate", fail)
    monkeypatch.setattr("train.answers.held_out_loss", fail)


@pytest.mark.usefixtures("never_generates")
def test_what_cannot_be_scored_is_refused_by_name_before_any_answer(
    evaluate_here: Callable[..., None],
    limited: Path,
    toy: Path,
    sets: list[Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    for name, value, least in (
        ("batch_size", 0, 1),
        ("batch_size", -3, 1),
        ("max_records", -1, 0),
        ("max_new_tokens", 0, 1),
        ("max_tokens", -1, 0),
    ):
        line = refused(evaluate_here, **{name: value})
        assert line == f"error: --{name}: must be at least {least}, got {value}"
    line = refused(evaluate_here, model=toy / "llm")
    assert f"{toy / 'llm' / 'config.json'}: not a framebank model of format" in line
    export = tmp_path / "export"  # as `train.export` writes it: the model, and nothing of its run
    shutil.copytree(
        limited, export, ignore=shutil.ignore_patterns("checkpoint-*", "run.json", "eval*", "pred*")
    )
    line = refused(evaluate_here, model=export)
    assert f"{export}: no run.json here, which says how long records were in training" in line
    assert "--max_tokens N, 0 for no limit" in line
    line = refused(evaluate_here, "--untrained", "--max_tokens", "0", model=export)
    assert f"{export}: no run.json here, which says how the model was before its first step" in line
    lost = tmp_path / "gone" / "eval.json"
    assert "its folder is not there" in refused(evaluate_here, output=lost)
    assert "a folder; name a file" in refused(evaluate_here, output=tmp_path)
    line = refused(evaluate_here, "--data_path", *map(str, sets), output=tmp_path / "x.json")
    assert "--output names one file, and there are 2 test sets" in line
    line = refused(evaluate_here, max_new_tokens=100_000)
    assert "a prompt with 100000 new tokens has" in line
    assert not list(limited.glob("eval*"))


def test_each_test_set_has_its_scores_and_its_answers_under_the_limits_of_training(
    evaluate_here: Callable[..., None],
    limited: Path,
    toy_bank: Path,
    sets: list[Path],
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    evaluate_here("--data_path", *map(str, sets), batch_size=4)
    printed = capsys.readouterr().out
    for name, path in zip(("a-test", "b-test"), sets, strict=True):
        report = json.loads((limited / f"eval-{name}.json").read_text())
        answers = rows_of(limited / f"predictions-{name}.jsonl")
        records = rows_of(path)
        assert (report["test_set"], report["data_path"]) == (name, str(path))
        assert report["records"] == len(records)
        assert report["answers"] == len(answers)
        assert f"written: {limited / f'eval-{name}.json'}, predictions-{name}.jsonl" in printed
        limits = report["limits"]
        assert (limits["max_tokens"], limits["max_frames_num"]) == (42, 6)
        assert limits["frames"] + limits["frames_left_out"] == 6 * len(records)
        assert limits["frames_left_out"] > 0
        assert (
            "frames as in training: 6 of a clip at most, interleave 0.5; of records of 42 tokens at "
            f"most, which leaves out {limits['frames_left_out']} of {6 * len(records)} frames"
            in printed
        )
        questions = [
            (row["id"], [row["video"]], turn["value"].removeprefix("<video>\n"))
            for row in records
            for turn in row["conversations"][::2]
        ]
        assert [
            (a["record"], a["media"], a["question"].removeprefix("<video>\n")) for a in answers
        ] == questions
        references = [turn["value"] for row in records for turn in row["conversations"][1::2]]
        assert [a["reference"] for a in answers] == references
        for kind, entry in report["tasks"].items():
            own = [a["scores"] for a in answers if a["kind"] == kind]
            assert entry["count"] == len(own)
            for score in set(entry) - {"count"}:
                mean = sum(scores[score] for scores in own) / len(own)
                assert entry[score] == pytest.approx(mean)


def test_answers_are_scored_again_without_a_model(
    evaluate_here: Callable[..., None],
    limited: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    evaluate_here(output=tmp_path / "eval-x.json")
    before = json.loads((tmp_path / "eval-x.json").read_text())
    path = tmp_path / "predictions-x.jsonl"
    lines = path.read_text()
    monkeypatch.setattr("model.vlm.VLM.load", None)
    main(["--rescore", str(path)])
    assert json.loads((tmp_path / "eval-x.json").read_text()) == before
    assert path.read_text() == lines
    rows = rows_of(path)
    spans = [row for row in rows if row["kind"] == "span"]
    for row in spans:
        row["answer"] = row["reference"]
    other = tmp_path / "perfect.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--rescore", str(other), "--output", str(tmp_path / "perfect.json")])
    after = json.loads((tmp_path / "perfect.json").read_text())
    assert after["tasks"]["span"]["iou"] == 1
    assert "losses" not in after
    scored = [r for r in rows_of(tmp_path / "predictions-perfect.jsonl") if r["kind"] == "span"]
    assert [row["scores"]["iou"] for row in scored] == [1.0] * len(spans) != []
    assert [f"from <t:{a:.3f}> to <t:{b:.3f}>" for a, b in (row["value"] for row in scored)] == [
        row["reference"] for row in scored
    ]
    (tmp_path / "bad.jsonl").write_text(lines.splitlines()[0] + '\n{"answer": "x"}\n')
    line = refused(main, ["--rescore", str(tmp_path / "bad.jsonl")])
    assert f"{tmp_path / 'bad.jsonl'}:2: not an answer that evaluate wrote" in line
    line = refused(main, ["--rescore", str(tmp_path / "none.jsonl")])
    assert f"{tmp_path / 'none.jsonl'}: no such file" in line


def test_answers_that_are_cut_are_counted_and_said(
    evaluate_here: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_here(output=tmp_path / "eval-x.json", max_new_tokens=1)
    report = json.loads((tmp_path / "eval-x.json").read_text())
    rows = rows_of(tmp_path / "predictions-x.jsonl")
    assert sum(report["cut"].values()) == sum(row["cut"] for row in rows) > 0
    assert set(report["limits"]["max_new_tokens"].values()) == {1}
    kind, count = next(iter(report["cut"].items()))
    of = report["tasks"][kind]["count"]
    said = (
        f"{count} of {of} {kind} answers had not ended when they were cut; raise --max_new_tokens"
    )
    assert said in capsys.readouterr().out
    # which helps a model that has learned to end its answers
    assert "--max_new_tokens" in table(report)
    assert "--max_new_tokens" not in table(report | {"untrained": True})


@pytest.mark.parametrize("lape", [True, False])
def test_an_answer_of_any_kind_has_room_for_its_reference(
    make_model: Callable[..., Any], toy_bank: Path, tmp_path: Path, lape: bool
) -> None:
    """A tube of six boxes takes more than 96 tokens, written in numbers much more."""
    from train.answers import loader_of, new_tokens, questions_of, reference_tokens
    from train.data.dataset import open_records

    boxes = " ".join(
        f"<t:{0.2 + k / 10:.1f}><x:0.1{k}1><y:0.2{k}2><x:0.6{k}3><y:0.7{k}4>" for k in range(6)
    )
    rows = [
        {"video": "train/clip-00000.mp4", "question": q, "answer": a}
        for q, a in (("Where?", f"from <t:0.2> to <t:0.7>: {boxes}"), ("Which?", "B"))
    ]
    path = tmp_path / "tubes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = open_records([str(toy_bank)], [str(path)], 4, 8)
    model = make_model(enable_lape=lape, slow_stride=4, fast_stride=8)
    loader = loader_of(model, dataset, 0)
    most = new_tokens(loader, questions_of(dataset.held_out), None)
    record = dataset.held_out[0]
    needed = reference_tokens(loader.chat, record.turns[1].text, 1.0)
    supervised = len(loader.batch([record]).labels)
    assert needed == supervised
    assert most["tube"] == max(96, 2 * needed)
    assert most["choice"] == 96
    assert lape or most["tube"] > 300
    assert set(new_tokens(loader, questions_of(dataset.held_out), 7).values()) == {7}


def test_long_questions_of_an_llm_that_does_not_keep_rows_apart_are_answered_one_by_one(
    make_model: Callable[..., Any], toy: Path, toy_bank: Path
) -> None:
    from train.answers import loader_of, questions_of, rows_at_once
    from train.data.dataset import open_records

    dataset = open_records([str(toy_bank)], [str(toy / "test.jsonl")], 4, 8)
    model = make_model(slow_stride=4, fast_stride=8)
    loader, questions = loader_of(model, dataset, 0), questions_of(dataset.held_out)
    longest = max(loader.prompt_length(*question) for question in questions)
    # an answer counts too: the keys of its tokens stand behind the others' padding
    most = {"span": 5, "text": 9}
    assert rows_at_once(model, loader, questions, most, 16) == 16
    for limit, rows in ((longest + 9, 16), (longest + 8, 1)):
        model.llm.config.rope_parameters = {
            "rope_type": "longrope",
            "original_max_position_embeddings": limit,
        }
        assert rows_at_once(model, loader, questions, most, 16) == rows
