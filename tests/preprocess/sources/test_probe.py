"""What a plan learns without decoding: true identity, true lengths, and no hostile file stops it.

pytest tests/preprocess/sources/test_probe.py
FRAMEBANK_CLIPS=videos pytest tests/preprocess/sources/test_probe.py    also real clips
"""

import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from preprocess.decode.source import identity
from preprocess.sources.find import find_clips
from preprocess.sources.header import Header, HeaderChild, predicted_frames
from preprocess.sources.probe import probe
from shards.format.features import Sampling

EIGHT = Sampling(num_frames=8)
CLIPS = os.environ.get("FRAMEBANK_CLIPS")


@pytest.mark.parametrize(
    ("header", "sampling", "start", "end", "frames"),
    [
        (Header(10.0, 25.0), Sampling(num_frames=8), None, None, 8),
        (Header(0.2, 25.0), Sampling(num_frames=8), None, None, 5),
        (Header(10.0, 25.0), Sampling(fps="1", max_frames=64), None, None, 10),
        (Header(10.01, 25.0), Sampling(fps="1", max_frames=64), None, None, 11),
        (Header(1e5, 25.0), Sampling(fps="1", max_frames=64), None, None, 64),
        (Header(10.0, 0.5), Sampling(fps="2", max_frames=64), None, None, 5),
        (Header(10.0, 25.0), Sampling(fps="1/2", max_frames=64), 2.0, 6.0, 2),
        (Header(10.0, 25.0), Sampling(fps="1", max_frames=64), 8.0, 60.0, 2),
        (Header(10.0, 25.0), Sampling(fps="1", max_frames=64), 20.0, None, 1),
        (Header(0.0, 0.0), Sampling(num_frames=8), None, None, 1),  # a still picture
        (Header(10.0, None), Sampling(num_frames=8), None, None, 8),
        (Header(None, None), Sampling(fps="1", max_frames=64), 1.0, 2.0, 64),
        (Header(-5.0, -1.0), Sampling(fps="1", max_frames=64), None, None, 1),
    ],
)
def test_frames_are_predicted_from_what_a_header_says(
    header: Header, sampling: Sampling, start: float | None, end: float | None, frames: int
) -> None:
    assert predicted_frames(header, sampling, start, end) == frames


def test_a_source_of_each_kind_is_known_by_its_bytes(toy: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "frames").mkdir(parents=True)
    for k in range(5):
        picture = np.full((9, 9, 3), k, np.uint8)
        Image.fromarray(picture).save(root / "frames" / f"{k}.png")
    video = shutil.copy(toy / "videos/test/clip-00000.mp4", root / "video.mp4")
    (root / "bad.mp4").write_text("no video")
    (root / "empty.mp4").write_bytes(b"")
    (tmp_path / "a.tar").write_bytes(b"")
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", toy / "videos", "test"], check=True)
    subprocess.run(["tar", "-czf", tmp_path / "b.tgz", "-C", toy / "videos", "train"], check=True)
    inputs = [str(root), str(tmp_path / "a.tar"), str(tmp_path / "b.tgz")]
    clips = {clip.id: clip for clip in probe(find_clips(inputs).clips, {}, EIGHT)}
    assert len(clips) == 4 + 3 + 6
    for id_ in ("video.mp4", "bad.mp4", "empty.mp4"):
        assert (clips[id_].size, clips[id_].digest) == identity(root / id_)
        assert clips[id_].mtime_ns == (root / id_).stat().st_mtime_ns
    assert (clips["frames"].size, clips["frames"].digest) == identity(root / "frames")
    assert {id_: clips[id_].frames for id_ in ("video.mp4", "bad.mp4", "empty.mp4", "frames")} == {
        "video.mp4": 8,
        "bad.mp4": 0,
        "empty.mp4": 0,
        "frames": 5,
    }
    for id_ in ("test/clip-00001.mp4", "train/clip-00005.mp4"):
        plain = toy / "videos" / id_
        assert (clips[id_].size, clips[id_].digest) == identity(plain)
        assert clips[id_].frames == 8, "of a member the most is predicted"
    assert Path(video).exists()


