"""Files whose first packets do not decode, as where a recording was cut: every part has the same clock.

A cut within open groups of pictures leaves frames that need others before the cut; one within a refresh
without keyframes leaves frames that are not clean yet. Players show neither.
"""

from pathlib import Path

import av
import numpy as np
import pytest

from preprocess.decode.clip import read_clip
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import scan
from shards.format.features import Sampling
from tests.preprocess.decode.test_formats import X264, X265, decoded, drawn, write

OPTIONS = {
    "mpeg2.mkv": "-c:v mpeg2video -bf 2 -q:v 3 -g 12",
    "mpeg4.mkv": "-c:v mpeg4 -bf 2 -q:v 3 -g 12",
    "refresh.mp4": f"{X264} -pix_fmt yuv420p -x264-params intra-refresh=1",
    "closed.mp4": f"{X264} -pix_fmt yuv420p",
    "hevc-leading.mkv": f"{X265}:open-gop=1:min-keyint=12:scenecut=0:bframes=3 -pix_fmt yuv420p",
}
LOSE_SOME = ("mpeg2.mkv", "mpeg4.mkv", "refresh.mp4", "hevc-leading.mkv")


def cut(source: Path, target: Path) -> Path:
    """Copy the packets of a file from its second keyframe on."""
    with av.open(str(source)) as opened, av.open(str(target), "w") as written:
        stream = opened.streams.video[0]
        copy = written.add_stream_from_template(stream)
        keys = 0
        for packet in opened.demux(stream):
            keys += packet.is_keyframe and packet.size > 0
            if keys > 1 and packet.size:
                packet.stream = copy
                written.mux(packet)
    return target


@pytest.mark.parametrize("name", OPTIONS)
def test_parts_of_a_cut_file_have_the_clock_of_the_whole(name: str, tmp_path: Path) -> None:
    whole = write(tmp_path / name, OPTIONS[name], drawn())
    path = cut(whole, tmp_path / f"cut-{name}")
    frames, times = decoded(path)  # by FFmpeg's command line
    assert len(frames) >= 10
    assert ("first_lost" in scan(path).flags) == (name in LOSE_SOME)
    times -= times[0]
    for start in (None, 0.2, 0.31):
        clip = read_clip(ReadRequest(path, Sampling(num_frames=5), start=start))
        first = 0 if start is None else int(np.searchsorted(times, start + 0.001)) - 1
        assert clip.frame_count == len(frames) - first
        assert clip.frame_index[0] == first
        shown = np.maximum(times[clip.frame_index], start or 0)
        assert np.abs(clip.timestamps - shown).max() < 0.002
        for place, frame in zip(clip.frame_index, clip.frames, strict=True):
            assert np.abs(frames - frame).mean(axis=(1, 2, 3)).argmin() == place
