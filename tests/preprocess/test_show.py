"""The bank as a table and a clip as a picture: true to the bank, to the video and to the grid.

pytest tests/preprocess/test_show.py
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from preprocess.cli.main import main
from preprocess.decode.clip import read_clip
from preprocess.decode.request import ReadRequest
from preprocess.show.picture import (
    PAPER,
    Layout,
    cells_tile,
    colours,
    page,
    shortened,
    title,
)
from preprocess.show.table import find, table
from shards.errors import UserError
from shards.format.features import FeatureConfig, Sampling
from shards.format.plan import read_plan, write_plan
from shards.format.samples import SampleMeta, sample_key
from shards.read.bank import Bank
from shards.text import in_bytes, printable
from tests.params import few

CLIP = "train/clip-00001.mp4"


def show(*words: object) -> Result:
    return CliRunner().invoke(main, ["show", *map(str, words)])


def random_clip(frames: int = 4, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {4: (frames, 2, 2, 5), 8: (frames, 1, 1, 5)}
    return {stride: rng.normal(size=shape).astype(np.float16) for stride, shape in shapes.items()}


def facts(text: str) -> dict[str, str]:
    """Return the table's lines by their first word or words."""
    return {line[:12].strip(): line[13:] for line in text.splitlines() if not line.startswith(" ")}


# The table


def test_the_table_tells_what_the_bank_holds(
    make_bank: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = {"a.mp4": random_clip(4), "b.mp4": random_clip(20)}, {"c.mp4": random_clip(1)}
    out = make_bank(tmp_path / "bank", first, second, quarantined=("x.mp4", "y.mp4"))
    bank = Bank.open(out)
    told = facts(table(out))
    assert told["tower"] == "unnamed (siglip_vision_model, digest 000000000000)"
    assert told["fingerprint"] == bank.config.fingerprint
    assert told["layer"] == "-2, width 64"
    assert told["sampling"] == "8 frames of each clip, uniformly"
    assert told["dtype"] == "float16, tower ran in float32, codec none"
    assert (told["pool"], told["clips"], told["frames"]) == ("average", "3", "25")
    assert told["bytes"] == f"{in_bytes(bank.manifest.nbytes)}, shards 2"
    assert told["stride 4"] == "2x2 cells, 1.0 kB"  # 25 frames x 4 cells x 5 values x 2 bytes
    assert told["stride 8"] == "1x1 cells, 250 B"
    assert told["durations"] == "0.12 s shortest, 0.50 s median, 2.50 s longest"
    assert (told["readers"], told["flags"], told["quarantine"]) == ("decord 3", "none", "2")
    assert "  damaged 2: x.mp4, y.mp4" in table(out).splitlines()


def test_a_clip_in_quarantine_is_told_with_its_reason(
    make_bank: Callable[..., Path], tmp_path: Path
) -> None:
    accents = normalize("NFD", "é.mp4")
    out = make_bank(tmp_path / "bank", {"a.mp4": random_clip(1)}, quarantined=("x.mp4", accents))
    for name in ("x.mp4", sample_key("x.mp4")):
        with pytest.raises(UserError, match=r"x\.mp4 is in quarantine: damaged: damaged$"):
            find(Bank.open(out), name)
    with pytest.raises(UserError, match="is in quarantine: damaged"):
        find(Bank.open(out), normalize("NFC", accents))
    banked = make_bank(tmp_path / "other", {accents: random_clip(1)})
    assert find(Bank.open(banked), normalize("NFC", accents)) == 0


def test_the_histogram_counts_every_clip_once(
    make_bank: Callable[..., Path], tmp_path: Path
) -> None:
    clips = {f"{n}.mp4": random_clip(frames) for n, frames in enumerate((4, 4, 7, 8, 20))}
    lines = [line.split() for line in table(make_bank(tmp_path / "b", clips)).splitlines()]
    assert [" ".join(words[:5]) for words in lines if "to" in words] == [
        "0 s to 1 s",
        "1 s to 2 s",
        "2 s to 5 s",
    ]
    bars = [(words[5].count("█"), words[6]) for words in lines if "to" in words]
    assert bars == [(32, "3"), (11, "1"), (11, "1")]


def test_the_table_needs_no_video_and_survives_odd_names(
    toy_bank: Path, make_bank: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(toy_bank, tmp_path / "copy")
    (tmp_path / "copy" / "plan.json").unlink()
    assert facts(table(tmp_path / "copy"))["clips"] == "9"
    odd = make_bank(tmp_path / "odd", {"a.mp4": random_clip()}, quarantined=("\x1b[2J\n",))
    result = show(odd)
    assert result.exit_code == 0
    assert "damaged 1: \\x1b[2J\\n" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_bank_in_which_every_clip_failed_has_a_table(
    make_bank: Callable[..., Path], tmp_path: Path
) -> None:
    empty = make_bank(tmp_path / "bank", quarantined=tuple(f"{n}.mp4" for n in range(9)))
    told = table(empty)
    assert facts(told)["clips"] == "0"
    assert "  damaged 9: 0.mp4, 1.mp4, 2.mp4 and 6 more" in told.splitlines()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (112_640, "112.6 kB"),
        (3 * 10**15, "3000.0 TB"),
    ],
)
def test_bytes_are_written_in_the_unit_that_fits(nbytes: int, text: str) -> None:
    assert in_bytes(nbytes) == text


