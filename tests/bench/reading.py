"""GB per CPU second of reading banked features, by ours and by others, from a warm page cache.

384 samples of 5.3 MB (32x64x1152 slow and 64x4x1152 fast, float16), 2 GB; FRAMEBANK_READING_GB
makes it another size. Each reader runs in a process of its own, in random order, five rounds;
medians. Peers get an environment of their own in a temporary folder; those that do not install are
dropped with a word. Then a catalogue of a million rows.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from shards.format.catalogue import Columns, write_columns
from shards.format.codec import Codec, channel_rms
from shards.format.commits import shard_path
from shards.format.features import FeatureConfig, Sampling
from shards.format.manifest import Manifest, TowerFacts
from shards.format.plan import ClipSource, Plan
from shards.format.samples import SampleMeta, sample_key
from shards.read.bank import Bank
from shards.signed import digest, signed_json
from shards.write.finish import finish
from shards.write.shard import ShardWriter
from tests.bench._readers import READERS

SIZE = float(os.environ.get("FRAMEBANK_READING_GB", "2"))
ROUNDS = int(os.environ.get("FRAMEBANK_READING_ROUNDS", "5"))
SLOW, FAST = (32, 8, 8, 1152), (64, 2, 2, 1152)
DISTINCT = 16
SHARD = 64
SECONDS = 20.0
"""Of one reader in one round, at most."""
STUCK = 300
"""Seconds after which a reader is given up."""
INSTALL = 300
"""Seconds that the installation of a peer may take."""
PEERS = {"litdata": "litdata", "mosaic": "mosaicml-streaming"}
CONFIG = FeatureConfig(
    tower_type="siglip_vision_model",
    tower_digest="00" * 16,
    layer=-2,
    processor={},
    dtype="float16",
    tower_dtype="bfloat16",
    attention="sdpa",
    sampling=Sampling(num_frames=32),
    strides=(4, 8),
    pool="average",
)
TOWER = TowerFacts("none", 1152)


def run() -> list[dict[str, object]]:
    with TemporaryDirectory() as folder:
        return [*read_rates(Path(folder)), *catalogue_rates(Path(folder))]


def read_rates(folder: Path) -> list[dict[str, object]]:
    tensors = draw()
    number = max(8, round(SIZE * 1e9 / sum(array.nbytes for array in tensors[0].values())))
    for codec in ("none", "blosc", "int8"):
        write_bank(folder / codec, codec, tensors, number)
    (folder / "count").write_text(str(number))
    (folder / "tensors").mkdir()
    for k, arrays in enumerate(tensors):
        np.savez(folder / "tensors" / f"{k}.npz", slow=arrays[4], fast=arrays[8])
    pythons: dict[str, str] = {}
    missing: dict[str, str] = {}
    for peer, package in PEERS.items():
        pythons[peer], why = environment(folder / f"env-{peer}", package)
        why = why or figures(f"write {peer}", folder, pythons[peer])[1]
        if why:
            missing[peer] = why
    found: dict[str, list[dict[str, float]]] = {}
    for k in range(ROUNDS):
        for name in random.Random(k).sample(list(READERS), len(READERS)):
            peer = name.split()[0]
            if peer in missing:
                continue
            passes, why = figures(name, folder, pythons.get(peer, sys.executable))
            if why:
                missing[peer] = why
            for number_, one in enumerate(passes):
                first = len(passes) == 2 and number_ == 0
                found.setdefault(f"{name}, first touch" if first else name, []).append(one)
    medians = {
        name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    order = {name: place for place, name in enumerate(READERS)}
    rows = [row_of(name, medians) for name in sorted(medians, key=lambda n: order[n.split(",")[0]])]
    rows += [{"reader": peer, "note": f"dropped: {why}"} for peer, why in missing.items()]
    return [*rows, bar(medians, "preadv", 0.8), bar(medians, "webdataset raw", 4.0)]


def row_of(name: str, medians: dict[str, dict[str, float]]) -> dict[str, object]:
    one, least = medians[name], medians["ours"]["per_cpu"]
    return {
        "reader": name,
        "GB / CPU s": one["per_cpu"],
        "% of preadv": 100 * one["per_cpu"] / medians["preadv"]["per_cpu"],
        "x webdataset": one["per_cpu"] / medians["webdataset raw"]["per_cpu"],
        "samples / s": one["samples"],
        "p99 ms": one["p99"],
        "first ms": one["first"],
        "RSS MB": one["rss"],
        "note": "beats ours" if one["per_cpu"] > least and not name.startswith("ours") else "",
    }


def bar(medians: dict[str, dict[str, float]], name: str, least: float) -> dict[str, object]:
    ratio = medians["ours"]["per_cpu"] / medians[name]["per_cpu"]
    met = "met" if ratio >= least else "MISSED"
    return {"reader": f"ours / {name}", "note": f"{ratio:.2f}, bar {least}: {met}"}


def figures(name: str, folder: Path, python: str) -> tuple[list[dict[str, float]], str]:
    """Run one reader; return the figures of each pass, or why there are none."""
    script = Path(__file__).with_name("_readers.py").resolve()
    try:
        done = subprocess.run(
            [python, str(script), name, str(folder), str(SECONDS)],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)},
            timeout=STUCK,
        )
    except subprocess.TimeoutExpired:
        return [], f"stands still: over {STUCK} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["died"])[-1]
        assert not name.startswith("ours"), f"{name}: {done.stderr}"
        return [], f"fails: {last[:120]}"
    return json.loads(done.stdout.strip().splitlines()[-1]), ""


def environment(folder: Path, package: str) -> tuple[str, str]:
    """Make a peer's own environment over our packages; return its Python, and why it is not there.

    Of our versions it is held to torch's alone, which is large: what else it needs of others is
    installed into its own.
    """
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(f"{Path(np.__file__).parents[1]}\n")
    held = folder / "held.txt"
    held.write_text(f"torch=={version('torch').partition('+')[0]}\n")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(held)]
    try:
        done = subprocess.run([*pip, package], capture_output=True, text=True, timeout=INSTALL)
    except subprocess.TimeoutExpired:
        return python, f"does not install within {INSTALL} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return python, f"does not install: {last[:120]}"
    return python, ""


def draw() -> list[dict[int, np.ndarray]]:
    """Return features such as a tower's: channels of own sizes, a few massive, frames alike, bf16."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(size=1152)) * 0.3
    size[:4] *= 50
    drawn = []
    for _ in range(DISTINCT):
        arrays = {}
        for stride, shape in ((4, SLOW), (8, FAST)):
            still = rng.normal(size=(1, *shape[1:])).astype(np.float32)
            values = (still + 0.5 * rng.normal(size=shape).astype(np.float32)) * size
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32) & 0xFFFF0000
            arrays[stride] = bits.view(np.float32).astype(np.float16)
        drawn.append(arrays)
    return drawn


