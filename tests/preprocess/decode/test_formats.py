"""Frames against FFmpeg's own command line, over the containers and codecs that it can write.

A few of each kind run by default, all of them in the slow run. Every file holds 40 drawn frames, and
each frame that comes of it must be the one of its place in what the command line decodes.
"""

import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from preprocess.decode.clip import Clip, read_clip
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from shards.format.features import Sampling

imageio_ffmpeg = pytest.importorskip(
    "imageio_ffmpeg", reason="imageio-ffmpeg, of the dev extra, is not installed"
)

HEIGHT, WIDTH, COUNT, RATE = 96, 128, 40, 25
SIXTEEN = Sampling(num_frames=16)
FAR = 6.0
"""Mean levels by which two decoders may differ in chroma of a frame, e.g. of interlaced 4:2:0."""


@dataclass(frozen=True)
class Format:
    """What FFmpeg is asked to write."""

    name: str
    """Of the file."""
    options: str
    quick: bool = False
    """Whether it is in the default run."""
    stream: str = "0:v"
    """What the command line is to take, where its own choice is not the moving one."""
    times: bool = True
    """Whether the command line's own times can be believed."""
    clear: bool = False
    """Whether some of it is transparent."""
    hidden: int = 0
    """Frames before the time at which the file says that it begins: no player shows them."""


