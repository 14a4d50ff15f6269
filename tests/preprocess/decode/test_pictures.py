"""Folders of frames, animations and still pictures are clips like any other.

pytest tests/preprocess/decode/test_pictures.py
"""

import struct
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from preprocess.decode.clip import read_clip
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from preprocess.decode.source import SourceReader
from preprocess.sources.find import FindOptions, find_clips
from shards.errors import UserError
from shards.format.features import Sampling

ALL = Sampling(num_frames=1000)


def grey(value: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def folder_of(path: Path, values: list[int], name: str = "frame{}.png") -> Path:
    path.mkdir(parents=True)
    for number, value in enumerate(values):
        Image.fromarray(grey(value)).save(path / name.format(number))
    return path


def shown(frames: np.ndarray) -> list[int]:
    return [int(frame[5, 5, 0]) for frame in frames]


def test_a_folder_is_its_pictures_in_natural_order_at_two_a_second(tmp_path: Path) -> None:
    values = [k * 20 for k in range(12)]  # frame10 comes after frame9, not after frame1
    clip = read_clip(ReadRequest(folder_of(tmp_path / "clip", values), ALL))
    assert shown(clip.frames) == values
    assert clip.timestamps.tolist() == [k / 2 for k in range(12)]
    assert (clip.start, clip.end, clip.fps, clip.frame_count) == (0.0, 6.0, 2.0, 12)
    assert (clip.decoder, clip.flags, clip.display_size) == ("pillow", ("folder",), (20, 30))


def test_sampling_and_parts_hold_for_a_folder_of_pictures(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "clip", [k * 10 for k in range(20)])
    five = read_clip(ReadRequest(folder, Sampling(num_frames=5)))
    assert shown(five.frames) == [0, 40, 90, 140, 190]
    each_second = read_clip(ReadRequest(folder, Sampling(fps="1")))
    assert shown(each_second.frames) == [k * 20 for k in range(10)]
    part = read_clip(ReadRequest(folder, ALL, start=1.0, end=3.0))
    assert part.frame_index.tolist() == [2, 3, 4, 5]
    faster = read_clip(ReadRequest(folder, Sampling(fps="1"), picture_fps="5"))
    assert (shown(faster.frames), faster.end) == ([0, 50, 100, 150], 4.0)


def test_other_files_and_hidden_files_of_a_folder_are_no_frames(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "clip", [10, 20])
    (folder / ".frame5.png").write_bytes(b"")
    (folder / "notes.txt").write_text("notes")
    assert shown(read_clip(ReadRequest(folder, ALL)).frames) == [10, 20]


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
def test_an_animation_keeps_the_duration_of_each_frame(tmp_path: Path, suffix: str) -> None:
    values, durations = [0, 60, 120, 180, 240], [100, 200, 50, 70, 300]
    images = [Image.fromarray(grey(value)) for value in values]
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, **options)
    clip = read_clip(ReadRequest(path, ALL))
    assert shown(clip.frames) == values
    assert clip.timestamps == pytest.approx(np.cumsum([0, *durations[:-1]]) / 1000, abs=1e-9)
    assert clip.end == pytest.approx(sum(durations) / 1000)
    assert clip.decoder == ("pillow" if suffix == "webp" else "pyav-scan")


def test_the_picture_of_a_png_for_those_who_cannot_play_it_is_no_frame(tmp_path: Path) -> None:
    images = [Image.fromarray(grey(value)) for value in (200, 10, 20, 30)]
    for count in (2, 4):
        options = {"default_image": True, "duration": [100, 200, 300][: count - 1]}
        path = tmp_path / f"{count}.png"
        images[0].save(path, save_all=True, append_images=images[1:count], **options)
        with av.open(str(path), format="apng") as container:
            played = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        clip = read_clip(ReadRequest(path, ALL))
        assert shown(clip.frames) == shown(np.array(played)) == [10, 20, 30][: count - 1]
        assert clip.timestamps == pytest.approx([0, 0.1, 0.3][: count - 1])


