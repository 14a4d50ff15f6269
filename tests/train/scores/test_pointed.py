"""What an answer points at, in markup and in plain numbers.

pytest tests/train/test_pointed.py
"""

from typing import Any

import pytest

from train.scores.pointed import pointed

WHEN, WHERE = "When is it?", "Give the box at <t:2.5>."
BOX, TEXT = (0.1, 0.2, 0.5, 0.6), "<x:0.1><y:0.2><x:0.5><y:0.6>"

CASES: list[tuple[str, str, Any, Any]] = [
    ("from <t:1.5> to <t:4>", WHEN, [(1.5, 4.0)], []),
    ("from <t:0> to <t:1>, from <t:3> to <t:4>", WHEN, [(0.0, 1.0), (3.0, 4.0)], []),
    ("at <t:2>", WHEN, [(2.0, 2.0)], []),
    ("from <t:4> to <t:1>", WHEN, [], []),
    ("never", WHEN, [], []),
    ("3", "How many at <t:2>?", [], []),
    (TEXT, WHERE, [], [((2.5,), BOX)]),
    (TEXT, "Where is it?", [], [((), BOX)]),
    (TEXT, "Where is it from <t:1> to <t:2>?", [], [((), BOX)]),
    ("<x:0.3><y:0.4>", WHERE, [], [((2.5,), (0.3, 0.4))]),
    (f"from <t:1> to <t:2> at {TEXT}", WHERE, [(1.0, 2.0)], [((), BOX)]),
    (f"<t:1>{TEXT}<t:2>{TEXT}", WHERE, [], [((1.0,), BOX), ((2.0,), BOX)]),
    (f"<t:1><t:2><t:1>{TEXT}", WHEN, [(1.0, 2.0)], [((1.0,), BOX)]),
    ("from 1.5 to 4.0", WHEN, [(1.5, 4.0)], []),
    ("0.1 0.2 0.5 0.6", WHERE, [], [((2.5,), BOX)]),
]


@pytest.mark.parametrize(("text", "question", "spans", "places"), CASES)
def test_spans_and_places_are_found(text: str, question: str, spans: Any, places: Any) -> None:
    found = pointed(text, question)
    assert (list(found.spans), list(found.places)) == (spans, places)
