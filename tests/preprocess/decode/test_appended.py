"""Files that were joined byte by byte: all frames come, or the clip is refused by name.

pytest tests/preprocess/decode/test_appended.py
"""

from pathlib import Path

import av
import numpy as np
import pytest

from preprocess.decode.clip import read_clip
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from shards.format.features import Sampling

ALL = Sampling(num_frames=20)
FORMATS: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp4": ("mp4", "mpeg4", {}),
    "mov": ("mov", "mpeg4", {}),
    "3gp": ("3gp", "mpeg4", {}),
    "mp4, index first": ("mp4", "mpeg4", {"movflags": "faststart"}),
    "mov, index first": ("mov", "mpeg4", {"movflags": "faststart"}),
    "mp4, fragments": ("mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
    "wmv": ("wmv", "mpeg4", {}),
    "flv": ("flv", "flv", {}),
}
WHOLE = {"avi": "mpeg4", "mkv": "mpeg4", "webm": "libvpx"}


def write(path: Path, codec: str, first: int, options: dict[str, str]) -> bytes:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(first, first + 10):
            picture = np.full((48, 64, 3), 10 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_what_no_reader_goes_on_to_is_refused(name: str, tmp_path: Path) -> None:
    suffix, codec, options = FORMATS[name]
    first, second = (write(tmp_path / f"{k}.{suffix}", codec, k, options) for k in (0, 10))
    alone = read_clip(ReadRequest(tmp_path / f"0.{suffix}", ALL))
    assert "appended" not in alone.flags
    path = tmp_path / f"both.{suffix}"
    path.write_bytes(first + second)
    with pytest.raises(VideoError, match=r"both.*: another file is appended .* --allow-truncated"):
        read_clip(ReadRequest(path, ALL))
    taken = read_clip(ReadRequest(path, ALL, allow_truncated=True))
    assert "appended" in taken.flags
    if "fragments" not in name:
        assert (taken.frames == alone.frames).all()


@pytest.mark.parametrize("end", ["mdat", "nothing"])
def test_a_second_file_that_is_cut_short_counts_and_bytes_that_are_none_do_not(
    end: str, tmp_path: Path
) -> None:
    first = write(tmp_path / "a.mp4", "mpeg4", 0, {})
    second = first[: first.index(b"moov") - 4] if end == "mdat" else b"\0\0\0\0" + first[:400]
    path = tmp_path / "both.mp4"
    path.write_bytes(first + second)
    flags = read_clip(ReadRequest(path, ALL, allow_truncated=True)).flags
    assert ("appended" in flags) == (end == "mdat")


@pytest.mark.parametrize("suffix", WHOLE)
def test_other_formats_give_the_frames_of_both(suffix: str, tmp_path: Path) -> None:
    both = [write(tmp_path / f"{k}.{suffix}", WHOLE[suffix], k, {}) for k in (0, 10)]
    path = tmp_path / f"both.{suffix}"
    path.write_bytes(b"".join(both))
    clip = read_clip(ReadRequest(path, ALL))
    shown = clip.frames.mean(axis=(1, 2, 3))
    assert abs(shown - 10 * np.arange(20)).max() < 5
