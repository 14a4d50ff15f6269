"""Grounding benchmarks become records with markup, and what is wrong with one is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.annotations.fault import RowError
from shards.annotations.forms import Json
from tests.readmes import python_block
from train import convert
from train.convert import main
from train.data import importers
from train.data.coordinates import check_coordinates
from train.data.importers import box, imported
from train.data.markup import kind_of
from train.data.records import Record, parse_record, read_records

CHARADES = (
    "AO8RW 0.0 6.9##a person is putting a book on a shelf.\n"
    "Y6R7T 20.8 30.0##person begins to cook, ##5 times\n"
)
QVHIGHLIGHTS = {
    "qid": 8737,
    "query": "A family is playing basketball together on a green court outside.",
    "duration": 150,
    "vid": "bP5KfdFJzC4_660.0_810.0",
    "relevant_windows": [[0, 16], [20, 36.5]],
    "relevant_clip_ids": [0, 1, 2],
    "saliency_scores": [[4, 1, 1], [4, 1, 1]],
}
REFCOCO = {
    "file_name": "COCO_train2014_000000581857.jpg",
    "width": 640,
    "height": 480,
    "bbox": [103.93, 299.99, 134.22, 177.42],
    "sents": ["the lady with the blue shirt", "lady"],
}
HC_STVG = {
    "10__Gvp-cj3bmIY.mp4": {
        "bbox": [[64.0, 36.0, 320.0, 180.0], [70.0, 36.0, 320.0, 180.0], [128, 72, 320, 180]],
        "st_time": 1.75,
        "ed_time": 3.75,
        "st_frame": 36,
        "img_num": 500,
        "img_size": [360, 640],
        "English": "The man in white walks to the car.",
    }
}
LLAVA_ST = [
    {
        "id": "s1",
        "video": "a.mp4",
        "conversations": [
            {"from": "human", "value": "<video>\nWhat is in {<TEMP-INPUT><TEMP-INPUT>}?"},
            {"from": "gpt", "value": "a dog [<WIDTH-OUTPUT><HEIGHT-OUTPUT>] <TEMP-OUTPUT>"},
        ],
        "variables": {
            "temporal_input_locations": [0.1, 0.875],
            "temporal_output_locations": [0.333],
            "spatial_height_input_locations": [],
            "spatial_height_output_locations": [0.5],
            "spatial_width_input_locations": [],
            "spatial_width_output_locations": [0.125],
        },
    }
]


def fixture(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    lines = [json.dumps(row) for row in content] if isinstance(content, list) else []
    path.write_text(
        content
        if isinstance(content, str)
        else "\n".join(lines)
        if name.endswith("l")
        else json.dumps(content)
    )
    return path


def rows_and_problems(form: str, path: Path, **options: Any) -> tuple[list[Json], list[str]]:
    problems: list[str] = []
    bad: list[RowError] = []
    rows = imported(form, path, problems, bad, **options)
    return rows, [*map(str, bad), *problems]


def records_of(form: str, path: Path, **options: Any) -> list[Record]:
    rows, problems = rows_and_problems(form, path, **options)
    assert problems == []
    return [parse_record(row, "f") for row in rows]


def test_charades_sta(tmp_path: Path) -> None:
    one, two = records_of("charades-sta", fixture(tmp_path, "c.txt", CHARADES))
    assert one.clips == ("AO8RW.mp4",)
    assert one.turns[0].text.endswith("a person is putting a book on a shelf.")
    assert one.turns[1].text == "from <t:0.000> to <t:6.900>"
    assert kind_of(one.turns[1].text) == "span"
    assert two.turns[0].text.endswith(": person begins to cook, ##5 times")


def test_qvhighlights(tmp_path: Path) -> None:
    (record,) = records_of("qvhighlights", fixture(tmp_path, "q.jsonl", [QVHIGHLIGHTS]))
    assert (record.id, record.clips) == ("8737", ("bP5KfdFJzC4_660.0_810.0.mp4",))
    expected = "from <t:0.000> to <t:16.000>, from <t:20.000> to <t:36.500>"
    assert record.turns[1].text == expected
    assert record.task == "windows"  # of which a query with one window is one, too


def test_refcoco(tmp_path: Path) -> None:
    # (103.93, 299.99) and (238.15, 477.41) of 640 x 480
    expected = "<x:0.1624><y:0.6250><x:0.3721><y:0.9946>"
    path = fixture(tmp_path, "r.json", [REFCOCO])
    one, two = records_of("refcoco", path, boxes="xywh")
    assert one.turns[1].text == two.turns[1].text == expected
    assert kind_of(expected) == "box"
    assert two.turns[0].text.endswith(": lady")
    assert one.clips == ("COCO_train2014_000000581857.jpg",)
    corners = {"image": "p.jpg", "expression": "she", "bbox": [103.93, 299.99, 238.15, 477.41]}
    size = {"width": 640, "height": 480}
    path = fixture(tmp_path, "c.jsonl", [corners | size])
    assert records_of("refcoco", path, boxes="xyxy")[0].turns[1].text == expected
    unit = {"img_path": "p.jpg", "expression": "she", "bbox": [0.1624, 0.625, 0.3721, 0.9946]}
    path = fixture(tmp_path, "u.jsonl", [unit | size])
    assert records_of("refcoco", path, boxes="unit")[0].turns[1].text == expected


def test_a_coco_file_joins_boxes_to_images_and_needs_no_word_on_them(tmp_path: Path) -> None:
    image = {"id": 4, "file_name": "p.jpg", "width": 640, "height": 480, "caption": "she"}
    notes = [{"id": 9, "image_id": 4, "bbox": REFCOCO["bbox"]}, {"id": 1, "image_id": 5}]
    path = fixture(tmp_path, "r.json", {"images": [image], "annotations": notes})
    (row,), problems = rows_and_problems("refcoco", path)
    assert parse_record(row, "f").turns[1].text.startswith("<x:0.1624><y:0.6250>")
    assert problems == [f"{path}[annotations][1]: no image has the id 5"]


def test_a_sentence_of_several_boxes_says_of_none_where_it_is(tmp_path: Path) -> None:
    image = {"id": 4, "file_name": "p.jpg", "width": 640, "height": 480, "caption": "a man, a dog"}
    boxes = [{"id": k, "image_id": 4, "bbox": [k, 1, 9, 9]} for k in (1, 2)]
    path = fixture(tmp_path, "c.json", {"images": [image], "annotations": boxes})
    rows, problems = rows_and_problems("refcoco", path)
    assert rows == []
    assert [": one text of image 4 for its 2 boxes" in line for line in problems] == [True, True]
    own = [entry | {"caption": f"thing {entry['id']}"} for entry in boxes]
    path = fixture(tmp_path, "c.json", {"images": [image], "annotations": own})
    assert len(records_of("refcoco", path)) == 2


def test_hc_stvg(tmp_path: Path) -> None:
    (record,) = records_of("hc-stvg", fixture(tmp_path, "h.json", HC_STVG))
    assert record.clips == ("10__Gvp-cj3bmIY.mp4",)
    assert record.turns[0].text.endswith("The man in white walks to the car.")
    span, tube = record.turns[1].text.split(": ")
    assert span == "from <t:1.750> to <t:3.750>"
    assert tube.split("; ") == [
        "<t:1.750> <x:0.1000><y:0.1000><x:0.6000><y:0.6000>",
        "<t:2.750> <x:0.1094><y:0.1000><x:0.6094><y:0.6000>",
        "<t:3.750> <x:0.2000><y:0.2000><x:0.7000><y:0.7000>",
    ]


def test_a_long_tube_is_written_evenly(tmp_path: Path) -> None:
    item = next(iter(HC_STVG.values())) | {"bbox": [[k, 0, 10, 10] for k in range(101)]}
    (record,) = records_of("hc-stvg", fixture(tmp_path, "h.json", {"v.mp4": item}))
    tube = record.turns[1].text.split(": ")[1].split("; ")
    assert len(tube) == 8
    assert tube[0].startswith("<t:1.750>")
    assert tube[-1].startswith("<t:3.750> <x:0.1562>")


ITEM = next(iter(HC_STVG.values()))
BAD: list[tuple[str, object, str]] = [
    ("charades-sta", "AO8RW 6.9 0.0##x\n", ":1: start 6.9 is not before end 0"),
    ("charades-sta", "AO8RW 6.9##x\n", ":1: expected `VIDEO START END##SENTENCE`"),
    ("charades-sta", "../../etc/x 0.0 6.9##x\n", "leads out of its root"),
    ("charades-sta", "A 0.0 6.9##see <video>\n", "2 <video>/<image> tags for 1 media"),
    ("qvhighlights", [QVHIGHLIGHTS | {"relevant_windows": [[5, 3]]}], "(id 8737): start 5 is not"),
    ("qvhighlights", [QVHIGHLIGHTS | {"relevant_windows": [[5, 151]]}], "end 151 is after the"),
    ("qvhighlights", [{"qid": 1, "vid": "x"}], "(id 1): no relevant_windows"),
    ("qvhighlights", [{"relevant_windows": [[1, 2]], "duration": 3}], ": no field 'query'"),
    ("qvhighlights", [[1]], ": not a record of qvhighlights"),
    ("refcoco", [REFCOCO], "the meaning of bbox is unknown; give --boxes xywh, xyxy, unit"),
    ("refcoco", [REFCOCO | {"boxes": "xyxy", "id": 3}], "(id 3): box 103.93 299.99 134.22 177.42"),
    ("refcoco", [REFCOCO | {"boxes": "xywh", "width": 200}], "leaves its frame of 200 x 480"),
    ("refcoco", [REFCOCO | {"boxes": "xywh", "bbox": [-9, 1, 20, 20]}], "leaves its frame"),
    ("refcoco", [REFCOCO | {"boxes": "xywh", "bbox": [1, 2, 3]}], "a box needs four numbers"),
    *[
        (
            "refcoco",
            [REFCOCO | {"boxes": kind, "bbox": [0.1, 0.2, 0.3, 0.4]}],
            "smaller than a pixel",
        )
        for kind in ("xywh", "xyxy")
    ],
    ("refcoco", [REFCOCO | {"boxes": "xywh", "width": 0}], "must be positive"),
    ("refcoco", [REFCOCO | {"sents": None}], "none of expression, sentence, caption, sents"),
    ("hc-stvg", {"v.mp4": ITEM | {"st_time": 9}}, "(id v.mp4): start 9 is not before end 3.75"),
    ("hc-stvg", {"v.mp4": ITEM | {"bbox": []}}, "a tube without boxes"),
    ("hc-stvg", {"v.mp4": ITEM | {"img_size": [36, 64]}}, "leaves its frame of 64 x 36"),
    ("llava-st", [LLAVA_ST[0] | {"variables": {}}], "(id s1): 2 <TEMP-INPUT> for 0 numbers"),
]


@pytest.mark.parametrize(("form", "content", "expected"), BAD)
def test_what_is_wrong_with_an_annotation_is_named(
    tmp_path: Path, form: str, content: object, expected: str
) -> None:
    path = fixture(tmp_path, "bad.jsonl" if isinstance(content, list) else "bad.json", content)
    rows, (line,) = rows_and_problems(form, path)
    assert rows == []
    assert line.startswith(str(path))
    assert expected in line
    assert line.isprintable()


MOMENTS = {"duration": 9.0, "timestamps": [[0, 5]], "sentences": ["He runs."]}
COCO = {"images": [REFCOCO | {"id": 1}], "annotations": []}
SOUND: dict[str, tuple[Json, Callable[[list[Any]], object]]] = {
    "qvhighlights": (QVHIGHLIGHTS, lambda items: items),
    "activitynet-captions": (MOMENTS, lambda items: {f"v{k}": i for k, i in enumerate(items)}),
    "refcoco": (
        {"id": 2, "image_id": 1, "bbox": REFCOCO["bbox"], "caption": "she"},
        lambda items: COCO | {"annotations": items},
    ),
    "hc-stvg": (ITEM, lambda items: {f"v{k}.mp4": i for k, i in enumerate(items)}),
    "llava-st": (LLAVA_ST[0], lambda items: items),
}
"""A sound annotation, and the file of several."""


@pytest.mark.parametrize("form", SOUND)
def test_an_annotation_that_is_spoilt_in_any_field_leaves_the_others_readable(
    tmp_path: Path, form: str
) -> None:
    sound, file_of = SOUND[form]
    (expected,) = rows_and_problems(form, fixture(tmp_path, "a.json", file_of([sound])))[:1]
    spoilt: list[Any] = [
        None,
        3,
        "x",
        [],
        *({n: v for n, v in sound.items() if n != m} for m in sound),
    ]
    spoilt += [sound | {name: value} for name in sound for value in (None, 3, "x", [], {})]
    for item in spoilt:
        path = fixture(tmp_path, "a.json", file_of([sound, item]))
        rows, problems = rows_and_problems(form, path)
        assert rows[: len(expected)] == expected, item
        # named, or still sound: an id and what is not read may be anything
        assert all(line.startswith(str(path)) for line in problems), (item, problems)
        assert problems or len(rows) > len(expected), item


def test_fields_of_annotations_are_no_flags(tmp_path: Path) -> None:
    """Some annotations name their video `clip`, which once ended spans with their videos."""
    late = QVHIGHLIGHTS | {"relevant_windows": [[5, 160]]}
    for field in ("clip", "times_past_end", "split", "rates", "vidor"):
        path = fixture(tmp_path, "q.jsonl", [late | {field: "clip"}])
        assert "end 160 is after" in rows_and_problems("qvhighlights", path)[1][0]
    path = fixture(tmp_path, "q.jsonl", [late])
    (record,) = records_of("qvhighlights", path, times_past_end="clip")
    assert record.turns[1].text == "from <t:5.000> to <t:150.000>"


def test_a_split_is_chosen_whatever_file_names_it(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    rows = [
        REFCOCO | {"id": k, "split": split, "boxes": "xywh", "sents": ["she"]}
        for k, split in enumerate(("train", "val", "train"))
    ]
    path, out = fixture(tmp_path, "r.jsonl", rows), tmp_path / "o.jsonl"
    assert [r.id for r in records_of("refcoco", path, split="train")] == ["0", "2"]
    assert [r.id for r in records_of("refcoco", path, split="val")] == ["1"]
    assert len(rows_and_problems("refcoco", path)[1]) == 3
    assert "no ref of the split test" in refused(
        convert.main, ["refcoco", str(path), "--split", "test", "--out", str(out)]
    )
    plain = fixture(tmp_path, "p.jsonl", [REFCOCO | {"boxes": "xywh"}])
    assert "no field 'split'" in rows_and_problems("refcoco", plain, split="val")[1][0]
    assert len(records_of("refcoco", plain)) == 2


def test_all_problems_come_together_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fixture(tmp_path, "c.txt", CHARADES + "A 3 2##x\nB\n")
    out = tmp_path / "o.jsonl"
    with pytest.raises(SystemExit) as stop:
        main(["charades-sta", str(path), "--out", str(out)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines[:2]] == [f"{path}:3", f"{path}:4"]
    assert lines[2].startswith(
        "error: 2 bad records are refused: correct them, or set on_bad_record"
    )
    assert not out.exists()


@pytest.mark.parametrize("form", ["charades-sta", "qvhighlights", "hc-stvg", "llava-st"])
def test_the_command_writes_what_a_run_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    content = {
        "charades-sta": CHARADES,
        "qvhighlights": [QVHIGHLIGHTS],
        "hc-stvg": HC_STVG,
        "llava-st": LLAVA_ST,
    }[form]
    path = fixture(tmp_path, "in.jsonl" if isinstance(content, list) else "in.json", content)
    out = tmp_path / "o.jsonl"
    main([form, str(path), "--out", str(out)])
    problems: list[str] = []
    read = read_records(out, problems)
    assert problems == []
    assert [r.turns for r in read] == [r.turns for r in records_of(form, path)]
    for record in read:
        assert check_coordinates(record, [200.0]) == []


@given(
    width=st.integers(10, 4000),
    height=st.integers(10, 4000),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_a_box_in_any_writing_is_the_same_markup(
    width: int, height: int, corners: tuple[float, float, float, float]
) -> None:
    (x1, x2), (y1, y2) = sorted(corners[:2]), sorted(corners[2:])
    if x2 - x1 < 0.01 or y2 - y1 < 0.01:
        return
    pixels = [x1 * width, y1 * height, x2 * width, y2 * height]
    sides = [*pixels[:2], pixels[2] - pixels[0], pixels[3] - pixels[1]]
    written = [
        box([x1, y1, x2, y2], "unit", width, height),
        box(pixels, "xyxy", width, height),
        box(sides, "xywh", width, height),
    ]
    for text in written:
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": text}]
        row = {"image": "p.jpg", "conversations": turns}
        assert check_coordinates(parse_record(row, "f"), [0.0]) == []
        numbers = [float(part.strip("<xy:")) for part in text.rstrip(">").split(">")]
        assert numbers == pytest.approx([x1, y1, x2, y2], abs=6e-5)


def test_the_readmes_own_benchmark_is_one_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code under "Add a benchmark", run as it stands where it says."""
    code = python_block("train/README.md", "Add a benchmark")
    monkeypatch.setattr(importers, "IMPORTERS", dict(importers.IMPORTERS))
    monkeypatch.setattr(convert, "IMPORTERS", importers.IMPORTERS)
    exec(code, dict(vars(importers)))
    item = {"id": "v_1", "duration": 30.5, "sentences": ["he runs", "he sits"]}
    item["timestamps"] = [[0.5, 12.25], [13, 30.5]]
    path = fixture(tmp_path, "a.jsonl", [item])
    main(["moments", str(path), "--out", str(tmp_path / "out.jsonl")])
    problems: list[str] = []
    one, two = read_records(tmp_path / "out.jsonl", problems)
    assert problems == []
    assert (one.id, one.clips, two.id) == ("v_1-0", ("v_1.mp4",), "v_1-1")
    assert one.turns[1].text == "from <t:0.500> to <t:12.250>"
    assert two.turns[0].text.endswith(": he sits")
    assert "2 records" in capsys.readouterr().out


def test_records_are_not_written_over_what_they_are_read_from(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    """In a folder that is read they would be read the next time, and all records be there twice."""
    folder = tmp_path / "in"
    folder.mkdir()
    source = folder / "a.jsonl"
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat"}]
    source.write_text(json.dumps({"id": "a", "video": "v.mp4", "conversations": turns}) + "\n")
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(folder)
    for read, out, words in (
        (source, source, "is read, and would be written over"),
        (source, tmp_path / "link" / "a.jsonl", "is read, and would be written over"),
        (folder, folder / "out.jsonl", "whose files are read; name an --out outside"),
        (folder, tmp_path / "link" / "out.jsonl", "whose files are read"),
        (source, tmp_path / "gone" / "out.jsonl", "its folder is not there"),
        (source, tmp_path, "a folder; name a file"),
    ):
        assert words in refused(main, ["records", str(read), "--out", str(out)])
        assert [path.name for path in folder.iterdir()] == ["a.jsonl"]
        assert source.read_bytes() == before
    main(["records", str(folder), "--out", str(tmp_path / "out.jsonl")])
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
