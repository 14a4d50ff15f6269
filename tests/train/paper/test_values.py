"""What stands in published annotations, as records: against numbers worked out by hand.

pytest tests/train/paper/test_values.py
"""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from shards.annotations.fault import RowError
from tests.train.paper import published
from train.convert import main
from train.data.coordinates import resolved
from train.data.importers import imported
from train.data.records import Record, parse_record

Json = dict[str, Any]
NUMBER = re.compile(r"<[txy]:(-?[\d.]+)%?>")


def records(form: str, path: Path, **more: object) -> list[Record]:
    problems: list[str] = []
    bad: list[RowError] = []
    rows = imported(form, path, problems, bad, **more)  # type: ignore[arg-type]
    assert (problems, bad) == ([], [])
    return [parse_record(row, "f") for row in rows]


def faults(form: str, path: Path, **more: object) -> list[str]:
    problems: list[str] = []
    bad: list[RowError] = []
    rows = imported(form, path, problems, bad, **more)  # type: ignore[arg-type]
    assert rows == []
    return [*map(str, bad), *problems]


def numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]


# -- Charades-STA


def test_a_span_of_charades_is_in_seconds_and_ends_with_its_video(tmp_path: Path) -> None:
    published.write_charades(tmp_path)
    first, late = records("charades-sta", tmp_path / "Charades-STA" / "charades_sta_train.txt")
    assert (first.clips, late.clips) == (("AO8RW.mp4",), ("AO8RW.mp4",))
    assert numbers(first.turns[1].text) == [0.0, 1.9]
    # a video of 3 seconds, of which 1.2 to 4.4 is said: its end, not 4.4
    ended, was_ended, wrong = resolved(late, [3.0], clip=True)
    assert (numbers(ended.turns[1].text), was_ended, wrong) == ([1.2, 3.0], True, [])
    _, _, (refused,) = resolved(late, [3.0], clip=False)
    assert refused.reason == "time past the end of its clip"


# -- HC-STVG


@pytest.mark.parametrize("version", [published.V1, published.V2], ids=["v1", "v2"])
def test_boxes_of_hc_stvg_are_of_the_frames_that_are_counted_from_1(
    tmp_path: Path, version: Json
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"10__Gvp-cj3bmIY.mp4": version}))
    (record,) = records("hc-stvg", path)
    span, _, tube = record.turns[1].text.partition(": ")
    assert numbers(span) == [5.0, 15.0]
    boxes = [numbers(part) for part in tube.split("; ")]
    # frame 26 of images that count from 1 is at (26 - 1) / 5 s; box k is at (25 + k) / 5
    places = [0, 7, 14, 21, 28, 35, 42, 50]
    assert [box[0] for box in boxes] == pytest.approx([(25 + k) / 5 for k in places], abs=1e-3)
    # x y w h of 640 x 360: 64 36 320 180 is 0.1 0.1 0.6 0.6
    assert boxes[0][1:] == [0.1, 0.1, 0.6, 0.6]
    assert boxes[7][1:] == pytest.approx([114 / 640, 0.1, 434 / 640, 0.6], abs=1e-4)


# -- VidSTG


def vidstg(folder: Path, **changes: Any) -> Path:
    path = folder / "train_annotations.json"
    published.write_json(path, [published.VIDSTG | changes])
    published.write_json(folder / "vidor" / "0000" / "2401075277.json", published.vidor())
    return path


def test_a_part_of_vidstg_is_cut_in_seconds_and_its_times_are_of_the_part(tmp_path: Path) -> None:
    child, ball = records("vidstg", vidstg(tmp_path), vidor=str(tmp_path / "vidor"))
    # frames 20 to 59, the last one too, at 10 a second: 2.0 to 6.0
    assert child.clips == ball.clips == ("0000/2401075277.mp4#2-6",)
    assert "the child watches the ball" in child.turns[0].text
    span, _, tube = child.turns[1].text.partition(": ")
    # frames 30 up to 50, without 50: 3.0 to 5.0 of the video, 1.0 to 3.0 of the part
    assert numbers(span) == [1.0, 3.0]
    boxes = [numbers(part) for part in tube.split("; ")]
    assert (boxes[0][0], boxes[-1][0]) == (1.0, 2.9)
    # in frame 30 the child is at 64 + 30 to 320 + 30 of 640, 36 to 180 of 360
    assert boxes[0][1:] == pytest.approx([94 / 640, 0.1, 350 / 640, 0.5], abs=1e-4)
    assert boxes[-1][1:] == pytest.approx([113 / 640, 0.1, 369 / 640, 0.5], abs=1e-4)
    # the ball is in even frames alone: its last box is of frame 48
    tube = ball.turns[1].text.partition(": ")[2]
    boxes = [numbers(part) for part in tube.split("; ")]
    assert (boxes[0][0], boxes[-1][0]) == (1.0, 2.8)
    assert boxes[0][1:] == [0.5, 0.25, 0.75, 0.75]