# Which clip


def test_a_clip_is_found_by_id_and_by_key(toy_bank: Path) -> None:
    bank = Bank.open(toy_bank)
    for row, id_ in enumerate(bank.ids):
        assert find(bank, id_) == find(bank, sample_key(id_)) == row
        assert bank.meta(row).id == id_


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train/clip-0001.mp4", "train/clip-00001.mp4"),
        ("clip-00001\x1b[1m\n", "train/clip-00001.mp4"),
        ("00002", "train/clip-00002.mp4"),
        ("?", "among its 9"),
    ],
)
def test_an_unknown_clip_is_refused_in_one_line_with_what_is_near(
    toy_bank: Path, tmp_path: Path, name: str, hint: str
) -> None:
    result = show(toy_bank, name, "--out", tmp_path / "page.png")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {toy_bank}: no clip {printable(name)}")
    assert hint in line
    assert "\x1b" not in line
    assert not (tmp_path / "page.png").exists()


def test_other_wrong_usage_is_one_line(toy_bank: Path, tmp_path: Path) -> None:
    for words in (
        [toy_bank, "--out", "page.png"],
        [toy_bank, CLIP, "--out", tmp_path / "no" / "page.png"],
        [toy_bank, CLIP, "--out", tmp_path / "page.docx"],
        [tmp_path],
    ):
        result = show(*words)
        assert result.exit_code == 2, words
        assert len(result.stderr.splitlines()) == 1, result.stderr


def test_what_does_not_print_is_escaped() -> None:
    assert printable("a b/ü漢.mp4") == "a b/ü漢.mp4"
    assert printable("\x1b]0;\x07\r\n\u202e\udc80") == "\\x1b]0;\\x07\\r\\n\\u202e\\udc80"


def test_a_damaged_shard_is_named(make_bank: Callable[..., Path], tmp_path: Path) -> None:
    out = make_bank(tmp_path / "bank", {"a.mp4": random_clip()})
    shard = out / "shards" / "bank-000000.tar"
    shard.write_bytes(b"\xff" * 600)
    result = show(out)
    assert result.exit_code == 2
    assert str(shard) in result.stderr


# Colours


