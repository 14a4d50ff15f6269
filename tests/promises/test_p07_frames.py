"""P7: every sampled frame is the frame of its pts; a bad video is named in time, and costs nothing else.

FRAMEBANK_CLIPS=videos pytest tests/promises/test_p07_frames.py
FRAMEBANK_CLIPS=videos pytest -m slow tests/promises/test_p07_frames.py    also the long ones

On real clips: which outcome each has, and what endures. tests/preprocess/decode/test_fuzz.py damages them
in a thousand ways more.
"""

import hashlib
import importlib.metadata
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from model.tower.pixels import Pixels
from preprocess.decode import decode_child
from preprocess.decode.clip import Clip, read_clip
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.read_decord import decord_trouble
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError, scan
from shards.format.features import Sampling

CLIPS = os.environ.get("FRAMEBANK_CLIPS")
needs_clips = pytest.mark.skipif(not CLIPS, reason="FRAMEBANK_CLIPS does not name the test videos")
DECORD = decord_trouble() is None
needs_decord = pytest.mark.skipif(not DECORD, reason="decord is not installed")

EIGHT = Sampling(num_frames=8)
SIXTEEN = Sampling(num_frames=16)
SMALL = Pixels(48, 64, False, 3, None, 1 / 255, (0.5,) * 3, (0.5,) * 3)
CROP = Pixels(56, 56, True, 2, (48, 48), 1 / 255, (0.5,) * 3, (0.5,) * 3)


def real(name: str) -> Path:
    assert CLIPS
    return Path(CLIPS) / name


@pytest.fixture
def child() -> Iterator[DecodeChild]:
    with DecodeChild() as one:
        yield one


# What becomes of each clip: reader and flags, or the reason of its refusal.
OUTCOMES = {
    "av1_360p.mkv": "pyav-seek",
    "bears_editlist.mp4": "pyav-seek discard",
    "bikes.mp4": "pyav-seek",
    "bunny_720p.mp4": "pyav-seek",
    "hevc_720p.mp4": "pyav-seek",
    "hevc_short_gop.mp4": "pyav-seek key_order",
    "hiker_vp9_720p.webm": "pyav-seek",
    "mpeg1_ps.mpg": "pyav-scan no_index",
    "mpeg4_bframes.avi": "pyav-scan avi_b",
    "nasa_hdr_hevc10.mp4": "pyav-seek",
    "nasa_multistream.mp4": "pyav-seek stream3",
    "nasa_rotated.mp4": "pyav-seek",
    "pancake.mkv": "pyav-seek",
    "slides_1080p_2min.mp4": "pyav-seek",
    "sync_jitter.mkv": "pyav-seek",
    "sync_mpeg4.avi": "pyav-scan short",
    "edge/audio_only.mp4": "refused: no-video-stream",
    "edge/bitflips_mid.mp4": "refused: damaged",
    "edge/corrupted_h264.mp4": "refused: damaged",
    "edge/discard_first_keyframe.mp4": "pyav-seek discard",
    "edge/editlist_66x50.mov": "pyav-seek discard",
    "edge/fragmented.mp4": "pyav-seek",
    "edge/full_range.mp4": "pyav-seek",
    "edge/gap_10s.mp4": "pyav-seek",
    "edge/h264_10bit.mp4": "pyav-seek",
    "edge/interlaced_h264.mp4": "pyav-seek",
    "edge/large_pts.ts": "pyav-scan no_index",
    "edge/missing_first_keyframe.mp4": "pyav-scan discard first_not_key",
    "edge/mjpeg.avi": "pyav-seek",
    "edge/mpeg4_bf_packed.avi": "pyav-scan avi_b key_order",
    "edge/nonzero_start.mp4": "pyav-seek",
    "edge/odd_321x181_vp9.webm": "pyav-seek",
    "edge/odd_321x181_yuv444.mp4": "pyav-seek",
    "edge/one_frame.mp4": "pyav-seek",
    "edge/open_gop_h264.mp4": "pyav-scan key_order",
    "edge/open_gop_hevc.mp4": "pyav-seek key_order",
    "edge/portrait_406x720.mp4": "pyav-seek",
    "edge/rotated_90.mp4": "pyav-seek",
    "edge/text_renamed.mp4": "refused: cannot-open",
    "edge/three_frames_rot90.mov": "pyav-seek",
    "edge/truncated.mkv": "refused: truncated",
    "edge/truncated_faststart.mp4": "refused: truncated",
    "edge/truncated_nomoov.mp4": "refused: cannot-open",
    "edge/unordered_pts.mov": "pyav-seek",
    "edge/vfr.mp4": "pyav-seek",
    "edge/zero_byte.mp4": "refused: cannot-open",
}