def test_what_a_plan_knows_is_not_looked_at_again(toy: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    shutil.copy(toy / "videos/test/clip-00000.mp4", file)
    (first,) = probe(find_clips([str(file)]).clips, {}, EIGHT)
    stat = file.stat()
    file.write_bytes(bytes(stat.st_size))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    clips = find_clips([str(file)]).clips
    assert probe(clips, {first.key: first}, EIGHT) == [first]
    (seen,) = probe(clips, {}, EIGHT)
    assert (seen.digest != first.digest, seen.frames) == (True, 0)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert probe(clips, {first.key: first}, EIGHT)[0].digest == seen.digest


def test_parts_of_one_video_are_predicted_each(toy: Path) -> None:
    (clip,) = find_clips([str(toy / "videos/test/clip-00000.mp4")]).clips
    parts = [replace(clip, key=str(k), start=k / 2, end=k / 2 + 0.5) for k in range(3)]
    found = probe(parts, {}, Sampling(fps="100", max_frames=99))
    assert [part.frames for part in found] == [4, 4, 4]  # 8 frames a second
    assert len({part.digest for part in found}) == 1


@pytest.mark.parametrize(
    ("extra", "warned"), [(None, False), (0.9, False), (1.1, True), (450, True)]
)
def test_parts_that_end_far_after_their_video_are_told(
    toy: Path, caplog: pytest.LogCaptureFixture, extra: float | None, warned: bool
) -> None:
    (clip,) = find_clips([str(toy / "videos/test/clip-00000.mp4")]).clips
    with HeaderChild() as child:
        header = child.header(Path(clip.path), "1")
    assert header is not None
    assert header.seconds
    end = None if extra is None else header.seconds + extra
    probe([replace(clip, start=0.5, end=end), clip], {}, EIGHT)
    assert [f"clip-00000.mp4 to {end:g} s of " in line for line in caplog.messages] == [
        True
    ] * warned


def test_files_of_noise_pipes_and_gone_ones_are_no_trouble(tmp_path: Path) -> None:
    random = Random(0)
    for k in range(30):
        (tmp_path / f"noise{k}.mp4").write_bytes(random.randbytes(random.randrange(50_000)))
    clips = find_clips([str(tmp_path)]).clips
    os.mkfifo(tmp_path / "pipe.mp4")
    pipe, gone = (replace(clips[0], path=str(tmp_path / n)) for n in ("pipe.mp4", "gone.mp4"))
    found = probe([*clips, replace(pipe, key="p"), replace(gone, key="g")], {}, EIGHT)
    assert all(clip.digest for clip in found[:30])
    assert [(clip.digest, clip.frames) for clip in found[30:]] == [(None, 0), (None, 0)]
    assert found[-1].size is None


class Loops(HeaderChild):
    """A child for which the file called `bad` is an endless loop."""

    how = "while True: pass"
    program = ("-c", "")

    def __init__(self, how: str, stall_seconds: float = 30) -> None:
        super().__init__()
        self.stall_seconds = stall_seconds
        self.program = (
            "-c",
            "import os, signal, time\n"
            "import preprocess.sources.header as header\n"
            "true = header.read_header\n"
            "def read(path, fps):\n"
            "    if path.name == 'bad':\n"
            f"        {how}\n"
            "    return true(path, fps)\n"
            "header.CPU_SECONDS, header.read_header = 1, read\n"
            "header.main()\n",
        )


@pytest.mark.parametrize(
    ("how", "stall"),
    [
        ("while True: pass", 30),
        ("time.sleep(1000)", 0.5),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 30),
        ("os.close(1); os._exit(0)", 30),
    ],
)
def test_a_file_that_loops_hangs_or_crashes_is_one_that_cannot_be_opened(
    toy: Path, how: str, stall: float
) -> None:
    good = toy / "videos" / "test" / "clip-00000.mp4"
    with Loops(how, stall) as child:
        began = time.monotonic()
        assert child.header(Path("bad"), "2") is None
        assert time.monotonic() - began < 30
        child.stall_seconds = 30
        header = child.header(good, "2")
    assert header
    assert header.fps == 8


@pytest.mark.skipif(not CLIPS, reason="FRAMEBANK_CLIPS does not name the test videos")
@pytest.mark.slow
def test_predictions_for_real_clips_are_what_is_decoded() -> None:
    assert CLIPS
    sampling = Sampling(fps="1", max_frames=16)
    wrong, total = [], 0
    with DecodeChild() as child:
        for clip in probe(find_clips([CLIPS]).clips, {}, sampling):
            try:
                frames = len(child.read_clip(ReadRequest(Path(clip.path), sampling)).frames)
            except VideoError:
                continue
            total += 1
            if abs(frames - (clip.frames or 0)) > 1:
                wrong.append((clip.id, frames, clip.frames))
    assert len(wrong) <= total // 5, wrong
