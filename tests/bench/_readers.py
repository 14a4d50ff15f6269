"""One reader over one folder of tensors, in a process of its own: prints a json line of figures.

python tests/bench/_readers.py NAME FOLDER SECONDS

Run by `tests.bench.reading`, peers by the Python of their own environment, so that only the standard
library and NumPy are imported here at the top. A reader is a function of the folder that returns an
iterator of bytes per sample, of which the features count and not what holds them.
"""

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

PIECE = 4 * 1024**2
Passes = list[Iterable[int]]


def tars(folder: Path) -> list[str]:
    return [str(path) for path in sorted((folder / "none" / "shards").glob("*.tar"))]


def memcpy(folder: Path) -> Passes:
    source, target = np.ones(64 * PIECE, np.uint8), np.ones(64 * PIECE, np.uint8)
    total = sum(os.path.getsize(path) for path in tars(folder))

    def copy() -> Iterator[int]:
        for place in range(0, total - PIECE, PIECE):
            begin = place % len(source)
            target[begin : begin + PIECE] = source[begin : begin + PIECE]
            yield PIECE

    return [copy()]


def preadv(folder: Path) -> Passes:
    buffer = np.zeros(PIECE, np.uint8)

    def read() -> Iterator[int]:
        for path in tars(folder):
            file, place = os.open(path, os.O_RDONLY), 0
            while got := os.preadv(file, [buffer.data], place):
                place += got
                yield got
            os.close(file)

    return [read()]


def ours(folder: Path, codec: str = "none", reuse: bool = True) -> Passes:
    """Random order, each pass another, the first with checksums.

    reuse: into the same memory, as a pinned buffer is used.
    """
    from shards.read.bank import Bank

    bank = Bank.open(folder / codec)
    out = {s: np.empty(bank.shape(0, s), np.float16) if reuse else None for s in (4, 8)}

    def read(seed: int) -> Iterator[int]:
        for row in random.Random(seed).sample(range(len(bank)), len(bank)):
            yield sum(bank.read(row, stride, out=out[stride]).nbytes for stride in (4, 8))

    return [read(0), read(1)]


def ours_trained(folder: Path) -> Passes:
    """int8 as training takes it: read as it is stored, made floats in torch, on one thread."""
    import torch

    from model.batch import as_tensor
    from shards.read.banks import Banks

    torch.set_num_threads(1)
    clips = Banks.open([folder / "int8"])
    ids = list(clips.banks[0].ids)

    def read(seed: int) -> Iterator[int]:
        for id_ in random.Random(seed).sample(ids, len(ids)):
            clip = clips.clip(id_)
            frames = range(len(clip.info.timestamps))
            yield sum(as_tensor(clip.read(stride, frames)).nbytes for stride in (4, 8))

    return [read(0), read(1)]


def webdataset(folder: Path, decode: bool) -> Passes:
    import webdataset as wds

    clips = wds.WebDataset(tars(folder), shardshuffle=False, empty_check=False)
    if decode:
        clips = clips.decode()

    def read() -> Iterator[int]:
        for clip in clips:
            arrays = [clip[f"stride{s}.npy"] for s in (4, 8)]
            yield sum(array.nbytes if decode else len(array) for array in arrays)

    return [read()]


def hugging_face(folder: Path) -> Passes:
    import datasets

    datasets.disable_progress_bars()
    clips = datasets.load_dataset(
        "webdataset", data_files=tars(folder), split="train", streaming=True
    ).with_format("numpy")

    def read() -> Iterator[int]:
        for clip in clips:
            yield sum(clip[f"stride{s}.npy"].size * 2 for s in (4, 8))

    return [read()]


def litdata(folder: Path) -> Passes:
    from litdata import StreamingDataset

    clips = StreamingDataset(str(folder / "litdata"), shuffle=False)
    return [(a.nbytes + b.nbytes for a, b in (clip.values() for clip in clips))]


def litdata_random(folder: Path) -> Passes:
    from litdata import StreamingDataset

    clips = StreamingDataset(str(folder / "litdata"), shuffle=False)
    order = random.Random(0).sample(range(len(clips)), len(clips))
    return [(sum(array.nbytes for array in clips[row].values()) for row in order)]