@needs_clips
def test_every_clip_has_the_outcome_of_the_table(child: DecodeChild) -> None:
    found = {}
    for path in sorted(real("").rglob("*.*")):
        if path.suffix == ".md":
            continue
        try:
            clip = child.read_clip(ReadRequest(path, SIXTEEN))
            outcome = " ".join([clip.decoder, *clip.flags])
        except VideoError as error:
            outcome = f"refused: {error.reason}" if path.name in str(error) else "not named"
        found[path.relative_to(real("")).as_posix()] = outcome
    assert found == OUTCOMES


@needs_clips
@pytest.mark.slow
def test_any_frames_of_a_clip_are_those_of_its_full_decode(child: DecodeChild) -> None:
    """D1: uniform 4 and 32, the last 8, and single frames at random times."""
    chosen = random.Random(0)
    for name, outcome in OUTCOMES.items():
        if outcome.startswith("refused") or name.startswith("slides"):
            continue
        seconds, pictures = full_decode(real(name))
        starts = [float(seconds[-min(8, len(seconds))]), chosen.choice(seconds.tolist())]
        for sampling, start in (
            (Sampling(num_frames=4), None),
            (Sampling(num_frames=32), None),
            (Sampling(num_frames=8), starts[0]),
            (Sampling(num_frames=1), starts[1]),
        ):
            clip = child.read_clip(ReadRequest(real(name), sampling, start=start))
            assert np.abs(clip.timestamps - seconds[clip.frame_index]).max() < 1e-3
            for place, frame in zip(clip.frame_index, clip.frames, strict=True):
                far = np.abs(pictures - thumbnail(frame)).mean(axis=1)
                assert far[place] == far.min(), (name, place, far.argmin())