def test_the_whole_of_a_video_is_no_part(tmp_path: Path) -> None:
    path = vidstg(tmp_path, used_segment={"begin_fid": 0, "end_fid": 79})
    child, _ = records("vidstg", path, vidor=str(tmp_path / "vidor"))
    assert child.clips == ("0000/2401075277.mp4",)
    assert numbers(child.turns[1].text.partition(": ")[0]) == [3.0, 5.0]


def test_a_rate_that_is_not_whole_cuts_where_its_first_frame_is_shown(tmp_path: Path) -> None:
    path = vidstg(tmp_path, fps=29.97)
    child, _ = records("vidstg", path, vidor=str(tmp_path / "vidor"))
    # 20 / 29.97 = 0.66733, 60 / 29.97 = 2.00200; 30 / 29.97 - 0.668 = 0.33300
    assert child.clips == ("0000/2401075277.mp4#0.668-2.002",)
    assert numbers(child.turns[1].text)[0] == pytest.approx(0.333, abs=1e-3)


def test_what_vidstg_lacks_is_named(tmp_path: Path) -> None:
    path = vidstg(tmp_path)
    assert "VidOR's annotation of video 2401075277 is not in" in faults("vidstg", path)[0]
    path = vidstg(tmp_path, temporal_gt={"begin_fid": 10, "end_fid": 50})
    there = str(tmp_path / "vidor")
    assert "frames 10 to 50 are not within 20 to 59" in faults("vidstg", path, vidor=there)[0]
    gone = [{"description": "a cat sits.", "type": "object", "target_id": 7}]
    path = vidstg(tmp_path, captions=gone, questions=[])
    assert "a tube without boxes" in faults("vidstg", path, vidor=there)[0]


# -- RefCOCO


def test_a_ref_has_its_box_and_picture_from_instances_json(tmp_path: Path) -> None:
    published.write_refcoco(tmp_path, "refcoco")
    path = tmp_path / "refcoco" / "refs(unc).p"
    one, two = records("refcoco", path, split="train")
    # not the ref's own name, COCO_train2014_000000098304_0.jpg
    assert one.clips == two.clips == ("COCO_train2014_000000098304.jpg",)
    assert [r.turns[0].text.rpartition(": ")[2] for r in (one, two)] == [
        "small dog",
        "the dog on the left",
    ]
    # x y w h 263.87 216.88 21.13 15.17 of 640 x 424
    corners = [263.87 / 640, 216.88 / 424, 285.0 / 640, 232.05 / 424]
    assert numbers(one.turns[1].text) == pytest.approx(corners, abs=6e-5)
    (lady,) = records("refcoco", path, split="testA")
    assert numbers(lady.turns[1].text) == [0.0, 0.0, 0.5, 0.5]


def test_parts_to_train_and_to_test_on_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.write_refcoco(tmp_path, "refcocog")
    path, out = tmp_path / "refcocog" / "refs(umd).p", tmp_path / "out.jsonl"
    lines = faults("refcoco", path)
    assert len(lines) == 3
    assert "holds those to train and to test on; --split train" in lines[0]
    with pytest.raises(SystemExit):
        main(["refcoco", str(path), "--split", "testA", "--out", str(out)])
    assert "no ref of the split testA" in capsys.readouterr().err
    assert not out.exists()


def test_a_pickle_of_python_2_is_read_and_a_text_that_is_not_utf_8_named(tmp_path: Path) -> None:
    """Whose texts are bytes, as in the published files."""
    published.write_refcoco(tmp_path, "refcoco")
    path = tmp_path / "refcoco" / "refs(unc).p"
    found = [
        published.ref(0, 3007, 98304, "train", "small dog"),
        published.ref(1, 3007, 98304, "train", "a caf\u00e9"),
    ]
    written = re.sub(rb"V([^\n]*)\n", rb"S'\1'\n", pickle.dumps(found, protocol=0))
    path.write_bytes(written.replace(b"\xe9", rb"\xe9"))
    problems: list[str] = []
    bad: list[RowError] = []
    (row,) = imported("refcoco", path, problems, bad, split="train")
    assert row["conversations"][0]["value"].endswith(": small dog")
    assert row["video"] == "COCO_train2014_000000098304.jpg"
    assert problems == []
    assert "write UTF-8 text" in str(bad[0])
    assert len(bad) == 1


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


