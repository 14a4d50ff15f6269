r"""What almost is markup is named, what is backwards too, and a backslash makes words of either.

pytest tests/train/data/test_markup.py
"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.annotations.fault import RowError
from train.data.coordinates import BEHIND, resolved
from train.data.markup import Coordinate, misspelt, split_markup
from train.data.records import Record, parse_record
from train.data.spans import forwards


def row(answer: str, question: str = "<video>\nWhen?", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "r", "video": "a.mp4", "conversations": turns} | more


MISSPELT = {
    "<t:3,5>": "<t:3.5>",
    "<t: 3.5>": "<t:3.5>",
    "<t :3.5>": "<t:3.5>",
    "< t:3.5>": "<t:3.5>",
    "<t:3.5 >": "<t:3.5>",
    "<t:3.5s>": "<t:3.5>",
    "<t:3.5 seconds>": "<t:3.5>",
    "<time:3.5>": "<t:3.5>",
    "<timestamp:3.5>": "<t:3.5>",
    "<T:3.5>": "<t:3.5>",
    "<X:0.5>": "<x:0.5>",
    "<t:3.5": "<t:3.5>",
    "<t=3.5>": "<t:3.5>",
    "<t 3.5>": "<t:3.5>",
    "<t3.5>": "<t:3.5>",
    "<t\uff1a3.5>": "<t:3.5>",
    "<x 0.5>": "<x:0.5>",
    "<x:50%>": "<x:0.5>",
    "<y:.5>": "<y:0.5>",
    "<t:5.>": "<t:5>",
    "<t:+3>": "<t:3>",
    "<t:1:30>": "<t:90>",
    "<t:00:01:30.5>": "<t:90.5>",
    "<t:-5%>": "<t:-5%>",
    "<TEMP-7>": "<TEMP-007>",
    "<TEMP-0037>": "<TEMP-037>",
    "<temp-037>": "<TEMP-037>",
    "<TEMP_037>": "<TEMP-037>",
    "<t:1e3>": "",
    "<t:nan>": "",
    "<t:3.5-7.2>": "",
    "<y:0.5;0.6>": "",
}
"""What is written, and what was meant where that is plain."""
FINE = (
    *("<t:3.5>", "<t:41.3%>", "<x:0.5><y:1>", "<TEMP-037>", "<t:-1>"),
    *("if x <y 3 then", "for (i=0; i<t-1; i++)", "a<x:3", "<h1>", "<t1>", "<x>", "<b>3</b>"),
    *("<time datetime='2023-01-01'>", "<width=300>", "<video width=300>", "3 < 5", "<table>"),
)


@pytest.mark.parametrize(("written", "meant"), MISSPELT.items())
def test_what_almost_is_markup_is_named_with_what_was_meant(written: str, meant: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_record(row(f"at {written} he runs"), "f:1")
    text = str(caught.value)
    assert text.startswith(f"f:1 (id r): turn 2 (assistant): {written!a} is no coordinate")
    assert f"expected {meant}" in text
    assert rf"write \{ascii(written)[1:-1]}" in text
    assert caught.value.reason == "misspelt coordinate"


@pytest.mark.parametrize("text", FINE)
def test_what_is_markup_or_far_from_it_is_let_be(text: str) -> None:
    assert list(misspelt(text)) == []


@pytest.mark.parametrize("written", [*MISSPELT, "<t:3.5>", "<t:5%>", "<TEMP-007>"])
def test_a_backslash_makes_words_of_what_looks_like_markup(written: str) -> None:
    record = parse_record(row(rf"write \{written} so"), "f:1")
    assert split_markup(record.turns[1].text) == [f"write {written} so"]


@pytest.mark.parametrize("tag", ["<image>", "<video>"])
def test_the_word_itself_can_be_written_and_is_named_where_it_is_not(tag: str) -> None:
    for answer, question in (
        ("x", f"<video>\nWhat does {tag} mean?"),
        (f"it is {tag}", "<video>?"),
    ):
        with pytest.raises(RowError, match=r"write \\<image> or \\<video>"):
            parse_record(row(answer, question), "f:1")
    record = parse_record(row(rf"it is \{tag}", rf"<video>What is \{tag}?"), "f:1")
    assert record.clips == ("a.mp4",)
    assert split_markup(record.turns[1].text) == [f"it is {tag}"]


@given(st.text(alphabet="\\ab<>:t3.5 ", max_size=20))
def test_a_backslash_that_escapes_nothing_stays(text: str) -> None:
    pieces = [piece for piece in split_markup(text) if isinstance(piece, str)]
    coordinates = [piece for piece in split_markup(text) if isinstance(piece, Coordinate)]
    if not coordinates and "\\<" not in text:
        assert "".join(pieces) == text


BACKWARDS = [
    ("from <t:3> to <t:1>", "a span from <t:3> to <t:1>, expected its start before its end"),
    ("<t:3> - <t:1>.", "a span from <t:3> to <t:1>"),
    ("it is <t:3>\u2013<t:1> long after that", "a span"),
    ("the part {<t:30%><t:10%>} of it, as was said", "a span from <t:30%> to <t:10%>"),
    ("between <t:3> and <t:1> he ran and ran again", "a span"),
    ("<t:3>, <t:1>", "a span"),
    ("from <TEMP-050> to <TEMP-010> he ran", "a span from <TEMP-050> to <TEMP-010>"),
    ("<t:1> to <t:2>, <t:9> to <t:8>", "a span from <t:9> to <t:8>"),
    ("<x:0.9><y:0.1><x:0.1><y:0.2>", "a box <x:0.9><y:0.1><x:0.1><y:0.2>, expected left, top"),
    ("<WIDTH-090><HEIGHT-010><WIDTH-010><HEIGHT-020>", "a box"),
]
FORWARDS = (
    *("from <t:1> to <t:3>", "<t:2> to <t:2>", "<t:9>, <t:5> and <t:1> are when it happens, I say"),
    "At <t:8> he falls, which <t:3> foreshadowed, and then it is over",
    *("from <t:90%> to <t:1>", "<x:0.9><y:0.9>, <x:0.1><y:0.1>", "<x:0.1><y:0.1><x:0.9><y:0.9>"),
)


@pytest.mark.parametrize(("answer", "expected"), BACKWARDS)
def test_spans_and_boxes_that_are_backwards_are_named(answer: str, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_record(row(answer), "f:1")
    assert expected in str(caught.value)
    assert caught.value.reason in ("span backwards", "box backwards")


@pytest.mark.parametrize("answer", FORWARDS)
def test_times_in_any_order_that_are_no_span_are_let_be(answer: str) -> None:
    assert parse_record(row(answer), "f:1").turns[1].text == answer


@pytest.mark.parametrize(("answer", "_"), BACKWARDS)
def test_a_models_span_or_box_that_is_backwards_ends_with_its_start(answer: str, _: str) -> None:
    assert parse_record(row(forwards(answer)), "f:1").turns[1].text == forwards(answer) != answer


@pytest.mark.parametrize("answer", FORWARDS)
def test_a_models_answer_with_times_in_any_order_is_let_be(answer: str) -> None:
    assert forwards(answer) == answer


def test_what_ends_before_its_start_takes_its_start() -> None:
    assert forwards("<t:3> - <t:2.5> - <t:1>") == "<t:3> - <t:3> - <t:3>"
    assert forwards("<x:0.50><y:-0.1><x:0.1><y:0>") == "<x:0.50><y:-0.1><x:0.50><y:0>"


def test_a_slot_without_its_number_is_named() -> None:
    with pytest.raises(RowError, match="1 <TEMP-OUTPUT> for 0 numbers"):
        parse_record(row("at <TEMP-OUTPUT>"), "f:1")


CLIPPED = [
    ("from <t:1> to <t:9>", "from <t:1> to <t:4.000000>"),
    ("<t:1> to <t:9>, <t:2> to <t:8.5>", "<t:1> to <t:4.000000>, <t:2> to <t:4.000000>"),
    ("from <t:1> to <t:4.05>", "from <t:1> to <t:4.05>"),  # rounded, not behind
    ("from <t:20%> to <t:300%>", "from <t:0.800000> to <t:4.000000>"),
]


@pytest.mark.parametrize(("answer", "expected"), CLIPPED)
def test_a_span_that_ends_behind_its_clip_may_end_with_it(answer: str, expected: str) -> None:
    record: Record = parse_record(row(answer), "f:1")
    clipped, changed, faults = resolved(record, [4.0], clip=True)
    assert (clipped.turns[1].text, faults) == (expected, [])
    assert changed == (answer != expected)
    _, unchanged, faults = resolved(record, [4.0], clip=False)
    assert not unchanged
    assert {fault.reason for fault in faults} <= {BEHIND}
    assert bool(faults) == (expected != answer)


@pytest.mark.parametrize("answer", ["from <t:5> to <t:9>", "at <t:9>", "<t:-2> to <t:3>"])
def test_what_lies_wholly_behind_or_before_its_clip_is_not_clipped(answer: str) -> None:
    clipped, changed, faults = resolved(parse_record(row(answer), "f:1"), [4.0], clip=True)
    assert (changed, clipped.turns[1].text) == (False, answer)
    assert faults[0].place == "f:1"
    assert "is outside [0, 4]" in str(faults[0])
