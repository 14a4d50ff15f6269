"""Frames per CPU second of sampling a clip, by ours and by others, and who gives wrong frames.

Each reader opens the file, decodes the same frames with one thread and resizes them to 384x384 with
the same Pillow filter. CPU time of this process and of the child, medians of rounds in random
order, as other work may share the machine. FRAMEBANK_CLIPS names the real clips; else one is drawn.
"""

import math
import os
import random
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from PIL import Image

from model.slow_fast import uniform_indices
from model.tower.pixels import Pixels
from preprocess.decode.clip import read_clip, scan_source
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.read_decord import decord_trouble
from preprocess.decode.request import ReadRequest
from shards.format.features import Sampling

COUNTS = (16, 32, 64)
CLIPS = (
    "bikes.mp4 bunny_720p.mp4 hiker_vp9_720p.webm pancake.mkv nasa_multistream.mp4 hevc_720p.mp4"
)
ODD = ("slides_1080p_2min.mp4", "bears_editlist.mp4")
"""With 16 frames, not in the means: too still for a wrong frame to show; full of wrong frames."""
ROUNDS = 5
PIXELS = Pixels(384, 384, False, Image.Resampling.BICUBIC, None, 1 / 255, (0.5,) * 3, (0.5,) * 3)

Reader = Callable[[Path, list[int]], np.ndarray]


def resized(picture: np.ndarray) -> np.ndarray:
    return PIXELS.resize(picture[None])[0]


def decord_bare(path: Path, index: list[int], batch: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    cuts = range(0, len(index), batch)
    batches = [reader.get_batch(index[cut : cut + batch]).asnumpy() for cut in cuts]
    del reader  # open, it would go on decoding while the frames are resized
    return np.concatenate([PIXELS.resize(frames) for frames in batches])


def pyav_seek(path: Path, index: list[int]) -> np.ndarray:
    """Without an index a seek needs the times of all packets: they are read first."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
        pts = sorted(at for at, _ in packets)
        keys = sorted(at for at, is_key in packets if is_key)
        out, position = [], -math.inf
        for wanted in (pts[i] for i in index):
            key = keys[bisect_right(keys, wanted) - 1]
            if key > position:
                container.seek(key, stream=stream)
                decoded = container.decode(stream)
            while position < wanted:
                frame = next(decoded)
                position = frame.pts
            out.append(resized(frame.to_ndarray(format="rgb24")))
    return np.stack(out)


def pyav_start(path: Path, index: list[int]) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        frames = zip(range(index[-1] + 1), container.decode(stream), strict=False)
        taken = (frame for place, frame in frames if place in index)
        return np.stack([resized(frame.to_ndarray(format="rgb24")) for frame in taken])


def torchcodec_exact(path: Path, index: list[int]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    reader = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
    return PIXELS.resize(reader.get_frames_at(index).data.numpy())


def opencv(path: Path, index: list[int], seek: bool) -> np.ndarray:
    import cv2

    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    out, position = [], 0
    for wanted in index:
        if seek:
            capture.set(cv2.CAP_PROP_POS_FRAMES, wanted)
        else:
            for _ in range(wanted - position):
                capture.grab()
        _, frame = capture.read()  # None where there is none, which the next line refuses
        position = wanted + 1
        out.append(resized(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
    return np.stack(out)


def ours(child: DecodeChild | None, path: Path, index: list[int]) -> np.ndarray:
    read = child.read_clip if child else read_clip
    clip = read(ReadRequest(path, Sampling(num_frames=len(index)), pixels=PIXELS))
    assert clip.frame_index.tolist() == index
    return clip.frames


PEERS: dict[str, Reader] = {
    "decord": partial(decord_bare, batch=64),
    "decord by 4": partial(decord_bare, batch=4),
    "PyAV seek": pyav_seek,
    "PyAV start": pyav_start,
    "torchcodec": torchcodec_exact,
    "OpenCV start": partial(opencv, seek=False),
    "OpenCV seek": partial(opencv, seek=True),
}


def run() -> list[dict[str, object]]:
    if trouble := decord_trouble():
        return [{"clip": f"nothing to compare with: {trouble}"}]
    with TemporaryDirectory() as drawn, DecodeChild() as child:
        folder = Path(os.environ.get("FRAMEBANK_CLIPS") or drawn)
        paths, odd = [folder / name for name in CLIPS.split()], [folder / name for name in ODD]
        if folder == Path(drawn):
            paths, odd = [draw(folder / "drawn.mp4")], []
        own: dict[str, Reader] = {"ours": partial(ours, child), "in process": partial(ours, None)}
        rows: list[dict[str, object]] = []
        ratios: dict[tuple[int, str], list[float]] = {}
        for path, count in [*product(paths, COUNTS), *product(odd, [16])]:
            spent, row = measure(path, count, own | PEERS, child)
            rows.append(row)
            for name, seconds in spent.items() if path in paths else ():
                ratios.setdefault((count, name), []).append(seconds / spent["decord"])
        for count in COUNTS:
            of_count = {name: r for (frames, name), r in ratios.items() if frames == count}
            means = {name: statistics.geometric_mean(r) for name, r in of_count.items()}
            rows.append({"clip": "CPU time, decord = 1", "frames": count, **means})
        return [*rows, {"clip": "wall, 1 worker / 2", "frames": 16, "ours": two_workers(paths)}]


def measure(
    path: Path, count: int, readers: dict[str, Reader], child: DecodeChild
) -> tuple[dict[str, float], dict[str, object]]:
    """Return the CPU seconds of each reader that gave frames, and the row of the table."""
    index = uniform_indices(len(scan_source(path).pts), count)
    wanted = truth(path, index)
    row: dict[str, object] = {"clip": path.stem, "frames": len(index)}
    times: dict[str, list[float]] = {}
    wrong, scans = [], []
    for name, reader in readers.items():  # first not timed: is it there, is it right
        try:
            missed = count_wrong(reader(path, index), *wanted)
        except Exception as error:  # of a library of whatever kind
            if name not in PEERS:
                raise
            row[name] = "absent" if isinstance(error, ImportError | OSError) else "fails"
        else:
            row[name], times[name] = 0.0, []
            wrong += [f"{name} {missed}"] if missed else []
    for number in range(ROUNDS):
        scans.append(cpu_seconds(child, lambda: scan_source(path)))
        for name in random.Random(number).sample(list(times), len(times)):
            slow = min(times[name], default=0) > 2 * min(times["ours"], default=math.inf)
            if not slow:  # else once is enough
                times[name].append(cpu_seconds(child, partial(readers[name], path, index)))
    spent = {name: statistics.median(rounds) for name, rounds in times.items()}
    row |= {name: len(index) / seconds for name, seconds in spent.items()}
    row["scan %"] = 100 * statistics.median(scans) / spent["ours"]
    return spent, row | {"wrong frames": ", ".join(wrong) or "none"}


def cpu_seconds(child: DecodeChild, work: Callable[[], object]) -> float:
    """Return the CPU time that this process and the child take, with all their threads."""
    assert child.pid
    clocks = (time.CLOCK_PROCESS_CPUTIME_ID, ~child.pid << 3 | 2)  # as clock_getcpuclockid(3)
    began = sum(map(time.clock_gettime, clocks))
    work()
    time.sleep(0.01)  # the child frees its frames after it has answered
    return sum(map(time.clock_gettime, clocks)) - began


def truth(path: Path, index: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Decode all in order; return where the wanted are among thumbnails of 8 around, and these."""
    near = {i + shift for i in index for shift in range(-8, 9)}
    kept, thumbs = [], []
    with av.open(str(path)) as container:
        for place, frame in enumerate(container.decode(container.streams.best("video"))):
            if place in near:
                kept.append(place)
                thumbs.append(thumbnail(resized(frame.to_ndarray(format="rgb24"))))
    return [kept.index(i) for i in index], np.stack(thumbs)


def thumbnail(frame: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).reduce(8), np.float32)


