"""What of a folder is a clip, told by ending or content, and why the rest is none.

pytest tests/preprocess/sources/test_folder.py
"""

import os
from pathlib import Path

import pytest
from PIL import Image

from preprocess.sources.find import find_clips
from preprocess.sources.folder import in_folder
from preprocess.sources.skips import Skip, Why, report

MP4 = b"\0\0\0\x18ftypisom" + bytes(99)
TS = (b"\x47" + bytes(187)) * 4
VIDEOS = {
    "mp4": MP4,
    "a QuickTime file without ftyp": b"\0\0\1\0moov" + bytes(99),
    "matroska": b"\x1a\x45\xdf\xa3" + bytes(99),
    "avi": b"RIFF\0\0\1\0AVI LIST",
    "flv": b"FLV\x01" + bytes(99),
    "theora": b"OggS" + bytes(24) + b"\x80theora" + bytes(99),
    "asf": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(99),
    "program stream": b"\0\0\1\xba" + bytes(99),
    "transport stream": TS,
    "transport stream of a camera": (bytes(4) + b"\x47" + bytes(187)) * 4,
    "mxf": b"\x06\x0e\x2b\x34" + bytes(99),
    "y4m": b"YUV4MPEG2 W64",
    "bare h264": b"\0\0\0\1\x67" + bytes(99),
    "gif": b"GIF89a" + bytes(99),
}
OTHERS = {
    "nothing": b"",
    "zeros": bytes(9999),
    "text": b"MIT License",
    "sound": b"OggS" + bytes(24) + b"\x01vorbis" + bytes(99),
    "sound of MP4": b"\0\0\0\x18ftypM4A " + bytes(99),
    "mp3": b"ID3" + bytes(99),
    "picture": b"\xff\xd8\xff\xe0" + bytes(99),
    "web page": b"<html>",
    "LFS": b"version https://git-lfs.github.com/spec/v1\n",
}
ENDINGS = (
    ".mp4 .MKV .webm .avi .mov .m4v .mpg .ts .m2ts .mts .vob .ogv .f4v .asf .mxf .y4m .divx .3g2 .3gp "
    ".flv .wmv .rm .rmvb .dv .m2v .ivf .nut .h264 .hevc .gif .apng"
)


def reasons(root: Path, **flags: bool) -> dict[str, Why | None]:
    """Return by path why each thing in a folder is no clip; None for the clips."""
    clips, skips = in_folder(root, flags.get("follow_links", False))
    found: dict[str, Why | None] = dict.fromkeys(clips)
    return found | {Path(s.where).relative_to(root).as_posix(): s.reason for s in skips}


@pytest.mark.parametrize("ending", ENDINGS.split())
def test_what_ffmpeg_reads_is_a_clip_by_its_ending(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a{ending}").write_bytes(b"\x01\x02")
    (tmp_path / f"empty{ending}").write_bytes(b"")
    assert reasons(tmp_path) == {f"a{ending}": None, f"empty{ending}": None}


@pytest.mark.parametrize("kind", [*VIDEOS, *OTHERS])
def test_a_file_without_an_ending_is_told_by_its_content(tmp_path: Path, kind: str) -> None:
    (tmp_path / "dQw4w9WgXcQ").write_bytes({**VIDEOS, **OTHERS}[kind])
    expected = None if kind in VIDEOS else Why.UNKNOWN
    assert reasons(tmp_path) == {"dQw4w9WgXcQ": expected}


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.ts", b"export const a = 1", Why.UNKNOWN),
        ("a.mts", b"export const a = 1", Why.UNKNOWN),
        ("a.ts", TS, None),
        ("a.mod", b"M.K." + bytes(99), Why.UNKNOWN),
        ("a.MOD", b"\0\0\1\xba" + bytes(99), None),
        ("a.dat", b"RIFF\0\0\1\0CDXA", None),
        ("a.dat", b"1 2 3", Why.UNKNOWN),
        ("a.ogg", OTHERS["sound"], Why.UNKNOWN),
        ("a.ogg", VIDEOS["theora"], None),
        ("a.mp4.part", MP4, Why.UNKNOWN),
        ("a.json.gz", b"", Why.ANNOTATIONS),
        ("a.csv", b"", Why.ANNOTATIONS),
        ("a.tar.gz", b"", Why.ARCHIVE),
        ("a.7z", b"", Why.ARCHIVE),
        ("archive", b"PK\x03\x04" + bytes(99), Why.ARCHIVE),
        ("._a.mp4", MP4, Why.SYSTEM),
        (".a.mp4", MP4, None),
        (".DS_Store", MP4, Why.SYSTEM),
        ("Thumbs.db", MP4, Why.SYSTEM),
    ],
)
def test_endings_that_several_kinds_of_files_have(
    tmp_path: Path, name: str, data: bytes, why: Why | None
) -> None:
    (tmp_path / name).write_bytes(data)
    assert reasons(tmp_path) == {name: why}


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "avif", "tif", "bmp"])
def test_a_folder_of_pictures_is_a_clip_whatever_systems_left_in_it(
    tmp_path: Path, ending: str
) -> None:
    (tmp_path / "v" / "__MACOSX").mkdir(parents=True)
    for k in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / "v" / f"{k}.{ending}")
    for junk in (".DS_Store", "Thumbs.db", "__MACOSX/._0.jpg"):
        (tmp_path / "v" / junk).write_bytes(b"x")
    (tmp_path / "v" / "gone.png").symlink_to("nowhere")
    found = reasons(tmp_path)
    assert found.pop("v") is None
    assert found == {
        "v/.DS_Store": Why.SYSTEM,
        "v/Thumbs.db": Why.SYSTEM,
        "v/__MACOSX/._0.jpg": Why.SYSTEM,
        "v/gone.png": Why.DEAD_LINK,
    }
    (tmp_path / "v" / "notes.txt").write_text("x")
    assert "v" not in reasons(tmp_path)
    assert reasons(tmp_path)[f"v/0.{ending}"] is Why.PICTURE


