"""What an answer says and what a person would give for it.

pytest tests/train/scores/test_scoring.py
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.annotations.forms import DESCRIBE
from train.scores.kinds import Asked, asked
from train.scores.predictions import Prediction, report_of
from train.scores.scoring import is_off_scale, score
from train.scores.summary import OFF_SCALE, constant_span, summarise_scores, table

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = "What falls?\nA. a red ball\nB. a blue box\nAnswer with the letter and the option."
SPAN, POINT = "from <t:1.0> to <t:4.0>", "<x:0.5><y:0.2>"
BOX = "<x:0.1><y:0.2><x:0.5><y:0.6>"
NUMBERED = "The 3rd of 7 events lasts from <t:1.0> to <t:4.0>"
WINDOWS = "from <t:0> to <t:16>, from <t:20> to <t:36>"
TUBE = "from <t:0> to <t:4>: <t:0> <x:0.1><y:0.1><x:0.5><y:0.5>; <t:4> <x:0.1><y:0.1><x:0.5><y:0.5>"

KINDS = [
    (SPAN, "", "", "span"),
    (NUMBERED, "", "", "span"),
    ("<TEMP-003> to <TEMP-009>", "", "", "span"),
    ("from <t:4> back to <t:1>", "", "", "mixed"),
    ("<t:1.0>", "", "", "time"),
    (POINT, "", "", "point"),
    (BOX, "", "", "box"),
    ("<x:0.5><y:0.6><x:0.1><y:0.2>", "", "", "mixed"),
    (WINDOWS, "", "", "windows"),
    (SPAN, "", "windows", "windows"),
    ("<t:1> to <t:2>: he runs\n<t:3> to <t:4>: he sits", "", "", "mixed"),
    (TUBE, "", "", "tube"),
    (TUBE.partition(": ")[2], "", "", "tube"),
    ("a dog [<x:0.1><y:0.5>] <t:1.2>", "", "", "mixed"),
    ("<y:0.5><x:0.2>", "", "", "mixed"),
    ("A", OPTIONS, "", "choice"),
    ("(C)", "Which?", "", "choice"),
    ("he sits", "", "action_order", "text"),
    ("1,200", "", "", "number"),
    ("A. a red ball", OPTIONS, "", "choice"),
    ("a blue box", OPTIONS, "", "choice"),
    ("it rolls", OPTIONS, "", "text"),
    ("3", "How many?", "", "number"),
    ("three", "How many?", "", "number"),
    ("0.53", "", "", "number"),
    ("B, A, C", "", "", "order"),
    ("BAC", "", "", "order"),
    ("3, 1, 2", "", "", "order"),
    ("he sits, he runs", "", "order", "order"),
    ("red circle, blue square", "", "seen", "text"),
    ("at 1.0 and 2.0", "", "", "text"),
    ("A man runs.", f"<video>\n{DESCRIBE}", "", "caption"),
    ("A man runs.", "", "video_caption", "caption"),
    ("one two three four five six seven eight nine ten", "", "", "caption"),
    ("", "", "", "text"),
]


@pytest.mark.parametrize(("reference", "question", "task", "kind"), KINDS)
def test_the_kind_is_read_off_the_record(
    reference: str, question: str, task: str, kind: str
) -> None:
    assert asked(reference, 8.0, question=question, task=task).kind == kind


UNITS = ("from <t:1.0>s to <t:4.0>s", "from 1.0s to 4.0s", "from 1.0 seconds to 4.0 seconds", SPAN)
RIGHT = [
    *(
        (SPAN, said)
        for said in (
            *("from <t:1.0> to <t:4.0>", "<t:1> <t:4>", "<t:1><t:4>", "From <t:1.000>-<t:4.000>."),
            *(
                "1.0-4.0",
                "1 - 4",
                "1.0 \u2013 4.0",
                "1s to 4s",
                "1 s to 4 s",
                "from 1 to 4 seconds",
            ),
            *("00:01 - 00:04", "0:01 to 0:04.0", "00:00:01-00:00:04", "0 min 1 s until 0 min 4 s"),
            *("Event 2 lasts from 1.0 to 4.0", "The 3rd of 7 events lasts from 1.0 to 4.0"),
            *("between 1.0 and 4.0", "[1.0, 4.0]", "(1.0, 4.0)", "1.0, 4.0", "1.0 4.0", "1.04.0"),
            *("It starts at 1.0 and ends at 4.0.", "start: 1.0, end: 4.0", "from 1.0s till 4.0s"),
            *("<think>1 to 2, no 3</think>\nfrom 1.0 to 4.0", "In the 8 s clip, from 1 to 4 s"),
            *("The answer is: from 1.0 to 4.0 seconds in the video.", "From  1.0 \n to 4.0"),
        )
    ),
    *(
        (NUMBERED, said)
        for said in (
            *(
                "The 3rd of 7 events lasts from 1.0 to 4.0",
                "the 3rd of 7 events lasts from 1 to 4.",
            ),
            *("The 3rd of 7 events lasts from <t:1.0> to <t:4.0>", "from 1.0 to 4.0", "1 s - 4 s"),
        )
    ),
    ("<t:1.0> is when event <t:4.0>", "1.0 is when event 4.0"),
    *((BOX, said) for said in ("0.100 0.200 0.500 0.600 ", "[0.1, 0.2, 0.5, 0.6]", BOX)),
    *((BOX, said) for said in ("(0.1, 0.2) to (0.5, 0.6)", "x1: .1, y1: .2, x2: .5, y2: .6")),
    *((WINDOWS, said) for said in (WINDOWS, "0.0-16.0 and 20.0-36.0", "[[0, 16], [20, 36]]")),
    (WINDOWS, "1. 0 s to 16 s\n2. 20 s to 36 s"),
    (TUBE, "from 0.0 to 4.0: 0.0 0.100 0.100 0.500 0.500 ; 4.0 0.100 0.100 0.500 0.500 "),
    *(("3", said) for said in ("3", "3.", "three", "Three objects", "There are 3 objects.")),
    ("0.53", "0.532"),
    *(("1,200", said) for said in ("1200", "1,200", "about 1,200 people")),
    *(("B", said) for said in ("B", "B.", "(B)", "Option B")),
    *((f"from <t:1>{unit} to <t:4>{unit}", said) for unit in ("s", " seconds") for said in UNITS),
    *(("B, A, C", said) for said in ("B, A, C", "B -> A -> C", "BAC", "B, A and C", "b,a,c")),
    *(("red circle", said) for said in ("red circle", "Red  circle.", '"red circle"')),
]


LONG = {
    "<t:3664>": ("1h 1m 4s", "1 hour 1 minute 4 seconds", "1 hour, 1 minute and 4 s", "01:01:04"),
    "<t:3604>": ("1 hour and 4 seconds", "1 h 4 s"),
    "<t:90>": ("1.5 minutes", "at 1.5 min", "1 min 30 s", "1:30"),
    "from <t:60> to <t:90>": ("1 to 1.5 minutes", "1-1.5 min", "between 1 and 1.5 minutes",
                              "1 min to 1 min 30 s", "from 60 s to 1.5 min", "from 1 to 1.5 minutes"),
    "from <t:1> to <t:240>": ("1.0s to 4.0 min", "1 s - 4 min"),
}  # fmt: skip
"""Seconds -> what says them by hours and minutes; read by their seconds alone these were others."""


@pytest.mark.parametrize(
    ("reference", "said"), [(k, one) for k, own in LONG.items() for one in own]
)
def test_hours_and_minutes_count(reference: str, said: str) -> None:
    found = score(asked(reference, 7200.0), said)
    assert (found["parsed"], found["error"]) == (1.0, pytest.approx(0.0))


@pytest.mark.parametrize("said", ["3,5 s", "1,005 seconds", "at 2,5 min"])
def test_a_comma_in_a_time_is_not_read_in_two(said: str) -> None:
    """3,5 s is 3.5 s here and 1,005 s is 1005 s there: neither is 5 s."""
    for reference in ("<t:5>", "from <t:3> to <t:5>"):
        assert score(asked(reference, 7200.0), said)["parsed"] == 0.0


@pytest.mark.parametrize(("reference", "said"), RIGHT)
def test_what_a_person_would_call_right_gets_all(reference: str, said: str) -> None:
    found = score(asked(reference, 40.0), said)
    assert found.get("parsed", 1.0) == 1.0
    assert {name: found[name] for name in bounded(found)} == pytest.approx(
        dict.fromkeys(bounded(found), 1.0)
    )
    assert all(found[name] == pytest.approx(0, abs=1e-9) for name in found if "error" in name)


def bounded(scores: dict[str, Any]) -> list[str]:
    """Return the scores that are from 0 to 1, the higher the better."""
    return [name for name in scores if name not in ("kind", "run_on") and "error" not in name]


WRONG = [
    # (reference, answer, its main score)
    (SPAN, "from 4.0 to 1.0", 0),
    (SPAN, "<t:4> <t:1>", 0),
    (SPAN, "from 1.0 to 2.5", 0.5),
    (SPAN, "<x:1.0> to <x:4.0>", 0),
    (SPAN, "<t:1.0>", 0),
    (SPAN, "at 4.0", 0),
    (SPAN, "<t:1.0> to <y:0.5>", 0),
    (SPAN, "frames 1 to 4", 0),
    (SPAN, "from 1 % to 4 %", 0),
    (SPAN, "1 min to 4 min", 0),
    (SPAN, "from 1.0 to 4.0 from 1.0 to 4.0", 0),
    (SPAN, "from 1.0 to 4.0, from 5.0 to 7.0", 0),
    (SPAN, "from <t:1> to <t:4> <t:4> <t:4> <t:4>", 0),
    (SPAN, "<t:0.5> from <t:1> to <t:4>", 0),
    (SPAN, "from 1.0 to 4.0 from 1.0 to", 0),
    (SPAN, "from 1.0 to 4.0. Then he stands up and leaves.", 1),
    (SPAN, "from 1.0 to 4.0\nWhen is the red circle visible?", 0),
    (SPAN, "from 1.0 to 4.0 " + "and so on " * 5, 0),
    (SPAN, "from 1.0 to 4.0 from from from", 0),
    (SPAN, "from <t:1.0> to <t:4.0> <t:", 0),
    (SPAN, "it is not there", 0),
    (SPAN, "", 0),
    (SPAN, "<think>from 1.0 to 4.0", 0),
    (SPAN, f"from {'9' * 400} to {'9' * 400}", 0),
    (SPAN, f"from 1.0 to {'9' * 400}", 0),
    (NUMBERED, "The 3rd of 7 events lasts from 3.0 to 7.0", 1 / 6),
    (NUMBERED, "The 3rd of 7 events", 0),
    (BOX, "<x:0.5><y:0.6><x:0.1><y:0.2>", 0),
    (BOX, "<x:0.1><y:0.2><x:0.5>", 0),
    (BOX, "<y:0.1><x:0.2><y:0.5><x:0.6>", 0),
    (BOX, "0.1 0.2 0.5 0.6 0.1 0.2", 0),
    (BOX, "0.1 0.2 0.5 0.4", 0.5),
    (WINDOWS, "from 0.0 to 16.0", 0.5),
    (WINDOWS, "from 0.0 to 16.0, from 0.0 to 16.0", 0),
    (WINDOWS, "from 16.0 to 0.0, from 36.0 to 20.0", 0),
    (WINDOWS, "from 40 to 50, from 0 to 16, from 20 to 36", 2 / 3),
    (TUBE, TUBE.replace("to <t:4>", "to <t:2>"), 0.5),
    (TUBE, TUBE.replace("<t:0> to <t:4>", "<t:4> to <t:0>"), 0),
    (TUBE, TUBE + "; <t:4> <x:0.1>", 0),
    (TUBE, TUBE + "; <t:4> <x:0.1><y:0.1><x:0.5><y:0.5>" * 3, 0),
    (TUBE, TUBE + "; <t:5> <x:0.1><y:0.1><x:0.5><y:0.5>", 0),
    (TUBE, "from <t:0> to <t:4>", 0),
    ("3", "4", 0),
    ("3", "3 or 4", 0),
    ("3", "2.6", 0),
    ("0.53", "0.54", 0),
    ("B, A, C", "A, B, C", 0),
    ("B, A, C", "B, A", 0),
    ("red circle", "red", 0),
]
MAIN = {"span": "iou", "box": "iou", "windows": "map", "tube": "viou"}


@pytest.mark.parametrize(("reference", "said", "expected"), WRONG)
def test_what_is_wrong_gets_what_a_person_would_give(
    reference: str, said: str, expected: float
) -> None:
    found = score(asked(reference, 40.0), said)
    assert found[MAIN.get(found["kind"], "exact")] == pytest.approx(expected)
    if found.get("run_on"):
        assert found["parsed"] == 0
        assert all(found[name] == 0 for name in bounded(found))


CORES = {
    "time": "<t:2.5>",
    "span": "from <t:1> to <t:4>",
    "windows": "from <t:1> to <t:4> and from <t:5> to <t:8>",
    "point": "<x:0.5><y:0.2>",
    "box": BOX,
    "tube": f"<t:1> {BOX}; <t:2> {BOX}",
    "mixed": f"<t:1> to <t:4>: 2 dogs run.\n<t:4> to <t:8>: a cat {BOX}",
}
TAILS = (
    " the 3 men leave",
    ", while a man in a blue jacket walks slowly across the road to the other side and waves",
    ": he goes on and on and on",
    "\nThen 2 of them leave.\nThe end.",
    " (see <https://a.b>)",
)
"""What a reference may have after its last coordinate: alone most of it would be a run-on."""


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("head", ["", "The 2 men: "])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", CORES)
def test_what_the_reference_says_itself_is_no_run_on(
    kind: str, tail: str, head: str, *, plain: bool
) -> None:
    reference = f"{head}{CORES[kind]}{tail}"
    about = asked(reference, 40.0)
    assert about.kind == kind
    said = re.sub("<[txy]:([0-9.]+)>", r" \1 ", reference) if plain else reference
    found = score(about, said)
    assert found["parsed"] == 1.0
    assert {name: found[name] for name in bounded(found)} == pytest.approx(
        dict.fromkeys(bounded(found), 1.0)
    )
    # the same in other words is read, and what goes on behind it is still found
    if not plain:
        other = re.sub("walks|leave|goes|see|dogs", "stays", said)
        assert score(about, other)["parsed"] == 1.0
        assert score(about, f"{said} 5 6 7")["run_on"] == 1.0


def test_words_that_are_escaped_are_answered_without_their_backslash() -> None:
    for reference in (r"the tag \<image> is text", r"\<t:3.5>"):
        assert score(asked(reference), reference.replace("\\", ""))["exact"] == 1.0
    question = "Which?\nA. \\<image>\nB. \\<video>"
    assert score(asked(r"B. \<video>", question=question), "<video>")["exact"] == 1.0


POINTS = [
    (POINT, "(0.5, 0.2)", 0),
    (POINT, "x: 0.5, y: 0.2", 0),
    (POINT, "<x:0.6><y:0.5>", 0.2),
    (POINT, "<y:0.5><x:0.2>", 1),
    (POINT, "<t:0.5><t:0.2>", 1),
    (POINT, "<x:0.5><y:0.2><x:0.5><y:0.2>", 1),
    ("<t:2.5>", "2.5 s", 0),
    ("<t:2.5>", "Event 2 is at 2.5 s", 0),
    ("at <t:2.5>", "at 0:02.5", 0),
    ("<t:2.5>", "3", 0.5),
    ("<t:2.5>", "300", 8),
    ("<t:2.5>", "<x:2.5>", 8),
    ("<t:2.5>", "2.5 or 3.5", 8),
    ("<t:2.5>", "", 8),
]


@pytest.mark.parametrize(("reference", "said", "error"), POINTS)
def test_a_time_and_a_point_err_by_a_distance_or_by_the_whole_range(
    reference: str, said: str, error: float
) -> None:
    assert score(asked(reference, 8.0), said)["error"] == pytest.approx(error)


CHOICES = [
    *((said, 1, 1) for said in ("A", "A.", "(A)", "a)", "A. a red ball", "a red ball", "**A**")),
    *((said, 1, 1) for said in ("Option A", "The answer is A.", "A: A red ball.")),
    *((said, 1, 0) for said in ("B", "a blue box", "B. a blue box")),
    *((said, 0, 0) for said in ("A or B", "A. a blue box", "C", "a red", "", "A B A B")),
]


@pytest.mark.parametrize(("said", "parsed", "exact"), CHOICES)
@pytest.mark.parametrize("reference", ["A", "A.", "A. a red ball", "a red ball"])
def test_an_option_is_named_by_letter_or_text(
    reference: str, said: str, parsed: float, exact: float
) -> None:
    found = score(asked(reference, question=OPTIONS), said)
    assert (found["parsed"], found["exact"]) == (parsed, exact)


def test_an_order_is_scored_by_its_pairs_too() -> None:
    assert score(asked("B, A, C"), "B, C, A")["pairs"] == pytest.approx(2 / 3)
    assert score(asked("he sits, he runs", task="order"), "he runs, then he sits")["pairs"] == 0


def test_spans_boxes_times_and_words_of_a_mixed_answer_are_scored_apart() -> None:
    reference = "a dog [<x:0.1><y:0.1><x:0.3><y:0.3>] from <t:1> to <t:3>, then <t:7>"
    said = "a cat [<x:0.1><y:0.1><x:0.3><y:0.2>] from <t:1> to <t:3>, then <t:5>"
    found = score(asked(reference, 8.0), said)
    assert found["iou"] == pytest.approx(0.75)
    assert found["error_time"] == 2
    assert found["same_words"] == 0
    assert score(asked(reference, 8.0), said.replace("cat", "dog"))["same_words"] == 1
    assert score(asked(reference, 8.0), "a dog")["error_time"] == 8


ANYTHING = st.text("<>:txy0123456789.-, fromtand{}[]()\n%s\ue010\ue014", max_size=40)


@given(st.one_of(st.text(max_size=20), ANYTHING), st.sampled_from(KINDS), st.floats(0.1, 100))
@settings(deadline=None)
def test_any_answer_gets_finite_scores(
    said: str, row: tuple[str, str, str, str], duration: float
) -> None:
    about = asked(row[0], duration, question=row[1], task=row[2])
    if about.kind == "caption":
        return
    found = score(about, said)
    assert all(math.isfinite(value) for name, value in found.items() if name != "kind")
    assert all(0 <= found[name] <= 1 for name in bounded(found))
    if found.get("parsed") == 0:
        assert not any(found[name] for name in bounded(found))


def test_scores_are_averaged_by_kind() -> None:
    about = [asked("<t:0> <t:4>", 8.0)] * 2 + [asked("yes")]
    said = ["<t:0> <t:2>", "?", "yes"]
    found = summarise_scores(about, said, [score(*pair) for pair in zip(about, said, strict=True)])
    assert set(found) == {"span", "text"}
    assert found["span"]["count"] == 2
    assert found["span"]["parsed"] == 0.5
    assert found["span"]["iou"] == pytest.approx(0.25)
    assert found["span"]["r@0.5"] == pytest.approx(0.5)
    assert found["text"] == {"count": 1, "exact": 1.0}


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=20)
def test_the_constant_guess_is_the_best_of_all_single_answers(spans: list[tuple[int, int]]) -> None:
    # clips of 10 s, so that references lie on the twentieths that are tried
    pairs = [(a, b) for a, b in map(sorted, spans) if a < b]
    found = constant_span([Asked("span", f"<t:{a / 2}> <t:{b / 2}>", 10.0) for a, b in pairs])
    if not pairs:
        assert found is None
        return
    means = [
        sum(
            max(0, min(b, end) - max(a, start)) / (max(b, end) - min(a, start))
            if min(b, end) > max(a, start)
            else 0
            for a, b in pairs
        )
        / len(pairs)
        for start in range(21)
        for end in range(start + 1, 21)
    ]
    assert found == pytest.approx(max(means))


def test_the_constant_guess_counts_in_shares_of_each_clip() -> None:
    about = [asked("<t:1> <t:2>", 4.0), asked("<t:2> <t:4>", 8.0)]
    assert constant_span(about) == pytest.approx(1.0)


def test_the_readmes_table_of_answers_is_what_they_score() -> None:
    readme = (ROOT / "train" / "README.md").read_text()
    table = readme.partition("| reference | answer | score |")[2].partition("\n\n")[0]
    rows = [row.strip("|").split(" | ") for row in table.strip().splitlines()[1:]]
    assert len(rows) > 12
    for reference, answers, wanted in rows:
        (about,) = re.findall("`([^`]+)`", reference)
        question = OPTIONS if about == "A. a red ball" else ""
        said = re.findall("`([^`]*)`", answers)
        assert said
        for answer in said:
            found = score(asked(about, 8.0, question=question), answer.replace("\u21b5", "\n"))
            name, value = re.fullmatch(r"\s*(\S+) ([\d.]+)\s*", wanted).groups()  # type: ignore[union-attr]
            assert found[name] == pytest.approx(float(value), abs=0.005), (about, answer)


SCALED = {
    "span": ("<t:{}> to <t:{}>", "tt", (1.0, 4.0)),
    "time": ("<t:{}>", "t", (3.0,)),
    "windows": ("<t:{}> to <t:{}>, <t:{}> to <t:{}>", "tttt", (1.0, 2.0, 4.0, 6.0)),
    "point": ("<x:{}><y:{}>", "xy", (0.5, 0.2)),
    "box": ("<x:{}><y:{}><x:{}><y:{}>", "xyxy", (0.1, 0.2, 0.5, 0.6)),
    "tube": (
        "<t:{}> <x:{}><y:{}><x:{}><y:{}>; <t:{}> <x:{}><y:{}><x:{}><y:{}>",
        "txyxytxyxy",
        (1.0, 0.1, 0.2, 0.5, 0.6, 5.0, 0.1, 0.2, 0.5, 0.6),
    ),
    "mixed": ("a dog <x:{}><y:{}> at <t:{}>", "xyt", (0.5, 0.25, 6.0)),
}
"""Kind -> (reference, axes of its numbers, its numbers); the medium lasts 8 seconds."""
UNITS_OF = {
    "pixels": {"x": 1920.0, "y": 1080.0},
    "percent": {"x": 100.0, "y": 100.0},
    "thousandths": {"x": 1000.0, "y": 1000.0},
    "frames": {"t": 25.0},
    "milliseconds": {"t": 1000.0},
}
CASES = [
    (kind, unit)
    for kind, (_, axes, _) in SCALED.items()
    for unit, factors in UNITS_OF.items()
    if factors.keys() & set(axes)
]


@pytest.mark.parametrize(("kind", "unit"), CASES)
def test_answers_in_other_units_are_counted_by_kind(kind: str, unit: str) -> None:
    """Such answers are read, and wrong by their unit alone: a score of 0 has to say so."""
    text, axes, numbers = SCALED[kind]
    plain = re.sub("<[txy]:{}>", " {}", text)
    reference = text.format(*numbers)
    scaled = [n * UNITS_OF[unit].get(axis, 1.0) for n, axis in zip(numbers, axes, strict=True)]
    right, wrong = plain.format(*numbers), plain.format(*(f"{n:g}" for n in scaled))
    asked_for = asked(reference, 8.0, task="")
    assert asked_for.kind == kind
    assert score(asked_for, wrong)["parsed"] == 1.0
    said = [right, wrong, reference, "no idea"]
    assert [is_off_scale(asked_for, one) for one in said] == [False, True, False, False]
    report = report_of(
        [Prediction("r", ("a",), 1, "", "", reference, 8.0, one, cut=False) for one in said]
    )
    assert report["off_scale"] == {kind: 1}
    shown = table(report | {"records": 4})
    assert f"1 of 4 {kind} answers {OFF_SCALE}" in shown
    assert OFF_SCALE not in table(report | {"records": 4, "untrained": True})


@pytest.mark.parametrize(
    ("reference", "said", "duration"),
    [
        (SPAN, "from 2.0 to 9.5", 8.0),  # a little after the end
        (BOX, "0.1 0.2 0.5 1.04", 0.0),
        (SPAN, "from 100.0 to 400.0", 0.0),  # of a medium of unknown length
        ("3", "300", 8.0),
        ("he sits", "at 900 px", 8.0),
    ],
)
def test_a_wrong_answer_of_the_right_scale_is_not_counted(
    reference: str, said: str, duration: float
) -> None:
    assert not is_off_scale(asked(reference, duration), said)
    one = Prediction("r", (), 1, "", "", reference, duration or 1000.0, said, cut=False)
    assert "off_scale" not in report_of([one])
