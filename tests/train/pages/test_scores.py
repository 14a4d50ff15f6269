"""Whether a run has learned, and what a fixed answer reaches without a look."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.pages.written import predictions, write_a_run, write_scores
from train.pages.answers import questions_of
from train.pages.guesses import asked_of, fixed_answers, fixed_guess
from train.pages.read.runs import read_runs
from train.pages.scores import (
    KINDS,
    LEARNED,
    NOT,
    PERHAPS,
    Reached,
    reached,
    same_tests,
    scores_of,
)
from train.pages.table import table
from train.scores.predictions import Prediction, read_predictions
from train.scores.scoring import score


def rows_of(references: list[str], kind: str) -> list[dict[str, Any]]:
    return [
        {"reference": text, "question": "?", "task": "", "duration": 10.0, "kind": kind, "media": ["c"]}
        for text in references
    ]  # fmt: skip


words = st.lists(st.sampled_from(["a cat", "a dog", "a road"]), min_size=1, max_size=12)
numbers = st.lists(st.integers(0, 5).map(str), min_size=1, max_size=12)


@given(words, numbers)
def test_no_fixed_word_or_number_scores_more_than_the_guess(
    texts: list[str], counts: list[str]
) -> None:
    for kind, references in (("text", texts), ("number", counts)):
        rows = rows_of(references, kind)
        best = max(np.mean([one == other for other in references]) for one in references)
        assert fixed_guess(kind, "exact", rows) == pytest.approx(best)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=9))
def test_no_fixed_point_errs_less_than_the_guess(places: list[tuple[int, int]]) -> None:
    rows = rows_of([f"<x:{x / 20}><y:{y / 20}>" for x, y in places], "point")
    grid = product(range(21), repeat=2)
    means = [
        np.mean([(abs(x - a) + abs(y - b)) / 40 for x, y in places]) for a, b in grid
    ]  # fmt: skip
    found = fixed_guess("point", "error", rows)
    assert found is not None
    assert found <= min(means) + 1e-9


def test_the_guess_of_a_time_is_the_same_share_of_each_clip() -> None:
    rows = rows_of(["<t:2>", "<t:5>", "<t:9>"], "time")
    rows[0]["duration"] = 4.0
    about = [asked_of(row) for row in rows]
    assert fixed_answers("time", about) == ["<t:2.0>", "<t:5.0>", "<t:5.0>"]
    assert fixed_guess("time", "error", rows) == pytest.approx((0 + 0 + 4) / 3)
    assert (
        fixed_guess("windows", "map", rows_of(["<t:1> to <t:2> and <t:3> to <t:4>"], "windows"))
        is None
    )
    assert fixed_guess("span", "iou", []) is None


def test_a_run_that_answers_well_has_learned_and_one_that_does_not_has_not(tmp_path: Path) -> None:
    clips = [f"{k}.mp4" for k in range(12)]
    folders = [write_a_run(tmp_path / n, clips, good=n == "good") for n in ("good", "bad")]
    good, bad = (
        {one.name: one for one in reached(run, run.tests[0])} for run in read_runs(folders)
    )
    assert good.keys() == {"span", "point", "box", "number", "text"}
    assert {one.verdict for one in good.values()} == {LEARNED}
    assert {one.verdict for one in bad.values()} == {NOT}
    one = good["span"]
    assert one.interval
    assert one.interval[0] <= one.value <= one.interval[1]
    assert one.guess == one.test.report["constant_span_miou"]
    assert one.control("shuffled") == bad_span(folders[0])
    assert one.control("untrained") is None


def bad_span(folder: Path) -> float:
    report = json.loads((folder / "eval-test-shuffled.json").read_text())
    return float(report["tasks"]["span"]["iou"])


@pytest.mark.parametrize(
    ("name", "value", "interval", "beats", "verdict"),
    [
        ("span", 0.8, (0.7, 0.9), {"a": 0.5, "b": 0.6}, LEARNED),
        ("span", 0.8, (0.55, 0.9), {"a": 0.5, "b": 0.6}, PERHAPS),
        ("span", 0.6, (0.5, 0.7), {"a": 0.5, "b": 0.6}, NOT),
        ("span", 0.8, None, {"a": 0.5}, LEARNED),
        ("span", 0.8, (0.7, 0.9), {}, ""),
        ("point", 0.1, (0.05, 0.15), {"a": 0.2, "b": 0.9}, LEARNED),
        ("point", 0.1, (0.05, 0.25), {"a": 0.2, "b": 0.9}, PERHAPS),
        ("point", 0.2, (0.15, 0.25), {"a": 0.2}, NOT),
    ],
)
def test_the_verdict(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    value: float,
    interval: tuple[float, float] | None,
    beats: dict[str, float],
    verdict: str,
) -> None:
    for what, given_ in (("value", value), ("interval", interval), ("beats", beats)):
        monkeypatch.setattr(Reached, what, given_)
    (run,) = read_runs([write_a_run(tmp_path / "run")])
    assert Reached(run, run.tests[0], name).verdict == verdict


def change_nothing(said: list[Prediction]) -> list[Prediction]:
    return said


def first_half(said: list[Prediction]) -> list[Prediction]:
    return said[: len(said) // 2]


def other_references(said: list[Prediction]) -> list[Prediction]:
    return [
        replace(p, reference=p.reference.replace("<t:", "<t:0").replace("<x:0", "<x:00"))
        for p in said
    ]


def other_clips(said: list[Prediction]) -> list[Prediction]:
    return [replace(p, media=(f"other-{p.media[0]}",)) for p in said]


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (change_nothing, True),
        (first_half, False),
        (other_references, False),
        (other_clips, False),
    ],
)
def test_scores_of_other_questions_are_not_compared_without_a_word(
    tmp_path: Path, change: Callable[[list[Prediction]], list[Prediction]], is_same: bool
) -> None:
    """A record file of one path may have changed between two scorings, or one had fewer records."""
    clips = [f"{k}.mp4" for k in range(12)]
    folders = [write_a_run(tmp_path / n, clips) for n in ("a", "b")]
    # a control, and another run, that were scored at another time
    write_scores(folders[0], "test-shuffled", change(predictions(clips, good=False)), shuffled=True)
    write_scores(folders[1], "test", change(predictions(clips, good=True)))
    runs = read_runs(folders)
    (span,) = (one for one in reached(runs[0], runs[0].tests[0]) if one.name == "span")
    assert ("other clips' features" in span.beats) == is_same
    assert ("other questions" in span.shown_control("shuffled")) != is_same
    shown = scores_of(runs, same_tests(runs)["/data/test.jsonl"])
    assert ("other questions than a" in shown) != is_same
    assert ("<li>span: <b>b</b> is " in shown) == is_same
    notes = [line for line in table(runs).splitlines() if line.startswith("note: ")]
    # b's own control was scored at b's time before
    assert len(notes) == (0 if is_same else 3), notes
    assert len(questions_of(same_tests(runs)["/data/test.jsonl"], "span")) <= 12


def test_reports_from_before_questions_were_recorded_are_compared_as_then(tmp_path: Path) -> None:
    folder = write_a_run(tmp_path / "run", [f"{k}.mp4" for k in range(12)])
    report = json.loads((folder / "eval-test.json").read_text())
    del report["questions"]
    (folder / "eval-test.json").write_text(json.dumps(report))
    (run,) = read_runs([folder])
    assert all("other clips' features" in one.beats for one in reached(run, run.tests[0]))
    assert "note: " not in table([run])


def test_every_kind_that_is_scored_has_a_word_for_its_score() -> None:
    said = predictions(["a.mp4"], good=True)
    for one in said:
        scores = score(one.asked, one.answer)
        assert KINDS[scores["kind"]].metric in scores


def test_questions_of_one_id_are_each_shown_whatever_is_in_their_lines(tmp_path: Path) -> None:
    """Ids repeat in published files; U+2028 and U+0085 end a line for Python, and not for JSON."""
    said = [
        replace(one, record="AO8RW.mp4_0.0_6.9", answer=f"{one.answer}\u2028\x85")
        for one in predictions([f"{k}.mp4" for k in range(5)], good=True)
    ]
    folder = write_a_run(tmp_path / "run")
    write_scores(folder, "test", said)
    (run,) = read_runs([folder])
    (test,) = run.tests
    assert len(questions_of([(run, test)], "span")) == 5
    assert test.answers is not None
    assert len(test.answers.clips) == 5
    assert read_predictions(folder / "predictions-test.jsonl") == said