def test_colours_are_shared_over_the_clip_and_its_strides() -> None:
    clip = random_clip(6)
    clip[4][0, 0, 0] = clip[4][5, 1, 1] = clip[8][3, 0, 0]
    made = colours(clip)
    again = colours({stride: array.copy() for stride, array in clip.items()})
    for stride, array in clip.items():
        assert made[stride].dtype == np.uint8
        assert made[stride].shape == (*array.shape[:3], 3)
        np.testing.assert_array_equal(made[stride], again[stride])
    assert made[4][0, 0, 0].tolist() == made[4][5, 1, 1].tolist() == made[8][3, 0, 0].tolist()


def test_red_green_and_blue_follow_the_directions_of_most_variance() -> None:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(6, 3)))[0].T
    basis *= np.sign(basis[range(3), np.abs(basis).argmax(axis=1)])[:, None]
    amounts = rng.uniform(-1, 1, (4000, 3)) * [9, 3, 1]
    made = colours({1: (amounts @ basis + 5).reshape(40, 10, 10, 6)})[1].reshape(-1, 3)
    expected = ((amounts / [9, 3, 1] / 0.98 + 1) / 2 * 255).clip(0, 255)
    assert np.abs(made - expected).mean() < 3


@pytest.mark.parametrize(
    ("frames", "dim"), [(1, 1), (1, 2), (2, 1), (1, 64), (64, 2)], ids=lambda n: f"{n}"
)
def test_what_does_not_vary_is_grey(frames: int, dim: int) -> None:
    constant = {
        4: np.full((frames, 2, 3, dim), 0.1, np.float16),
        8: np.full((frames, 1, 2, dim), 0.1, np.float16),
    }
    assert all((array == 127).all() for array in colours(constant).values())
    varied = {8: np.arange(frames * 2 * dim).reshape(frames, 1, 2, dim).astype(np.float16)}
    made = colours(varied)[8]
    assert {0, 255} <= set(made[..., 0].flatten().tolist())
    assert (made[..., 1:] == 127).all(), "one direction of variance is one channel"