BAD_PICKLES = {
    "code": (pickle.dumps([Harmful()]), "would run code"),
    "text": (b"<html>", "not readable as a pickle"),
    "cut off": (pickle.dumps([{"ref_id": 1}], protocol=0)[:-3], "not readable as a pickle"),
    "no list": (pickle.dumps({"ref_id": 1}), "expected a list of refs, got a dict"),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_a_pickle_is_data_or_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, said = BAD_PICKLES[name]
    published.write_refcoco(tmp_path, "refcoco")
    path = tmp_path / "refcoco" / "refs(unc).p"
    path.write_bytes(data)
    (line,) = faults("refcoco", path, split="train")
    assert said in line
    assert capsys.readouterr().out == ""


def test_refs_without_what_they_refer_to_are_named(tmp_path: Path) -> None:
    published.write_refcoco(tmp_path, "refcoco")
    path = tmp_path / "refcoco" / "refs(unc).p"
    odd = [
        published.ref(0, 5, 98304, "train", "x"),
        published.ref(1, 3007, 6, "train", "x"),
        published.ref(2, 3007, 581857, "train", "x"),
    ]
    path.write_bytes(pickle.dumps(odd, protocol=2))
    lines = faults("refcoco", path, split="train")
    assert [line.partition(": ")[2] for line in lines] == [
        "instances.json has no annotation 5",
        "instances.json has no image 6",
        "of image 581857, its box of image 98304",
    ]
    (path.parent / "instances.json").unlink()
    assert "instances.json: missing" in faults("refcoco", path, split="train")[0]


# -- LLaVA-ST's own data


def st_align(folder: Path, **changes: Any) -> Path:
    path = folder / "stvg.json"
    published.write_json(path, [published.STVG | changes])
    published.write_json(folder / "rates.json", [published.VIDSTG])
    return path


def test_a_part_in_frames_becomes_seconds_by_the_videos_rate(tmp_path: Path) -> None:
    path = st_align(tmp_path)
    (record,) = records("llava-st", path, rates=str(tmp_path / "rates.json"))
    assert record.clips == ("2401075277.mp4#2-6",)
    seconds, wrong = resolved(record, [4.0], clip=False)[::2]
    assert wrong == []
    # shares of the way from frame 20 to frame 59: frame 29.75 is at 2.975 s, 0.975 s of the part
    expected = [0.25 * 39 / 10, 0.75 * 39 / 10, 0.5 * 39 / 10]
    assert numbers(seconds.turns[1].text)[:3] == pytest.approx(expected, abs=1e-4)
    assert numbers(seconds.turns[1].text)[3:] == [0.1, 0.2, 0.5, 0.6]


def test_a_part_in_frames_without_a_rate_is_refused_by_name(tmp_path: Path) -> None:
    path = st_align(tmp_path)
    (line,) = faults("llava-st", path)
    assert (
        "`meta.split`: a part of the video, in frames, and this form of row does not read it"
        in line
    )
    assert "--rates" in line
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"b.mp4": 25}))
    (line,) = faults("llava-st", path, rates=str(other))
    assert "the rate of video '2401075277', of which `meta.split` is a part, is not in" in line
    (line,) = faults("llava-st", st_align(tmp_path, meta={"split": [59, 20]}), rates=str(other))
    assert "2401075277" in line


@pytest.mark.parametrize("meta", [{"start": 3.5}, {"timestamps": [[1, 2]]}, {"split": [0, 5]}])
def test_a_part_that_a_row_names_inside_an_object_is_not_passed_over(meta: Json) -> None:
    row = {"video": "a.mp4", "conversations": published.talk("<video>?", "x"), "meta": meta}
    with pytest.raises(RowError, match=r"`meta\.") as caught:
        parse_record(row, "f")
    assert caught.value.reason == "a field that nothing reads"
    assert parse_record(row, "f", ignored=["meta"]).clips == ("a.mp4",)


@pytest.mark.parametrize(
    "meta", [{"fps": 25, "duration": 3.5}, {"split": "train"}, {"start": None}]
)
def test_what_says_nothing_of_a_part_is_passed_over(meta: Json) -> None:
    row = {"video": "a.mp4", "conversations": published.talk("<video>?", "x"), "meta": meta}
    assert parse_record(row, "f").clips == ("a.mp4",)


def test_the_whole_video_by_its_number_of_frames_has_no_part(tmp_path: Path) -> None:
    path = st_align(tmp_path, meta={"split": [0, 79]})
    (record,) = records("llava-st", path, rates=str(tmp_path / "rates.json"))
    assert record.clips == ("2401075277.mp4",)


# -- mixtures as LLaVA-ST publishes them


def test_a_stage_yaml_of_llava_st_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.data.mixtures import read_mixture

    published.write_st_align(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stage2_data.yaml").write_text(
        "datasets:\n"
        "  - json_path: ST-Align-Dataset/stage2/vtimellm.json\n"
        "    data_folder: videos\n"
        "    source: vtimellm\n"
        "    sampling_strategy: all\n"
    )
    problems: list[str] = []
    (part,) = read_mixture("data/stage2_data.yaml", "", problems)
    assert problems == []
    assert part.records == ["ST-Align-Dataset/stage2/vtimellm.json"]
    assert part.folders.media_dir == "videos"
