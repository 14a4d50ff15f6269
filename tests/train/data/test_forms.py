"""Forms of records: each read as it is published, each common mistake named, none guessed."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.annotations.files import annotation_files, is_hub_name, local_copy, read_rows
from shards.annotations.forms import DESCRIBE, canonical
from shards.annotations.selection import Selection
from shards.errors import UserError
from train.convert import main
from train.data.records import Record, parse_record, read_records

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[3]


def says(*values: str) -> list[Row]:
    return [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]


def chat(*contents: object) -> list[Row]:
    return [
        {"role": ("user", "assistant")[k % 2], "content": content}
        for k, content in enumerate(contents)
    ]


LLAVA_VIDEO = {
    "id": "academic_source/Charades/AO8RW",
    "conversations": says("<image>\nWhat is held?", "a book", "Which colour?", "red"),
    "data_source": "0_30_s_academic_v0_1",
    "video": "academic_source/Charades/AO8RW.mp4",
}
MULTI_CHOICE = {
    "id": 1234,
    "conversations": says("<image>\nWhich?\nA. one\nB. two\nAnswer with the letter.", "B."),
    "data_source": "0_30_s_nextqa",
    "video": "NExTQA/0000/2440175990.mp4",
}
FRAME_FOLDER = {
    "id": "v_-D1gdv_gQyw",
    "conversations": says("<image>\nDescribe it.", "A man."),
    "data_source": "llava_hound",
    "video": "activitynet/v_-D1gdv_gQyw",
}
QWEN = {"id": "q", "video": "a.mp4", "conversations": says("<video>\nWhat?", "this")}
QWEN_MESSAGES = {"messages": chat("<video>What?", "this"), "videos": ["a.mp4"]}
OPENAI = {
    "id": "o",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "s/p.jpg"},
                {"type": "video_url", "video_url": {"url": "a.mp4"}},
                {"type": "text", "text": "Same?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ],
}
# a Hub dataset's columns hold what other rows have, as nulls
NULLS = {
    "messages": [
        {
            "role": "user",
            "content": [{"type": "video", "text": None}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "!", "video": None}]},
    ],
    "videos": ["a.mp4"],
    "images": None,
}

FORMS: list[tuple[Row, tuple[str, ...], list[tuple[str, str]]]] = [
    (
        LLAVA_VIDEO,
        ("academic_source/Charades/AO8RW.mp4",),
        [
            ("user", "<image>\nWhat is held?"),
            ("assistant", "a book"),
            ("user", "Which colour?"),
            ("assistant", "red"),
        ],
    ),
    (
        MULTI_CHOICE,
        ("NExTQA/0000/2440175990.mp4",),
        [
            ("user", "<image>\nWhich?\nA. one\nB. two\nAnswer with the letter."),
            ("assistant", "B."),
        ],
    ),
    (
        FRAME_FOLDER,
        ("activitynet/v_-D1gdv_gQyw",),
        [("user", "<image>\nDescribe it."), ("assistant", "A man.")],
    ),
    (QWEN, ("a.mp4",), [("user", "<video>\nWhat?"), ("assistant", "this")]),
    (QWEN_MESSAGES, ("a.mp4",), [("user", "<video>What?"), ("assistant", "this")]),
    (
        OPENAI,
        ("s/p.jpg", "a.mp4"),
        [("system", "Be brief."), ("user", "<image><video>Same?"), ("assistant", "yes")],
    ),
    (NULLS, ("a.mp4",), [("user", "<video>?"), ("assistant", "!")]),
    (
        {
            "messages": chat(
                [{"type": "video", "video": "a.mp4", "video_start": 1, "video_end": 2.5}, "What?"],
                "it",
            )
        },
        ("a.mp4#1-2.5",),
        [("user", "<video>What?"), ("assistant", "it")],
    ),
    # the media in the order of their tags, whatever the order of the fields
    (
        {
            "video": ["a.mp4", "b.mp4"],
            "image": "p.jpg",
            "conversations": says("<video> <image> <video>?", "x"),
        },
        ("a.mp4", "p.jpg", "b.mp4"),
        [("user", "<video> <image> <video>?"), ("assistant", "x")],
    ),
    # turns as some ShareGPT files have them, and no medium at all
    (
        {"conversations": chat("What is 1 + 1?", "2")},
        (),
        [("user", "What is 1 + 1?"), ("assistant", "2")],
    ),
    (
        {"video": "a.mp4", "question": "Who?", "answer": "she"},
        ("a.mp4",),
        [("user", "<video>\nWho?"), ("assistant", "she")],
    ),
    (
        {"image": "p.jpg", "caption": "A cat."},
        ("p.jpg",),
        [("user", f"<image>\n{DESCRIBE}"), ("assistant", "A cat.")],
    ),
    (
        {"video": "v.mp4", "question": "Why?", "options": ["(A) x", "(B) y"], "answer": "b"},
        ("v.mp4",),
        [
            ("user", "<video>\nWhy?\nA. x\nB. y\nAnswer with the letter and the option."),
            ("assistant", "B. y"),
        ],
    ),
    # NExT-QA: five columns, and the number of the right one
    (
        {"video": "v.mp4", "question": "Why", "a0": "p", "a1": "q", "a2": "r", "answer": 2},
        ("v.mp4",),
        [
            ("user", "<video>\nWhy\nA. p\nB. q\nC. r\nAnswer with the letter and the option."),
            ("assistant", "C. r"),
        ],
    ),
]


def simple(record: Record) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    return record.clips, [(turn.role, turn.text) for turn in record.turns]


@pytest.mark.parametrize(("row", "clips", "turns"), FORMS)
def test_a_row_of_each_form_is_the_record_that_it_means(
    row: Row, clips: tuple[str, ...], turns: list[tuple[str, str]]
) -> None:
    kept = json.dumps(row)
    assert simple(parse_record(row, "f:1")) == (clips, turns)
    assert json.dumps(row) == kept, "a row is not changed by being read"


@pytest.mark.parametrize("row", [row for row, _, _ in FORMS])
def test_what_a_form_becomes_is_of_our_form_and_stays_the_same(row: Row) -> None:
    ours = canonical(row)
    assert set(ours) <= {"id", "video", "start", "end", "task", "data_source", "conversations"}
    assert canonical(json.loads(json.dumps(ours))) == ours
    # all that a record is made of: the folder that LLaVA-Video's clips lie in was left out once
    assert parse_record(ours, "f:1") == parse_record(row, "f:1")


URL = {"type": "video", "video": "https://x.org/a.mp4"}
FIELDS = (
    *("id", "video", "videos", "image", "images", "start", "end", "task", "conversations"),
    *("messages", "question", "answer", "options", "a0", "caption", "variables"),
)
BAD: list[tuple[object, str]] = [
    (["video"], "expected an object, got list"),
    ({"video": "a.mp4"}, "one of conversations, messages, question, caption; got 'video'"),
    (QWEN | {"messages": chat("x", "y")}, "got both conversations and messages"),
    ({"question": "?", "answer": "!", "caption": "c"}, "got both question and caption"),
    (QWEN | {"video": None}, "1 <video>/<image> tags for 0 media"),
    (QWEN | {"video": ["a.mp4", "b.mp4"]}, "1 <video>/<image> tags for 2 media"),
    (QWEN | {"videos": ["a.mp4"]}, "both video and videos name media"),
    (QWEN | {"image": "p.jpg"}, "1 <video> tags for 1, 0 <image> tags for 1: which tag is which"),
    (QWEN | {"start": 2, "end": 1}, "start 2 is not before end 1"),
    (QWEN | {"start": "2"}, "start must be seconds, not negative, got '2'"),
    (QWEN | {"start": float("nan")}, "start must be seconds, not negative, got nan"),
    (QWEN | {"end": -1}, "end must be seconds, not negative, got -1"),
    (QWEN | {"conversations": [{"from": "user2", "value": "x"}]}, "unknown role 'user2'; known"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
    (QWEN | {"conversations": [{"from": "human", "role": "user", "value": "x"}]}, "a turn needs"),
    (QWEN | {"conversations": "x"}, "`conversations` must be a list, got 'x'"),
    (QWEN | {"conversations": [3]}, "a turn needs `from` (human or gpt) and `value`, got 3"),
    (QWEN | {"conversations": says("<video>?")}, "no supervised text"),
    (QWEN | {"conversations": says("<video>\ud800", "x")}, "half of a UTF-16 pair"),
    (QWEN | {"video": {"bytes": "AAAA", "path": "a.mp4"}}, "bytes are in the row"),
    (QWEN | {"video": 3}, "a medium must be a path, got 3"),
    (QWEN | {"video": ""}, "1 <video>/<image> tags for 0 media"),
    ({"messages": chat([URL, "?"], "x")}, "must be a path, got 'https://x.org/a.mp4'; download"),
    ({"messages": chat([{"type": "image_url", "image_url": "data:image/png;base64,AA"}], "x")},
     "a medium must be a path, got 'data:"),
    ({"messages": chat([{"type": "video", "video": ["f1.jpg", "f2.jpg"]}], "x")},
     "a list of 2 frames; name the folder"),
    ({"messages": chat([{"type": "audio", "audio": "a.wav"}], "x")}, "`type` text, video or image"),
    ({"messages": chat([{"type": "video", "video": "a.mp4"}], "x"), "videos": ["a.mp4"]},
     "media both in the messages and in a field"),
    ({"messages": chat([{"type": "video", "video": "a.mp4"}, "what is <video>?"], "x")},
     "2 <video>/<image> tags for 1 media"),
    ({"messages": chat([{"type": "video", "video": "a.mp4", "video_start": 1},
                        {"type": "video", "video": "b.mp4", "video_start": 1}], "x")},
     "video_start and video_end of several media"),
    ({"messages": chat([{"type": "video", "video": "a.mp4", "video_start": 1},
                        {"type": "video", "video": "b.mp4"}], "x")},
     "video_start and video_end of several media"),
    ({"messages": chat([{"type": "video", "video": "a.mp4", "video_start": 1}], "x"), "start": 2},
     "start and end both in a message and in the row"),
    ({"question": "?", "options": ["x", "y"], "answer": 1}, "answer 1 is none of the options"),
    ({"question": "?", "options": ["x", "A"], "answer": "A"}, "more than one of the options"),
    ({"question": "?", "options": ["x"], "a0": "x", "answer": "x"}, "keep one"),
    ({"question": "?"}, "a question without `answer`"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), BAD)
def test_what_is_commonly_wrong_is_named(row: object, expected: str) -> None:
    with pytest.raises(UserError, match="f:1") as caught:
        parse_record(row, "f:1")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    if isinstance(row, dict) and "id" in row:
        assert str(caught.value).startswith(f"f:1 (id {row['id']}): ")


@pytest.mark.parametrize("video", ["../a.mp4", "/data/a.mp4", "x/../../a.mp4", "file:///a.mp4"])
def test_a_path_that_leads_out_of_its_root_is_refused_unless_it_may(video: str) -> None:
    with pytest.raises(UserError, match="leads out of its root; name it relative") as caught:
        parse_record(QWEN | {"video": video}, "f:1")
    assert "allow_outside" in str(caught.value)
    record = parse_record(QWEN | {"video": video}, "f:1", allow_outside=True)
    assert record.clips == (video.removeprefix("file://"),)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_whatever_a_row_holds_it_is_a_record_or_one_line(data: st.DataObject) -> None:
    row = dict(data.draw(st.sampled_from([row for row, _, _ in FORMS] + [SLOTS]), label="row"))
    row["variables"] = data.draw(st.none() | JSON) if "variables" in row else None
    for name in data.draw(st.lists(st.sampled_from(FIELDS), max_size=3), label="fields"):
        row[name] = data.draw(JSON, label=name)
    turn = data.draw(st.none() | st.sampled_from(["from", "value", "role", "content"]))
    for form in ("conversations", "messages"):
        if turn and isinstance(row.get(form), list) and row[form]:
            row[form] = (
                [{**row[form][0], turn: data.draw(JSON)}, *row[form][1:]]
                if (isinstance(row[form][0], dict))
                else row[form]
            )
    try:
        said = parse_record(row, "f:1").id
    except UserError as error:
        said = str(error)
    assert said.isprintable()


def test_names_with_dots_stay_under_their_root() -> None:
    assert parse_record(QWEN | {"video": "a/..b/c...mp4"}, "f").clips == ("a/..b/c...mp4",)


@pytest.mark.parametrize("id_", ["\x1b[2J\x1b]0;x\x07", "a\nerror: b", "\u202eabc", "\x9bm"])
def test_what_would_steer_a_terminal_is_written_out(id_: str) -> None:
    assert parse_record(QWEN | {"id": id_}, "f:1").id.isprintable()
    wrong = [
        QWEN | {"id": id_, "video": None},
        QWEN | {"id": id_, "video": f"../{id_}"},
        {"id": id_, "conversations": [{"from": id_, "value": id_}]},
        {"id": id_, "conversations": [{"value": id_}]},
        {"id": id_, id_: 1},
    ]
    for row in wrong:
        with pytest.raises(UserError, match="f:1") as caught:
            parse_record(row, "f:1")
        assert str(caught.value).isprintable(), ascii(str(caught.value))


SLOTS = {
    "id": 7,
    "video": "a.mp4",
    "conversations": says(
        "<video>\nWhat happens {<TEMP-INPUT><TEMP-INPUT>}?",
        "Starts in <TEMP-OUTPUT> [<WIDTH-OUTPUT><HEIGHT-OUTPUT><WIDTH-OUTPUT><HEIGHT-OUTPUT>]",
    ),
    "variables": {
        "temporal_input_locations": [0.413, 0.87],
        "temporal_output_locations": [0.5],
        "spatial_height_input_locations": [],
        "spatial_height_output_locations": [0.2, 1],
        "spatial_width_input_locations": [],
        "spatial_width_output_locations": [0.1, 0.333],
    },
}


def test_llava_st_numbers_stand_at_their_slots() -> None:
    turns = parse_record(SLOTS, "f").turns
    assert turns[0].text == "<video>\nWhat happens {<t:41.3%><t:87%>}?"
    assert turns[1].text == "Starts in <t:50%> [<x:0.1><y:0.2><x:0.333><y:1>]"


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("temporal_input_locations", [0.1], "2 <TEMP-INPUT> for 1 numbers in temporal_input"),
        ("temporal_output_locations", None, "1 <TEMP-OUTPUT> for 0 numbers"),
        ("temporal_output_locations", [12.5], "temporal_output_locations: 12.5 is no share"),
        ("spatial_width_output_locations", [0.1, "__import__('os')"], "is no share of the clip"),
    ],
)
def test_slots_and_numbers_that_do_not_fit_are_refused(
    name: str, numbers: list[object], expected: str
) -> None:
    row = SLOTS | {"variables": {**SLOTS["variables"], name: numbers}}  # type: ignore[dict-item]
    with pytest.raises(UserError, match="id 7") as caught:
        parse_record(row, "f")
    assert expected in str(caught.value)


def read(path: Path) -> tuple[list[Record], list[str]]:
    problems: list[str] = []
    return read_records(path, problems), problems


def written(folder: Path, suffix: str, rows: Sequence[Row]) -> Path:
    path = folder / f"r{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8-sig")
    elif suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list({name: 1 for row in rows for name in row}))
            table.writeheader()
            nested = (list, dict)
            table.writerows(
                {k: json.dumps(v) if isinstance(v, nested) else v for k, v in row.items()}
                for row in rows
            )
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = {name: None for row in rows for name in row}
        pq.write_table(pa.Table.from_pylist([names | row for row in rows]), path)
    return path


SUFFIXES = [".json", ".jsonl", ".csv", ".parquet"]
MIXED: list[Row] = [
    LLAVA_VIDEO,
    QWEN | {"start": 1.5, "end": 3.0},
    {"id": "t", "conversations": says('Quoted, "so"\nand \u2028 on', "é")},
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_each_kind_holds_the_same_records(tmp_path: Path, suffix: str) -> None:
    records, problems = read(written(tmp_path, suffix, MIXED))
    assert problems == []
    assert [simple(record) for record in records] == [simple(parse_record(r, "")) for r in MIXED]
    assert [record.id for record in records] == [row["id"] for row in MIXED]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_problems_of_a_file_come_together(tmp_path: Path, suffix: str) -> None:
    rows = [
        QWEN | {"id": "r0"},
        QWEN | {"id": "r1", "video": "../a.mp4"},
        QWEN | {"id": "r2", "conversations": [{"from": "alien", "value": "<video>"}]},
        {"id": "r3", "conversations": says("<video>?", "x")},
        QWEN | {"id": "r4", "start": 3.0, "end": 2.0},
    ]
    records, problems = read(written(tmp_path, suffix, rows))
    assert [record.id for record in records] == ["r0"]
    assert [problem.partition("(id ")[2][:2] for problem in problems] == ["r1", "r2", "r3", "r4"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"r{suffix}"
    path.write_bytes(b'video\n{"id": "\xff\x00')
    records, problems = read(path)
    assert records == []
    assert len(problems) == 1
    assert problems[0].startswith(str(path))
    assert "\n" not in problems[0]


def test_a_bad_line_hides_none_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f"{json.dumps(QWEN)}\n{{'id': 1}}\n{json.dumps(QWEN)}\n[[[")
    records, problems = read(path)
    assert len(records) == 2
    assert [line.partition(": ")[0] for line in problems] == [f"{path}:2", f"{path}:4"]


def test_a_csv_row_with_more_cells_than_the_header_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("video,question,answer\na.mp4,who, or what,she\nb.mp4,who,he\n")
    records, problems = read(path)
    assert [record.clips for record in records] == [("b.mp4",)]
    assert problems == [f"{path}:2: more cells than the header names; quote the commas"]


def test_json_that_is_no_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"a": QWEN}))
    assert read(path)[1] == [
        f"{path}: expected a list of records, got an object with 'a': entries by name; write them as "
        "a list, the name as `id`"
    ]


def test_a_folder_is_read_whole_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "none").mkdir()
    written(tmp_path, ".parquet", [QWEN | {"id": "1"}]).rename(tmp_path / "sub" / "b.parquet")
    written(tmp_path, ".parquet", [QWEN | {"id": "0"}]).rename(tmp_path / "a.parquet")
    (tmp_path / ".cache" / "c.parquet").write_bytes(b"not parquet")
    (tmp_path / "README.md").write_text("x")
    records, problems = read(tmp_path)
    assert problems == []
    assert [record.id for record in records] == ["0", "1"]
    assert records[1].where == f"{tmp_path}/sub/b.parquet[0]"
    written(tmp_path, ".json", [])
    assert read(tmp_path)[1] == [
        f"{tmp_path}: this folder has 1 .json, 2 .parquet; name the files of one kind"
    ]
    with pytest.raises(UserError, match="no annotation files in this folder"):
        annotation_files(tmp_path / "none")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, ".parquet", [QWEN])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert read(path)[1] == [f"{path}: parquet needs pyarrow; pip install pyarrow"]


def test_rows_are_chosen_by_number_share_and_seed() -> None:
    def of(text: str, seed: int = 0, count: int = 20) -> list[int]:
        return Selection.parse(text, seed).of(count)

    assert of("all") == list(range(20))
    assert of("first:3") == [0, 1, 2]
    assert of("first:11%") == [0, 1, 2]  # 2.2 rounded up, as LLaVA-NeXT does
    assert of("end:2") == [18, 19]
    assert of("first:99") == list(range(20))
    assert len(of("random:5")) == 5
    assert of("random:25%") == of("random:5") == of("25%") == sorted(of("25%"))
    assert set(of("random:5")) < set(of("random:9"))
    assert of("random:5") != of("random:5", seed=1)
    for bad in (
        "",
        "some",
        "first",
        "first:0",
        "random:-1",
        "101%",
        "0%",
        "5",
        "random:1.5",
        "all:3",
    ):
        with pytest.raises(UserError, match="sampling_strategy"):
            Selection.parse(bad)


def test_only_what_can_be_a_dataset_of_the_hub_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_hub_name("lmms-lab/LLaVA-Video-178K")
    assert is_hub_name("lmms-lab/LLaVA-Video-178K:0_30_s_academic_v0_1")
    for name in ("train.jsonl", "dta/train.jsonl", "data/train", "/a/b", "../a", "./a", "a/b/c"):
        assert not is_hub_name(name), name


def test_offline_a_hub_name_says_what_to_download_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="some/data:part: no such path") as caught:
        local_copy("some/data:part")
    text = str(caught.value)
    assert "\n" not in text
    assert "hf download some/data --repo-type dataset --include 'part/*.json'" in text
    assert "--local-dir some/data" in text
    assert text.endswith("and name some/data/part/")


def test_a_hub_dataset_that_was_downloaded_is_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "datasets--some--data"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    part = repo / "snapshots" / ("a" * 40) / "part"
    part.mkdir(parents=True)
    written(part, ".json", [QWEN])
    found = local_copy("some/data:part")
    assert [row["id"] for _, row in read_rows(found)] == ["q"]
    with pytest.raises(UserError, match="no annotations under 'other/'"):
        local_copy("some/data:other")
    with pytest.raises(UserError, match="after the colon"):
        local_copy("some/data:../../x")


def test_the_command_writes_records_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    source = written(tmp_path / "in", ".parquet", [LLAVA_VIDEO, QWEN | {"start": 1.0, "end": 2.0}])
    out = tmp_path / "out.jsonl"
    main(["records", str(source), "--out", str(out)])
    assert "2 records" in capsys.readouterr().out
    one, two = read(source)[0], read(out)[0]
    assert [simple(record) for record in one] == [simple(record) for record in two]
    bad = written(tmp_path, ".json", [QWEN | {"video": "/a.mp4"}, QWEN | {"video": None}])
    with pytest.raises(SystemExit) as stop:
        main(["records", str(bad), "--out", str(tmp_path / "none.jsonl")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith(
        "error: 2 bad records are refused: correct them, or set on_bad_record"
    )
    assert not (tmp_path / "none.jsonl").exists()


def test_reading_records_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(QWEN))
    script = (
        "import sys\nfrom train.convert import main\n"
        f"main(['records', {str(path)!r}, '--out', {str(tmp_path / 'o.jsonl')!r}])\n"
        "sys.exit(len({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_of_forms_of_every_kind_and_one_without_any_video(
    toy: Path, toy_bank: Path, tmp_path: Path
) -> None:
    from train.run import main as run

    videos = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
    slots = SLOTS | {"video": videos[0]["video"]}
    written(tmp_path, ".parquet", videos)
    written(tmp_path, ".json", [{"conversations": says("Hello?", "yes")}] * 12)
    written(tmp_path, ".jsonl", [slots])
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        "video: {records: r.parquet}\nst: {records: r.jsonl}\n"
        "text: {records: r.json, sampling_strategy: 'random:50%'}\n"
    )
    common = [
        *("--stage_path", str(toy / "llm")),
        *("--bank", str(toy_bank)),
        *("--max_steps", "2"),
    ]
    mixed = ["--data_config", str(mixture), "--data_mixture", "video+text*2+st"]
    text_only = ["--data_path", str(tmp_path / "r.json")]
    for name, data in (("mixed", mixed), ("text", text_only)):
        out = tmp_path / name
        run([*common, *data, "--output_dir", str(out), "--per_device_train_batch_size", "4"])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [line["ce_loss"] for line in lines if "ce_loss" in line]
        assert losses
        assert all(0 < loss < 20 for loss in losses)
