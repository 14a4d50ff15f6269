import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from preprocess.decode import decode_child
from preprocess.decode.clip import Clip, VideoError, read_clip, scan
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.decode.stream.sampling import sample_indices
from shards.format.features import Sampling
from tests.params import few

CLIPS = os.environ.get("FRAMEBANK_CLIPS")
needs_clips = pytest.mark.skipif(not CLIPS, reason="FRAMEBANK_CLIPS does not name the test videos")
try:
    import decord  # noqa: F401

    DECORD = True
except ImportError:
    DECORD = False

ALL = Sampling(num_frames=10_000)
EIGHT = Sampling(num_frames=8)
SIXTEEN = Sampling(num_frames=16)

# frames shown and displayed (height, width) as the README of the clips has them; reader by the scan
READABLE = {
    "av1_360p.mkv": (125, (360, 640), "pyav-seek"),
    "bears_editlist.mp4": (56, (360, 640), "pyav-seek"),
    "bikes.mp4": (250, (272, 640), "pyav-seek"),
    "bunny_720p.mp4": (132, (720, 1280), "pyav-seek"),
    "hevc_720p.mp4": (60, (720, 1280), "pyav-seek"),
    "hevc_short_gop.mp4": (10, (128, 128), "pyav-seek"),
    "hiker_vp9_720p.webm": (453, (720, 1280), "pyav-seek"),
    "mpeg1_ps.mpg": (100, (128, 128), "pyav-scan"),
    "mpeg4_bframes.avi": (164, (240, 320), "pyav-scan"),
    "nasa_hdr_hevc10.mp4": (325, (180, 320), "pyav-seek"),
    "nasa_multistream.mp4": (390, (270, 480), "pyav-seek"),
    "nasa_rotated.mp4": (17, (480, 270), "pyav-seek"),
    "pancake.mkv": (310, (240, 426), "pyav-seek"),
    "sync_jitter.mkv": (1891, (108, 192), "pyav-seek"),
    "sync_mpeg4.avi": (1891, (108, 192), "pyav-scan"),
    "edge/discard_first_keyframe.mp4": (25, (64, 64), "pyav-seek"),
    "edge/editlist_66x50.mov": (82, (50, 66), "pyav-seek"),
    "edge/fragmented.mp4": (250, (272, 640), "pyav-seek"),
    "edge/full_range.mp4": (50, (272, 640), "pyav-seek"),
    "edge/gap_10s.mp4": (100, (272, 640), "pyav-seek"),
    "edge/h264_10bit.mp4": (100, (272, 640), "pyav-seek"),
    "edge/interlaced_h264.mp4": (50, (272, 640), "pyav-seek"),
    "edge/large_pts.ts": (100, (272, 640), "pyav-scan"),
    "edge/missing_first_keyframe.mp4": (50, (272, 640), "pyav-scan"),
    "edge/mjpeg.avi": (25, (272, 640), "pyav-seek"),
    "edge/mpeg4_bf_packed.avi": (100, (272, 640), "pyav-scan"),
    "edge/nonzero_start.mp4": (12, (112, 200), "pyav-seek"),
    "edge/odd_321x181_vp9.webm": (50, (181, 321), "pyav-seek"),
    "edge/odd_321x181_yuv444.mp4": (50, (181, 321), "pyav-seek"),
    "edge/one_frame.mp4": (1, (272, 640), "pyav-seek"),
    "edge/open_gop_h264.mp4": (250, (272, 640), "pyav-scan"),
    "edge/open_gop_hevc.mp4": (250, (272, 640), "pyav-seek"),
    "edge/portrait_406x720.mp4": (75, (720, 406), "pyav-seek"),
    "edge/rotated_90.mp4": (52, (640, 272), "pyav-seek"),
    "edge/three_frames_rot90.mov": (3, (568, 320), "pyav-seek"),
    "edge/unordered_pts.mov": (4, (50, 50), "pyav-seek"),
    "edge/vfr.mp4": (114, (272, 640), "pyav-seek"),
}
HEAVY = {"bunny_720p.mp4", "hevc_720p.mp4", "hiker_vp9_720p.webm"}
QUICK = [
    *few([name for name in READABLE if name not in HEAVY], 3),
    *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(HEAVY)),
]


def real(name: str) -> Path:
    assert CLIPS
    return Path(CLIPS) / name


# --- drawn videos: each frame shows its number ---


