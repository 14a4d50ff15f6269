"""Records: parsed once, joined by clip id, every problem with its place."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.annotations.timeline import Cut
from shards.errors import UserError
from shards.read.banks import Banks
from train.batches.plan import order
from train.data.coordinates import check_coordinates, resolved
from train.data.markup import Coordinate, split_markup
from train.data.records import Record, Turn, join, parse_record, read_records, records_digest


def record(**changes: object) -> dict[str, object]:
    return {
        "id": "r1",
        "video": "a.mp4",
        "conversations": [
            {"from": "human", "value": "<video>\nWhen?"},
            {"from": "gpt", "value": "at <t:1.5>"},
        ],
    } | changes


def test_a_record_names_its_clip_and_turns() -> None:
    parsed = parse_record(record(start=1, end=2.5, task="span"), "f:1")
    assert parsed.clips == ("a.mp4#1-2.5",)
    assert [turn.role for turn in parsed.turns] == ["user", "assistant"]
    assert parsed.task == "span"


BAD = [
    ({"conversations": None}, "`conversations` is empty"),
    ({"conversations": [{"from": "human", "value": "<video>?"}]}, "no supervised text"),
    (
        {"conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": " "}]},
        "no supervised text",
    ),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "a turn needs `from`"),
    ({"video": None}, "1 <video>/<image> tags for 0 media"),
    ({"video": ["a.mp4", "b.mp4"]}, "1 <video>/<image> tags for 2 media"),
    ({"start": 3, "end": 2}, "start 3 is not before end 2"),
]


@pytest.mark.parametrize(("changes", "expected"), BAD)
def test_a_bad_record_is_named_with_its_place(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match="f:7") as caught:
        parse_record(record(**changes), "f:7")
    assert expected in str(caught.value)


def test_all_bad_records_of_a_file_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    rows = [record(), record(video=None), record(conversations=[]), record(id="r4")]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    problems: list[str] = []
    assert len(read_records(path, problems)) == 2
    assert [p.split(" (")[0] for p in problems] == [f"{path}:2", f"{path}:3"]


@given(st.lists(st.sampled_from(["<t:1.25>", "<x:0.5>", "<y:1>", "<TEMP-007>", "text", " a<b "])))
def test_markup_splits_without_losing_a_character(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = split_markup(text)
    plain = "".join(piece for piece in found if isinstance(piece, str))
    coordinates = [piece for piece in found if isinstance(piece, Coordinate)]
    assert plain == "".join(piece for piece in pieces if piece in ("text", " a<b "))
    assert len(coordinates) == sum(piece.startswith("<") for piece in pieces)


def test_a_coordinate_outside_its_clip_or_frame_is_a_problem() -> None:
    turns = [
        {"from": "human", "value": "<video>\nx"},
        {"from": "gpt", "value": "<t:9.5> <x:1.2> <y:0.5>"},
    ]
    parsed: Record = parse_record(record(conversations=turns), "f:1")
    problems = list(map(str, check_coordinates(parsed, [4.0])))
    assert len(problems) == 2
    assert "time 9.5 is outside [0, 4]" in problems[0]
    assert "coordinate 1.2 is outside [0, 1]; places are fractions of the frame" in problems[1]


def test_shares_of_a_clip_are_written_in_seconds_of_it(
    make_bank: Callable[..., Path], tmp_path: Path
) -> None:
    arrays = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    longer = {stride: np.concatenate([array, array]) for stride, array in arrays.items()}
    banks = Banks.open([make_bank(tmp_path / "bank", {"a.mp4": arrays, "b.mp4": longer})])
    turns = [
        {"from": "human", "value": "<t:50%> <video> <t:41.3%> <video> <t:25%> <t:1.5>"},
        {"from": "gpt", "value": "at <t:100%>"},
    ]
    row = record(video=["a.mp4", "b.mp4"], conversations=turns)
    seconds = [banks.clip(id_).info.duration for id_ in ("a.mp4", "b.mp4")]
    joined, clipped, faults = resolved(parse_record(row, "f:1"), seconds, clip=True)
    assert (clipped, faults) == (False, [])
    assert joined.turns[0].text == (
        "<t:0.500000> <video> <t:0.413000> <video> <t:0.500000> <t:1.5>"
    )
    assert joined.turns[1].text == "at <t:2.000000>"
    # a picture beside it has no share of its own, and hinders none
    for answer, fits in (("<x:1><y:1>", True), ("at <t:50%>", False)):
        said = [{"from": "human", "value": "<video> <t:50%> <image>"}, turns[1] | {"value": answer}]
        beside = parse_record(record(video=["a.mp4", "p.jpg"], conversations=said), "f:1")
        joined, _, faults = resolved(beside, [1.0, 0.0], clip=True)
        assert joined.turns[0].text == "<video> <t:0.500000> <image>"
        assert [str(fault).partition(": ")[2] for fault in faults] == (
            [] if fits else ["a time in %, and a medium without a duration"]
        )
    text_only = parse_record(record(video=None, conversations=[turns[1]]), "f:2")
    _, _, faults = resolved(text_only, [], clip=True)
    assert list(map(str, faults)) == ["f:2 (id r1): a time in %, and a medium without a duration"]


def test_a_clip_that_is_banked_under_another_root_is_named(
    make_bank: Callable[..., Path], tmp_path: Path
) -> None:
    arrays = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    clips = {"x/a.mp4": arrays, "y/a.mp4": arrays}
    banks = Banks.open([make_bank(tmp_path / "bank", clips)])
    problems: list[str] = []
    assert join([parse_record(record(), "f:1")], banks, "error", problems) == []
    (line,) = problems
    assert "no bank knows the clip 'a.mp4'; the bank has 'x/a.mp4', 'y/a.mp4'" in line
    assert "--video-root" in line


def test_records_without_a_medium_are_kept(make_bank: Callable[..., Path], tmp_path: Path) -> None:
    arrays = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    banks = Banks.open([make_bank(tmp_path / "bank", {"a.mp4": arrays})])
    said = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    text_only = parse_record(record(video=None, conversations=said), "f:1")
    assert text_only.clips == ()
    problems: list[str] = []
    assert join([text_only], banks, "error", problems) == [text_only]
    assert problems == []


@given(seed=st.integers(0, 99), epoch=st.integers(0, 9), count=st.integers(1, 200))
def test_an_epoch_sees_each_record_once_in_an_order_that_only_the_numbers_decide(
    seed: int, epoch: int, count: int
) -> None:
    first = order(seed, epoch, count)
    assert sorted(first) == list(range(count))
    assert first == order(seed, epoch, count)


WHEREABOUTS = {"where", "source", "places"}
"""Facts of a record that say where it was read, and where its clips are."""


def test_each_fact_that_changes_what_is_asked_changes_the_digest_of_records() -> None:
    asked = Record("r", ("a", "b"), (Turn("user", "When?"), Turn("assistant", "<t:1>")), "", "x:1")
    others = {
        "id": "s",
        "clips": ("b", "a"),
        "turns": (Turn("user", "When?"), Turn("assistant", "<t:2>")),
        "task": "windows",
        "cuts": (Cut("a", 0.0, 1.0), Cut("b")),
        "independent": True,
    }
    digests = {
        name: records_digest([replace(asked, **{name: other})]) for name, other in others.items()
    }  # type: ignore[arg-type]

    assert others.keys() | WHEREABOUTS == {item.name for item in fields(Record)}
    assert len({records_digest([asked]), *digests.values()}) == len(others) + 1
    assert records_digest([replace(asked, where="y:7", source="z")]) == records_digest([asked])
    assert records_digest([asked, asked]) != records_digest([asked])
