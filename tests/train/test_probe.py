"""Spans and places read off the frames: exact where features tell, chance where they do not."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.config import read_model_config
from train.data.records import Record, Turn
from train.pages.read.runs import read_runs
from train.pages.table import table
from train.probe import main
from train.probes.places import examples_of
from train.probes.spans import longest_run, meaning_of

MEANINGS = [["a street", "a road"], ["a cat"], ["a cat on a roof", "an animal high up"]]
FRAMES = 12
"""Of each clip; one every eighth of a second."""


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probed") / "run"
    kept = shutil.ignore_patterns("checkpoint-*", "eval-*", "predictions-*")
    return Path(shutil.copytree(trained_run, out, ignore=kept))


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def world(folder: Path, make_bank: Callable[..., Path], features: Any, noise: float) -> list[str]:
    """Write a bank of clips of three scenes each, in any order; return the probe's flags."""
    rng = np.random.default_rng(1)
    looks = rng.normal(size=(len(MEANINGS), 4))
    clips, scenes, tests = {}, [], []
    for number in range(40):
        order = rng.permutation(len(MEANINGS)).tolist()
        counts = [3, 4, 5]
        shown = np.repeat(looks[order], counts, axis=0)
        shown = shown + noise * rng.normal(size=shown.shape)
        arrays = {s: np.broadcast_to(shown[:, None, None], (FRAMES, 8 // s, 8 // s, 4))
                  .astype(np.float16) for s in (4, 8)}  # fmt: skip
        clips[f"{number}.mp4"] = arrays
        # between two frames, where nobody can do better than to cut half way
        edges = [0.0, *((np.cumsum(counts) - 0.5) / 8)[:-1].tolist(), FRAMES / 8]
        for k, (start, end) in zip(order, pairwise(edges), strict=True):
            own = {"video": f"{number}.mp4"}
            if number < 20:
                scenes.append(own | {"start": start, "end": end, "phrase": MEANINGS[k]})
            else:
                question = f"When is there {MEANINGS[k][-1]}?"
                answer = f"from <t:{start:.3f}> to <t:{end:.3f}>"
                tests.append(own | {"question": question, "answer": answer})
    tests.append({"video": "30.mp4", "question": "How many scenes?", "answer": "3"})
    tests.append({"video": "30.mp4", "question": "When is rain?", "answer": "from <t:0> to <t:1>"})
    config = replace(features, strides=(4, 8))
    bank = make_bank(folder / "bank", clips, config=config)
    return flags(folder, bank, "scenes", scenes, tests)


def flags(
    folder: Path, bank: Path, learned_from: str, rows: list[Any], tests: list[Any]
) -> list[str]:
    """Write what is learned from and the tests; return the probe's flags but for the model."""
    given = [
        "--bank",
        str(bank),
        f"--{learned_from}",
        write(folder / f"{learned_from}.jsonl", rows),
    ]
    return [*given, "--data_path", write(folder / "test.jsonl", tests)]


@pytest.mark.parametrize(("noise", "low", "high"), [(0.01, 0.93, 1.0), (100.0, 0.1, 0.45)])
def test_spans_are_as_good_as_the_features(
    run: Path,
    make_bank: Callable[..., Path],
    features: Any,
    tmp_path: Path,
    noise: float,
    low: float,
    high: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([*world(tmp_path, make_bank, features, noise), "--model", str(run)])
    report = json.loads((run / "eval-test-probe.json").read_text())
    assert low <= report["tasks"]["span"]["iou"] <= high
    assert report["answers"] == 60, "one of each scene of the test clips, and no other question"
    assert report["frames_named"] == pytest.approx(1.0 if noise < 1 else 1 / 3, abs=0.12)
    assert report["probe"] is True
    assert "of the frames in these spans are named right" in capsys.readouterr().out
    assert f"{report['tasks']['span']['iou']:.3f}" in table(read_runs([run]))


def test_a_test_set_without_a_known_phrase_is_refused(
    run: Path, make_bank: Callable[..., Path], features: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = world(tmp_path, make_bank, features, 0.1)
    write(tmp_path / "test.jsonl", [{"video": "9.mp4", "question": "When?", "answer": "soon"}])
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--model", str(run)])
    assert stopped.value.code == 2
    assert "no question about a span names one phrase of the scenes" in capsys.readouterr().err


def test_the_longest_run_and_where_it_is_cut() -> None:
    times = np.arange(6) + 0.5
    far = np.ones(6)
    named = np.asarray([1, 0, 1, 1, 0, 1], bool)
    assert longest_run(named, far, times, 6.0) == (2.0, 4.0)
    assert longest_run(np.ones(6, bool), far, times, 6.0) == (0.0, 6.0)
    far[4] = 0.5
    assert longest_run(np.zeros(6, bool), far, times, 6.0) == (4.0, 5.0)


def pictures(
    folder: Path, make_bank: Callable[..., Path], features: Any, noise: float
) -> list[str]:
    """Write a bank of pictures of two things each, whose places their cells say; return flags."""
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(4, 6))  # four coordinates, six channels
    clips: dict[str, Any] = {}
    learned, tests = [], []
    for number in range(400):
        places = rng.uniform(size=(2, 2)).round(4)
        seen = places.reshape(-1) @ mixed + noise * rng.normal(size=6)
        clips[f"{number}.jpg"] = {
            s: np.broadcast_to(seen, (1, 8 // s, 8 // s, 6)).astype(np.float16) for s in (4, 8)
        }
        talk = []
        for name, (x, y) in zip(("cat", "dog"), places.tolist(), strict=True):
            talk.append({"from": "human", "value": f"Where is the {name}?"})
            talk.append({"from": "gpt", "value": f"<x:{x}><y:{y}>"})
        if number < 300:
            learned.append({"video": f"{number}.jpg", "conversations": talk})
        else:
            turns = talk[:2] if number % 2 else talk[2:]
            tests.append({"video": f"{number}.jpg", "conversations": turns})
    tests.append({"video": "300.jpg", "question": "How many?", "answer": "2"})
    config = replace(features, strides=(4, 8))
    bank = make_bank(folder / "bank", clips, config=config)
    return flags(folder, bank, "places", learned, tests)


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 0.0, 0.06), (100.0, 0.2, 0.4)])
def test_places_are_as_good_as_the_features(
    run: Path,
    make_bank: Callable[..., Path],
    features: Any,
    tmp_path: Path,
    noise: float,
    low: float,
    high: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.probes.places.STEPS", 600)
    # the middle of the frame is 0.25 away in the mean
    main([*pictures(tmp_path, make_bank, features, noise), "--model", str(run)])
    report = json.loads((run / "eval-test-probe.json").read_text())
    assert report["answers"] == 100, "one of each test picture, and no other question"
    assert low <= report["tasks"]["point"]["error"] <= high
    assert report["probe"] is True
    assert "frames_named" not in report


def test_places_of_clips_are_not_read_off(
    run: Path, make_bank: Callable[..., Path], features: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bank, _, *rest = world(tmp_path, make_bank, features, 0.1)[1:]
    given = ["--bank", bank, "--places", rest[0], *rest[1:], "--model", str(run)]
    write(Path(rest[0]), [{"video": "9.mp4", "question": "Where?", "answer": "<x:0.5><y:0.5>"}])
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    assert "frames of one grid are what places are learned from" in capsys.readouterr().err


def of_independent_turns(run: Path, out: Path) -> Path:
    """A copy of a run whose model was trained on turns that do not see each other."""
    shutil.copytree(run, out)
    config = json.loads((out / "config.json").read_text())
    config["model"]["turns"] = "independent"
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.slow
def test_questions_that_do_not_see_each_other_are_answered_one_by_one(
    run: Path, make_bank: Callable[..., Path], features: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("train.probes.places.STEPS", 300)
    given = pictures(tmp_path, make_bank, features, 0.0)
    learned = (tmp_path / "places.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in learned[:50]]
    talks = [row["conversations"] for row in rows]
    # the same three questions of a picture, together and alone
    third = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "2"}]
    together = [
        row | {"conversations": talk + third} for row, talk in zip(rows, talks, strict=True)
    ]
    alone = [
        row | {"conversations": talk[k : k + 2]}
        for row, talk in zip(rows, talks, strict=True)
        for k in (0, 2)
    ]
    model = of_independent_turns(run, tmp_path / "independent")
    said = {}
    for name, own, trained in (("together", together, model), ("alone", alone, run)):
        flags = [*given[:-1], write(tmp_path / f"{name}.jsonl", own)]
        main([*flags, "--model", str(trained)])
        lines = (trained / f"predictions-{name}-probe.jsonl").read_text().splitlines()
        said[name] = [json.loads(line) for line in lines]
    assert len(said["together"]) == len(said["alone"]) == 100
    assert [row["turn"] for row in said["together"]] == [1, 3] * 50
    assert [row["scores"] for row in said["together"]] == [row["scores"] for row in said["alone"]]
    # in a dialogue a later question may be about what was said before
    with pytest.raises(SystemExit):
        main([*given[:-1], str(tmp_path / "together.jsonl"), "--model", str(run)])


@pytest.mark.slow
def test_places_by_the_names_of_anchors_are_places(
    run: Path, make_bank: Callable[..., Path], features: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("train.probes.places.STEPS", 300)
    given = pictures(tmp_path, make_bank, features, 0.0)
    last = read_model_config(run)["model"].num_spatial_tokens - 1

    def named(text: str) -> str:
        return re.sub(
            "<([xy]):([0-9.e-]+)>",
            lambda m: f"<{'WIDTH' if m[1] == 'x' else 'HEIGHT'}-{round(float(m[2]) * last):03d}>",
            text,
        )

    errors = []
    for write_names in (False, True):
        for name in ("places", "test"):
            path = tmp_path / f"{name}.jsonl"
            path.write_text(named(path.read_text()) if write_names else path.read_text())
        main([*given, "--model", str(run)])
        report = json.loads((run / "eval-test-probe.json").read_text())
        errors.append(report["tasks"]["point"]["error"])
    rows = [json.loads(x) for x in (run / "predictions-test-probe.jsonl").read_text().splitlines()]
    assert len({row["reference"] for row in rows}) > 50
    # 0.5: half an anchor's distance on each axis is lost in the names
    assert errors[1] == pytest.approx(errors[0], abs=0.5 / last)


def test_what_is_no_answer_is_not_learned(make_clip: Callable[..., Any]) -> None:
    talk = [
        ("system", "Be brief."),
        ("user", "<video>What is at <x:0.1><y:0.2>?"),
        ("assistant", "a cat"),
        ("user", "And where is the dog?"),
        ("assistant", "<x:0.3><y:0.4>"),
    ]
    record = Record("r", ("a.jpg",), tuple(Turn(*pair) for pair in talk), "", "here")
    (one,) = examples_of(record, make_clip(1, 1), 2, (20, 20, 20))
    assert (one.blank.turn, one.blank.question) == (4, "And where is the dog?")
    assert one.blank.asked.coordinates == (0.3, 0.4)


@pytest.mark.parametrize(
    ("question", "meaning"),
    [
        ("When is there a cat?", 1),
        ("When is there a catalogue?", None),
        ("When is there a cat on a roof?", 2),
        ("什么时候有猫?", 3),
        ("Is a road, or not?", 0),
    ],
)
def test_phrases_are_whole_words(question: str, meaning: int | None) -> None:
    phrases = [tuple(own) for own in [*MEANINGS, ["猫"]]]
    assert meaning_of(question, phrases) == meaning
