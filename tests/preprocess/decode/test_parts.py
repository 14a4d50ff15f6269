"""Parts of one file: what each takes, and that many of them cost few scans and few decodes."""

import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from preprocess.decode import clip as clip_module
from preprocess.decode import read_pyav
from preprocess.decode.clip import FileReader, read_clip
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.events import collect
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from shards.format.features import Sampling

FOUR = Sampling(num_frames=4)


def slides(path: Path, ticks: list[int], codec: str = "mpeg4") -> Path:
    """Write a frame of its own grey at each tick, in tenths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 64
        for number, tick in enumerate(ticks):
            picture = np.full((64, 64, 3), 20 + 230 * number // len(ticks), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_part_takes_the_frames_that_are_shown_within_it(suffix: str, tmp_path: Path) -> None:
    starts = [0.0, 2.0, 5.0, 6.0]
    path = slides(tmp_path / f"v{suffix}", [round(10 * start) for start in starts])
    for start, end, taken in [
        (2.5, 3.5, [1]),  # within one slide
        (2.5, 5.5, [1, 2]),
        (2.0, 5.0, [1]),
        (4.9, 6.05, [1, 2, 3]),
        (None, 0.5, [0]),
        (6.02, None, [3]),
    ]:
        clip = read_clip(ReadRequest(path, FOUR, start=start, end=end))
        assert clip.frame_index.tolist() == taken, (start, end)
        shown = np.maximum(np.array(starts)[taken], start or 0)
        assert np.abs(clip.timestamps - shown).max() < 1e-3
        assert clip.start == (start or 0)
        fps = read_clip(ReadRequest(path, Sampling(fps="10"), start=start, end=end))
        assert fps.frame_index.tolist() == taken
    for start, end in [(7.0, None), (-1.0, 2.0), (3.0, 3.0), (3.0, 2.0)]:
        with pytest.raises(VideoError, match="correct the part") as error:
            read_clip(ReadRequest(path, FOUR, start=start, end=end))
        assert error.value.reason == "empty-part"
        assert "None" not in str(error.value)


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count scans and frames decoded from the start of a file."""
    done = {"scans": 0, "frames": 0}
    scan, frames = clip_module.scan, read_pyav.WholeDecode.frames

    def counting_scan(path: Path) -> Any:
        done["scans"] += 1
        return scan(path)

    def counting_frames(self: read_pyav.WholeDecode) -> Any:
        for frame in frames(self):
            done["frames"] += 1
            yield frame

    monkeypatch.setattr(clip_module, "scan", counting_scan)
    monkeypatch.setattr(read_pyav.WholeDecode, "frames", counting_frames)
    return done


@pytest.mark.parametrize("overlap", [False, True])
def test_many_parts_of_a_file_without_an_index_are_two_passes(
    overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = slides(tmp_path / "v.ts", list(range(400)), "mpeg2video")
    parts = [(k / 10, k / 10 + (3.0 if overlap else 0.5)) for k in range(0, 360, 5)]
    alone = [read_clip(ReadRequest(path, FOUR, start=a, end=b)) for a, b in parts]
    done = counted(monkeypatch)
    reader = FileReader()
    for place, (start, end) in enumerate(parts):
        following = tuple(parts[place + 1 : place + 65])
        request = ReadRequest(path, FOUR, start=start, end=end, next_parts=following)
        clip = collect(reader.events(request))
        assert clip.decoder == "pyav-scan"
        for name, value in vars(alone[place]).items():
            assert np.array_equal(value, getattr(clip, name)), name
    assert done["scans"] == 1
    assert done["frames"] <= 2 * 400


def test_parts_in_any_order_and_of_other_files_are_each_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_pyav, "KEPT_BYTES", 64 * 64 * 3 * 3)
    paths = [slides(tmp_path / f"{n}.ts", list(range(n)), "mpeg2video") for n in (60, 80)]
    chosen = random.Random(0)
    asked = [(chosen.choice(paths), chosen.randrange(0, 50) / 10) for _ in range(24)]
    with DecodeChild() as child:
        for place, (path, start) in enumerate(asked):
            following = tuple((s, s + 1) for p, s in asked[place + 1 : place + 5] if p == path)
            request = ReadRequest(path, FOUR, start=start, end=start + 1, next_parts=following)
            clip = child.read_clip(request)
            whole = read_clip(ReadRequest(path, Sampling(num_frames=100)))
            assert np.array_equal(clip.frames, whole.frames[clip.frame_index])
            assert clip.frame_index[0] == round(10 * start)
    assert child.pid is None
