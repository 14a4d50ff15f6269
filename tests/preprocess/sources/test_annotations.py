"""`encode` reads annotation files as training does: the same clips, refused with the same words.

pytest tests/preprocess/sources/test_annotations.py
"""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocess.sources.find import find_clips
from shards.annotations import forms
from shards.annotations.fault import RowError
from shards.annotations.forms import Json, canonical
from shards.errors import UserError
from train.data.records import read_records

README = Path(__file__).resolve().parents[3] / "README.md"
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
    try:
        return {clip.id for clip in find_clips([str(path)], [str(root)])}, []
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
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "FORMS[" in block]
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
