"""Names of media that are not the ids of banked clips: led there, refused by name, or told how near."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.format.catalogue import Columns
from shards.read.banks import Banks
from shards.read.near import NearIds, difference, plain_name
from train.data.dataset import Dataset, open_dataset, open_records
from train.settings.config import TrainConfig
from train.settings.folders import Folders, advice, unknown_clips

MakeBank = Callable[..., Path]


def clip(seconds: int = 1) -> dict[int, np.ndarray]:
    frames = 8 * seconds
    return {4: np.zeros((frames, 2, 2, 5), np.float16), 8: np.zeros((frames, 1, 1, 5), np.float16)}


def rows_file(path: Path, *rows: Any) -> str:
    """Write records: a video's name, or a row's own fields."""
    turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
    whole = [{"video": row} if isinstance(row, str) else row for row in rows]
    path.write_text(
        "".join(
            json.dumps({"id": f"r{k}", "conversations": turns} | row) + "\n"
            for k, row in enumerate(whole)
        )
    )
    return str(path)


def opened(tmp_path: Path, bank: Any, *rows: Any, **settings: Any) -> Dataset:
    path = rows_file(tmp_path / "r.jsonl", *rows)
    banks = [str(b) for b in (bank if isinstance(bank, list) else [bank])]
    return open_dataset(TrainConfig(bank=banks, data_path=[path], **settings))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as stop:
        call()
    (line,) = stop.value.problems
    return line


PREFIX = "0_30_s_academic_v0_1"
VIDEO = "academic_source/Charades/B30GE.mp4"
LLAVA_VIDEO = {"id": "B30GE", "video": VIDEO, "data_source": PREFIX}
"""A row of LLaVA-Video-178K: its video lies in the folder that data_source names."""


def test_llava_videos_rows_are_joined_by_their_data_source(
    make_bank: MakeBank, tmp_path: Path
) -> None:
    bank = make_bank(tmp_path / "bank", {f"{PREFIX}/{VIDEO}": clip()}, quarantined=(f"{PREFIX}/q",))
    dataset = opened(tmp_path, bank, LLAVA_VIDEO, LLAVA_VIDEO | {"video": "q"})
    assert [record.clips for record in dataset.records] == [(f"{PREFIX}/{VIDEO}",)]
    assert dataset.dropped == {"clip in quarantine": 1}
    # an exact id wins, whatever data_source says
    exact = make_bank(tmp_path / "exact", {f"{PREFIX}/{VIDEO}": clip(), VIDEO: clip(2)})
    (record,) = opened(tmp_path, exact, LLAVA_VIDEO).records
    assert record.clips == (VIDEO,)
    assert record.places[0].clip().info.duration == 2


LEADING = [
    # what the record says, the id, media_dir, strip_prefix
    ("a.mp4", "x/a.mp4", "x", []),
    ("a.mp4", "x/a.mp4", "/data/x", []),
    ("a.mp4", "data/x/a.mp4", "/mnt/data/x/", []),
    ("a.mp4", "/data/x/a.mp4", "/data/x", []),
    ("/mnt/old/y/a.mp4", "y/a.mp4", "", ["/mnt/old"]),
    ("/mnt/old/y/a.mp4", "new/y/a.mp4", "new", ["/mnt/other", "/mnt/old/"]),
    ("x/y/a.mp4", "a.mp4", "", ["x/y"]),
    ("x/y/a.mp4", "x/y/a.mp4", "x", ["x"]),
]


@pytest.mark.parametrize(("said", "id_", "media_dir", "strip"), LEADING)
def test_folders_lead_from_what_is_said_to_an_id(
    make_bank: MakeBank, tmp_path: Path, said: str, id_: str, media_dir: str, strip: list[str]
) -> None:
    bank = make_bank(tmp_path / "bank", {id_: clip()})
    row = {"video": said, "start": None}
    by_flag = opened(tmp_path, bank, row, media_dir=media_dir, strip_prefix=strip)
    assert [record.clips for record in by_flag.records] == [(id_,)]
    entry = {"data_path": "r.jsonl", "media_dir": media_dir, "strip_prefix": strip}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"a": entry}))
    config = TrainConfig(bank=[str(bank)], data_config=str(tmp_path / "sets.yaml"))
    assert [record.clips for record in open_dataset(config).records] == [(id_,)]
    scored = open_records(
        [str(bank)], [str(tmp_path / "r.jsonl")], 4, 8, media=Folders(media_dir, tuple(strip))
    )
    assert [record.clips for record in scored.held_out] == [(id_,)]


def test_a_part_is_led_as_its_video_is(make_bank: MakeBank, tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", {"x/a.mp4#0.5-2": clip()})
    row = {"video": "a.mp4", "start": 0.5, "end": 2}
    (record,) = opened(tmp_path, bank, row, media_dir="x").records
    assert record.clips == ("x/a.mp4#0.5-2",)


def test_a_prefix_that_does_not_lead_a_path_leaves_it_to_the_guard(
    make_bank: MakeBank, tmp_path: Path
) -> None:
    bank = make_bank(tmp_path / "bank", {"2/a.mp4": clip()})
    for said in ("/mnt/old2/a.mp4", "/mnt/old/../a.mp4", "/mnt/old"):
        line = refusal(lambda said=said: opened(tmp_path, bank, said, strip_prefix=["/mnt/old"]))
        assert "leads out of its root" in line
        assert "strip_prefix" in line


def test_a_name_of_two_clips_is_refused_and_not_guessed(
    make_bank: MakeBank, tmp_path: Path
) -> None:
    bank = make_bank(tmp_path / "bank", {"x/a.mp4": clip(), "data/x/a.mp4": clip()})
    line = refusal(lambda: opened(tmp_path, bank, "a.mp4", media_dir="/data/x"))
    assert line == (
        f"{tmp_path / 'r.jsonl'}:1 (id r0): the clip 'a.mp4' may be 'data/x/a.mp4' or 'x/a.mp4' of "
        "the bank; choose one by a longer media_dir, by a strip_prefix, or by exact ids in the records"
    )


def two_banks(make_bank: MakeBank, tmp_path: Path) -> tuple[Path, Path]:
    """Banks of one second and of two, that know their clips by the same names."""
    one = make_bank(tmp_path / "one", {"0001.mp4": clip(1), "only.mp4": clip(1)})
    two = make_bank(tmp_path / "two", {"0001.mp4": clip(2)}, quarantined=("bad.mp4",))
    return one, two


def bound(tmp_path: Path, text: str, **settings: Any) -> Dataset:
    (tmp_path / "sets.yaml").write_text(text)
    return open_dataset(TrainConfig(data_config=str(tmp_path / "sets.yaml"), **settings))


def test_a_datasets_own_bank_binds_its_records(make_bank: MakeBank, tmp_path: Path) -> None:
    one, _ = two_banks(make_bank, tmp_path)
    rows_file(tmp_path / "a.jsonl", "0001.mp4", "only.mp4")
    rows_file(tmp_path / "b.jsonl", "0001.mp4")
    text = "a: {records: a.jsonl, banks: one}\nb: {records: b.jsonl, bank: [two]}\n"
    dataset = bound(tmp_path, text)
    seconds = [dataset.clips(record)[0].info.duration for record in dataset.records]
    assert seconds == [1, 1, 2]
    # a dataset without a bank draws on those of the run alone
    rest = "a: {records: a.jsonl}\nb: {records: b.jsonl, banks: two}\n"
    dataset = bound(tmp_path, rest, bank=[str(one)], eval_path=[str(tmp_path / "a.jsonl")])
    seconds = [dataset.clips(record)[0].info.duration for record in dataset.records]
    assert seconds == [1, 1, 2]
    assert [dataset.clips(record)[0].info.duration for record in dataset.held_out] == [1, 1]


def test_a_clip_that_only_another_datasets_bank_has_is_named_with_it(
    make_bank: MakeBank, tmp_path: Path
) -> None:
    one, two = two_banks(make_bank, tmp_path)
    rows_file(tmp_path / "a.jsonl", "0001.mp4")
    rows_file(tmp_path / "b.jsonl", "only.mp4")
    text = "a: {records: a.jsonl, banks: one}\nb: {records: b.jsonl, banks: two}\n"
    line = refusal(lambda: bound(tmp_path, text))
    assert (
        f"no bank knows the clip 'only.mp4'; {tmp_path / 'one'} has it, which these records do not "
        "draw on: name it in their `banks`"
    ) in line
    # where nothing says which of two banks is meant, neither is taken
    text = "a: {records: a.jsonl}\n"
    line = refusal(lambda: bound(tmp_path, text, bank=[str(one), str(two)]))
    assert "'0001.mp4' is in" in line
    assert "by the `banks` of a data_config entry" in line
    # a bank under two names is one bank
    same = [str(one), os.path.relpath(one)]
    assert len(bound(tmp_path, text, bank=same).banks.banks) == 1


def test_lengths_and_features_are_those_of_the_bound_bank(
    make_bank: MakeBank, tmp_path: Path
) -> None:
    from train.batches.lengths import Clips

    two_banks(make_bank, tmp_path)
    rows_file(tmp_path / "a.jsonl", "0001.mp4", "only.mp4")
    rows_file(tmp_path / "b.jsonl", "0001.mp4")
    text = "b: {records: b.jsonl, bank: two}\na: {records: a.jsonl, banks: one}\n"
    dataset = bound(tmp_path, text)
    clips = Clips.of(dataset.records, dataset.banks, 4, 8)
    assert clips.frames.tolist() == [16, 8, 8]
    assert clips.duration.tolist() == [2, 1, 1]
    assert [len(dataset.clips(record)[0].read(4, [0])) for record in dataset.records] == [1] * 3
    assert [c.bank.path.name for r in dataset.records for c in dataset.clips(r)] == [
        *("two", "one", "one")
    ]


# -- what is near


SPELLINGS = [
    ("x/clip 1.mp4", "x/clip 1", "write it with the ending of the file"),
    ("x/clip 1.mp4", "x/clip 1.webm", "write it with the ending of the file"),
    ("x/clip 1.mp4", "x\\clip 1.mp4", "write it with / instead of \\"),
    ("x/clip 1.mp4", "X/Clip 1.MP4", "in capitals and small letters as they are there"),
    ("x/clip 1.mp4", "x/clip%201.mp4", "with other letters in its percent-encoding"),
    (
        "x/caf\u00e9.mp4",
        "x/cafe\u0301.mp4",
        "write it in the Unicode form that it has there (NFC or",
    ),
    (
        "x/cafe\u0301.mp4",
        "x/caf\u00e9.mp4",
        "write it in the Unicode form that it has there (NFC or",
    ),
    ("x/clip 1.mp4", "clip 1.mp4", "Set media_dir: x, or encode with another --video-root"),
    ("clip 1.mp4", "x/y/clip 1.mp4", "Set strip_prefix: x/y, or encode"),
    ("x/y/a.mp4", "z/y/a.mp4", "Set strip_prefix: z and media_dir: x, or encode"),
    ("x/a.mp4", "/v/x/a.mp4", "Set strip_prefix: /v, or"),
    ("a.mp4", "a.mp4#3-7", "the whole video is banked; for its part 3-7 encode the records' file"),
    ("a.mp4#3-7", "a.mp4", "parts of it are banked; give the record their start and end"),
    ("a.mp4#3-7", "a.mp4#3-8", "other parts of it are banked; encode the records' file too"),
]


@pytest.mark.parametrize(("banked", "said", "expected"), SPELLINGS)
def test_the_nearest_id_is_named_with_what_makes_it_another(
    make_bank: MakeBank, tmp_path: Path, banked: str, said: str, expected: str
) -> None:
    banks = Banks.open([make_bank(tmp_path / "bank", {banked: clip(), "far/off.mp4": clip()})])
    text = advice(said, banks)
    assert text.startswith(f"the bank has {banked!r}: ")
    assert expected in text
    assert text.count(";") <= 1, "one difference, one advice"


def test_settings_that_are_advised_lead_to_the_clip(make_bank: MakeBank, tmp_path: Path) -> None:
    for number, (banked, said, expected) in enumerate(SPELLINGS):
        if "Set " not in expected:
            continue
        found = difference(said, banked)
        settings = {"media_dir": found.banked_folder, "strip_prefix": [found.wanted_folder]}
        bank = make_bank(tmp_path / f"bank{number}", {banked: clip()})
        (record,) = opened(tmp_path, bank, said, **settings).records
        assert record.clips == (banked,)


def lines_about(bank: Path, *names: str) -> list[str]:
    return unknown_clips([(f"r{k}", name) for k, name in enumerate(names)], Banks.open([bank]))


def test_records_that_one_setting_finds_are_one_problem(
    make_bank: MakeBank, tmp_path: Path
) -> None:
    # clips 0 and 1 are in both folders, 2 and 3 in one: the records are of that one
    ids = ["test/0.mp4", "test/1.mp4", *(f"train/{k}.mp4" for k in range(4)), "train/sub/9.mp4"]
    bank = make_bank(tmp_path / "bank", {id_: clip() for id_ in ids})
    (line,) = lines_about(bank, *(f"d/{k}.mp4" for k in range(4)))
    assert line == (
        "r0: no bank knows the clip 'd/0.mp4', nor those of 3 more records; the bank has "
        "'train/0.mp4': are the records' paths relative to another root? Set strip_prefix: d and "
        "media_dir: train, or encode with another --video-root"
    )
    # other folders, other spellings, and what nothing is near to, are other problems
    first, second, third, fourth = lines_about(
        bank, "2.mp4", "9.mp4", "3.mp4", "train/3.webm", "other.mp4"
    )
    assert first.startswith("r0: no bank knows the clip '2.mp4', nor those of 1 more record; ")
    assert "Set media_dir: train/sub, or" in second
    assert third.endswith("write it with the ending of the file")
    assert fourth == "r4: no bank knows the clip 'other.mp4'; encode it, name its bank"


def test_of_folders_that_fit_alike_none_is_advised(make_bank: MakeBank, tmp_path: Path) -> None:
    ids = [f"{folder}/{k}.mp4" for folder in ("test", "train") for k in range(2)]
    bank = make_bank(tmp_path / "bank", {id_: clip() for id_ in ids})
    (line,) = lines_about(bank, "0.mp4", "1.mp4")
    assert (
        "which of these folders do the records mean? Set media_dir: test, or media_dir: train"
        in line
    )


WORDS = st.text("abcXYZ 01%_-é", min_size=1, max_size=6)
PATHS = st.lists(WORDS, min_size=1, max_size=3).map("/".join)


@given(path=PATHS, folder=WORDS, ending=st.sampled_from([".mp4", ".WebM", ""]))
def test_other_spellings_of_a_path_have_one_plain_name(path: str, folder: str, ending: str) -> None:
    whole = f"{path.replace('%', '')}/v{ending}"
    spellings = [whole, whole.upper(), whole.replace("/", "\\"), quote(whole), f"{folder}/{whole}"]
    spellings += [f"{whole}#1-2.5", f"/{whole}", f"{whole.removesuffix(ending)}.mkv"]
    assert {plain_name(spelling) for spelling in spellings} == {"v"}


class Million:
    """What an index reads of a bank."""

    def __init__(self, count: int) -> None:
        ids = [f"part-{k % 97}/v_{k:07}.mp4" for k in range(count)]
        text = "".join(ids).encode()
        edges = np.cumsum([0, *map(len, ids)])
        self.columns: Columns = {"id": np.frombuffer(text, np.uint8), "id_offsets": edges}
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)


def test_the_nearest_of_many_ids_is_found_at_once() -> None:
    near = NearIds([Million(100_000), Million(10)])  # type: ignore[list-item]
    began = time.perf_counter()
    for number in range(0, 100_000, 1000):
        wanted = f"elsewhere\\V_{number:07}"
        assert near.like(wanted)[0] == f"part-{number % 97}/v_{number:07}.mp4"
    assert near.like("v_1234567.mp4") == []
    assert time.perf_counter() - began < 1