def numbered(number: int, height: int = 64, width: int = 128) -> np.ndarray:
    """Return a picture whose upper half shows `number` as eight black or white bars."""
    picture = np.full((height, width, 3), 128, dtype=np.uint8)
    for bit in range(8):
        bar = slice(bit * width // 8, (bit + 1) * width // 8)
        picture[: height // 2, bar] = 255 * (number >> bit & 1)
    return picture


def number_in(picture: np.ndarray) -> int:
    height, width, _ = picture.shape
    bars = picture[2 : height // 2 - 2].reshape(-1, 8, width // 8, 3)[:, :, 2:-2]
    return sum(1 << bit for bit in range(8) if bars[:, bit].mean() > 128)


def write_video(
    path: Path,
    ticks: list[int],
    codec: str = "libx264",
    rate: int = 25,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    **kwargs: str,
) -> Path:
    """Write one numbered frame per tick of 1 / rate seconds."""
    with av.open(str(path), "w", **kwargs) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        if rotation:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write a rotation")
            stream.set_display_rotation(rotation)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


BFRAMES = {"bf": "3", "g": "12", "x264-params": "b-adapt=0:scenecut=0"}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 frames at 25 per second, B-frames, 9 keyframes."""
    return write_video(tmp_path_factory.mktemp("v") / "v.mp4", list(range(100)), options=BFRAMES)


def numbers(clip: Clip) -> list[int]:
    return [number_in(frame) for frame in clip.frames]


# --- sampling ---


def brute_force(times: list[Fraction], end: Fraction, sampling: Sampling) -> list[int]:
    count = len(times)
    limit = sampling.num_frames
    if sampling.fps:
        taken = set()
        k = 0
        while k / Fraction(sampling.fps) < end:
            before = [i for i in range(count) if times[i] <= k / Fraction(sampling.fps)]
            taken.add(before[-1] if before else 0)
            k += 1
        if sampling.max_frames is None or len(taken) <= sampling.max_frames:
            return sorted(taken)
        limit = sampling.max_frames
    assert limit
    if limit >= count:
        return list(range(count))
    return [0] if limit == 1 else [k * (count - 1) // (limit - 1) for k in range(limit)]


@given(
    steps=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    late=st.integers(0, 30),
    base=st.sampled_from(["1/25", "1001/30000", "1/1000", "1/12800", "1/90000"]),
    sampling=st.one_of(
        st.builds(Sampling, num_frames=st.integers(1, 70)),
        st.builds(
            Sampling,
            fps=st.sampled_from(["1", "0.5", "25", "12.5", "30000/1001", "0.3", "7"]),
            max_frames=st.none() | st.integers(1, 70),
        ),
    ),
)
@example(steps=[5] * 10, late=0, base="1/25", sampling=Sampling(fps="5"))
def test_sampling_is_the_rule_of_the_documentation(
    steps: list[int], late: int, base: str, sampling: Sampling
) -> None:
    ticks = [late + sum(steps[:i]) for i in range(len(steps))]
    exact = [tick * Fraction(base) for tick in ticks]
    end = exact[-1] + steps[-1] * Fraction(base)
    times = np.array([float(time) for time in exact])
    taken = sample_indices(times, float(end), 0.0, sampling)
    assert taken == brute_force(exact, end, sampling)
    assert taken == sorted(set(taken))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        # 4 s at 25 frames a second: a step of 12.5, whole pairs; from end to end; a step of 33 1/3
        (Sampling(fps="2", max_frames=64, like="qwen2_vl"), [0, 12, 25, 37, 50, 62, 75, 87]),
        (Sampling(fps="2", max_frames=5, like="qwen2_vl"), [0, 25, 50, 75]),
        (Sampling(fps="2", max_frames=64, like="qwen3_vl"), [0, 14, 28, 42, 57, 71, 85, 99]),
        (Sampling(fps="1/4", max_frames=64, like="qwen3_vl"), [0, 33, 66, 99]),
        (Sampling(num_frames=3, like="llava"), [0, 33, 66]),
        (Sampling(num_frames=3, like="qwen3_vl"), [0, 50, 99]),
        (Sampling(num_frames=5, like="qwen2_vl"), [0, 25, 50, 75]),
        (Sampling(num_frames=4, kept=2, like="llava"), [0, 75]),
    ],
)
def test_frames_like_a_processors(video: Path, sampling: Sampling, expected: list[int]) -> None:
    clip = read_clip(ReadRequest(video, sampling))
    assert clip.frame_index.tolist() == expected
    assert len(clip.frames) == len(expected)


def test_frame_on_a_sampled_instant_is_the_one_taken(video: Path) -> None:
    clip = read_clip(ReadRequest(video, Sampling(fps="5")))
    assert numbers(clip) == clip.frame_index.tolist() == list(range(0, 100, 5))


def test_instants_of_a_part_count_from_its_start(video: Path) -> None:
    # 2.4 + 0.2 is not 2.6 in floats; the frame at 2.6 s is still the one of the second instant
    clip = read_clip(ReadRequest(video, Sampling(fps="5", max_frames=64), start=2.4, end=3.4))
    assert numbers(clip) == clip.frame_index.tolist() == [60, 65, 70, 75, 80]
    assert (clip.start, clip.end, clip.frame_count) == (2.4, 3.4, 25)


# --- drawn files through each reader ---


@pytest.mark.parametrize(
    ("decoder", "reader"),
    [
        pytest.param(
            "decord",
            "decord",
            marks=pytest.mark.skipif(not DECORD, reason="decord is not installed"),
        ),
        ("auto", "pyav-seek"),
    ],
)
@pytest.mark.parametrize("part", [(None, None), (1.0, 3.0), (3.98, None), (None, 0.04)])
def test_each_frame_is_the_one_of_its_index(
    video: Path, decoder: str, reader: str, part: tuple[float | None, float | None]
) -> None:
    for sampling in (EIGHT, Sampling(num_frames=1), Sampling(fps="3", max_frames=64), ALL):
        clip = read_clip(ReadRequest(video, sampling, start=part[0], end=part[1], decoder=decoder))
        assert numbers(clip) == clip.frame_index.tolist()
        assert np.array_equal(clip.timestamps, np.maximum(clip.frame_index / 25, part[0] or 0))
        assert clip.decoder == reader
        assert clip.fps == 25.0
        assert clip.display_size == (64, 128)


def test_part_keeps_frames_from_start_up_to_but_without_end(video: Path) -> None:
    clip = read_clip(ReadRequest(video, ALL, start=1.0, end=2.0))
    assert clip.frame_index.tolist() == list(range(25, 50))
    late = read_clip(ReadRequest(video, ALL, start=3.0, end=99.0))
    assert (late.frame_index[-1], late.end) == (99, 4.0)


def test_times_of_a_variable_rate_are_those_of_the_frames(tmp_path: Path) -> None:
    ticks = [7, 8, 9, 20, 45, 46, 80, 81, 82, 120]
    clip = read_clip(ReadRequest(write_video(tmp_path / "v.mkv", ticks, options=BFRAMES), ALL))
    assert numbers(clip) == list(range(10))
    assert np.abs(clip.timestamps - (np.array(ticks) - 7) / 25).max() < 1e-3  # Matroska: ms


def test_decord_and_pyav_give_equal_pictures_turned_alike(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", list(range(10)), rotation=90)
    clip = read_clip(ReadRequest(path, ALL, decoder="pyav"))
    assert clip.display_size == (128, 64)
    assert [number_in(np.rot90(frame, -1)) for frame in clip.frames] == list(range(10))
    assert np.array_equal(clip.frames, read_clip(ReadRequest(path, ALL, decoder="decord")).frames)


@pytest.mark.parametrize(
    ("name", "codec", "kwargs", "flag"),
    [
        ("b.avi", "mpeg4", {}, "avi_b"),
        ("b.wmv", "libx264", {"format": "asf"}, "no_index"),  # decord: 7 of 9 wrong in silence
        ("b.ts", "libx264", {}, "no_index"),
        ("b.h264", "libx264", {}, "nopts"),
    ],
)
def test_files_without_true_pts_or_index_are_read_from_the_start(
    tmp_path: Path, name: str, codec: str, kwargs: dict[str, str], flag: str
) -> None:
    options = BFRAMES if codec == "libx264" else {"bf": "2", "g": "12"}
    path = write_video(tmp_path / name, list(range(60)), codec, options=options, **kwargs)
    clip = read_clip(ReadRequest(path, EIGHT))
    assert clip.decoder == "pyav-scan"
    assert flag in clip.flags
    assert clip.frame_count == 60
    assert numbers(clip) == clip.frame_index.tolist()
    assert np.abs(clip.timestamps - clip.frame_index / 25).max() < 2e-3


def test_mpeg4_avi_and_open_gop_each_get_the_reader_that_is_right(tmp_path: Path) -> None:
    avi = write_video(tmp_path / "a.avi", list(range(50)), "mpeg4")
    assert scan(avi).flags == ()
    assert numbers(read_clip(ReadRequest(avi, EIGHT))) == [k * 49 // 7 for k in range(8)]
    options = {"x264-params": "open-gop=1:keyint=10:min-keyint=10:bframes=3:b-adapt=0:scenecut=0"}
    open_gop = write_video(tmp_path / "o.mp4", list(range(100)), options=options)
    clip = read_clip(ReadRequest(open_gop, ALL))
    assert (clip.flags, clip.decoder) == (("key_order",), "pyav-scan")  # a seek makes errors
    assert numbers(clip) == list(range(100))
    assert numbers(read_clip(ReadRequest(open_gop, SIXTEEN))) == [k * 99 // 15 for k in range(16)]


def test_one_frame_asked_for_sixteen_is_one_frame(tmp_path: Path) -> None:
    clip = read_clip(ReadRequest(write_video(tmp_path / "v.mp4", [0]), SIXTEEN))
    assert clip.frames.shape == (1, 64, 128, 3)
    assert (clip.start, clip.end, clip.frame_count) == (0.0, 0.04, 1)


def test_truncated_file_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", list(range(200)), options={"bf": "0"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"truncated, \d+ frames come of (19|20)\d ") as error:
        read_clip(ReadRequest(path, EIGHT))
    assert error.value.reason == "truncated"
    clip = read_clip(ReadRequest(path, ALL, allow_truncated=True))
    assert "truncated" in clip.flags
    assert numbers(clip) == list(range(clip.frame_count))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "cannot-open"), (b"text" * 99, "cannot-open"), (None, "cannot-open")],
)
def test_unreadable_file_is_named_with_its_reason(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "v.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError, match=r"v\.mp4") as error:
        read_clip(ReadRequest(path, EIGHT))
    assert error.value.reason == reason
    assert "\n" not in str(error.value)


# --- the real clips ---


def thumbnail(picture: np.ndarray) -> np.ndarray:
    step = max(1, picture.shape[1] // 48)
    return picture[::step, ::step].astype(np.int16).ravel()


def decode_everything(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds from the first frame, and thumbnails, of a plain decode from the start."""
    pts, pictures = [], []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                pts.append(frame.pts)
                rgb = frame.to_ndarray(format="rgb24")
                pictures.append(thumbnail(np.rot90(rgb, frame.rotation // 90)))
        # without true pts (AVI with B-frames) only the order of the pictures can be believed
        seconds = [float((value - min(pts)) * stream.time_base) for value in sorted(pts)]
    return np.array(seconds), np.stack(pictures)


def check_against(truth: tuple[np.ndarray, np.ndarray], clip: Clip) -> None:
    seconds, pictures = truth
    assert np.abs(clip.timestamps - seconds[clip.frame_index]).max() < 1e-6
    for place, frame in zip(clip.frame_index, clip.frames, strict=True):
        far = np.abs(pictures - thumbnail(frame)).mean(axis=1)
        assert far[place] == far.min(), f"{place} looks like {far.argmin()}"
        assert far[place] < 3  # decord's FFmpeg 4.1 doubles interlaced chroma differently: 1.9


@needs_clips
@pytest.mark.parametrize("name", QUICK)
def test_real_clip_gives_the_frames_of_a_full_decode(name: str) -> None:
    count, size, reader = READABLE[name]
    path = real(name)
    truth = decode_everything(path)
    assert len(truth[0]) == count
    last = float(truth[0][-max(1, count // 6)])
    for sampling, start in (
        (SIXTEEN, None),
        (EIGHT, last),
        (Sampling(fps="2", max_frames=8), None),
    ):
        clip = read_clip(ReadRequest(path, sampling, start=start))
        assert clip.display_size == size
        assert clip.decoder == reader or (not DECORD and reader == "decord")
        if start is None:
            assert clip.frame_count == count
            assert clip.timestamps[0] == 0.0
        check_against(truth, clip)
    if count < 400 and reader == "decord":
        check_against(truth, read_clip(ReadRequest(path, Sampling(num_frames=5), decoder="pyav")))


@needs_clips
def test_long_clip_is_counted_by_its_packets() -> None:
    scanned = scan(real("slides_1080p_2min.mp4"))
    assert (len(scanned.pts), scanned.flags, scanned.promised_frames) == (3678, (), 3678)
    assert float(scanned.duration) == pytest.approx(122.6)


@needs_clips
@pytest.mark.parametrize(
    ("name", "reason", "frames"),
    [
        ("zero_byte.mp4", "cannot-open", None),
        ("text_renamed.mp4", "cannot-open", None),
        ("truncated_nomoov.mp4", "cannot-open", None),
        ("audio_only.mp4", "no-video-stream", None),
        ("truncated.mkv", "truncated", 180),
        ("truncated_faststart.mp4", "truncated", 67),
        ("bitflips_mid.mp4", "damaged", 249),
        ("corrupted_h264.mp4", "damaged", 49),
    ],
)
def test_broken_file_is_refused_or_flagged(name: str, reason: str, frames: int | None) -> None:
    path = real("edge") / name
    began = time.monotonic()
    with pytest.raises(VideoError, match=name) as error:
        read_clip(ReadRequest(path, SIXTEEN))
    assert error.value.reason == reason
    if frames is None:
        assert time.monotonic() - began < 1
        return
    assert f" {frames} frames come of " in str(error.value)
    clip = read_clip(ReadRequest(path, SIXTEEN, allow_truncated=True))
    assert reason in clip.flags
    assert clip.frame_count == frames
    check_against(decode_everything(path), clip)


# --- the child ---


@pytest.fixture
def child() -> Iterator[DecodeChild]:
    with DecodeChild() as one:
        yield one


def gone(pid: int) -> bool:
    """Whether a process has ended; one that lost its parent may wait for init to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def same(left: Clip, right: Clip) -> bool:
    return all(np.array_equal(value, vars(right)[name]) for name, value in vars(left).items())


def test_child_gives_what_read_clip_gives(child: DecodeChild, video: Path, tmp_path: Path) -> None:
    for sampling, start in ((EIGHT, None), (ALL, 1.5), (Sampling(fps="2"), None)):
        clip = child.read_clip(ReadRequest(video, sampling, start=start))
        assert same(clip, read_clip(ReadRequest(video, sampling, start=start)))
    with pytest.raises(VideoError, match=r"nowhere\.mp4: no such file") as error:
        child.read_clip(ReadRequest(tmp_path / "nowhere.mp4", EIGHT))
    assert error.value.reason == "cannot-open"
    pid = child.pid
    child.read_clip(ReadRequest(video, EIGHT))
    assert child.pid == pid


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_child_that_dies_in_a_clip_is_an_error_and_the_next_clip_is_served(
    child: DecodeChild, video: Path, how: signal.Signals
) -> None:
    child.read_clip(ReadRequest(video, EIGHT))
    pid = child.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)  # so that the clip is under way when the blow falls
    blow = threading.Timer(0.2, os.kill, (pid, how))
    wake = threading.Timer(0.3, lambda: gone(pid) or os.kill(pid, signal.SIGCONT))
    blow.start()
    wake.start()
    with pytest.raises(VideoError, match=rf"v\.mp4.*{how.name}") as error:
        child.read_clip(ReadRequest(video, EIGHT))
    wake.cancel()
    assert error.value.reason == "decoder-crashed"
    assert error.value.retryable
    assert not Path(f"/proc/{pid}").exists()
    began = time.monotonic()
    assert numbers(child.read_clip(ReadRequest(video, EIGHT))) == [k * 99 // 7 for k in range(8)]
    assert time.monotonic() - began < 5  # 0.4 s on an idle machine


def test_child_that_dies_between_clips_is_nobodys_error(child: DecodeChild, video: Path) -> None:
    child.read_clip(ReadRequest(video, EIGHT))
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    time.sleep(0.1)
    child.read_clip(ReadRequest(video, EIGHT))


def test_clip_beyond_its_deadline_is_named(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocess.decode.child_process.POLL_SECONDS", 0.0)
    monkeypatch.setattr(DecodeChild, "base_seconds", -1.0)
    monkeypatch.setattr(DecodeChild, "seconds_per_pixel", 0.0)
    with DecodeChild() as child:
        # a limit below zero may also meet the child between two steps, when all its threads wait
        either = r"v\.mp4: (decoding had not ended|the decoder's threads wait for each other)"
        with pytest.raises(VideoError, match=either) as error:
            child.read_clip(ReadRequest(video, ALL))
        assert error.value.reason == "timeout"
        assert child.pid is None


def test_child_that_waits_without_working_is_a_retry(
    child: DecodeChild, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.read_clip(ReadRequest(video, EIGHT))
    assert child.pid
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(DecodeChild, "scan_seconds", 0.02)
    with pytest.raises(VideoError, match=r"v\.mp4") as error:
        child.read_clip(ReadRequest(video, EIGHT))
    assert error.value.reason == "stalled"
    assert error.value.retryable


def test_child_is_replaced_after_its_clips_and_leaves_nothing(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = set()
    monkeypatch.setattr(DecodeChild, "clips_per_child", 2)
    with DecodeChild() as child:
        for _ in range(4):
            if child.pid:
                pids.add(child.pid)
            child.read_clip(ReadRequest(video, EIGHT))
        child.read_clip(ReadRequest(video, EIGHT))
        assert child.pid
        pids.add(child.pid)
    assert len(pids) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_child_has_no_torch(child: DecodeChild, video: Path) -> None:
    child.read_clip(ReadRequest(video, EIGHT))
    maps = Path(f"/proc/{child.pid}/maps").read_text()
    assert "numpy" in maps
    assert "torch" not in maps
    code = "import sys, preprocess.decode.decode_child; print(sorted({'torch', 'av'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_child_leaves_when_its_parent_is_killed(video: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from shards.format.features import Sampling\n"
        "from preprocess.decode.decode_child import DecodeChild\n"
        "from preprocess.decode.request import ReadRequest\n"
        "request = ReadRequest(Path(sys.argv[1]), Sampling(num_frames=2))\n"
        "child = DecodeChild(); child.read_clip(request)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, video], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    with parent.stdout:
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    limit = time.monotonic() + 5
    while not gone(pid) and time.monotonic() < limit:
        time.sleep(0.02)
    assert gone(pid)


@needs_clips
@pytest.mark.skipif(not DECORD, reason="decord is not installed")
def test_endless_loop_in_decord_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = real("edge/missing_first_keyframe.mp4")
    # place 198 among the packets
    endless = ReadRequest(loops, Sampling(num_frames=1), start=7.88, end=7.92, decoder="decord")
    monkeypatch.setattr(DecodeChild, "base_seconds", 1.0)
    monkeypatch.setattr(DecodeChild, "seconds_per_pixel", 1e-8)
    with DecodeChild() as child:
        bikes = child.read_clip(ReadRequest(real("bikes.mp4"), EIGHT))
        pid = child.pid
        began = time.monotonic()
        with pytest.raises(VideoError, match="missing_first_keyframe") as error:
            child.read_clip(endless)
        assert error.value.reason == "timeout"
        assert time.monotonic() - began < 10  # 1.5 s of CPU
        assert not Path(f"/proc/{pid}").exists()
        assert same(child.read_clip(ReadRequest(real("bikes.mp4"), EIGHT)), bikes)
        assert child.read_clip(ReadRequest(loops, EIGHT)).frame_count == 50


@needs_clips
def test_child_reports_damage_as_read_clip_does(child: DecodeChild) -> None:
    for name in ("bitflips_mid.mp4", "corrupted_h264.mp4", "truncated.mkv"):
        with pytest.raises(VideoError) as error:
            child.read_clip(ReadRequest(real("edge") / name, SIXTEEN))
        assert error.value.reason in ("damaged", "truncated")


@needs_clips
def test_damage_that_decord_conceals_is_noticed(child: DecodeChild, tmp_path: Path) -> None:
    content = bytearray(real("edge/vfr.mp4").read_bytes())
    content[157357] ^= 4  # decord returns wrong pictures and raises nothing
    path = tmp_path / "flipped.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"114 frames come of 114") as error:
        child.read_clip(ReadRequest(path, Sampling(num_frames=12)))
    assert error.value.reason == "damaged"


@pytest.mark.slow
def test_child_does_not_grow_or_go_on_working(child: DecodeChild, video: Path) -> None:
    def resident() -> int:
        return int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * 4096

    for turn in range(150):
        child.read_clip(ReadRequest(video, EIGHT, decoder="auto" if turn % 2 else "pyav"))
        if turn == 30:
            early = resident()
    assert resident() - early < 32 << 20
    assert child.pid
    used = decode_child._cpu_seconds(child.pid)
    time.sleep(1)
    assert decode_child._cpu_seconds(child.pid) - used < 0.05