def thumbnail(picture: np.ndarray) -> np.ndarray:
    step = max(1, picture.shape[1] // 48)
    return picture[::step, ::step].astype(np.int16).ravel()


def full_decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    pts, pictures = [], []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        for frame in container.decode(stream):
            pts.append(frame.pts)
            rgb = frame.to_ndarray(format="rgb24")
            pictures.append(thumbnail(np.rot90(rgb, frame.rotation // 90)))
        seconds = [float((value - min(pts)) * stream.time_base) for value in sorted(pts)]
    return np.array(seconds), np.stack(pictures)


@needs_clips
@pytest.mark.parametrize("name", ["zero_byte", "text_renamed", "audio_only", "truncated_nomoov"])
def test_an_unreadable_file_is_refused_within_a_second_and_the_child_lives_on(
    child: DecodeChild, name: str
) -> None:
    """D3."""
    child.read_clip(ReadRequest(real("edge/one_frame.mp4"), EIGHT))
    pid, began = child.pid, time.monotonic()
    with pytest.raises(VideoError, match=name):
        child.read_clip(ReadRequest(real(f"edge/{name}.mp4"), EIGHT))
    assert time.monotonic() - began < 1
    child.read_clip(ReadRequest(real("edge/one_frame.mp4"), EIGHT))
    assert child.pid == pid


class Hurried(DecodeChild):
    base_seconds = 1.0  # a good clip has taken 0.5 s of CPU on a slow, busy machine
    seconds_per_pixel = 1e-9


@needs_clips
@needs_decord
@pytest.mark.slow
def test_a_hundred_endless_clips_among_a_hundred_good_ones_lose_nothing() -> None:
    """D4."""
    loops, good = real("edge/missing_first_keyframe.mp4"), real("edge/vfr.mp4")
    request = ReadRequest(loops, Sampling(num_frames=1), start=7.88, end=7.92, decoder="decord")
    with Hurried() as child:
        expected = digest(child.read_clip(ReadRequest(good, EIGHT)))
        pids = set()
        for _ in range(100):
            began = time.monotonic()
            pids.add(child.pid)
            with pytest.raises(VideoError) as error:
                child.read_clip(request)
            assert error.value.reason == "timeout"
            assert time.monotonic() - began < 10, "little more than a second of CPU or of waiting"
            assert digest(child.read_clip(ReadRequest(good, EIGHT))) == expected
        assert len(pids) == 100
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@needs_clips
def test_times_are_pts_from_the_first_shown_frame(child: DecodeChild) -> None:
    """D6: against the packets' times as demuxed here."""
    names = ["edge/vfr.mp4", "edge/gap_10s.mp4", "sync_jitter.mkv", "edge/nonzero_start.mp4"]
    for name in [*names, "bears_editlist.mp4"]:
        with av.open(str(real(name))) as container:
            stream = container.streams.best("video")
            pts = sorted(p.pts for p in container.demux(stream) if p.size and not p.is_discard)
            seconds = [float((value - pts[0]) * stream.time_base) for value in pts]
        clip = child.read_clip(ReadRequest(real(name), SIXTEEN))
        assert clip.timestamps[0] == 0.0
        assert np.abs(clip.timestamps - np.array(seconds)[clip.frame_index]).max() < 1e-3


@needs_clips
@needs_decord
def test_rotation_and_track_are_alike_from_every_reader(child: DecodeChild) -> None:
    """D7 and D8."""
    sizes = {
        "nasa_rotated.mp4": (480, 270),
        "edge/rotated_90.mp4": (640, 272),
        "edge/three_frames_rot90.mov": (568, 320),
        "nasa_multistream.mp4": (270, 480),
    }
    for name, size in sizes.items():
        for decoder in ("decord", "pyav"):
            clip = child.read_clip(ReadRequest(real(name), Sampling(num_frames=2), decoder=decoder))
            assert clip.display_size == clip.frames.shape[1:3] == size
            assert clip.frame_count == {"nasa_multistream.mp4": 390}.get(name, clip.frame_count)


@needs_clips
@pytest.mark.slow
def test_five_hundred_clips_leave_a_child_small_and_idle(child: DecodeChild) -> None:
    """D10."""

    def resident() -> int:
        return int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * 4096

    names = ["bikes.mp4", "pancake.mkv", "edge/vfr.mp4", "hevc_short_gop.mp4", "edge/mjpeg.avi"]
    for turn in range(550):
        child.read_clip(ReadRequest(real(names[turn % 5]), Sampling(num_frames=4), pixels=SMALL))
        if turn == 50:
            early = resident()
    assert resident() - early < 32 << 20
    assert child.pid
    before, used = resident(), decode_child._cpu_seconds(child.pid)
    time.sleep(3)
    assert decode_child._cpu_seconds(child.pid) - used < 0.05 * 3
    assert resident() - before < 1 << 20


def digest(clip: Clip) -> str:
    facts = [clip.timestamps.tolist(), clip.decoder, clip.flags, clip.display_size]
    return hashlib.md5(clip.frames.tobytes() + repr(facts).encode()).hexdigest()


@needs_clips
def test_any_order_and_number_of_children_give_the_same_bytes() -> None:
    """D11."""
    names = ["edge/vfr.mp4", "bears_editlist.mp4", "mpeg1_ps.mpg", "edge/rotated_90.mp4"]
    with DecodeChild() as one:
        expected = {name: digest(one.read_clip(ReadRequest(real(name), EIGHT))) for name in names}
    found: list[tuple[str, str]] = []

    def work(some: list[str]) -> None:
        with DecodeChild() as own:
            found.extend(
                (name, digest(own.read_clip(ReadRequest(real(name), EIGHT)))) for name in some
            )

    shuffled = random.Random(1).sample(names * 2, 8)
    threads = [threading.Thread(target=work, args=(shuffled[k::3],)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert dict(found) == expected
    assert all(expected[name] == value for name, value in found)


@needs_clips
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bikes.mp4", "bunny_720p.mp4", "hiker_vp9_720p.webm"])
def test_a_scan_costs_a_tenth_of_reading_at_most(name: str) -> None:
    """D12."""

    def cost(call: Any) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began

    whole = min(cost(lambda: read_clip(ReadRequest(real(name), SIXTEEN))) for _ in range(3))
    assert min(cost(lambda: scan(real(name))) for _ in range(5)) <= 0.1 * whole


@needs_clips
def test_one_frame_asked_for_sixteen_comes_once(child: DecodeChild) -> None:
    """D13."""
    clip = child.read_clip(ReadRequest(real("edge/one_frame.mp4"), SIXTEEN))
    assert (len(clip.frames), clip.frame_index.tolist(), clip.end) == (1, [0], 0.04)


# --- resizing in the child ---


@needs_clips
@pytest.mark.parametrize(
    "name",
    ["bikes.mp4", "hevc_short_gop.mp4", "mpeg1_ps.mpg", "edge/rotated_90.mp4", "av1_360p.mkv"],
)
@pytest.mark.parametrize("pixels", [SMALL, CROP])
def test_frames_resized_in_the_child_are_those_resized_afterwards(
    child: DecodeChild, name: str, pixels: Pixels
) -> None:
    native = child.read_clip(ReadRequest(real(name), SIXTEEN))
    resized = child.read_clip(ReadRequest(real(name), SIXTEEN, pixels=pixels))
    assert resized.frames.shape[1:3] == pixels.output_size(*native.display_size)
    assert resized.display_size == native.display_size == native.frames.shape[1:3]
    assert np.array_equal(resized.frames, pixels.resize(native.frames))


@needs_clips
@pytest.mark.slow
def test_many_frames_of_1080p_need_little_memory(child: DecodeChild) -> None:
    """64 frames are 380 MiB at their native size and 27 MiB at a tower's."""
    tower = Pixels(384, 384, False, 3, None, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    video = real("slides_1080p_2min.mp4")
    clip = child.read_clip(ReadRequest(video, Sampling(num_frames=64), pixels=tower))
    assert clip.frames.nbytes == 64 * 384 * 384 * 3
    status = Path(f"/proc/{child.pid}/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    assert peak < 800, f"{peak:.0f} MiB"


def test_a_frame_that_a_crop_does_not_fit_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    too_large = Pixels(40, 40, True, 3, (48, 48), 1.0, (0.5,) * 3, (0.5,) * 3)
    with DecodeChild() as child, pytest.raises(VideoError, match=r"a\.png") as error:
        child.read_clip(ReadRequest(tmp_path / "a.png", EIGHT, pixels=too_large))
    assert error.value.reason == "cannot-resize"


# --- which decord, which stream, which times ---


@pytest.mark.parametrize(
    ("owners", "said"),
    [
        ({"decord": ["decord"]}, None),
        ({}, "decord is not installed"),
        ({"decord": ["eva-decord"]}, "comes from eva-decord"),
        ({"decord": ["decord", "decord2"]}, "comes from decord, decord2"),
    ],
)
def test_a_decord_that_is_not_decord_is_not_used(
    monkeypatch: pytest.MonkeyPatch, owners: dict[str, list[str]], said: str | None
) -> None:
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    trouble = decord_trouble.__wrapped__()
    assert (trouble is None) == (said is None)
    assert said is None or said in trouble


def test_a_decord_that_cannot_be_imported_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "packages_distributions", lambda: {"decord": ["decord"]}
    )
    monkeypatch.setitem(sys.modules, "decord", None)
    assert "cannot be imported" in (decord_trouble.__wrapped__() or "")


def write_streams(path: Path, *greys: int, size: tuple[int, int] = (64, 48)) -> None:
    """Write one stream of 20 frames for each grey, the later ones smaller."""
    with av.open(str(path), "w") as container:
        streams = []
        for number, _ in enumerate(greys):
            stream = container.add_stream("libx264", rate=10, options={"bf": "0"})
            stream.width, stream.height = (value >> number for value in size)
            stream.pix_fmt = "yuv420p"
            streams.append(stream)
        for tick in range(20):
            for stream, grey in zip(streams, greys, strict=True):
                picture = np.full((stream.height, stream.width, 3), grey, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = tick, Fraction(1, 10)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))


def test_of_several_streams_the_best_is_read_and_named(tmp_path: Path) -> None:
    write_streams(tmp_path / "v.mkv", 40, 200)
    clip = read_clip(ReadRequest(tmp_path / "v.mkv", EIGHT))
    assert clip.flags == ("stream0",)
    assert clip.display_size == (48, 64)
    assert abs(int(clip.frames[0].mean()) - 40) < 4


def test_where_the_best_stream_does_not_decode_the_next_one_is_read(tmp_path: Path) -> None:
    write_streams(tmp_path / "v.mkv", 40, 200)
    with (
        av.open(str(tmp_path / "v.mkv")) as read,
        av.open(str(tmp_path / "broken.mkv"), "w") as written,
    ):
        copies = [written.add_stream_from_template(stream) for stream in read.streams.video]
        for packet in read.demux():
            if packet.dts is None:
                continue
            if packet.stream_index == 0:
                spoilt = av.Packet(b"\0\0\0\2\xff\xff" + bytes(len(bytes(packet))))
                spoilt.pts, spoilt.dts, spoilt.time_base = packet.pts, packet.dts, packet.time_base
                spoilt.is_keyframe = packet.is_keyframe
                packet, stream = spoilt, copies[0]
            else:
                stream = copies[1]
            packet.stream = stream
            written.mux(packet)
    clip = read_clip(ReadRequest(tmp_path / "broken.mkv", EIGHT))
    assert set(clip.flags) == {"best_fails", "stream1"}
    assert clip.display_size == (24, 32)
    assert clip.decoder.startswith("pyav")
    assert abs(int(clip.frames[0].mean()) - 200) < 4


@pytest.mark.parametrize("first", [-40, 0, 100_000])
def test_times_count_from_the_first_pts_even_below_zero(tmp_path: Path, first: int) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w", options={"avoid_negative_ts": "disabled"}) as out:
        stream = out.add_stream("libx264", rate=20, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 20)
        for tick in range(30):
            picture = np.full((48, 64, 3), 8 * tick, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = first + tick, Fraction(1, 20)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    clip = read_clip(ReadRequest(tmp_path / "v.mkv", EIGHT))
    assert clip.timestamps == pytest.approx(clip.frame_index / 20, abs=2e-3)
    assert [round(frame.mean() / 8) for frame in clip.frames] == clip.frame_index.tolist()


def test_nothing_of_a_child_is_left(tmp_path: Path) -> None:
    """D5's last part: no process of ours outlives the reader."""
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with DecodeChild() as child:
        child.read_clip(ReadRequest(tmp_path / "a.png", EIGHT))
        pid = child.pid
    listed = subprocess.run(["ps", "-e", "-o", "pid="], capture_output=True, text=True).stdout
    assert str(pid) not in listed.split()
