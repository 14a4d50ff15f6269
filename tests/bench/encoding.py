"""Encoding real clips with a real tower on the CPU: ours, a plain loop, and our stages one by one.

Whole processes, start-up counted: wall and CPU seconds, ours over a plain loop's (decord ->
transformers' processor -> model -> pool -> torch.save) in float32, as it comes, and in the same
arithmetic; over the same with a DataLoader's workers to decode, and with batches of several clips'
frames, as clip-video-encode has them; and over the CPU seconds of decoding, tower and writing alone /
cores. All read the same clips; those that decord cannot are named.
FRAMEBANK_CLIPS and FRAMEBANK_MODELS (as `preprocess realmodels` makes them) name the folders,
FRAMEBANK_ENCODING_FRAMES other numbers of frames than 16,64.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

FRAMES = tuple(map(int, os.environ.get("FRAMEBANK_ENCODING_FRAMES", "16,64").split(",")))
DTYPES = ("float32", "bfloat16")
Seconds = tuple[float, float]
"""Wall and CPU."""
ENDINGS = (".mp4", ".mkv", ".webm", ".mpg", ".avi")


def run() -> list[dict[str, object]]:
    clips, models = (os.environ.get(f"FRAMEBANK_{name}") for name in ("CLIPS", "MODELS"))
    if not clips or not models:
        return [{"what": "nothing to measure: set FRAMEBANK_CLIPS and FRAMEBANK_MODELS"}]
    tower = str(Path(models) / "dinov2-small")
    paths = sorted(path for path in Path(clips).iterdir() if path.suffix in ENDINGS)
    read, unread = [], []
    for path in paths:
        (read if is_read_by_decord(path) else unread).append(str(path))
    rows: list[dict[str, object]] = [
        {"what": f"{len(read)} clips; decord cannot read {', '.join(unread) or 'none less'}"}
    ]
    for frames in FRAMES:
        plain = peer("loop", tower, frames, "float32", read)
        for dtype in DTYPES:
            same = plain if dtype == "float32" else peer("loop", tower, frames, dtype, read)
            others = [peer(what, tower, frames, dtype, read) for what in ("loader", "mixed")]
            rows.append(row(tower, frames, dtype, read, (plain, same, *others)))
    return rows


def row(
    tower: str,
    frames: int,
    dtype: str,
    clips: list[str],
    peers: tuple[Seconds, ...],
) -> dict[str, object]:
    """Return ours beside a plain loop in float32, one in the same arithmetic, one with workers, and one
    that mixes clips in a batch."""
    plain, same, workers, mixed = peers
    with TemporaryDirectory() as out:
        asked = ["--tower", tower, "--frames", str(frames), "--tower-dtype", dtype]
        words = ["encode", *clips, "--out", f"{out}/bank", "--device", "cpu", *asked]
        wall, cpu, _ = timed(["-m", "preprocess", *words])
    with TemporaryDirectory() as out:
        words = ["stages", tower, str(frames), dtype, out, *clips]
        alone = json.loads(timed(["-m", "tests.bench._encoding", *words])[2])
    cores = len(os.sched_getaffinity(0))
    return {
        "what": dtype,
        "frames": frames,
        "wall s": wall,
        "CPU s": cpu,
        "wall / plain": wall / plain[0],
        "CPU / plain": cpu / plain[1],
        "wall / plain, same dtype": wall / same[0],
        "wall / DataLoader, same dtype": wall / workers[0],
        "CPU / DataLoader, same dtype": cpu / workers[1],
        "wall / mixed batches, same dtype": wall / mixed[0],
        "CPU / mixed batches, same dtype": cpu / mixed[1],
        **{f"{stage} s": seconds for stage, seconds in alone.items()},
        "wall / (stages / cores)": wall / (sum(alone.values()) / cores),
    }


def peer(what: str, tower: str, frames: int, dtype: str, clips: list[str]) -> Seconds:
    """Return the seconds of one of `_encoding`'s other ways to the same features."""
    with TemporaryDirectory() as out:
        words = [what, tower, str(frames), dtype, out, *clips]
        return timed(["-m", "tests.bench._encoding", *words])[:2]


def is_read_by_decord(path: Path) -> bool:
    code = f"import decord; decord.VideoReader({str(path)!r}).get_batch([0])"
    return not subprocess.run([sys.executable, "-c", code], capture_output=True).returncode


def timed(words: list[str]) -> tuple[float, float, str]:
    """Return the wall and CPU seconds of a Python process and its children, and what it printed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, done.stdout
