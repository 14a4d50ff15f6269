"""What a run was trained with, in words: which setting was what, which record file changed.

pytest tests/train/test_recorded.py
"""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from model.config import VLMConfig
from train.settings.recorded import facts_changed, files_changed, write_run

A, B, C = ("a1" * 16, "b2" * 16, "c3" * 16)
BEFORE = {"0 a.jsonl": f"{A} 30 x 1", "1 b.json": f"{B} 5 x 2"}
FILES: list[tuple[dict[str, str], list[str]]] = [
    (BEFORE, []),
    ({"0 moved.jsonl": f"{A} 30 x 1", "1 renamed.json": f"{B} 5 x 2"}, []),
    (
        {"0 a.jsonl": f"{C} 31 x 1", "1 b.json": f"{B} 5 x 2"},
        ["record file a.jsonl has changed (it gave 30 records, now 31)"],
    ),
    (
        {"0 c.jsonl": f"{C} 31 x 1", "1 b.json": f"{B} 5 x 2"},
        [
            "record file a.jsonl (30 records) is missing now",
            "record file c.jsonl (31 records) is new",
        ],
    ),
    ({"0 a.jsonl": f"{A} 30 x 1"}, ["record file b.json (5 records) is missing now"]),
    (BEFORE | {"2 c.csv": f"{C} 1 x 1"}, ["record file c.csv (1 records) is new"]),
    (
        {"0 b.json": f"{B} 5 x 2", "1 a.jsonl": f"{A} 30 x 1"},
        ["the order of the record files was a.jsonl, b.json, is now b.json, a.jsonl"],
    ),
    (
        {"0 a.jsonl": f"{A} 30 x 3", "1 d.json": f"{B} 4 x 2"},
        [
            "record file a.jsonl was taken x 1, is now x 3",
            "of record file d.json 5 records were taken, now 4",
        ],
    ),
]


@pytest.mark.parametrize(("now", "expected"), FILES)
def test_a_record_file_is_known_by_its_bytes(now: dict[str, str], expected: list[str]) -> None:
    assert files_changed(BEFORE, now) == expected


def test_what_is_known_by_a_digest_is_told_in_words() -> None:
    before = {"bank": {"tower_digest": A, "pool": "max"}, "plan": {"tokenizer": A, "clips": A}}
    now = {"bank": {"tower_digest": B, "pool": "average"}, "plan": {"tokenizer": B, "clips": B}}
    lines = facts_changed(before, now)
    assert lines == [
        'bank pool was "max", is now "average"',
        "the bank is of another tower: other weights, or another config.json",
        "the bank holds other times or features of the records' clips: it was encoded again",
        "the LLM that stage_path names has another tokenizer",
    ]
    more = {"records": BEFORE}, {"records": {"0 a.jsonl": f"{C} 31 x 1"}}
    lines = facts_changed({"plan": before["plan"] | more[0]}, {"plan": now["plan"] | more[1]})
    assert not [line for line in lines if A[:6] in line or "clips" in line]
    assert facts_changed(before, json.loads(json.dumps(before))) == []


def test_a_setting_that_an_older_run_did_not_know_was_as_its_default_is() -> None:
    now = asdict(VLMConfig(frame_marks="none", mm_projector_type="linear"))
    before = {k: v for k, v in now.items() if k not in ("frame_marks", "frame_positions")}
    lines = facts_changed({"model": before}, {"model": now})
    assert lines == ['frame_marks was "frames", is now "none"']
    assert facts_changed({"model": before}, {"model": now | {"frame_marks": "frames"}}) == []


def test_settings_of_earlier_steps_are_kept(tmp_path: Path) -> None:
    def told() -> object:
        facts = json.loads((tmp_path / "run.json").read_text())
        return [(f["config"]["lr"], f["since_step"]) for f in [*facts.get("before", []), facts]]

    write_run(tmp_path, {"lr": 1, "resume": "auto"}, 0)
    write_run(tmp_path, {"lr": 1, "resume": "none"}, 5)  # says nothing of the weights
    assert told() == [(1, 0)]
    write_run(tmp_path, {"lr": 2}, 5)
    write_run(tmp_path, {"lr": 2}, 5)  # at its next save
    assert told() == [(1, 0), (2, 5)]
    write_run(
        tmp_path, {"lr": 3}, 4
    )  # from an older checkpoint: what came after it is not in there
    assert told() == [(1, 0), (3, 4)]
    write_run(tmp_path, {"lr": 4}, 8)
    write_run(tmp_path, {"lr": 4}, 6)  # the same settings, and from an older checkpoint, too
    assert told() == [(1, 0), (3, 4), (4, 6)]
    write_run(tmp_path, {"lr": 4}, 9)
    assert told() == [(1, 0), (3, 4), (4, 6)]
    write_run(tmp_path, {"lr": 1}, 3)  # back at the first ones, of which nothing is kept but them
    assert told() == [(1, 0)]
    write_run(tmp_path, {"lr": 4}, 0)
    assert told() == [(4, 0)]
    (tmp_path / "run.json").write_text('{"config": {"lr": 1}}')  # as earlier versions wrote it
    write_run(tmp_path, {"lr": 2}, 7)
    assert told() == [(1, 0), (2, 7)]
