"""Spliced records: what they say is true of what they show, and each draw is a pure function."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.annotations.records import parse_row
from shards.errors import UserError
from train.data.dataset import Dataset, open_dataset
from train.data.records import Record
from train.data.splice import Splice
from train.settings.config import TrainConfig, parse
from train.settings.drawn import draw, read_augment, read_splice, words_of

FRAMES = {"a.mp4": 40, "b.mp4": 24, "c.mp4": 9, "d.mp4": 33, "e.mp4": 60}
ROWS = [
    {"video": "a.mp4", "phrase": "a busy street", "start": 0.5, "end": 3.0},
    {"video": "a.mp4", "phrase": "an empty street", "start": 3.0, "end": 5.0},
    {"video": "b.mp4", "caption": "A cat sleeps."},
    {"video": "c.mp4", "phrase": "a dog"},
    {"video": "d.mp4", "phrase": "a dog"},
    {"video": "e.mp4", "phrase": "rain on a window"},
]
SHOWS = [(row["video"], str(row.get("phrase", "A cat sleeps")), row) for row in ROWS]


@pytest.fixture(scope="module")
def bank(make_bank: Callable[..., Path], features: Any, tmp_path_factory: Any) -> Path:
    zeros = {id_: {s: np.zeros((n, 8 // s, 8 // s, 4), np.float16) for s in (4, 8)}
             for id_, n in FRAMES.items()}  # fmt: skip
    return make_bank(tmp_path_factory.mktemp("splice") / "bank", zeros, config=features)


def open_with(bank: Path, folder: Path, rows: list[Any], *splice: str, **settings: Any) -> Dataset:
    path = folder / "phrases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(bank=[str(bank)], splice_path=[str(path)], splice=list(splice))
    return open_dataset(replace(config, **settings))


def truth(record: Record) -> list[tuple[str, float, float]]:
    """Return (phrase, begins, ends) of each part, from its cut and the rows that it may be of."""
    shown, begins = [], 0.0
    for cut in record.cuts:
        assert cut.start is not None
        assert cut.end is not None
        (phrase,) = [
            phrase
            for video, phrase, row in SHOWS
            if video == cut.video
            and float(row.get("start", 0)) <= cut.start + 1e-3  # type: ignore[arg-type]
            and cut.end <= float(row.get("end", 99)) + 1e-3  # type: ignore[arg-type]
        ]
        shown.append((phrase, begins, begins + cut.end - cut.start))
        begins += cut.end - cut.start
    return shown


def check(question: str, answer: str, shown: list[tuple[str, float, float]]) -> str:
    """Assert that an answer is true; return the kind of the question."""
    question = question.removeprefix("<video>\n")
    if match := re.fullmatch(r"When is this seen: (.*)\?", question):
        (part,) = [part for part in shown if part[0] == match[1]]
        times = [float(t) for t in re.findall(r"<t:([\d.]+)>", answer)]
        assert times == pytest.approx(part[1:], abs=6e-4)
        return "span"
    if match := re.fullmatch(r"How many times is this seen: (.*)\?", question):
        assert int(answer) == sum(part[0] == match[1] for part in shown) > 0
        return "count"
    if match := re.fullmatch(r"What is seen at <t:([\d.]+)>\?", question):
        (part,) = [part for part in shown if part[1] < float(match[1]) < part[2]]
        assert answer == part[0]
        return "seen"
    lines = re.findall(r"^([A-Z])\. (.*)$", question, re.MULTILINE)
    named = dict(lines)
    assert [letter for letter, _ in lines] == sorted(named)
    once = [part[0] for part in shown if sum(part[0] == o[0] for o in shown) == 1]
    assert [named[letter] for letter in answer.split(", ")] == once
    return "order"


def test_answers_are_true_and_parts_are_what_was_asked(bank: Path, tmp_path: Path) -> None:
    dataset = open_with(bank, tmp_path, ROWS, "records=400", "parts=2-5", "seconds=0.4-2")
    kinds, answers = Counter[str](), Counter[str]()
    sizes = set()
    for record in dataset.epoch(2):
        shown = truth(record)
        sizes.add(len(shown))
        assert all(0.399 <= ends - begins <= 2.001 for _, begins, ends in shown)
        assert all(one[0] != two[0] for one, two in pairwise(shown))
        assert len({cut.video for cut in record.cuts}) >= len(shown) - 1
        clip = record.places[0].clip()
        assert clip.info.duration == pytest.approx(shown[-1][2])
        times = clip.info.timestamps
        assert all(any(b - 1e-3 <= t < e for t in times) for _, b, e in shown), "each part is seen"
        assert (np.diff(times) > 0).all()
        pairs = [
            (q.text, a.text) for q, a in zip(record.turns[::2], record.turns[1::2], strict=True)
        ]
        assert pairs[0][0].startswith("<video>\n")
        assert 1 <= len(pairs) <= 4
        own = [check(*pair, shown) for pair in pairs]
        assert own.count("order") <= 1 >= own.count("count")
        kinds.update(own)
        answers.update(a for (_, a), kind in zip(pairs, own, strict=True) if kind == "count")
    assert sizes <= {1, 2, 3, 4, 5}
    assert {2, 3, 4} <= sizes
    assert min(kinds.values()) > 50
    assert min(answers["1"], answers["2"]) > 20


@pytest.mark.parametrize("kind", ["span", "order", "count", "seen"])
def test_only_the_kinds_that_are_asked_for(bank: Path, tmp_path: Path, kind: str) -> None:
    dataset = open_with(bank, tmp_path, ROWS, "records=60", "parts=3-4", f"questions={kind}")
    for record in dataset.records:
        shown = truth(record)
        asked = [
            check(q.text, a.text, shown)
            for q, a in zip(record.turns[::2], record.turns[1::2], strict=True)
        ]
        assert set(asked) <= {kind, "count"}
        assert kind in asked or len({part[0] for part in shown}) < 2


WORDINGS = {
    "span": ["When does {} happen?", "Find {} + its end"],
    "order": ["Sort these."],
    "count": ["How often is {} there?"],
    "seen": ["What happens at {}?", "{}: what is it?"],
}
MEANT = {"a dog": ["a dog", "a small animal", "man's friend"], "A cat sleeps": ["A cat sleeps"]}


def test_phrases_of_one_meaning_and_the_users_own_wordings(bank: Path, tmp_path: Path) -> None:
    """Spans and counts are those of the meaning; the first phrase answers what is seen."""
    rows = [
        {
            name: MEANT.get(value, value) if name == "phrase" else value
            for name, value in row.items()
        }
        for row in ROWS
    ]
    words = [f"{kind}={'|'.join(texts)}" for kind, texts in WORDINGS.items()]
    dataset = open_with(bank, tmp_path, rows, "records=400", "parts=2-5", "seconds=0.4-2", *words)
    assert dataset.splices[0].settings == read_splice(
        words_of({"records": 400, "parts": "2-5", "seconds": "0.4-2"} | WORDINGS)
    )
    meaning = {other: first for first, others in MEANT.items() for other in others}
    plain = {"span": "When is this seen: {}?", "order": "In which order are these seen?"}
    plain |= {"count": "How many times is this seen: {}?", "seen": "What is seen at {}?"}
    used: Counter[tuple[str, str]] = Counter()
    dogs: Counter[str] = Counter()
    for record in dataset.epoch(1):
        shown = truth(record)
        for q, a in zip(record.turns[::2], record.turns[1::2], strict=True):
            question = q.text.removeprefix("<video>\n")
            ((kind, text, inside),) = [
                (kind, text, match.groups())
                for kind, texts in WORDINGS.items()
                for text in texts
                if (
                    match := re.match(re.escape(text).replace(r"\{\}", "(.*)") + "(\n|$)", question)
                )
            ]
            used[kind, text] += 1
            if kind == "order":
                _, *lines = question.split("\n")
                named = [line[:3] + meaning.get(line[3:], line[3:]) for line in lines]
                asked, answer = "\n".join([plain[kind], *named]), a.text
            else:
                dogs[inside[0]] += inside[0] in MEANT["a dog"]
                asked = plain[kind].replace("{}", meaning.get(inside[0], inside[0]))
                answer = a.text
            assert check(asked, answer, shown) == kind
    assert {text for _, text in used} == {text for texts in WORDINGS.values() for text in texts}
    assert min(used.values()) > 30
    assert min(dogs[phrase] for phrase in MEANT["a dog"]) > 20


def test_a_phrase_of_two_meanings_is_refused(bank: Path, tmp_path: Path) -> None:
    rows = [*ROWS[:4], {"video": "d.mp4", "phrase": ["a dog", "a wolf"]}]
    with pytest.raises(UserError, match="phrase 'a dog' is in two different lists of phrases"):
        open_with(bank, tmp_path, rows)


def test_questions_do_not_come_in_the_order_of_time(bank: Path, tmp_path: Path) -> None:
    dataset = open_with(
        bank, tmp_path, ROWS, "records=300", "parts=4", "questions=span", "rounds=2"
    )
    first_is_earlier = []
    for record in dataset.records:
        begins = [float(re.findall(r"<t:([\d.]+)>", t.text)[0]) for t in record.turns[1::2]]
        if len(begins) == 2:
            first_is_earlier.append(begins[0] < begins[1])
    assert 0.4 < sum(first_is_earlier) / len(first_is_earlier) < 0.6


def test_a_record_is_a_function_of_seed_epoch_and_number(bank: Path, tmp_path: Path) -> None:
    dataset = open_with(bank, tmp_path, ROWS, "records=50", seed=5)
    (splice,) = dataset.splices
    alone = replace(splice)
    backwards = [alone.draw(epoch, k) for epoch in (3, 1) for k in range(49, -1, -1)]
    assert backwards == [*dataset.epoch(3)[::-1], *dataset.epoch(1)[::-1]]
    one_by_one = [splice.layout(1, np.asarray([k])) for k in range(50)]
    together = splice.layout(1, np.arange(50))
    for column, *rows in zip(together, *one_by_one, strict=True):
        assert np.array_equal(column, np.concatenate(rows))
    other = open_with(bank, tmp_path, ROWS, "records=50", seed=6)
    assert len({r.turns for r in other.records} & {r.turns for r in dataset.records}) < 10
    assert dataset.record(2 * dataset.count + 7) == splice.draw(2, 7)


def test_draws_are_even_and_do_not_depend_on_each_other() -> None:
    numbers = draw(7, 0, 3, np.arange(4000)[:, None], np.arange(5))
    assert numbers.shape == (4000, 5)
    assert 0 <= numbers.min() < numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert abs(counts - 2000).max() < 250
    assert abs(np.corrcoef(numbers.T) - np.eye(5)).max() < 0.06
    assert draw(7, 0, 3, 12, 4)[0] == numbers[12, 4]
    assert draw(7, 0, 4, 12, 4)[0] != numbers[12, 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4"}, "its `phrase` or `caption`, got 1 media, 0 phrases"),
        ({"phrase": "x"}, "got 0 media, 1 phrases"),
        ({"video": "a.mp4", "phrase": "x", "caption": "y"}, "got 1 media, 2 phrases"),
        ({"video": "a.mp4", "phrase": "x <t:1>"}, "expected a text without tags"),
        ({"video": "a.mp4", "phrase": ["x", 3]}, "or a list of some of one meaning"),
        ({"video": "a.mp4", "phrase": []}, "got 1 media, 0 phrases"),
        (
            {"video": "a.mp4", "phrase": "x", "timestamp": [1, 2]},
            "`timestamp`: this form of row does",
        ),
        ({"video": "a.mp4", "phrase": "x", "meta": {"start_sec": 1}}, "`meta.start_sec`"),
        ({"video": "a.mp4", "phrase": "x", "start": 4, "end": 6}, "after its clip"),
        ({"video": "zzz.mp4", "phrase": "x"}, "no bank knows the clip 'zzz.mp4'"),
    ],
)
def test_a_wrong_source_is_named(bank: Path, tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        open_with(bank, tmp_path, [*ROWS, row])
    assert any("phrases.jsonl:7" in p and message in p for p in error.value.problems)


def test_bad_sources_are_dropped_like_bad_records(bank: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"video": "a.mp4"}, {"video": "zzz.mp4", "phrase": "x"}]
    dataset = open_with(bank, tmp_path, rows, "records=5", on_bad_record="drop", missing="drop")
    assert [drop.row for drop in dataset.drops] == ["7", "8"]
    assert len(dataset.splices[0].sources) == 6


def test_too_few_phrases_are_refused(bank: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 different phrases, expected 2 or more"):
        open_with(bank, tmp_path, ROWS[:1])


def test_a_part_that_is_banked_as_a_clip_of_its_own_is_that_clip(
    make_bank: Callable[..., Path], features: Any, tmp_path: Path
) -> None:
    arrays = {s: np.zeros((16, 8 // s, 8 // s, 4), np.float16) for s in (4, 8)}
    bank = make_bank(tmp_path / "bank", {"a.mp4#3-5": arrays, "b.mp4": arrays}, config=features)
    rows = [
        {"video": "a.mp4", "phrase": "one", "start": 3, "end": 5},
        {"video": "b.mp4", "phrase": "two"},
    ]
    dataset = open_with(bank, tmp_path, rows, "records=3", "parts=2")
    assert {clip for record in dataset.records for clip in record.clips} == {"a.mp4#3-5", "b.mp4"}


def test_a_data_config_entry_splices_beside_records_that_are_read(
    bank: Path, tmp_path: Path
) -> None:
    (tmp_path / "phrases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    talk = {"video": "a.mp4", "question": "What?", "answer": "This."}
    (tmp_path / "read.jsonl").write_text(json.dumps(talk) + "\n")
    (tmp_path / "data.yaml").write_text(
        "spliced:\n  records: phrases.jsonl\n"
        "  splice: {records: 12, parts: 2-3, questions: [span, seen]}\n"
        "read: {records: read.jsonl}\n"
    )
    config = TrainConfig(bank=[str(bank)], data_config=str(tmp_path / "data.yaml"))
    dataset = open_dataset(replace(config, data_mixture="spliced*2+read"))
    assert (dataset.count, len(dataset.records)) == (25, 25)
    assert [record.media for record in dataset.records] == [1] * 25
    assert not dataset.records[0].cuts
    spliced = dataset.records[1:]
    assert len({record.turns for record in spliced}) > 20, "no repeats"
    assert dataset.splices[0].settings == read_splice(
        ["records=12", "parts=2-3", "questions=span+seen"]
    )
    (tmp_path / "data.yaml").write_text("x:\n  records: phrases.jsonl\n  splice: {rows: 4}\n")
    with pytest.raises(UserError, match="x: splice: knows no 'rows', expected some of records"):
        open_dataset(config)


WRONG = {
    "splice": {
        "records=0": "a positive integer",
        "parts=6-2": "a range such as 2-6",
        "parts=2.5": "a number of clips",
        "parts=0-2": "parts are at least 1",
        "seconds=x": "seconds, or a range",
        "seconds=0": "seconds at least 0.1",
        "questions=what": "some of span+order+count+seen",
        "clips=3": "knows no 'clips'",
        "rounds": "a positive integer",
        "span=When?": 'such as "When does {} happen?"',
        "span=When does {}|?": 'such as "When does {} happen?"',
        "order=Sort {}": "a text without {}",
        "seen=<video> at {}": 'such as "What happens at {}?"',
    },
    "augment": {
        "jitter=3": "no value",
        "pattern=random": "some of interleave",
        "ratio=2": "shares of slow frames",
        "drop=1": "a share up to 0.9",
        "flip": "knows no 'flip'",
    },
}


@pytest.mark.parametrize(("name", "word"), [(n, w) for n, words in WRONG.items() for w in words])
def test_a_wrong_word_is_refused_before_anything_is_read(
    name: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{name}", word, "--splice_path", str(tmp_path), "--stage_path", str(tmp_path)]
    with pytest.raises(SystemExit):
        parse([*flags, "--output_dir", str(tmp_path / "out")], {})
    said = capsys.readouterr().err
    assert f"--{name} {name}: " in said
    assert WRONG[name][word] in said


def test_words_are_read_in_any_order_and_once() -> None:
    assert read_augment(["drop=.25", "jitter", "pattern"]).pattern == (
        "interleave",
        "first_slow",
        "uniform",
    )
    with pytest.raises(UserError, match="has jitter twice"):
        read_augment(["jitter", "jitter"])
    assert read_splice([]).records == 10_000


# -- timelines in annotation files


def test_forms_of_a_timeline() -> None:
    parts = [{"video": "a.mp4", "start": 3, "end": 7}, {"video": "b.mp4", "start": None}]
    row = parse_row({"timeline": parts, "question": "What?", "answer": "x"}, "f:1")
    assert row.media == ("a.mp4", "b.mp4")
    assert [tuple(cut) for cut in row.timeline] == [("a.mp4", 3, 7), ("b.mp4", None, None)]
    assert row.turns[0] == ("user", "<video>\nWhat?")
    talk = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "x"}]
    assert len(parse_row({"timeline": json.dumps(parts), "messages": talk}, "f:1").timeline) == 2
    assert parse_row({"timeline": parts}, "f:1", media_only=True).media == ("a.mp4", "b.mp4")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"timeline": 3}, "`timeline` must be a list"),
        ({"timeline": ["a.mp4"]}, "part 1 of `timeline`, expected {"),
        ({"timeline": [{"start": 3}]}, "names no `video`"),
        (
            {"timeline": [{"video": "a.mp4", "fps": 3}]},
            "has `fps`, expected only video, start and end",
        ),
        (
            {"timeline": [{"video": "a.mp4", "start": -1}]},
            "start, expected seconds, not negative",
        ),
        ({"timeline": [{"video": "a.mp4", "start": 5, "end": 5}]}, "start 5 is not before end 5"),
        ({"timeline": [{"video": "/etc/a.mp4"}]}, "leads out of its root"),
        ({"timeline": [{"video": "a.mp4"}], "video": "b.mp4"}, "both timeline and video"),
        ({"timeline": [{"video": "a.mp4"}], "start": 1}, "`start` beside a timeline"),
    ],
)
def test_a_wrong_timeline_is_named(row: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_row(row | {"question": "What?", "answer": "x"}, "f:1")
    assert message in str(error.value)


def test_one_tag_stands_for_a_timeline() -> None:
    parts = [{"video": "a.mp4"}, {"video": "b.mp4"}]
    talk = [{"from": "human", "value": "<video><video>?"}, {"from": "gpt", "value": "x"}]
    with pytest.raises(UserError, match="2 <video>/<image> tags for 1 media"):
        parse_row({"timeline": parts, "conversations": talk}, "f:1")


def test_a_splice_is_the_same_object_however_often_it_is_asked(bank: Path, tmp_path: Path) -> None:
    (splice,) = open_with(bank, tmp_path, ROWS, "records=9").splices
    assert isinstance(splice, Splice)
    assert splice.draw(0, 8) == splice.draw(0, 8) != splice.draw(1, 8)