def write_bank(out: Path, codec: str, tensors: list[dict[int, np.ndarray]], number: int) -> None:
    scales = {s: channel_rms(arrays[s] for arrays in tensors) for s in (4, 8)}
    channel_scale = scales if codec == "int8" else {}
    config = replace(CONFIG, codec=codec)
    units = []
    for unit, first in enumerate(range(0, number, SHARD)):
        rows = range(first, min(first + SHARD, number))
        ids = [f"clip-{row:06d}.mp4" for row in rows]
        with ShardWriter(
            shard_path(out, unit),
            unit,
            config.fingerprint,
            Codec(codec, "float16", channel_scale),
        ) as writer:
            for row, id_ in zip(rows, ids, strict=True):
                writer.write(sample_key(id_), meta(id_), tensors[row % DISTINCT])
            writer.commit()
        units.append([ClipSource(id_, sample_key(id_), id_, id_) for id_ in ids])
    calibration = {str(s): scale.tolist() for s, scale in channel_scale.items()} or None
    finish(out, Plan(config, units, calibration=calibration), TOWER)


def meta(id_: str) -> SampleMeta:
    return SampleMeta(
        id=id_,
        path=id_,
        size=1,
        digest="00" * 16,
        start=0.0,
        end=32.0,
        fps=25.0,
        frame_count=800,
        frame_index=list(range(0, 800, 25)),
        timestamps=[float(k) for k in range(32)],
        display_size=(360, 640),
        covered=(0.0, 0.0, 1.0, 1.0),
        patch_grid=(32, 32),
        cell_grids={"4": (8, 8), "8": (2, 2)},
        tower_width=1152,
        frames_per_unit=1,
        decoder="pyav-seek",
        flags=[],
    )