@pytest.mark.parametrize("suffix", ["webp", "avif", "gif", "png"])
def test_an_animation_is_read_alike_under_any_name_and_in_an_archive(
    suffix: str, tmp_path: Path
) -> None:
    images = [Image.fromarray(grey(value)) for value in (0, 100, 200)]
    images[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=images[1:], duration=200)
    data = (tmp_path / f"a.{suffix}").read_bytes()
    own = read_clip(ReadRequest(tmp_path / f"a.{suffix}", ALL))
    (tmp_path / "noending").write_bytes(data)
    (tmp_path / "b.gif").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(f"a.{suffix}", data)
    (member,) = find_clips([str(tmp_path / "a.zip")]).clips
    clips = [read_clip(ReadRequest(tmp_path / name, ALL)) for name in ("noending", "b.gif")]
    with SourceReader(DecodeChild(), tmp_path) as reader:
        outcome = reader.read(member, ReadRequest(Path(member.path), ALL))
    assert outcome.clip, outcome.error
    for clip in (*clips, outcome.clip):
        np.testing.assert_array_equal(clip.frames, own.frames)
        assert clip.timestamps.tolist() == own.timestamps.tolist()
        assert (clip.end, clip.decoder) == (own.end, own.decoder)


def test_a_picture_of_more_than_8_bits_is_not_to_be_fetched_again(tmp_path: Path) -> None:
    Image.new("I;16", (8, 8), 40000).save(tmp_path / "depth.png")
    with pytest.raises(VideoError, match="not 8 bits a colour; convert it"):
        read_clip(ReadRequest(tmp_path / "depth.png", ALL))


def test_a_gif_cut_off_is_refused_as_truncated(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (40, 40, 3), np.uint8)) for _ in range(6)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    raw = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(VideoError, match=r"cut\.gif") as error:
        read_clip(ReadRequest(tmp_path / "cut.gif", ALL))
    assert error.value.reason == "truncated"
    cut = read_clip(ReadRequest(tmp_path / "cut.gif", ALL, allow_truncated=True))
    assert "truncated" in cut.flags


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_a_still_picture_is_a_clip_of_one_frame_and_no_duration(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(grey(120)).save(path)
    for sampling in (ALL, Sampling(fps="1", max_frames=64), Sampling(num_frames=1)):
        clip = read_clip(ReadRequest(path, sampling))
        assert abs(shown(clip.frames)[0] - 120) <= 1
        assert (clip.start, clip.end, clip.frame_count, clip.fps) == (0.0, 0.0, 1, 0.0)
        assert (clip.timestamps.tolist(), clip.flags) == ([0.0], ("still",))


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    picture = grey(0)
    picture[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    clip = read_clip(ReadRequest(tmp_path / "a.jpg", ALL))
    assert clip.display_size == (30, 20)
    assert clip.frames[0, :8].mean() > 250
    assert clip.frames[0, 12:].mean() < 5


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "frame2.png").write_bytes(b"no picture"), "cannot-open"),
        (lambda f: (f / "frame2.png").write_bytes(b""), "cannot-open"),
        (lambda f: (f / "frame2.png").write_bytes((f / "frame0.png").read_bytes()[:60]), None),
        (lambda f: Image.fromarray(grey(1, 10, 10)).save(f / "frame2.png"), "mixed-sizes"),
        (lambda f: Image.new("I;16", (30, 20)).save(f / "frame2.png"), "cannot-open"),
        (lambda f: [file.unlink() for file in f.iterdir()], "no-pictures"),
    ],
)
def test_a_bad_picture_is_refused_by_name_in_the_child(
    tmp_path: Path, spoil: object, reason: str | None
) -> None:
    folder = folder_of(tmp_path / "clip", [1, 2, 3, 4])
    assert callable(spoil)
    spoil(folder)
    with DecodeChild() as child:
        with pytest.raises(VideoError, match="clip") as error:
            child.read_clip(ReadRequest(folder, ALL))
        assert error.value.reason == (reason or "cannot-open")
        assert "\n" not in str(error.value)
        good = folder_of(tmp_path / "good", [5, 6])
        assert shown(child.read_clip(ReadRequest(good, ALL, picture_fps="4")).frames) == [5, 6]