def count_wrong(frames: np.ndarray, wanted_at: list[int], thumbs: np.ndarray) -> int:
    """Return how many frames are closer to another frame of the clip than to the wanted one."""
    apart = [np.abs(thumbs - thumbnail(frame)).mean(axis=(1, 2, 3)) for frame in frames]
    # two stills differ by less than 0.01
    return sum(bool(d[at] > d.min() + 0.01) for d, at in zip(apart, wanted_at, strict=True))


def two_workers(paths: list[Path]) -> float:
    """Return the wall-clock speed-up of two decode children over one, best of the rounds."""
    idle: list[DecodeChild] = []

    def read(path: Path) -> None:
        child = idle.pop()
        child.read_clip(ReadRequest(path, Sampling(num_frames=16), pixels=PIXELS))
        idle.append(child)

    walls: dict[int, list[float]] = {1: [], 2: []}
    with DecodeChild() as one, DecodeChild() as other:
        for child in (one, other):
            child.read_clip(ReadRequest(paths[0], Sampling(num_frames=1)))  # starts it
        idle += one, other
        for count in (1, 2) * ROUNDS:
            began = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(read, paths * 2))
            walls[count].append(time.perf_counter() - began)
    return min(walls[1]) / min(walls[2])


def draw(path: Path) -> Path:
    """Write ten seconds of a drifting pattern, H.264 with B-frames."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "50"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for number in range(250):
            drifted = Image.fromarray(np.roll(noise, (number, 2 * number), axis=(0, 1)))
            container.mux(stream.encode(av.VideoFrame.from_image(drifted.resize((640, 360)))))
        container.mux(stream.encode(None))
    return path
