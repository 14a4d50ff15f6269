"""Inputs become clips and clips units: each once, whatever the order, and never moved later.

pytest tests/preprocess/sources/test_plan.py
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.sources.changes import compare
from preprocess.sources.find import FindOptions, find_clips
from preprocess.sources.skips import Why, report
from shards.errors import UserError
from shards.format.features import FeatureConfig
from shards.format.plan import (
    ClipSource,
    Plan,
    TowerSettings,
    cut_units,
    read_plan,
    refuse_other_features,
    write_plan,
)
from shards.format.samples import sample_key
from shards.signed import signed_json


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder of files with names of videos; nothing is decoded here."""
    root = tmp_path / "videos"
    for name in ("a.mp4", "sub/b.MKV", "sub/deep er/c.v1.webm", "sub/ü ñ.mov"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    for name in ("notes.txt", "sub/a.jpg", "sub/records.json", ".mp4"):
        (root / name).write_text("[]")
    (root / "folder.mp4").mkdir()
    return root


def under(*roots: Path, allow_outside: bool = False) -> FindOptions:
    return FindOptions(video_roots=tuple(map(str, roots)), allow_outside=allow_outside)


def ids(inputs: Sequence[Path], roots: Sequence[Path] = ()) -> list[str]:
    return [clip.id for clip in find_clips([*map(str, inputs)], under(*roots)).clips]


def refusal(call: Callable[[], object]) -> list[str]:
    """Return the problems that are told, one a line."""
    with pytest.raises(UserError, match=r".") as caught:
        call()
    return str(caught.value).splitlines()


def records(path: Path, *items: object) -> Path:
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    text = "\n".join(lines) + "\n" if path.suffix == ".jsonl" else f"[{','.join(lines)}]"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_gives_its_videos_at_any_depth(videos: Path) -> None:
    clips = find_clips([str(videos)]).clips
    assert {clip.id for clip in clips} == {
        "a.mp4",
        "sub/b.MKV",
        "sub/deep er/c.v1.webm",
        "sub/ü ñ.mov",
    }
    for clip in clips:
        assert Path(clip.path).read_bytes().decode() == clip.relative == clip.id
        assert Path(clip.path).is_absolute()
        assert (clip.start, clip.end) == (None, None)
        assert clip.key == sample_key(clip.id)


def test_a_file_is_named_from_its_own_folder(videos: Path) -> None:
    assert ids([videos / "sub" / "b.MKV"]) == ["b.MKV"]


def test_a_file_of_unusual_name_can_be_asked_for_itself(videos: Path) -> None:
    (videos / "clip.bin").write_bytes(b"video")
    assert ids([videos / "clip.bin"]) == ["clip.bin"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_annotation_file_gives_each_video_and_part_once(videos: Path, suffix: str) -> None:
    file = records(
        videos.parent / f"train{suffix}",
        {"video": "a.mp4", "conversations": []},
        {"video": "a.mp4", "question": "another question", "answer": "yes"},
        {"video": "./a.mp4"},
        {"video": "a.mp4", "start": 1.5, "end": 3},
        {"video": "a.mp4", "start": 1.5, "end": 3.0},
        {"video": "a.mp4", "end": 2},
        {"video": "sub/ü ñ.mov", "start": 2},
        {"video": ["a.mp4", "sub/b.MKV"]},
        {"question": "no video at all", "answer": "no"},
    )
    clips = {clip.id: clip for clip in find_clips([str(file)], under(videos)).clips}
    assert set(clips) == {
        "a.mp4",
        "a.mp4#1.5-3",
        "a.mp4#0-2",
        "sub/ü ñ.mov#2-",
        "sub/b.MKV",
    }
    part = clips["a.mp4#1.5-3"]
    assert (part.start, part.end, part.relative) == (1.5, 3, "a.mp4")
    assert clips["a.mp4"].path == part.path == str(videos / "a.mp4")


def test_unusual_line_breaks_within_a_record_do_not_cut_it(videos: Path) -> None:
    file = records(videos.parent / "x.jsonl", {"video": "a.mp4", "note": "a\u2028b\x85c"})
    assert ids([file], [videos]) == ["a.mp4"]


def test_annotations_look_under_every_root_and_beside_themselves(
    videos: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.mp4").write_bytes(b"x")
    file = records(
        tmp_path / "train.jsonl",
        {"video": "a.mp4"},
        {"video": "x.mp4"},
        {"video": "videos/sub/b.MKV"},
    )
    clips = {
        clip.id: clip.path
        for clip in find_clips(
            [str(file)],
            under(videos, other),
        ).clips
    }
    assert clips == {
        "a.mp4": str(videos / "a.mp4"),
        "x.mp4": str(other / "x.mp4"),
        "videos/sub/b.MKV": str(videos / "sub" / "b.MKV"),
    }


@pytest.mark.parametrize("name", ["../secret.mp4", "sub/../../secret.mp4", "{absolute}"])
def test_an_annotation_may_not_lead_out_of_its_roots_unless_it_is_trusted(
    videos: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"x")
    video = name.format(absolute=secret)
    file = records(tmp_path / "train.jsonl", {"video": video}, {"video": "a.mp4"})
    (line,) = refusal(lambda: find_clips([str(file)], under(videos)).clips)
    assert line.startswith(f"{file}:1: video {video!a} leads out of its root")
    assert "--allow-outside" in line
    trusted = find_clips([str(file)], under(videos, allow_outside=True)).clips
    assert len(trusted) == 2
    # a link under the root is of whoever made the root
    (videos / "linked.mp4").symlink_to(secret)
    file = records(tmp_path / "linked.jsonl", {"image": "linked.mp4"})
    assert ids([file], [videos]) == ["linked.mp4"]


def test_a_video_under_several_roots_is_refused(videos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.mp4").write_bytes(b"another")
    file = records(tmp_path / "train.jsonl", {"video": "a.mp4"})
    (line,) = refusal(
        lambda: (
            find_clips(
                [str(file)],
                under(videos, other),
            ).clips
        )
    )
    assert "'a.mp4' is under several roots" in line
    assert str(other / "a.mp4") in line
    (other / "a.mp4").unlink()
    (other / "a.mp4").symlink_to(videos / "a.mp4")
    assert ids([file], [videos, other]) == ["a.mp4"]


def test_the_same_file_by_two_ways_is_one_clip(videos: Path) -> None:
    file = records(videos.parent / "train.jsonl", {"video": "a.mp4"})
    assert ids([videos, videos / "a.mp4", file], [videos]).count("a.mp4") == 1


def test_missing_videos_are_counted_with_the_first_and_the_way_out(videos: Path) -> None:
    file = records(
        videos.parent / "train.jsonl",
        *({"video": name} for name in ("a.mp4", "gone2.mp4", "gone1.mp4", "sub/b.MKV", "g3.mp4")),
    )
    (line,) = refusal(lambda: find_clips([str(file)], under(videos)).clips)
    assert line.startswith(f"{file}: 3 of 5 videos not found, first 'g3.mp4'")
    assert str(videos) in line
    assert "--video-root" in line


def test_every_problem_is_told_at_once(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"video": "a.mp4"}\n{"video": ')
    listed = tmp_path / "listed.json"
    listed.write_text('"a.mp4"')
    file = records(tmp_path / "train.json", {"video": "gone.mp4"})
    inputs = [tmp_path / "nowhere", tmp_path / "empty", broken, listed, file, videos]
    lines = refusal(lambda: find_clips([*map(str, inputs)], under(tmp_path / "noroot")).clips)
    for line, start in zip(
        lines,
        [
            f"--video-root {tmp_path / 'noroot'}: no such folder",
            f"{tmp_path / 'nowhere'}: no such file or folder",
            f"{tmp_path / 'empty'}: no video files in this folder",
            f"{broken}:2: not JSON: ",
            f"{broken}: 1 of 1 videos not found",
            f"{listed}: expected a list of records, got str",
            f"{file}: 1 of 1 videos not found",
        ],
        strict=True,
    ):
        assert line.startswith(start)


@pytest.mark.parametrize(
    "bounds",
    [
        {"start": 3, "end": 2},
        {"start": 2, "end": 2},
        {"start": -1},
        {"start": "1.5", "end": "3"},
        {"end": float("nan")},
        {"end": float("inf")},
    ],
)
def test_bounds_that_bound_no_part_are_refused(videos: Path, bounds: dict[str, object]) -> None:
    file = records(videos.parent / "train.json", {"video": "a.mp4", **bounds})
    (line,) = refusal(lambda: find_clips([str(file)], under(videos)).clips)
    assert line.startswith((f"{file}[0]: start ", f"{file}[0]: end "))


def test_two_files_of_one_id_are_refused(videos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.mp4").write_bytes(b"another video")
    (line,) = refusal(lambda: find_clips([str(videos), str(other)]).clips)
    assert str(videos / "a.mp4") in line
    assert str(other / "a.mp4") in line
    assert "'a.mp4'" in line


def test_a_link_to_a_video_is_that_video(videos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.mp4").symlink_to(videos / "a.mp4")
    assert ids([videos, other]).count("a.mp4") == 1


def test_a_name_that_is_not_utf8_is_one_skip_and_refused_where_it_is_all_there_is(
    videos: Path,
) -> None:
    odd = Path(os.fsdecode(bytes(videos) + b"/caf\xe9.mp4"))
    odd.write_bytes(b"x")
    found = find_clips([str(videos)])
    assert len(found.clips) == 4
    (line,) = report([skip for skip in found.skips if skip.reason is Why.NAME])
    assert re.search(r"1 name that is not UTF-8 \(rename them\): .*caf\\udce9\.mp4", line)
    (line,) = refusal(lambda: find_clips([str(odd)]))
    assert re.search(r"caf\\udce9\.mp4.*rename", line)
    line.encode()  # it can be printed
    folder = odd.with_name(odd.stem)
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"x")
    for call in (
        lambda: find_clips([str(folder)]),
        lambda: find_clips([str(videos)], under(folder)),
    ):
        (line,) = refusal(call)
        assert re.search(r"caf\\udce9: its path is not UTF-8; .*ln -s", line)
    (videos / "link").symlink_to(folder)
    assert ids([videos / "link"]) == ["a.mp4"]


def source(id_: str) -> ClipSource:
    return ClipSource(id_, sample_key(id_), f"/videos/{id_}", id_)


def each(nbytes: int) -> Callable[[ClipSource], int]:
    return lambda clip: nbytes


names = st.lists(st.text("abc", min_size=1, max_size=4), unique=True, max_size=30)
sizes = st.integers(1, 5000)


@given(names, sizes, sizes)
def test_units_hold_every_clip_once_in_order_of_key(
    some: list[str], shard_bytes: int, clip_bytes: int
) -> None:
    units = cut_units([*map(source, some)], shard_bytes, each(clip_bytes))
    assert [clip.key for unit in units for clip in unit] == sorted(map(sample_key, some))
    for unit in units:
        assert len(unit) == 1 or 1 <= len(unit) * clip_bytes <= shard_bytes
    for unit in units[:-1]:
        assert len(unit) == 1 or (len(unit) + 1) * clip_bytes > shard_bytes, "room was left"


@given(names, sizes, sizes, st.randoms(use_true_random=False))
def test_units_do_not_depend_on_the_order_of_inputs(
    some: list[str], shard_bytes: int, clip_bytes: int, random: Random
) -> None:
    clips = [*map(source, some)]
    shuffled = random.sample(clips, len(clips))
    cost = each(clip_bytes)
    assert cut_units(shuffled, shard_bytes, cost) == cut_units(clips, shard_bytes, cost)


def test_plans_do_not_depend_on_the_order_of_inputs_on_disk(videos: Path) -> None:
    inputs = [str(videos / "a.mp4"), str(videos), str(videos / "sub" / "b.MKV")]
    forward = cut_units(find_clips(inputs).clips, 10, each(5))
    assert cut_units(find_clips(inputs[::-1]).clips, 10, each(5)) == forward
    assert len(forward) > 1


@given(st.lists(st.tuples(names, sizes), min_size=1, max_size=4), sizes)
def test_an_extended_plan_keeps_its_units_and_adds_each_new_clip_once(
    features: FeatureConfig, steps: list[tuple[list[str], int]], clip_bytes: int
) -> None:
    plan = Plan(features, [])
    seen: set[str] = set()
    for some, shard_bytes in steps:
        changes = compare(Path("bank"), plan, [*map(source, some)])
        extended = changes.plan.extended(changes.todo, shard_bytes, each(clip_bytes))
        assert extended.units[: len(plan.units)] == plan.units
        new = [clip.id for unit in extended.units[len(plan.units) :] for clip in unit]
        assert sorted(new) == sorted(set(some) - seen)
        assert all(extended.units)
        seen |= set(some)
        again = compare(Path("bank"), extended, [*map(source, sorted(seen))])
        assert (again.plan, again.todo) == (extended, [])
        plan = extended
    assert {clip.id for clip in plan.clips} == seen


@given(names, sizes)
def test_a_plan_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory,
    features: FeatureConfig,
    some: list[str],
    shard_bytes: int,
) -> None:
    bank = tmp_path_factory.mktemp("bank")
    clips = [replace(source(id_), start=0.5, end=None, size=9, frames=0) for id_ in some]
    plan = Plan(
        features,
        cut_units(clips, shard_bytes, each(100)),
        TowerSettings(8, 2, "tower"),
        {"4": [0.1, 1e-30]},
        {"4": {"cosine_mean": 1.0}},
        frozenset(clip.key for clip in clips[:1]),
    )
    write_plan(bank, plan)
    assert read_plan(bank) == plan


def test_a_folder_without_a_plan_has_none(tmp_path: Path) -> None:
    assert read_plan(tmp_path) is None


def test_an_edited_plan_is_refused(tmp_path: Path, features: FeatureConfig) -> None:
    write_plan(tmp_path, Plan(features, [[source("a")]]))
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace("/videos/a", "/videos/b"))
    (line,) = refusal(lambda: read_plan(tmp_path))
    assert str(path) in line


def test_a_plan_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(signed_json({"format_version": 4, "something": "else"}))
    (line,) = refusal(lambda: read_plan(tmp_path))
    assert "format 4, this framebank reads up to 3; update framebank" in line


def test_other_features_are_refused_field_by_field(features: FeatureConfig, tmp_path: Path) -> None:
    refuse_other_features(tmp_path, features, features)
    banked = replace(features, strides=(2, 8), pool="max")
    (line,) = refusal(lambda: refuse_other_features(tmp_path, features, banked))
    assert "strides: [4, 8] here, [2, 8] there" in line
    assert "pool: 'average' here, 'max' there" in line
    assert "layer" not in line
    assert "another folder" in line