def test_bfloat16_has_the_colours_of_its_values() -> None:
    values = random_clip(6)[4].astype(np.float32)
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    same = (upper.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(colours({4: upper})[4], colours({4: same})[4])


# Geometry


@pytest.mark.parametrize("count", [1, 2, 5, 16, 64, 300])
@pytest.mark.parametrize("shape", [(720, 1280), (1280, 720), (64, 64), (10, 2000), (2000, 10)])
def test_tiles_keep_the_aspect_lie_on_the_page_and_never_overlap(
    count: int, shape: tuple[int, int]
) -> None:
    layout = Layout.of(count, 3, *shape)
    width, height = layout.tile
    if min(shape) > 20:
        assert width / height == pytest.approx(shape[1] / shape[0], rel=0.02)
    corners = [layout.place(k, band) for k in range(count) for band in range(3)]
    assert all(0 <= x <= layout.size[0] - width for x, _ in corners)
    assert all(0 <= y <= layout.size[1] - height for _, y in corners)
    assert layout.size[0] <= 1600
    drawn = np.zeros((layout.size[1], layout.size[0]), np.uint8)
    for x, y in corners:
        drawn[y : y + height, x : x + width] += 1
    assert drawn.max() == 1
    first_row = [y for k, (_, y) in enumerate(corners[::3]) if k < layout.columns]
    assert len(set(first_row)) == 1, "frames run from left to right, then down"
    assert corners == sorted(
        corners, key=lambda c: ((c[1] - corners[0][1]) // layout.row_height, c)
    )


def test_a_crop_leaves_the_rest_of_the_frame_empty(make_meta: Callable[..., SampleMeta]) -> None:
    meta = make_meta("a", random_clip(), covered=(0.0, 0.25, 1.0, 0.75), patch_grid=(8, 8))
    cells = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)
    tile = cells_tile(cells, 4, "average", (200, 100), meta)
    where = {
        (60, 10): (255, 0, 0),
        (140, 10): (0, 255, 0),
        (60, 90): (0, 0, 255),
        (140, 90): (9,) * 3,
    }
    assert {place: tile.getpixel(place) for place in where} == where
    assert {tile.getpixel((x, 50)) for x in (*range(1, 50), *range(151, 199))} == {(255, 255, 255)}
    assert PAPER == "#fff"
    beyond = replace(meta, covered=(-0.5, 0.0, 1.5, 1.0))  # a letterbox
    assert cells_tile(cells, 4, "average", (200, 100), beyond).getpixel((10, 2)) == (255, 0, 0)


# The picture


def planted(
    make_meta: Callable[..., SampleMeta], **fields: object
) -> tuple[SampleMeta, Image.Image]:
    """Return a page of cells that differ by frame most, then by row, then by column."""
    slow = np.zeros((3, 2, 3, 4), np.float16)
    slow[..., 0] = np.arange(3)[:, None, None] * 100  # frames
    slow[..., 1] = np.arange(2)[None, :, None] * 40  # top, bottom
    slow[..., 2] = np.arange(3)[None, None, :] * 5  # left, middle, right
    arrays = {4: slow, 8: slow[:, :1, :2]}
    meta = make_meta("a.mp4", arrays, patch_grid=(8, 12), covered=(0.0, 0.0, 1.0, 1.0), **fields)
    return meta, page(meta, "video missing", arrays, "average")


def test_cells_stand_in_their_order_and_the_right_way_up(
    make_meta: Callable[..., SampleMeta],
) -> None:
    meta, image = planted(make_meta)
    layout = Layout.of(3, 3, *meta.display_size)
    width, height = layout.tile

    def pixel(frame: int, band: int, y: float, x: float) -> np.ndarray:
        left, top = layout.place(frame, band)
        colour = image.getpixel((left + round(x * width), top + round(y * height)))
        return np.array(colour, dtype=int)

    for frame in range(3):
        upper, lower = pixel(frame, 1, 0.25, 0.5), pixel(frame, 1, 0.75, 0.5)
        assert lower[1] > upper[1] + 200, "green grows from top to bottom"
        blues = [int(pixel(frame, 1, 0.25, x)[2]) for x in (1 / 6, 3 / 6, 5 / 6)]
        assert blues == sorted(blues)
        assert blues[2] > blues[0] + 150, "blue grows from left to right"
        first = pixel(frame, 1, 0.1, 0.1)
        np.testing.assert_array_equal(pixel(frame, 2, 0.9, 0.6), first)  # one cell, one palette
        np.testing.assert_array_equal(pixel(frame, 0, 0.05, 0.05), [0xDD] * 3)  # no video
    reds = [int(pixel(frame, 1, 0.25, 0.5)[0]) for frame in range(3)]
    assert reds == sorted(reds)
    assert reds[2] > reds[0] + 200, "red grows from frame to frame"


def test_frames_of_a_pair_share_its_features(make_meta: Callable[..., SampleMeta]) -> None:
    times = [k / 8 for k in range(6)]
    fields = {"timestamps": times, "frame_index": list(range(6)), "frames_per_unit": 2}
    meta, image = planted(make_meta, **fields)
    layout = Layout.of(6, 3, *meta.display_size)
    columns = [image.getpixel(tuple(c + 5 for c in layout.place(k, 1))) for k in range(6)]
    assert columns[0] == columns[1] != columns[2] == columns[3] != columns[4] == columns[5]


def test_the_frames_are_those_of_the_video(toy: Path, toy_bank: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.png"
    result = show(toy_bank, sample_key(CLIP), "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    clip = read_clip(ReadRequest(toy / "videos" / CLIP, Sampling(num_frames=8)))
    layout = Layout.of(8, 3, *clip.display_size)
    image = np.array(Image.open(out)).astype(int)
    seen = []
    for k in range(8):
        x, y = layout.place(k, 0)
        tile = image[y : y + layout.tile[1], x : x + layout.tile[0]]
        sizes = [Image.fromarray(frame).resize(layout.tile) for frame in clip.frames]
        seen.append(int(np.argmin([np.abs(tile - np.array(frame)).mean() for frame in sizes])))
        assert np.abs(tile - np.array(sizes[k])).mean() < 4
    assert seen == list(range(8))


def test_without_out_the_picture_takes_the_clips_key(
    toy_bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert show(toy_bank, CLIP).stdout == f"{sample_key(CLIP)}.png\n"
    assert (tmp_path / f"{sample_key(CLIP)}.png").exists()


@pytest.mark.parametrize("how", few(["gone", "changed", "no plan", "not a video"], 4))
def test_without_its_video_a_clip_is_drawn_in_grey(
    toy: Path, toy_bank: Path, tmp_path: Path, how: str
) -> None:
    bank, video, out = tmp_path / "bank", tmp_path / "clip.mp4", tmp_path / "page.png"
    shutil.copytree(toy_bank, bank)
    shutil.copy(toy / "videos" / CLIP, video)
    plan = read_plan(bank)
    assert plan
    units = [[replace(clip, path=str(video)) for clip in unit] for unit in plan.units]
    write_plan(bank, replace(plan, units=units))
    layout = Layout.of(8, 3, 64, 64)
    corner = tuple(c + 2 for c in layout.place(7, 0))
    cell = tuple(c + 2 for c in layout.place(7, 1))
    assert show(bank, CLIP, "--out", out).exit_code == 0
    there = Image.open(out)
    assert there.getpixel(corner) != (0xDD,) * 3
    if how == "gone":
        video.unlink()
    elif how == "no plan":
        (bank / "plan.json").unlink()
    elif how == "changed":
        video.write_bytes(video.read_bytes() + b"\0")
    else:
        video.write_bytes(b"")
    assert show(bank, CLIP, "--out", out).exit_code == 0
    without = Image.open(out)
    assert without.getpixel(corner) == (0xDD,) * 3
    assert without.getpixel(cell) == there.getpixel(cell)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (4, 900), (900, 4)])
@pytest.mark.parametrize("frames", [1, 64])
def test_every_shape_and_number_of_frames_is_drawn(
    make_meta: Callable[..., SampleMeta], shape: tuple[int, int], frames: int
) -> None:
    arrays = random_clip(frames)
    meta = make_meta("a.mp4", arrays, display_size=shape)
    pictures = np.zeros((frames, *shape, 3), np.uint8)
    for given in (pictures, "video missing"):
        assert page(meta, given, arrays, "average").size == Layout.of(frames, 3, *shape).size


def test_the_title_is_what_the_json_says_in_letters_the_font_has(
    make_meta: Callable[..., SampleMeta],
) -> None:
    fields = {"flags": ["short", "vfr"], "start": 2.0, "end": 4.5}
    name, made, size = title(make_meta("漢\n.mp4#2-4.5", random_clip(), **fields))
    assert name == "\\u6f22\\n.mp4#2-4.5"
    assert made.split("  ·  ") == [
        "2.500 s from 2.000 s",
        "read by decord",
        "flags: short, vfr",
        "4 of 4 frames at 8 fps",
    ]
    assert size.startswith("64x48 pixels  ·  8x6 patches  ·  ")
    long = "x" * 500 + ".mp4"
    cut = shortened(long, 20, 600)
    assert len(cut) < 100
    assert cut.startswith("xxx")
    assert cut.endswith("xx.mp4")
    assert shortened("short.mp4", 20, 600) == "short.mp4"


def test_the_bank_of_another_config_shows_its_sampling(
    make_bank: Callable[..., Path], features: FeatureConfig, tmp_path: Path
) -> None:
    config = replace(features, sampling=Sampling(fps="1/2", max_frames=64))
    told = facts(table(make_bank(tmp_path / "bank", {"a": random_clip()}, config=config)))
    assert told["sampling"] == "1/2 frames per second, at most 64"
    assert json.loads((tmp_path / "bank" / "bank.json").read_text())["clips"] == 1