@pytest.mark.parametrize("ending", ["webp", "png", "avif", "gif"])
def test_pictures_that_move_are_clips_each(tmp_path: Path, ending: str) -> None:
    images = [Image.new("RGB", (32, 32), (90 * k, 0, 0)) for k in range(3)]
    for name in ("a", "b"):
        images[0].save(
            tmp_path / f"{name}.{ending}", save_all=True, append_images=images[1:], duration=50
        )
    assert reasons(tmp_path) == {f"a.{ending}": None, f"b.{ending}": None}


def test_links_to_folders_are_entered_where_that_is_asked_for_and_never_in_a_circle(
    tmp_path: Path,
) -> None:
    root, far = tmp_path / "root", tmp_path / "far"
    for folder in (root / "sub", far):
        folder.mkdir(parents=True)
        (folder / "a.mp4").write_bytes(MP4)
    (root / "far").symlink_to(far)
    (far / "back").symlink_to(root)
    (root / "sub" / "up").symlink_to(root)
    (root / "self").symlink_to("self")
    assert reasons(root) == {
        "sub/a.mp4": None,
        "far": Why.LINK,
        "sub/up": Why.LOOP,
        "self": Why.DEAD_LINK,
    }
    assert reasons(root, follow_links=True) == {
        "sub/a.mp4": None,
        "far/a.mp4": None,
        "far/back": Why.LOOP,
        "sub/up": Why.LOOP,
        "self": Why.DEAD_LINK,
    }


def test_a_folder_deeper_than_paths_may_be_long_is_a_skip(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(MP4)
    opened = [os.open(tmp_path, os.O_RDONLY)]
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=opened[-1])
        opened.append(os.open("d" * 250, os.O_RDONLY, dir_fd=opened[-1]))
    try:
        found = find_clips([str(tmp_path)])
    finally:
        for number in opened:
            os.close(number)
    assert [clip.id for clip in found.clips] == ["a.mp4"]
    (skip,) = found.skips
    assert (skip.reason, skip.text) == (Why.FOLDER, "File name too long")


def test_the_line_names_endings_and_ways_out_the_most_frequent_first() -> None:
    skips = [Skip(Why.UNKNOWN, f"{k}.srt") for k in range(1200)]
    skips += [Skip(Why.UNKNOWN, "a.PART"), Skip(Why.UNKNOWN, "LICENSE")]
    skips += [Skip(Why.ARCHIVE, "a.tar"), Skip(Why.FOLDER, "b"), Skip(Why.FOLDER, "c")]
    assert report(skips) == [
        "skipped: 1,202 files of unknown type: .srt 1,200 .part 1 no ending 1, 2 unreadable folders, 1 "
        "archive (name them themselves)"
    ]
    assert report([]) == []
