"""Real clips with random damage: no hang, no wrong frame, every clip delivered or refused by name.

FRAMEBANK_CLIPS=videos pytest tests/preprocess/decode/test_fuzz.py            40 of them
FRAMEBANK_CLIPS=videos pytest -m slow tests/preprocess/decode/test_fuzz.py    1,000, some 20 minutes
"""

import os
from collections import Counter
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest

from preprocess.decode.clip import Clip
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError, scan
from shards.format.features import Sampling

CLIPS = os.environ.get("FRAMEBANK_CLIPS")
pytestmark = pytest.mark.skipif(not CLIPS, reason="FRAMEBANK_CLIPS does not name the test videos")

TWELVE = Sampling(num_frames=12)
LARGEST = 700_000  # bytes
REASONS = {"cannot-open", "no-video-stream", "no-packets", "truncated", "damaged", "decode-failed"}
REASONS |= {"odd-matrix"}
REASONS |= {"decoder-crashed", "timeout"}  # the decoder's own faults: the child outlives them


def originals() -> list[Path]:
    assert CLIPS
    files = sorted(Path(CLIPS).rglob("*.*"))
    damaged = ("audio", "zero", "text", "trunc", "bitflips", "corrupted", "missing")
    return [
        file
        for file in files
        if file.suffix != ".md"
        and file.stat().st_size <= LARGEST
        and not file.name.startswith(damaged)
    ]


def damaged(content: bytes, random: Random) -> bytes:
    """Return the bytes with bits flipped, a stretch overwritten, or the end cut off."""
    spoiled = bytearray(content)
    kind = random.choice(["flip", "flip", "flip", "cut", "zeros"])
    if kind == "cut":
        return bytes(spoiled[: random.randrange(len(spoiled))])
    if kind == "zeros":
        begin, length = random.randrange(len(spoiled)), random.choice([16, 512, 8192])
        spoiled[begin : begin + length] = bytes(min(length, len(spoiled) - begin))
        return bytes(spoiled)
    for _ in range(random.choice([1, 1, 4, 32, 256])):
        spoiled[random.randrange(len(spoiled))] ^= 1 << random.randrange(8)
    return bytes(spoiled)


def small(picture: np.ndarray) -> np.ndarray:
    step = max(1, picture.shape[1] // 32)
    return picture[::step, ::step].astype(np.int16).ravel()


def from_the_start(path: Path, stream_index: int) -> dict[int, np.ndarray]:
    """Return the picture of each pts, by a plain decode that goes on after every error."""
    pictures = {}
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams[stream_index]
        stream.codec_context.thread_count = 1
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
                for frame in packet.decode():
                    turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    pictures[frame.pts] = small(turned)
            except (StopIteration, av.error.EOFError):
                return pictures
            except av.error.FFmpegError:
                continue


def wrong_frames(path: Path, clip: Clip) -> list[int]:
    """Return the places of frames that look like the frame of another pts."""
    scanned = scan(path)
    truth = from_the_start(path, scanned.stream)
    if {"avi_b", "nopts"} & set(scanned.flags):  # no true pts: their order is all there is
        truth = dict(enumerate(truth.values()))
        claimed = clip.frame_index.tolist()
    else:
        first = scanned.pts[0] if clip.decoder != "pyav-scan" else min(truth)
        claimed = [first + round(t / float(scanned.time_base)) for t in clip.timestamps]
    every = [value for value in truth.values() if value.shape == small(clip.frames[0]).shape]
    wrong = []
    for place, (pts, frame) in enumerate(zip(claimed, clip.frames, strict=True)):
        seen = small(frame)
        nearest = min((np.abs(other - seen).mean() for other in every), default=0.0)
        if (
            pts not in truth
            or truth[pts].shape != seen.shape
            or np.abs(truth[pts] - seen).mean() > nearest
        ):
            wrong.append(place)
    return wrong


def run_cases(cases: range, folder: Path) -> Counter[str]:
    files = originals()
    outcomes: Counter[str] = Counter()
    problems = []
    with DecodeChild() as child:
        for case in cases:
            random = Random(case)
            original = random.choice(files)
            path = folder / f"{case}{original.suffix}"
            path.write_bytes(damaged(original.read_bytes(), random))
            try:
                clip = child.read_clip(ReadRequest(path, TWELVE))
            except VideoError as error:
                outcomes[error.reason] += 1
                if error.reason not in REASONS:
                    problems.append((case, original.name, str(error)))
            else:
                outcomes[f"delivered by {clip.decoder}"] += 1
                if wrong := wrong_frames(path, clip):
                    problems.append((case, original.name, f"{clip.decoder} {clip.flags} {wrong}"))
            path.unlink()
    print(sum(outcomes.values()), dict(sorted(outcomes.items())), *problems, sep="\n")
    assert not problems
    return outcomes


def test_a_sample_of_damaged_clips_is_delivered_right_or_refused(tmp_path: Path) -> None:
    assert run_cases(range(1000, 1040), tmp_path).total() == 40


@pytest.mark.slow
def test_a_thousand_damaged_clips_are_delivered_right_or_refused(tmp_path: Path) -> None:
    assert run_cases(range(1000), tmp_path).total() == 1000
