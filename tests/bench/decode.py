"""Frames per CPU second of sampling a clip, by ours and by others, and who gives wrong frames.

Each reader opens the file, decodes the same frames with one thread and resizes them to 384x384 with
the same Pillow filter. CPU time of this process and of the child, medians of interleaved rounds, as
other work may share the machine. FRAMEBANK_CLIPS names the real clips; without it two are drawn.
"""

import functools
import math
import os
import queue
import statistics
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from PIL import Image

from model.frames import uniform_indices
from model.pixels import Pixels
from preprocess.decode_child import DecodeChild
from preprocess.readers import decord_trouble
from preprocess.video import read_clip, scan_source
from shards.schema import Sampling

CLIPS = {
    "bikes.mp4": (16, 32, 64),
    "bunny_720p.mp4": (16, 32, 64),
    "hiker_vp9_720p.webm": (16, 32, 64),
    "pancake.mkv": (16, 32, 64),
    "nasa_multistream.mp4": (16, 32, 64),
    "hevc_720p.mp4": (16, 32),  # it has 60 frames
    "slides_1080p_2min.mp4": (16,),
}
ROUNDS = 5
SLOW = 3.0
"""A reader that took this many times as long as bare decord is timed once."""
WORKER_ROUNDS = 5
SIZE = (384, 384)
PIXELS = Pixels(
    *SIZE, shortest_edge=False, resample=Image.Resampling.BICUBIC, crop=None, scale=1 / 255,
    mean=(0.5,) * 3, std=(0.5,) * 3,
)  # fmt: skip
NEAR = 8
"""How many frames around a wanted one a wrong frame is looked for among."""
THUMB = (48, 48)

Reader = Callable[[Path, list[int]], np.ndarray]


def decord_bare(path: Path, index: list[int]) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    frames = reader.get_batch(index).asnumpy()
    del reader  # open, it would go on decoding while the frames are resized
    return PIXELS.resize(frames)


def pyav_seek(path: Path, index: list[int]) -> np.ndarray:
    """Without an index a seek needs the times of all packets: they are read first."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        packets = [p for p in container.demux(stream) if p.pts is not None]
        pts = sorted(p.pts for p in packets)
        keys = sorted(p.pts for p in packets if p.is_keyframe)
        del packets
        out, position = [], None
        for wanted in (pts[i] for i in index):
            key = keys[bisect_right(keys, wanted) - 1]
            if position is None or key > position:
                container.seek(key, stream=stream)
                decoded = container.decode(stream)
            while position is None or position < wanted:
                frame = next(decoded)
                position = frame.pts
            out.append(PIXELS.resize(frame.to_ndarray(format="rgb24")[None])[0])
    return np.stack(out)


def pyav_from_start(path: Path, index: list[int]) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        out = []
        for place, frame in enumerate(container.decode(stream)):
            if place == index[len(out)]:
                out.append(PIXELS.resize(frame.to_ndarray(format="rgb24")[None])[0])
                if len(out) == len(index):
                    break
    return np.stack(out)


def torchcodec_exact(path: Path, index: list[int]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    reader = VideoDecoder(
        str(path), num_ffmpeg_threads=1, seek_mode="exact", dimension_order="NHWC"
    )
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
        came, frame = capture.read()
        if not came:
            raise RuntimeError(f"no frame {wanted}")
        position = wanted + 1
        out.append(PIXELS.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)[None])[0])
    capture.release()
    return np.stack(out)


class Clock:
    """CPU seconds of this process and of a decode child, all threads, ended ones too."""

    def __init__(self, child: DecodeChild) -> None:
        self.child = child

    def now(self) -> float:
        own = time.process_time()
        # What clock_getcpuclockid(3) makes of a pid.
        return own + (time.clock_gettime(~self.child.pid << 3 | 2) if self.child.pid else 0.0)

    def timed(self, work: Callable[[], object]) -> float:
        began = self.now()
        work()
        time.sleep(0.01)  # the child frees its frames after it has answered
        return self.now() - began


def run() -> list[dict[str, object]]:
    folder = os.environ.get("FRAMEBANK_CLIPS")
    with TemporaryDirectory() as drawn, DecodeChild() as child:
        if folder:
            cases = {Path(folder) / name: counts for name, counts in CLIPS.items()}
        else:
            cases = {path: (16, 32, 64) for path in draw(Path(drawn))}
        readers: dict[str, Reader] = {
            "ours": functools.partial(ours, child),
            "ours in process": lambda path, index: ours(None, path, index),
            "decord": decord_bare,
            "PyAV seek": pyav_seek,
            "PyAV start": pyav_from_start,
            "torchcodec": torchcodec_exact,
            "OpenCV start": functools.partial(opencv, seek=False),
            "OpenCV seek": functools.partial(opencv, seek=True),
        }
        assert decord_trouble() is None, decord_trouble()
        ratios: dict[int, dict[str, list[float]]] = {}
        rows: list[dict[str, object]] = []
        for path, counts in cases.items():
            for count in counts:
                spent, row = measure(path, count, readers, child)
                rows.append(row)
                for name, seconds in spent.items():
                    if "slides" not in path.name:  # the others' mean is over the same clips
                        ratio = seconds / spent["decord"]
                        ratios.setdefault(count, {}).setdefault(name, []).append(ratio)
        for count, by_reader in ratios.items():
            means = {name: math.prod(r) ** (1 / len(r)) for name, r in by_reader.items()}
            rows.append({"clip": "CPU time, decord = 1", "frames": count} | means)
        return [*rows, workers([path for path in cases if "slides" not in path.name])]


def measure(
    path: Path, count: int, readers: dict[str, Reader], child: DecodeChild
) -> tuple[dict[str, float], dict[str, object]]:
    """Return the CPU seconds of each reader that gave frames, and the row of the table."""
    scan = scan_source(path)
    index = uniform_indices(len(scan.pts), count)
    wanted_at, thumbs = truth(path, index)
    clock, spent = Clock(child), dict[str, list[float]]()
    row: dict[str, object] = {"clip": path.stem, "frames": len(index)}
    wrong = []
    for name, reader in readers.items():  # unmeasured: is it there, is it right
        row[name] = ""
        try:
            frames = reader(path, index)
        except ImportError:
            row[name] = "absent"
        except Exception as error:
            row[name] = "fails" if not isinstance(error, OSError) else "absent"
        else:
            spent[name] = []
            if missed := count_wrong(frames, wanted_at, thumbs):
                wrong.append(f"{name} {missed}")
    scans = []
    for number in range(ROUNDS):
        names = list(spent)[number % 2 :: 1] + list(spent)[: number % 2]
        scans.append(clock.timed(lambda: scan_source(path)))
        for name in names:
            mine, others = spent[name], spent["decord"]
            if mine and others and mine[0] > SLOW * others[0]:
                continue
            mine.append(clock.timed(functools.partial(readers[name], path, index)))
    medians = {name: statistics.median(times) for name, times in spent.items()}
    row |= {name: len(index) / seconds for name, seconds in medians.items()}
    row["ours / decord"] = medians["ours"] / medians["decord"]
    row["scan %"] = 100 * statistics.median(scans) / medians["ours"]
    row["wrong frames"] = ", ".join(wrong) or "none"
    return medians, row


def ours(child: DecodeChild | None, path: Path, index: list[int]) -> np.ndarray:
    read = child.read_clip if child else read_clip
    clip = read(path, Sampling(num_frames=len(index)), pixels=PIXELS)
    assert clip.frame_index.tolist() == index
    return clip.frames


def truth(path: Path, index: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Decode all frames in order; return thumbnails of those around the wanted, and their places."""
    near = {i + shift for i in index for shift in range(-NEAR, NEAR + 1)}
    kept, thumbs = [], []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.thread_type = "AUTO"
        for place, frame in enumerate(container.decode(stream)):
            if place in near:
                kept.append(place)
                thumbs.append(thumbnail(PIXELS.resize(frame.to_ndarray(format="rgb24")[None])[0]))
    return [kept.index(i) for i in index], np.stack(thumbs)