def mosaic(folder: Path, shuffled: bool) -> Passes:
    from streaming import StreamingDataset

    clips = StreamingDataset(local=str(folder / "mosaic"), shuffle=False, batch_size=1)
    rows = range(clips.num_samples)
    order = random.Random(0).sample(rows, len(rows)) if shuffled else rows
    return [(sum(clips[row][s].nbytes for s in ("slow", "fast")) for row in order)]


def write_litdata(folder: Path) -> Passes:
    """Write the tensors as litdata has them; not timed."""
    from litdata import optimize

    optimize(
        fn=_Load(folder),
        inputs=list(range(count(folder))),
        output_dir=str(folder / "litdata"),
        chunk_bytes="256MB",
        num_workers=1,
    )
    return [[1]]


class _Load:
    """A sample by number, as a dict of arrays; picklable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, row: int) -> dict[str, np.ndarray]:
        with np.load(self.folder / "tensors" / f"{row % distinct(self.folder)}.npz") as arrays:
            return {"slow": arrays["slow"], "fast": arrays["fast"]}


def write_mosaic(folder: Path) -> Passes:
    from streaming import MDSWriter

    columns = {"slow": "ndarray:float16:32,8,8,1152", "fast": "ndarray:float16:64,2,2,1152"}
    load = _Load(folder)
    with MDSWriter(out=str(folder / "mosaic"), columns=columns, size_limit=256 * 1024**2) as out:
        for row in range(count(folder)):
            out.write(load(row))
    return [[1]]


def count(folder: Path) -> int:
    return int((folder / "count").read_text())


def distinct(folder: Path) -> int:
    return len(list((folder / "tensors").iterdir()))


READERS: dict[str, Callable[[Path], Passes]] = {
    "memcpy": memcpy,
    "preadv": preadv,
    "ours": ours,
    "ours new arrays": lambda folder: ours(folder, reuse=False),
    "ours blosc": lambda folder: ours(folder, codec="blosc"),
    "ours int8": lambda folder: ours(folder, codec="int8"),
    "ours int8 in torch": ours_trained,
    "webdataset raw": lambda folder: webdataset(folder, decode=False),
    "webdataset decoded": lambda folder: webdataset(folder, decode=True),
    "HF datasets": hugging_face,
    "litdata": litdata,
    "litdata random": litdata_random,
    "mosaic": lambda folder: mosaic(folder, shuffled=False),
    "mosaic random": lambda folder: mosaic(folder, shuffled=True),
}
WRITERS = {"write litdata": write_litdata, "write mosaic": write_mosaic}


def main(name: str, folder: Path, seconds: float) -> None:
    IMPORTS.get(name.split()[0], lambda: None)()
    began = time.perf_counter()
    passes = (READERS | WRITERS)[name](folder)
    opening = time.perf_counter() - began
    figures = [measured(one, opening, seconds) for one in passes]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([one | {"rss": peak / 1024} for one in figures]))


def measured(samples: Iterable[int], opening: float, seconds: float) -> dict[str, float]:
    """Read for at most so many seconds; return bytes and samples per second and what they cost."""
    total, waits = 0, []
    began, cpu = time.perf_counter(), time.process_time()
    last = began
    for nbytes in samples:
        total += nbytes
        now = time.perf_counter()
        waits.append(now - last)
        last = now
        if now - began > seconds:
            break
    cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    return {
        "per_cpu": total / 1e9 / cpu,
        "samples": len(waits) / wall,
        "p99": 1000 * float(np.quantile(waits, 0.99)),
        "first": 1000 * (opening + waits[0]),
        "read": total / 1e9,
    }


def _import(name: str) -> Callable[[], object]:
    return lambda: __import__(name)


# Imported before the clock starts.
IMPORTS: dict[str, Callable[[], object]] = {
    "ours": _import("shards.read.bank"),
    "webdataset": _import("webdataset"),
    "HF": _import("datasets"),
    "litdata": _import("litdata"),
    "mosaic": _import("streaming"),
}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
