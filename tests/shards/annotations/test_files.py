"""Files that are not what their names say are read for what they are, or told what they are.

pytest tests/shards/annotations/test_files.py
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from shards.annotations.files import UnreadableRow, annotation_files, read_rows, stray_files
from shards.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"id": k, "video": f"{k}.mp4", "question": "Who?", "answer": "she\u2028"} for k in range(3)
]
LIST = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
BOM = b"\xef\xbb\xbf"

READ = {
    "lines in .json": ("r.json", LINES),
    "one line in .json": ("r.json", LINES.split(b"\n")[0]),
    "a list in .jsonl": ("r.jsonl", LIST),
    "a list without line ends in .jsonl": ("r.jsonl", json.dumps(ROWS).encode()),
    ".jsonl.gz": ("r.jsonl.gz", gzip.compress(LINES, mtime=0)),
    ".json.gz": ("r.json.gz", gzip.compress(LIST, mtime=0)),
    ".JSONL": ("r.JSONL", LINES),
    "gzip by another name": ("r.jsonl", gzip.compress(LINES, mtime=0)),
    "a byte order mark": ("r.jsonl", BOM + LINES),
    "a byte order mark before a list": ("r.json", BOM + LIST),
    "a byte order mark in gzip": ("r.jsonl.gz", gzip.compress(BOM + LINES, mtime=0)),
    "Windows' line ends": ("r.jsonl", LINES.replace(b"\n", b"\r\n")),
    "csv": ("r.csv", b"id,video,question,answer\n0,0.mp4,Who?,she\n"),
    "csv.gz": ("r.csv.gz", gzip.compress(b"id,video,question,answer\n0,0.mp4,Who?,she\n", mtime=0)),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_for_what_it_is(tmp_path: Path, name: str) -> None:
    file, data = READ[name]
    (tmp_path / file).write_bytes(data)
    rows = [row for _, row in read_rows(tmp_path / file)]
    assert [str(row["video"]) for row in rows] == [f"{k}.mp4" for k in range(len(rows))]
    assert len(rows) == (1 if "one line in .json" in name or "csv" in name else 3)
    assert [row for _, row in read_rows(tmp_path)] == rows, "of a folder, too"


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
HTML = b"\n<!DOCTYPE html><html><head><title>\n401 Unauthorized</title></head></html>"
TOLD: list[tuple[str, bytes, str]] = [
    ("r.json", LFS, "this is a Git LFS pointer for a file of 12,345 bytes, not the file; run `git lfs"),
    ("r.parquet", LFS, "this is a Git LFS pointer for a file of 12,345 bytes"),
    ("r.csv", LFS, "this is a Git LFS pointer"),
    ("r.json", HTML, "this is a web page ('401 Unauthorized'), not records; the download failed"),
    ("r.parquet", HTML, "this is a web page"),
    ("r.jsonl", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "this is XML, not"),
    ("r.json", b"", "the file is empty"),
    ("r.jsonl", b" \n\n", "the file is empty"),
    ("r.json", b"PK\x03\x04rest", "this is a ZIP archive; unpack it"),
    ("r.jsonl", b"\x28\xb5\x2f\xfdrest", "this is compressed with zstandard; unpack it: unzstd"),
    ("r.jsonl", b"BZh91AY", "this is compressed with bzip2; unpack it"),
    ("r.jsonl", b"PAR1rest", "this is a parquet file; let its name end in .parquet"),
    ("r.json", b"ARROW1\0\0", "this is an Arrow file; write it as parquet"),
    ("r.json", b"\x80\x04\x95", "this is a Python pickle"),
    ("r.jsonl", '{"id": 1}'.encode("utf-16"), "this is UTF-16 text; save it as UTF-8"),
    ("r.jsonl.gz", gzip.compress(LINES, mtime=0)[:40], "not readable as gzip"),
    ("r.jsonl.gz", gzip.compress(HTML, mtime=0), "this is a web page"),
    ("r.json", b'{"error": "Repository not found"}', "a server's answer ({'error': 'Repository not"),
    ("r.json", b'{"data": [{"id": 1}], "version": 2}', "the records may be the list 'data'; write it"),
    ("r.json", b'{"images": [], "annotations": []}', "a COCO file; python -m train.convert refcoco"),
    ("r.json", b'{"video": ["a.mp4"], "answer": ["x"]}', ""),
    ("r.json", b'{"id": [1, 2], "text": ["x", "y"]}', "a table by columns; write a list of its rows"),
    ("r.json", b'{"features": {}, "splits": {}}', "the description of a dataset; name the files"),
    ("r.json", b'{"v": {"st_time": 1}}', "HC-STVG; python -m train.convert hc-stvg makes records"),
    ("r.json", b'{"v": {"id": 1}}', "entries by name; write them as a list, the name as `id`"),
    ("r.json", b"3", "expected a list of records, got int"),
    ("r.csv", b"a.mp4 0\nb.mp4 1\n", "a list of paths and labels is not a list"),
    ("r.csv", b"a.mp4,0\nb.mp4,1\n", "the first line of a csv names its columns, got 'a.mp4, 0'"),
    ("r.csv", b"video;question;answer\na.mp4;x;y\n", "its columns are separated by semicolons; write"),
    ("r.csv", b"video\tquestion\tanswer\n", "its columns are separated by tabs; write commas"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "expected"), TOLD)
def test_a_file_of_something_else_is_told_what_it_is(
    tmp_path: Path, name: str, data: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    if not expected:
        assert [row for _, row in read_rows(path)] == [json.loads(data)], "a row, if a strange one"
        return
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_line_that_is_nested_too_deeply_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n' + "[" * 100_000 + '\n{"a": 2}\n')
    rows = dict(read_rows(path))
    assert (rows[f"{path}:1"], rows[f"{path}:3"]) == ({"a": 1}, {"a": 2})
    assert isinstance(rows[f"{path}:2"], UnreadableRow)
    assert "nested too deeply" in rows[f"{path}:2"]


def test_lists_as_python_prints_them_are_named_in_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("video,question,options,answer\na.mp4,Who?,\"['he' 'she']\",B\n")
    ((where, row),) = read_rows(path)
    assert where == f"{path}:2"
    assert str(row).startswith("`options` is a list or an object, and no JSON (")
    assert "write it with double quotes" in row


STRAY = {
    "dataset_info.json": {"features": {}, "splits": {}},
    "metadata.json": [{"license": "x"}],
    "stats.json": {"mean": 3, "nested": {"deep": [1, 2]}},
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_metadata_beside_records_is_passed_over(
    tmp_path: Path, suffix: str, indent: int | None
) -> None:
    if suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    else:
        (tmp_path / f"r{suffix}").write_bytes(LIST if suffix == ".json" else LINES)
    if suffix == ".json":
        (tmp_path / "lines.json").write_bytes(LINES)
    for name, content in STRAY.items():
        (tmp_path / name).write_text(json.dumps(content, indent=indent))
    assert [file.name for file in stray_files(tmp_path)] == sorted(STRAY)
    assert len(list(read_rows(tmp_path))) == (6 if suffix == ".json" else 3)


def test_a_folder_of_metadata_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"no annotation files.*metadata alone: dataset_info\.json"):
        annotation_files(tmp_path)


def test_a_saved_dataset_is_told_what_it_is(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one, split = tmp_path / "one", tmp_path / "split"
    made = datasets.Dataset.from_list([{"video": "a.mp4", "caption": "x"}])
    made.save_to_disk(str(one))
    datasets.DatasetDict({"train": made}).save_to_disk(str(split))
    for folder, part in ((one, ""), (split, "['train']")):
        with pytest.raises(UserError) as caught:
            list(read_rows(folder))
        text = str(caught.value)
        assert text.startswith(f"{folder}: this folder was written by datasets' save_to_disk")
        code = text.partition('python -c "')[2].removesuffix('"')
        assert f"load_from_disk('{folder}'){part}.to_parquet" in code
        exec(code.replace("records.parquet", str(folder.with_suffix(".parquet"))))
        assert [row for _, row in read_rows(folder.with_suffix(".parquet"))] == [
            {"video": "a.mp4", "caption": "x"}
        ]
