"""The reasons of the quarantine: one list, said in the README, and no slug written anywhere else."""

import ast
import json
import pickle
from pathlib import Path

import pytest

from preprocess.decode.scan import VideoError
from shards.format.quarantine import QuarantineEntry, Reason

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("reason", Reason)
def test_the_readme_says_what_each_means_and_what_to_do(reason: Reason) -> None:
    row = f"| `{reason}` | {reason.meaning} | {reason.fix} |\n"
    assert row in (ROOT / "preprocess" / "README.md").read_text("utf-8")
    for text in (reason.meaning, reason.fix):
        assert text.endswith(".")
        assert "|" not in text


def test_no_slug_is_written_but_in_the_list() -> None:
    slugs = {reason.value for reason in Reason} - {"truncated", "damaged", "timeout", "stalled"}
    for package in ("preprocess", "shards"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "quarantine.py":
                constants = {
                    node.value
                    for node in ast.walk(ast.parse(path.read_text("utf-8")))
                    if isinstance(node, ast.Constant) and isinstance(node.value, str)
                }
                assert not constants & slugs, path


def test_an_entry_is_what_was_written() -> None:
    entry = QuarantineEntry("a.mp4", "a-1", "/a.mp4", "decode", Reason.DAMAGED, "damaged", 2, 0.25)
    line = entry.to_line()
    assert QuarantineEntry.from_line(line) == entry
    assert json.loads(line)["reason"] == "damaged"


def test_an_error_of_a_video_travels_between_processes() -> None:
    error = VideoError(Reason.TRUNCATED, "cut off", where=Path("a.mp4"), fix="fetch it again")
    for copy in (
        pickle.loads(pickle.dumps(error)),
        VideoError(*json.loads(json.dumps(error.args))),
    ):
        assert str(copy) == str(error) == "a.mp4: cut off; fetch it again"
        assert copy.reason is Reason.TRUNCATED