def thumbnail(frame: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize(THUMB, Image.Resampling.BOX), np.float32)


def count_wrong(frames: np.ndarray, wanted_at: list[int], thumbs: np.ndarray) -> int:
    """Return how many frames are closer to another frame of the clip than to the wanted one."""
    missed = 0
    for frame, at in zip(frames, wanted_at, strict=True):
        distances = np.abs(thumbs - thumbnail(frame)).mean(axis=(1, 2, 3))
        missed += bool(distances[at] > distances.min() + 0.01)  # stills differ by less
    return missed


def workers(paths: list[Path]) -> dict[str, object]:
    """Return the wall-clock speed-up of two decode children over one."""
    walls: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(WORKER_ROUNDS):
        for count in walls:
            walls[count].append(wall(paths * 2, count))
    speed_up = statistics.median(walls[1]) / statistics.median(walls[2])
    return {"clip": "2 workers over 1, wall clock", "frames": 16, "ours": speed_up}


def wall(paths: list[Path], count: int) -> float:
    waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
    start = threading.Barrier(count + 1)

    def work() -> None:
        with DecodeChild() as child:
            child.read_clip(paths[0], Sampling(num_frames=1))  # started
            start.wait()
            while not waiting.empty():
                child.read_clip(waiting.get(), Sampling(num_frames=16), pixels=PIXELS)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for path in paths:
        waiting.put(path)
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def draw(folder: Path) -> list[Path]:
    """Write two clips, H.264 with B-frames and MPEG-4 at 720p, of a drifting pattern."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    paths = []
    for name, codec, (height, width) in (
        ("drawn-h264", "libx264", (360, 640)),
        ("drawn-mpeg4", "mpeg4", (720, 1280)),
    ):
        paths.append(folder / f"{name}.mp4")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream(codec, rate=25, options={"g": "50"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 25)
            for number in range(250):
                rolled = np.roll(noise, (number, 2 * number), axis=(0, 1))
                big = Image.fromarray(rolled).resize((width, height), Image.Resampling.BICUBIC)
                frame = av.VideoFrame.from_ndarray(np.asarray(big), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return paths
