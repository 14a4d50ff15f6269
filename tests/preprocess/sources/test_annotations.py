"""`encode` reads annotation files as training does: the same clips, refused with the same words.

pytest tests/preprocess/sources/test_annotations.py
"""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from preprocess.sources.find import FindOptions, find_clips
from preprocess.sources.skips import Why, report, write_skips
from shards.annotations import forms
from shards.annotations.fault import RowError
from shards.annotations.forms import Json, canonical
from shards.errors import UserError
from tests.readmes import python_block
from train.data.records import read_records

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def says(*values: str) -> list[Json]:
    return [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]


def chat(*contents: object) -> list[Json]:
    return [{"role": ("user", "assistant")[k % 2], "content": c} for k, c in enumerate(contents)]


QWEN = {"id": "q", "video": "a.mp4", "conversations": says("<video>\nWhat?", "this")}
READ: dict[str, Json] = {
    "LLaVA": {"id": 1, "video": "sub/b.mp4", "conversations": says("<image>\nWhat?", "x", "y?", "z")},
    "a folder of frames": {"video": "frames", "conversations": says("<image>\nWhat?", "a man")},
    "a picture": {"image": "p.png", "conversations": says("<image>\nWhat?", "a man")},
    "Qwen": QWEN,
    "a part": QWEN | {"start": 1.5, "end": 3.0},
    "an open part": QWEN | {"start": 1.5},
    "a name with a dot": QWEN | {"video": "./a.mp4"},
    "a file URL of one level": QWEN | {"video": "file://a.mp4"},
    "a path in an object": QWEN | {"video": {"path": "a.mp4", "bytes": None}},
    "several": QWEN | {"video": ["a.mp4", "sub/b.mp4"], "conversations": says("<video><video>?", "x")},
    "two kinds": {"video": "a.mp4", "image": "p.png", "conversations": says("<image><video>?", "x")},
    "messages": {"messages": chat("<video>What?", "this"), "videos": ["a.mp4"]},
    "OpenAI": {"messages": chat(
        [{"type": "image_url", "image_url": {"url": "p.png"}},
         {"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Same?"}],
        [{"type": "text", "text": "yes"}])},
    "times in a message": {"messages": chat(
        [{"type": "video", "video": "a.mp4", "video_start": 1, "video_end": 2.5}],
        [{"type": "text", "text": "it"}])},
    "a question": {"video": "a.mp4", "question": "Who?", "answer": "she"},
    "options": {"video": "a.mp4", "question": "Who?", "options": ["x", "y"], "answer": "B"},
    "a caption": {"videos": ["sub/b.mp4"], "caption": "A man."},
    "slots": {"video": "a.mp4", "conversations": says("<video>When?", "<TEMP-OUTPUT>"),
              "variables": {"temporal_output_locations": [0.25]}},
    "text alone": {"conversations": says("Hello?", "yes")},
}  # fmt: skip
REFUSED: dict[str, object] = {
    "no object": ["video"],
    "two forms": {"question": "?", "answer": "!", "caption": "c"},
    "tags of other media": QWEN | {"conversations": says("<video> <video>What?", "this")},
    "an unknown role": QWEN | {"conversations": [{"from": "alien", "value": "<video>"}]},
    "no list": QWEN | {"conversations": "x"},
    "out of its root": QWEN | {"video": "../a.mp4"},
    "absolute": QWEN | {"video": "/a.mp4"},
    "a URL": QWEN | {"video": "https://x.org/a.mp4"},
    "bytes": QWEN | {"video": {"bytes": "AAAA", "path": "a.mp4"}},
    "a number": QWEN | {"video": 3},
    "a part backwards": QWEN | {"start": 2.0, "end": 1.0},
    "half a letter": QWEN | {"conversations": says("<video>\ud800", "x")},
    "half a letter in a name": QWEN | {"video": "\ud800.mp4"},
    "no answer": {"video": "a.mp4", "question": "Who?"},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Media by the names that the rows use."""
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    (folder / "frames").mkdir()
    for name in ("a.mp4", "sub/b.mp4"):
        (folder / name).write_bytes(name.encode())
    for name in ("p.png", "frames/0.png"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name)
    return folder


def written(path: Path, rows: list[Any]) -> Path:
    """Write rows as a file of the kind that its name says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            for row in rows:
                plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                writer.writerow(plain)
    else:
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def trained_on(path: Path) -> tuple[set[str], list[str]]:
    """Return the clips that training knows the records of a file by, and what it refuses."""
    problems: list[str] = []
    records = read_records(path, problems)
    return {id_ for record in records for id_ in record.clips}, problems


def encoded(path: Path, root: Path) -> tuple[set[str], list[str]]:
    """Return the ids that encode gives the clips of a file, and what it refuses."""
    lookup = FindOptions(video_roots=(str(root),))
    try:
        return {clip.id for clip in find_clips([str(path)], lookup).clips}, []
    except UserError as error:
        return set(), error.problems


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("form", READ)
def test_every_form_in_every_kind_of_file_gives_the_ids_that_training_asks_for(
    root: Path, tmp_path: Path, form: str, suffix: str
) -> None:
    path = written(tmp_path / f"r{suffix}", [READ[form]])
    clips, problems = trained_on(path)
    if form == "text alone":
        assert encoded(path, root) == (set(), [f"{path}: names no media"])
        return
    assert clips
    assert problems == []
    assert encoded(path, root) == (clips, [])


@pytest.mark.parametrize("form", REFUSED)
def test_what_training_refuses_encode_refuses_with_the_same_words(
    root: Path, tmp_path: Path, form: str
) -> None:
    path = written(tmp_path / "r.json", [QWEN, REFUSED[form]])
    _, problems = trained_on(path)
    assert len(problems) == 1
    assert encoded(path, root) == (set(), problems)


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe{", b'{"a": 1}', b'[{"video": ', b'"a.mp4"'],
    ids=["not UTF-8", "no list", "cut off", "a text"],
)
def test_a_file_that_is_none_is_refused_alike(root: Path, tmp_path: Path, data: bytes) -> None:
    for suffix in (".json", ".parquet"):
        path = tmp_path / f"r{suffix}"
        path.write_bytes(data)
        _, problems = trained_on(path)
        assert len(problems) == 1
        assert encoded(path, root) == (set(), problems)


def test_a_byte_order_mark_is_no_letter(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(QWEN).encode())
    assert encoded(path, root) == trained_on(path) == ({"a.mp4"}, [])


def test_a_byte_order_mark_where_files_were_joined_is_no_letter(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    row = b"\xef\xbb\xbf" + json.dumps(QWEN).encode() + b"\n"
    path.write_bytes(row + b"\xef\xbb\xbf" + row)
    assert encoded(path, root) == ({"a.mp4"}, [])


CHAT = '"conversations": [{"from": "human", "value": %s}, {"from": "gpt", "value": "x"}]'
ODD_LINES: dict[str, tuple[str, str]] = {
    "a bool as start": ('{"video": "a.mp4", "start": true}', "start must be seconds, not neg"),
    "a bool as end": ('{"video": "a.mp4", "end": false}', "end must be seconds, not negative"),
    "a list in a list": ('{"video": [["a.mp4"]]}', "`video`: a medium is a list of 1"),
    "an object": (
        '{"videos": {"a": 1, "b": null}}',
        "`videos`: a medium must be a path, got {'a': 1, 'b': null}",
    ),
    "a number": ('{"image": 3}', "`image`: a medium must be a path, got 3"),
    "null": ("null", "expected an object, got null"),
    "a list": ('["a.mp4"]', "expected an object, got list"),
    "an object as text": (
        "{" + CHAT % '{"a": null}' + "}",
        "a turn's value must be a text or a list",
    ),
    "null as an option": (
        '{"video": "a.mp4", "question": "?", "options": [null, "b"], "answer": "b"}',
        "`options`, expected a text, got null",
    ),
    "a list as a folder": (
        '{"video": "a.mp4", "media_dir": ["x", null]}',
        "media_dir must be a folder, got ['x', null]",
    ),
    "cut off": ('{"video": "a.m', "not JSON: Unterminated string starting at (column 11)"),
    "cut off before a value": ('{"video":', "not JSON: Expecting value (column 10)"),
}


@pytest.mark.parametrize("odd", ODD_LINES)
def test_an_odd_line_is_told_by_file_line_and_field_in_json_words(
    root: Path, tmp_path: Path, odd: str
) -> None:
    line, said = ODD_LINES[odd]
    path = tmp_path / "r.jsonl"
    path.write_text(f"{json.dumps(QWEN)}\n{line}")
    (told,) = encoded(path, root)[1]
    assert told.startswith(f"{path}:2: {said}")
    assert not re.search(r"\b(None|True|False|NoneType)\b", told)
    assert told.endswith("is the file cut short?") == ("cut off" in odd)
    dropped = find_clips([str(path)], FindOptions(video_roots=(str(root),), on_bad_record="drop"))
    assert [clip.id for clip in dropped.clips] == ["a.mp4"]
    assert [(skip.reason, skip.where) for skip in dropped.skips] == [(Why.BAD_ROW, f"{path}:2")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": {"video": "a.mp4"}}', "an object with 'a': entries by name; write them as a list"),
        ('{"data": [{"video": "a.mp4"}]}', "the records may be the list 'data'"),
        ("null", "expected a list of records, got null"),
        ('[{"video": "a.mp4"},\n {"vid', "not readable as records: line 2, column 3: Unterminated"),
    ],
    ids=["a dict", "a list in a dict", "null", "cut off"],
)
def test_a_json_file_that_is_no_list_says_what_it_is(
    root: Path, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    (told,) = encoded(path, root)[1]
    assert told.startswith(f"{path}: ")
    assert said in told
    assert not re.search(r"\b(None|NoneType)\b", told)


def test_rows_of_missing_videos_stop_the_run_or_are_dropped_and_listed(
    root: Path, tmp_path: Path
) -> None:
    names = ["a.mp4", "gone1.mp4", "sub/b.mp4", "gone2.mp4", "gone1.mp4", "gone3.mp4", "gone4.mp4"]
    path = written(tmp_path / "r.jsonl", [{"video": name} for name in names])
    (told,) = encoded(path, root)[1]
    assert "4 of 6 videos not found, first 'gone1.mp4', 'gone2.mp4', 'gone3.mp4' and 1 more" in told
    assert told.endswith("or leave their rows out: --missing drop")
    found = find_clips([str(path)], FindOptions(video_roots=(str(root),), missing="drop"))
    assert [clip.id for clip in found.clips] == ["a.mp4", "sub/b.mp4"]
    lost = [f"{path}:{line}" for line in (2, 4, 5, 6, 7)]
    assert [(skip.reason, skip.where) for skip in found.skips] == [(Why.MISSING, at) for at in lost]
    (line,) = report(found.skips, tmp_path)
    assert line == (
        "skipped: 5 rows whose videos are not found: gone1.mp4, gone2.mp4, gone1.mp4 and 2 more; all "
        f"in {tmp_path}/skipped.jsonl"
    )
    write_skips(tmp_path, found.skips)
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in listed] == lost
    write_skips(tmp_path, [])
    assert not (tmp_path / "skipped.jsonl").exists()
    path = written(tmp_path / "r.jsonl", [{"video": "gone.mp4"}])
    with pytest.raises(UserError, match="no clips are left to encode; skipped: 1 row whose video"):
        find_clips([str(path)], FindOptions(missing="drop"))


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_a_name_in_another_unicode_form_is_found_and_told(tmp_path: Path, on_disk: str) -> None:
    folder = tmp_path / normalize(on_disk, "vidéos")
    folder.mkdir()
    (folder / normalize(on_disk, "é.mp4")).write_bytes(b"video")
    said = normalize({"NFC": "NFD", "NFD": "NFC"}[on_disk], "vidéos/é.mp4")
    path = written(tmp_path / "r.jsonl", [{"video": said}])
    found = find_clips([str(path)])
    (clip,) = found.clips
    assert (clip.id, Path(clip.path).read_bytes()) == (said, b"video")
    (note,) = found.notes
    assert note.startswith(f"note: {path} writes 1 names in another Unicode form (NFC, NFD)")
    path = written(tmp_path / "r.jsonl", [{"video": normalize(on_disk, "vidéos/é.mp4")}])
    assert find_clips([str(path)]).notes == []


def test_a_folder_without_videos_may_hold_annotation_files_of_one_kind(
    root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "annotations"
    (folder / "sub").mkdir(parents=True)
    written(folder / "one.jsonl", [QWEN])
    written(folder / "sub" / "two.jsonl", [QWEN | {"start": 1, "end": 2}])
    assert encoded(folder, root) == trained_on(folder) == ({"a.mp4", "a.mp4#1-2"}, [])
    written(folder / "three.json", [QWEN])
    assert encoded(folder, root)[1] == trained_on(folder)[1] != []


def test_a_dataset_of_the_hub_is_read_from_its_copy(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "datasets--some--data"
    part = repo / "snapshots" / ("a" * 40) / "part"
    part.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    written(part / "r.json", [QWEN])
    assert encoded(Path("some/data:part"), root) == ({"a.mp4"}, [])
    (line,) = encoded(Path("other/data"), root)[1]
    assert "hf download other/data" in line
    (line,) = encoded(Path("other/data.mp4"), root)[1]
    assert line == "other/data.mp4: no such file or folder"


def test_parquet_without_pyarrow_says_what_to_install(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "r.parquet", [QWEN])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert encoded(path, root)[1] == [f"{path}: parquet needs pyarrow; pip install pyarrow"]


def test_a_row_may_be_media_alone_and_an_answer_is_not_needed(root: Path, tmp_path: Path) -> None:
    asked = {"video": "sub/b.mp4", "conversations": says("<video>What?")}
    rows = [{"video": "a.mp4"}, {"image": "p.png", "video": "a.mp4", "start": 1}, asked]
    path = written(tmp_path / "r.json", rows)
    assert encoded(path, root)[0] == {"a.mp4", "a.mp4#1-", "p.png#1-", "sub/b.mp4"}
    bad: list[RowError] = []
    problems: list[str] = []
    read_records(written(tmp_path / "q.json", [asked]), problems, bad)
    assert ([error.reason for error in bad], problems) == (["no supervised text"], [])


def test_many_bad_rows_do_not_flood_the_terminal(root: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", [QWEN | {"video": "../a.mp4"}] * 1000)
    problems = encoded(path, root)[1]
    assert len(problems) == 31
    assert problems[-1] == f"{path}: and 970 more like these"


def test_the_form_that_the_readme_adds_is_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = python_block("train/README.md", "Add a format")
    monkeypatch.setattr(forms, "FORMS", dict(forms.FORMS))
    exec(block, {})
    row = {
        "id": "d",
        "video": "a.mp4",
        "dense_captions": [[0, 2.5, "A man sits."], [3, 4, "He goes."]],
    }
    assert canonical(row)["conversations"] == says(
        "<video>\nDescribe what happens, and when.",
        "<t:0> to <t:2.5>: A man sits.\n<t:3> to <t:4>: He goes.",
    )
    path = written(tmp_path / "r.json", [row])
    assert encoded(path, root) == trained_on(path) == ({"a.mp4"}, [])