def ffmpeg(*words: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-y", *map(str, words)]
    if stdin is not None:
        command.remove("-nostdin")
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    assert not done.returncode, done.stderr.decode()[-2000:]
    return done


def drawn(count: int = COUNT, first: int = 0) -> np.ndarray:
    """Return uint8 `(count, height, width, 4)`: each picture its number in bars, and its own colour."""
    pictures = np.full((count, HEIGHT, WIDTH, 4), 255, np.uint8)
    for place in range(count):
        number = first + place
        pictures[place, :, :, :3] = (40 + 3 * number, 200 - 3 * number, 90 + 60 * (number % 3))
        for bit in range(8):
            bar = slice(bit * WIDTH // 8, (bit + 1) * WIDTH // 8)
            pictures[place, : HEIGHT // 2, bar, :3] = 235 if number >> bit & 1 else 20
        pictures[place, -16:, : WIDTH // 2, :3] = (220, 30, 30)  # so that no side is like another
    return pictures


def write(path: Path, options: str, pictures: np.ndarray) -> Path:
    ffmpeg(
        "-f", "rawvideo", "-pix_fmt", "rgba", "-s", f"{WIDTH}x{HEIGHT}",
        "-r", str(RATE), "-i", "-", *options.split(), path, stdin=pictures.tobytes(),
    )  # fmt: skip
    return path


def decoded(path: Path, *options: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all frames that the command line gives, over white: `(frames, h, w, 3)`, and their times."""
    out = path.with_suffix(".raw")
    done = ffmpeg(
        "-i", path, *options, "-an", "-fps_mode", "passthrough",
        "-vf", "format=rgba,showinfo", "-f", "rawvideo", out,
    )  # fmt: skip
    said = done.stderr.decode(errors="replace")
    times = [float(text) for text in re.findall(r" n: *\d+ pts: *\S+ pts_time:(\S+)", said)]
    height, width = map(int, re.findall(r" s:(\d+)x(\d+) ", said)[0][::-1])
    rgba = np.fromfile(out, np.uint8).reshape(-1, height, width, 4).astype(np.float64)
    opaque = rgba[..., 3:] / 255
    return rgba[..., :3] * opaque + 255 * (1 - opaque), np.array(times)


def check(clip: Clip, frames: np.ndarray, far: float = FAR) -> None:
    """Assert that each frame is the one of its place, and no other is as near."""
    assert clip.frame_count == len(frames)
    for place, frame in zip(clip.frame_index, clip.frames, strict=True):
        distances = np.abs(frames - frame).mean(axis=(1, 2, 3))
        assert distances.argmin() == place, f"{place} looks like {distances.argmin()}"
        assert distances[place] < far


X264 = "-c:v libx264 -g 12 -bf 2 -threads 1 -preset veryfast"
X265 = "-c:v libx265 -preset veryfast -x265-params log-level=none:pools=1:keyint=12"
AV1 = "-c:v libaom-av1 -cpu-used 8 -g 12"
VP9 = "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 12"
VFR = "-vf settb=1/1000,setpts=N*(N+40) -fps_mode passthrough"
FORMATS = [
    Format("h264.mp4", f"{X264} -pix_fmt yuv420p", quick=True),
    Format("h264-10.mp4", f"{X264} -pix_fmt yuv420p10le"),
    Format("h264-422.mp4", f"{X264} -pix_fmt yuv422p"),
    Format("h264-444.mp4", f"{X264} -pix_fmt yuv444p"),
    Format("h264-fragments.mp4", f"{X264} -pix_fmt yuv420p -movflags frag_keyframe+empty_moov"),
    Format("h264-open-gop.mp4", f"{X264} -pix_fmt yuv420p -x264-params open-gop=1"),
    Format("h264-interlaced.mp4", f"{X264} -pix_fmt yuv420p -flags +ilme+ildct -x264-params tff=1"),
    Format("h264-late.mp4", f"{X264} -pix_fmt yuv420p -output_ts_offset 7.3"),
    Format("h264-negative.mp4", f"{X264} -pix_fmt yuv420p -output_ts_offset -0.4", hidden=10),
    Format("hevc.mp4", f"{X265} -pix_fmt yuv420p -tag:v hvc1"),
    Format("hevc-10.mp4", f"{X265} -pix_fmt yuv420p10le", quick=True),
    Format("av1.mp4", f"{AV1} -pix_fmt yuv420p", quick=True),
    Format("av1-10.mp4", f"{AV1} -pix_fmt yuv420p10le"),
    Format("vp9.mp4", f"{VP9} -pix_fmt yuv420p"),
    Format("mpeg4.mp4", "-c:v mpeg4 -bf 2 -q:v 3"),
    Format("mpeg2.mp4", "-c:v mpeg2video -bf 2 -q:v 3"),
    Format("mjpeg.mov", "-c:v mjpeg -q:v 3 -pix_fmt yuvj422p"),
    Format("prores.mov", "-c:v prores_ks -profile:v 2 -pix_fmt yuv422p10le", quick=True),
    Format("prores-alpha.mov", "-c:v prores_ks -profile:v 4444 -pix_fmt yuva444p10le", clear=True),
    Format("dnxhr.mov", "-c:v dnxhd -profile:v dnxhr_sq -pix_fmt yuv422p -s 256x192"),
    Format("png.mov", "-c:v png -pix_fmt rgba", clear=True),
    Format("qtrle.mov", "-c:v qtrle -pix_fmt argb", quick=True, clear=True),
    Format("cineform.mov", "-c:v cfhd -pix_fmt yuv422p10le"),
    Format("h263.3gp", "-c:v h263 -s 176x144 -q:v 3"),
    Format("h264.3g2", f"{X264} -pix_fmt yuv420p"),
    Format("h264.f4v", f"{X264} -pix_fmt yuv420p"),
    Format("h264.mkv", f"{X264} -pix_fmt yuv420p"),
    Format("hevc-444.mkv", f"{X265} -pix_fmt yuv444p"),
    Format("ffv1.mkv", "-c:v ffv1 -pix_fmt yuv422p10le", quick=True),
    Format("ffv1-alpha.mkv", "-c:v ffv1 -pix_fmt bgra", clear=True),
    Format("theora.mkv", "-c:v libtheora -q:v 8 -pix_fmt yuv420p"),
    Format("huffyuv.mkv", "-c:v huffyuv -pix_fmt yuv422p"),
    Format("raw.mkv", "-c:v rawvideo -pix_fmt yuv420p"),
    Format("vfr.mkv", f"{X264} -pix_fmt yuv420p {VFR}", quick=True),
    Format("vp8.webm", "-c:v libvpx -b:v 1M -g 12 -pix_fmt yuv420p"),
    Format("vp9.webm", f"{VP9} -pix_fmt yuv420p", quick=True),
    Format("vp9-444.webm", f"{VP9} -pix_fmt yuv444p"),
    Format("vp9-10.webm", f"{VP9} -pix_fmt yuv420p10le"),
    Format("av1.webm", f"{AV1} -pix_fmt yuv420p"),
    Format("h264.ts", f"{X264} -pix_fmt yuv420p", quick=True),
    Format("hevc.ts", f"{X265} -pix_fmt yuv420p"),
    Format("mpeg2.ts", "-c:v mpeg2video -bf 2 -q:v 3"),
    Format("h264.m2ts", f"{X264} -pix_fmt yuv420p"),
    Format("h264.mts", f"{X264} -pix_fmt yuv420p -f mpegts"),
    Format("mpeg1.mpg", "-c:v mpeg1video -bf 2 -q:v 3"),
    Format("mpeg2.mpg", "-c:v mpeg2video -bf 2 -q:v 3", quick=True),
    Format("mpeg2-422.mpg", "-c:v mpeg2video -pix_fmt yuv422p -q:v 3"),
    Format("mpeg2.vob", "-c:v mpeg2video -bf 2 -q:v 3"),
    Format("mpeg2-interlaced.vob", "-c:v mpeg2video -flags +ilme+ildct -q:v 3"),
    Format("mpeg4.avi", "-c:v mpeg4 -q:v 3"),
    Format("mpeg4-b.avi", "-c:v mpeg4 -bf 2 -q:v 3", quick=True),
    Format("divx.avi", "-c:v mpeg4 -vtag DIVX -q:v 3"),
    Format("h264-b.avi", f"{X264} -pix_fmt yuv420p"),
    Format("mjpeg.avi", "-c:v mjpeg -q:v 3 -pix_fmt yuvj420p"),
    Format("msmpeg4.avi", "-c:v msmpeg4 -q:v 3"),
    Format("huffyuv.avi", "-c:v huffyuv -pix_fmt yuv422p"),
    Format("utvideo.avi", "-c:v utvideo -pix_fmt gbrp"),
    Format("ffv1.avi", "-c:v ffv1 -pix_fmt yuv420p"),
    Format("raw.avi", "-c:v rawvideo -pix_fmt bgr24"),
    Format("dv.avi", "-c:v dvvideo -s 720x576 -pix_fmt yuv420p -target pal-dv -f avi"),
    Format("h264.flv", f"{X264} -pix_fmt yuv420p", quick=True),
    Format("flv1.flv", "-c:v flv -q:v 3"),
    Format("theora.ogv", "-c:v libtheora -q:v 8 -pix_fmt yuv420p", quick=True),
    Format("vp8.ogg", "-c:v libvpx -b:v 1M -pix_fmt yuv420p"),
    Format("mpeg2.mxf", "-c:v mpeg2video -bf 2 -q:v 3"),
    Format("dnxhr.mxf", "-c:v dnxhd -profile:v dnxhr_sq -pix_fmt yuv422p -s 256x192"),
    Format("h264.mxf", f"{X264} -pix_fmt yuv420p", times=False),
    Format("wmv2.wmv", "-c:v wmv2 -q:v 3", quick=True),
    Format("wmv1.asf", "-c:v wmv1 -q:v 3"),
    Format("mpeg4.nut", "-c:v mpeg4 -bf 2 -q:v 3"),
    Format("pictures.gif", "-lavfi split[a][b];[a]palettegen[p];[b][p]paletteuse", quick=True),
    Format("pictures.apng", "-f apng -plays 0", clear=True),
    Format("pictures.webp", "-c:v libwebp_anim -lossless 1 -loop 0", clear=True),
    Format("pictures.avif", f"{AV1} -pix_fmt yuv444p", stream="0:v:1"),
    Format("raw.y4m", "-pix_fmt yuv420p"),
    Format("vp9.ivf", f"{VP9} -pix_fmt yuv420p"),
    Format("raw.h264", f"{X264} -pix_fmt yuv420p"),
    Format("raw.hevc", f"{X265} -pix_fmt yuv420p"),
    Format("raw.m2v", "-c:v mpeg2video -bf 2 -q:v 3"),
    Format("raw.m4v", "-c:v mpeg4 -q:v 3 -f m4v"),
    Format("raw.mjpeg", "-c:v mjpeg -q:v 3 -f mjpeg"),
    Format("raw.obu", f"{AV1} -pix_fmt yuv420p"),
    Format("pal.dv", "-c:v dvvideo -s 720x576 -pix_fmt yuv420p"),
    Format("rv10.rm", "-c:v rv10 -q:v 3"),
    Format("flv1.swf", "-c:v flv -q:v 3"),
]  # fmt: skip
TABLE = [
    pytest.param(one, id=one.name, marks=() if one.quick else pytest.mark.slow) for one in FORMATS
]


@pytest.mark.parametrize("format_", TABLE)
def test_frames_are_those_of_the_command_line(format_: Format, tmp_path: Path) -> None:
    pictures = drawn()
    if format_.clear:
        pictures[:, 60:, 80:, 3] = 0
    path = write(tmp_path / format_.name, format_.options, pictures)
    frames, times = decoded(path, "-map", format_.stream)
    assert len(frames) == COUNT - format_.hidden, "the command line lost some"
    assert not format_.clear or (frames[:, 64:, 84:] > 250).all()
    clip = read_clip(ReadRequest(path, SIXTEEN))
    check(clip, frames)
    told = times - times[0] if format_.times else np.arange(len(frames)) / RATE
    assert np.abs(clip.timestamps - told[clip.frame_index]).max() < 0.002, told


# --- streams that were appended to each other, and clocks that jump ---

APPENDED = ["h264.ts", "mpeg2.mpg", "h264.mkv", "raw.m4v", "hevc.ts", "mpeg2.vob", "vp9.webm"]
APPENDED += ["mpeg4.avi", "raw.h264", "raw.m2v", "raw.mjpeg", "raw.obu", "pal.dv"]
BY_NAME = {one.name: one for one in FORMATS}


def halves(name: str, folder: Path) -> tuple[Path, Path]:
    """Return two files of 24 and 16 frames, which number on."""
    options = BY_NAME[name].options
    first = write(folder / f"a-{name}", options, drawn(24))
    return first, write(folder / f"b-{name}", options, drawn(16, first=24))


@pytest.mark.parametrize(
    "name", [n if n in APPENDED[:4] else pytest.param(n, marks=pytest.mark.slow) for n in APPENDED]
)
def test_appended_streams_are_laid_end_to_end(name: str, tmp_path: Path) -> None:
    first, second = halves(name, tmp_path)
    path = tmp_path / name
    path.write_bytes(first.read_bytes() + second.read_bytes())
    frames = np.concatenate([decoded(first)[0], decoded(second)[0]])
    clip = read_clip(ReadRequest(path, SIXTEEN))
    check(clip, frames)
    assert np.abs(clip.timestamps - clip.frame_index / RATE).max() < 0.002
    assert abs(clip.end - COUNT / RATE) < 0.002
    part = read_clip(ReadRequest(path, SIXTEEN, start=0.88, end=1.12))  # across the seam
    assert part.frame_index.tolist() == list(range(22, 28))


@pytest.mark.parametrize("offset", [500, 20])
def test_a_clock_that_a_recorder_started_again_is_laid_end_to_end(
    offset: int, tmp_path: Path
) -> None:
    options = BY_NAME["h264.ts"].options
    first = write(tmp_path / "a.ts", f"{options} -output_ts_offset 100", drawn(24))
    second = write(tmp_path / "b.ts", f"{options} -output_ts_offset {offset}", drawn(16, first=24))
    (tmp_path / "c.ts").write_bytes(first.read_bytes() + second.read_bytes())
    clip = read_clip(ReadRequest(tmp_path / "c.ts", SIXTEEN))
    check(clip, np.concatenate([decoded(first)[0], decoded(second)[0]]))
    assert "discontinuity" in clip.flags
    assert np.abs(clip.timestamps - clip.frame_index / RATE).max() < 0.002


@pytest.mark.parametrize("rate", ["1", "25", "30000/1001"])
@pytest.mark.parametrize("bframes", [0, 2])
def test_one_far_timestamp_asks_for_no_memory(rate: str, bframes: int, tmp_path: Path) -> None:
    far = "-vf settb=1/1000,setpts=N*40+if(eq(N\\,39)\\,1e12\\,0) -fps_mode passthrough"
    options = f"-c:v libx264 -bf {bframes} -threads 1 -pix_fmt yuv420p {far}"
    path = write(tmp_path / "v.mkv", options, drawn())
    clip = read_clip(ReadRequest(path, Sampling(fps=rate, max_frames=64)))
    assert "discontinuity" in clip.flags
    check(clip, decoded(path)[0])
    assert clip.end < 2


def test_a_long_gap_is_flagged_where_no_packet_explains_it(tmp_path: Path) -> None:
    hold = "-vf settb=1/1000,setpts=N*40+if(gt(N\\,20)\\,60000\\,0) -fps_mode passthrough"
    options = f"{X264} -pix_fmt yuv420p {hold}"
    clip = read_clip(ReadRequest(write(tmp_path / "v.mkv", options, drawn()), SIXTEEN))
    assert clip.flags == ("gap",)
    assert clip.end > 60
    held = read_clip(ReadRequest(write(tmp_path / "v.mp4", options, drawn()), SIXTEEN))
    assert held.flags == ()  # its packets say how long they are shown


# --- how pictures are turned ---


def matrix_file(path: Path, matrix: tuple[int, ...], source: bytes) -> Path:
    """Write an MP4 whose track header holds another display matrix: a b c d in 16.16."""
    a, b, c, d = matrix
    at = source.index(b"tkhd") + 44
    values = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(source[:at] + values + source[at + 36 :])
    return path


def shown_by(matrix: tuple[int, ...], picture: np.ndarray) -> np.ndarray:
    """Return a picture with each pixel where the matrix puts it."""
    a, b, c, d = (value >> 16 for value in matrix)
    row, col = np.mgrid[: picture.shape[0], : picture.shape[1]]
    x, y = a * col + c * row, b * col + d * row
    x, y = x - x.min(), y - y.min()
    shown = np.zeros((y.max() + 1, x.max() + 1, 3), np.uint8)
    shown[y, x] = picture
    return shown


ONE = 1 << 16
STRAIGHT = [(a * ONE, 0, 0, d * ONE) for a in (1, -1) for d in (1, -1)]
ACROSS = [(0, b * ONE, c * ONE, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", [*STRAIGHT, *ACROSS])
@pytest.mark.parametrize("decoder", ["auto", "pyav", "decord"])
def test_all_eight_orientations(matrix: tuple[int, ...], decoder: str, tmp_path: Path) -> None:
    plain = write(tmp_path / "v.mp4", BY_NAME["h264.mp4"].options, drawn())
    path = matrix_file(tmp_path / "turned.mp4", matrix, plain.read_bytes())
    frames = read_clip(ReadRequest(plain, SIXTEEN)).frames
    try:
        clip = read_clip(ReadRequest(path, SIXTEEN, decoder=decoder))
    except VideoError as error:
        if decoder != "decord" or "does not mirror" not in str(error):
            raise
        return
    for got, picture in zip(clip.frames, frames, strict=True):
        assert np.array_equal(got, shown_by(matrix, picture))
    if decoder == "auto":
        check(clip, decoded(path)[0])


@pytest.mark.parametrize(
    "matrix",
    [(ONE, ONE // 4, 0, ONE), (ONE, ONE, -ONE, ONE), (ONE, 0, ONE // 3, ONE), (0, ONE, 0, ONE)],
)
def test_a_matrix_that_is_no_orientation_is_named(matrix: tuple[int, ...], tmp_path: Path) -> None:
    plain = write(tmp_path / "v.mp4", BY_NAME["h264.mp4"].options, drawn())
    path = matrix_file(tmp_path / "odd.mp4", matrix, plain.read_bytes())
    with pytest.raises(VideoError, match="display matrix") as error:
        read_clip(ReadRequest(path, SIXTEEN))
    assert error.value.reason == "odd-matrix"


# --- the stream that is meant ---


def test_webm_alpha_is_laid_over_white(tmp_path: Path) -> None:
    pictures = drawn()
    pictures[:, 60:, 80:, 3] = 0
    for codec in ("libvpx-vp9 -deadline realtime -cpu-used 8", "libvpx -auto-alt-ref 0 -b:v 1M"):
        path = write(tmp_path / "v.webm", f"-c:v {codec} -pix_fmt yuva420p", pictures)
        clip = read_clip(ReadRequest(path, SIXTEEN))
        assert clip.frame_count == COUNT
        assert clip.frames[:, 64:, 84:].min() > 250
        assert clip.frames[:, -10:, :40].max() < 250


def test_the_alpha_plane_of_an_avif_is_no_stream_of_its_own(tmp_path: Path) -> None:
    pictures = drawn()
    pictures[:, 60:, 80:, 3] = 0
    planes = "[0:v]format=yuva420p,split[p][q];[p]format=yuv420p[c];[q]alphaextract[a]"
    options = f"-filter_complex {planes} -map [c] -map [a] {AV1}"
    path = write(tmp_path / "v.avif", options, pictures)
    clip = read_clip(ReadRequest(path, SIXTEEN))
    assert clip.decoder == "pillow"
    assert clip.frames[:, 64:, 84:].min() > 250
    as_video = path.rename(tmp_path / "v.mp4")  # colour is taken, whatever reads it
    taken = read_clip(ReadRequest(as_video, SIXTEEN))
    assert taken.frame_index.tolist() == clip.frame_index.tolist()
    assert np.abs(taken.frames[:, :56].astype(int) - clip.frames[:, :56]).mean() < FAR


def test_a_thumbnail_a_cover_and_a_plane_of_grey_are_never_taken(tmp_path: Path) -> None:
    main = write(tmp_path / "main.mp4", BY_NAME["h264.mp4"].options, drawn())
    frames = decoded(main)[0]
    picture = write(tmp_path / "one.mp4", "-c:v mjpeg -q:v 1 -s 640x480 -frames:v 1", drawn(1))
    grey = write(tmp_path / "plane.mkv", "-c:v ffv1 -pix_fmt gray -s 320x240", drawn())
    for name, words in {
        "thumbnail.mp4": ["-i", picture, "-i", main],
        "cover.mp4": ["-i", picture, "-i", main, "-disposition:v:0", "attached_pic"],
        "grey.mkv": ["-i", grey, "-i", main],
    }.items():
        ffmpeg(*words, "-map", "0:v", "-map", "1:v", "-c", "copy", tmp_path / name)
        check(read_clip(ReadRequest(tmp_path / name, SIXTEEN)), frames)
