"""Rows that are read as a whole are read as turn by turn, and no field that matters is passed over.

pytest tests/shards/annotations/test_plain.py
"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.annotations import forms, records
from shards.annotations.fields import Fields, kinds_of
from shards.annotations.forms import canonical

TEXTS = ["Who?", "she", "", " ", "<video>", "<video>\nWhen?", "<image>", "\\<video> it", "<t:1.5>"]
TEXTS += ["<TEMP-INPUT>", "é 漢字", "<video><video>", "\ud800", "a\nb", "<|im_end|>"]
NAMES = [("human", "gpt"), ("user", "assistant"), ("Human", "gpt"), ("system", "human")]
ASIDE: dict[str, st.SearchStrategy[Any]] = {
    **{
        "id": st.sampled_from(["r1", 3, None, ""]),
        "task": st.sampled_from(["span", "", " ", 3, None]),
    },
    **{
        "data_source": st.just("x"),
        "fps": st.just(3),
        "meta": st.sampled_from([{"split": [1, 2]}, {}]),
    },
    **{"answer": st.sampled_from(["she", "he", None]), "start": st.sampled_from([None, 1.0])},
    **{
        "system": st.sampled_from(["", "Be brief."]),
        "timestamps": st.sampled_from([[1, 2], ["a"]]),
    },
    **{
        "video_id": st.just("v"),
        "question": st.sampled_from(["Who?", None]),
        "image": st.just("b.png"),
    },
    **{
        "messages": st.sampled_from([None, []]),
        "variables": st.just({"temporal_input_locations": [0.5]}),
    },
}
OUTSIDE = ["/a.mp4", "b/../../a", "file:///a", "http://x/a"]
VIDEOS: st.SearchStrategy[Any] = st.sampled_from(
    ["a.mp4", "", " ", *OUTSIDE, "é", "\ud800", ["a.mp4"], ["a.mp4", "b.mp4"], None, 3]
)
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        *({"from": "gpt"}, {"role": "user", "content": "x"}, "ab", 3, {"from": 1, "value": "x"}),
        *({"from": "gpt", "value": None}, {"from": "gpt", "value": "x", "image": "y"}),
    ]
)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.sampled_from(NAMES))
    texts = draw(st.lists(st.sampled_from(TEXTS), max_size=6))
    talk: list[Any] = [{"from": names[k % 2], "value": text} for k, text in enumerate(texts)]
    if talk and draw(st.integers(0, 4)) == 0:
        talk[draw(st.integers(0, len(talk) - 1))] = draw(ODD)
    row = {"video": draw(VIDEOS), "conversations": talk}
    for name in draw(st.lists(st.sampled_from(sorted(ASIDE)), max_size=2, unique=True)):
        row[name] = draw(ASIDE[name])
    return row


def outcome(read: Any, *args: Any) -> object:
    try:
        return read(*args)
    except UnicodeEncodeError as error:
        return type(error)  # at which place in which text is not said to anybody
    except records.RowError as error:
        return type(error), str(error)


@given(row=rows(), allow_outside=st.booleans())
def test_a_row_read_as_a_whole_is_the_one_read_by_turns(
    row: dict[str, Any], allow_outside: bool
) -> None:
    whole = outcome(records._plain, row, "r:1", allow_outside)

    def by_turns() -> object:
        return records._parse(canonical(row), "r:1", allow_outside, False)

    assert whole is None or whole == outcome(by_turns)


@pytest.mark.parametrize("names", NAMES[:2])
@pytest.mark.parametrize("tag", ["", "<video>\n", "<image>"])
def test_plain_rows_are_read_as_a_whole(names: tuple[str, str], tag: str) -> None:
    texts = [f"{tag}Who?", "she", "And?", "é"]
    talk = [{"from": names[k % 2], "value": text} for k, text in enumerate(texts)]
    row = {"id": "r", "video": "a.mp4", "conversations": talk, "fps": 3, "video_id": "a", "x": None}
    assert records._plain(row, "r", False) == records._parse(canonical(row), "r", False, False)


def test_all_fields_that_are_looked_up_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    class Watched(Fields):
        def __contains__(self, name: object) -> bool:
            asked.add(name)
            return super().__contains__(name)

        def __getitem__(self, name: str) -> Any:
            asked.add(name)
            return super().__getitem__(name)

        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return super().get(name, default)

    monkeypatch.setattr(forms, "Fields", Watched)
    talk = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "x"}]
    canonical({"id": "r", "video": "a.mp4", "conversations": talk, "fps": 3})
    known = records.PLAIN | records.READ | set(forms.FORMS)
    assert asked >= {"start", "timeline", "variables", "media_dir", "is_video"}
    assert {name for name in asked - known if not kinds_of(name)[0]} == set()