# The catalogue.


def catalogue_rates(folder: Path, rows: int = 1_000_000) -> list[dict[str, object]]:
    """Return how long a catalogue of many rows takes to open, and a lookup in it."""
    ids = [f"train/{k:08d}/clip.mp4" for k in range(rows)]
    out = folder / "million"
    out.mkdir()
    columns = synthetic(ids)
    write_columns(out / "index.zarr", columns)
    manifest = Manifest.of(Plan(CONFIG, []), [], columns, TOWER)
    (out / "bank.json").write_bytes(signed_json(manifest.to_json()))
    opening = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        bank = Bank.open(out)
        opening.append(time.perf_counter() - began)
    picks = np.random.default_rng(0).integers(0, rows, 20_000).tolist()
    wanted = [ids[row] for row in picks]
    plain = bank.columns["stride4_offset"]
    times: dict[str, list[float]] = {"numpy": [], "index": [], "key": []}
    for _ in range(ROUNDS):
        times["numpy"].append(each(lambda k: plain[picks[k]], len(picks)))
        times["index"].append(each(lambda k: bank.shape(picks[k], 4), len(picks)))
        times["key"].append(each(lambda k: bank.row(wanted[k]), len(picks)))
    assert [bank.row(id_) for id_ in wanted] == picks
    spent = {name: statistics.median(rounds) for name, rounds in times.items()}
    size = sum(column.nbytes for column in columns.values())
    lookups = [("index", "Bank.shape(row, stride)"), ("key", "Bank.row(id)")]
    return [
        {
            "reader": f"open {rows:,} rows, {size / 1e6:.0f} MB",
            "s": statistics.median(opening),
        },
        {"reader": "column[row] in NumPy", "us": 1e6 * spent["numpy"], "x NumPy": 1.0},
        *(
            {
                "reader": shown,
                "us": 1e6 * spent[name],
                "x NumPy": spent[name] / spent["numpy"],
            }
            for name, shown in lookups
        ),
    ]


def each(work: Callable[[int], object], times: int) -> float:
    """Return the seconds of one call, over many in a row."""
    began = time.perf_counter()
    for k in range(times):
        work(k)
    return (time.perf_counter() - began) / times


def synthetic(ids: list[str]) -> Columns:
    """Return the columns of clips of 32 frames, as `build_columns` makes them."""
    rows, frames, rng = len(ids), 32, np.random.default_rng(0)
    digests = [digest(id_.encode(), size=8) for id_ in ids]
    hashes = np.asarray([int(one, 16) for one in digests], np.uint64)
    columns: Columns = {
        "shard": np.arange(rows, dtype=np.uint32) // 100,
        "offset": np.arange(rows, dtype=np.uint64) * 5_300_000,
        "key_hash": hashes,
        "key_order": np.argsort(hashes).astype(np.uint32),
        "covered": np.tile([0.0, 0.0, 1.0, 1.0], rows),
        "frames_per_unit": np.ones(rows, np.uint8),
        "timestamps": rng.random(rows * frames),
        "frame_index": np.arange(rows * frames, dtype=np.uint32),
    }
    for name in ("timestamps", "frame_index"):
        columns[f"{name}_offsets"] = np.arange(rows + 1) * frames
    for name, texts in (("id", ids), ("key", [f"clip-mp4-{one}" for one in digests])):
        encoded = [text.encode() for text in texts]
        columns[name] = np.frombuffer(b"".join(encoded), np.uint8)
        columns[f"{name}_offsets"] = np.cumsum([0, *map(len, encoded)])
    for name in ("start", "end", "fps"):
        columns[name] = rng.random(rows)
    for name in ("display_height", "display_width"):
        columns[name] = np.full(rows, 360, np.uint32)
    for name in ("patch_rows", "patch_cols"):
        columns[name] = np.full(rows, 32, np.uint16)
    for stride, shape in ((4, SLOW), (8, FAST)):
        for what in ("offset", "nbytes"):
            columns[f"stride{stride}_{what}"] = columns["offset"] + stride
        columns[f"stride{stride}_crc32c"] = rng.integers(0, 1 << 32, rows, np.uint32)
        columns[f"stride{stride}_shape"] = np.tile(np.asarray(shape, np.uint32), rows)
    return columns