def test_a_recursive_folder_takes_folders_of_nothing_but_pictures(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    folder_of(root / "hound" / "clip-1", [1, 2])
    folder_of(root / "hound" / "clip-2", [1])
    folder_of(root / "mixed", [1, 2])
    (root / "mixed" / "a.mp4").write_bytes(b"video")
    folder_of(root / "with-notes", [1, 2])
    (root / "with-notes" / "readme.txt").write_text("no")
    Image.fromarray(grey(1)).save(root / "hound" / "cover.jpg")
    (root / "b.gif").write_bytes(b"gif")
    clips = {clip.id: clip for clip in find_clips([str(root)], FindOptions(picture_fps="3")).clips}
    assert set(clips) == {"hound/clip-1", "hound/clip-2", "mixed/a.mp4", "b.gif"}
    assert clips["hound/clip-1"].picture_fps == "3"
    assert clips["mixed/a.mp4"].picture_fps is None


def test_a_folder_of_pictures_given_itself_is_named_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "clip-1", [1, 2])
    (clip,) = find_clips([str(tmp_path / "clip-1")]).clips
    assert (clip.id, clip.path) == ("clip-1", str(tmp_path / "clip-1"))
    monkeypatch.chdir(tmp_path / "clip-1")
    assert find_clips(["."]).clips == [clip]


def test_an_annotation_may_name_a_folder_an_animation_or_a_still(tmp_path: Path) -> None:
    folder_of(tmp_path / "frames" / "v1", [1, 2])
    Image.fromarray(grey(1)).save(tmp_path / "frames" / "a.jpg")
    (tmp_path / "frames" / "empty").mkdir()
    names = ["v1", "a.jpg"]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"video": "{name}"}}\n' for name in names))
    lookup = FindOptions(video_roots=(str(tmp_path / "frames"),))
    assert [c.id for c in find_clips([str(file)], lookup).clips] == sorted(names)
    file.write_text('{"video": "empty"}\n')
    with pytest.raises(UserError, match="1 of 1 videos not found, first 'empty'"):
        find_clips([str(file)], lookup)


def test_a_gif_gives_the_pictures_that_pillow_sees(tmp_path: Path) -> None:
    """Frames that change a corner only: the rest has to be kept from the frame before."""
    images = []
    for k in range(5):
        picture = grey(50, 24, 24)
        picture[:6, : 4 * k + 1] = 200
        images.append(Image.fromarray(picture))
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=40)
    clip = read_clip(ReadRequest(tmp_path / "a.gif", ALL))
    with Image.open(tmp_path / "a.gif") as image:
        for place, frame in enumerate(clip.frames):
            image.seek(place)
            assert np.array_equal(frame, np.asarray(image.convert("RGB")))
    with av.open(str(tmp_path / "a.gif")) as container:
        assert len(list(container.decode(video=0))) == len(clip.frames) == 5


def test_a_damaged_tiff_of_which_pillow_raises_a_type_error_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    page = Image.fromarray(np.zeros((4, 5, 3), np.uint8))
    page.save(path, save_all=True, append_images=[page])
    before, _, after = path.read_bytes().rpartition(struct.pack("<HH", 256, 4))
    path.write_bytes(before + struct.pack("<HH", 9999, 4) + after)  # no width on page two
    with pytest.raises(VideoError, match=r"a\.tif: not a readable picture") as error:
        read_clip(ReadRequest(path, ALL))
    assert error.value.reason == "cannot-open"
