"""`preprocess bench`: measure each stage of encoding alone, and estimate hours and cost from them.

    pace = measure_pace(clips, tower, options, folder, most=8, cores=16)
    table(pace, Job(clips=178_510, frames=9_100_000), Asked((1, 4), (1, 8), (1,), price=2.0))

The slowest stage sets the pace of a run, because decoders, tower and writer run in parallel: a machine's
seconds per frame are max(decode / decoders, tower / devices, write / devices), with no more decoders than
it has cores. Where the tower runs on the CPU, all stages share these, however many devices are asked for:
seconds per frame are then at least those of one core / cores.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from model.tower.pooling import FeatureRangeError
from model.tower.tower import Tower
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.source import SourceReader
from preprocess.encode.calibrate import measured
from preprocess.encode.estimate import share_of_most
from preprocess.encode.features import EncodeOptions, describe, encode_frames
from shards.errors import UserError
from shards.format.codec import Codec
from shards.format.commits import shard_path
from shards.format.plan import ClipSource
from shards.format.samples import SampleMeta
from shards.text import counted, duration, in_bytes
from shards.write.shard import ShardWriter

STAGES = ("decode", "tower", "write")


@dataclass(frozen=True)
class Pace:
    """Seconds per frame of each stage, measured alone and warmed up; and bytes per frame in the bank."""

    decode: float
    """With one decoder."""
    tower: float
    """On one device."""
    write: float
    nbytes: float
    clips: int
    """Clips that were measured."""
    frames: int
    cores: int
    """Cores of a machine."""
    tower_cores: float = 0.0
    """Those of them that the tower keeps busy on a CPU; 0 if it has its own device."""
    share: float = 1.0
    """Frames of the measured members of archives over the most that they may have."""

    def seconds(self, frames: int, decoders: int, devices: int, machines: int = 1) -> float:
        """Return the seconds for `frames` frames. decoders: per device; devices: per machine."""
        decode = self.decode / min(decoders * devices, self.cores)
        if self.tower_cores:
            of_one_core = self.decode + self.tower * self.tower_cores + self.write
            slowest = max(decode, self.tower, self.write, of_one_core / self.cores)
        else:
            slowest = max(decode, self.tower / devices, self.write / devices)
        return frames * slowest / machines

    @property
    def decoders(self) -> int:
        """Number of decoders that keep a device busy, at most one a core."""
        # the next stage takes max(tower, write): so many decoders give a frame in that time
        return min(math.ceil(self.decode / max(self.tower, self.write)), self.cores)


@dataclass(frozen=True)
class Job:
    """The amount to encode."""

    clips: int
    frames: int


@dataclass(frozen=True)
class Asked:
    """The rows and columns of the table of hours."""

    decoders: tuple[int, ...]
    """Per device."""
    devices: tuple[int, ...]
    """Per machine."""
    machines: tuple[int, ...]
    price: float | None = None
    """Per device and hour."""


# -- measuring


def measure_pace(
    clips: Sequence[ClipSource],
    tower: Tower,
    options: EncodeOptions,
    folder: Path,
    most: int,
    cores: int,
    seen: Callable[[], object] = lambda: None,
) -> Pace:
    """Measure the stages on up to `most` clips of typical sizes; raises UserError if none can be encoded.

    folder: on the disk of the bank. cores: that this process may use. seen: called after each clip.
    """
    spent, frames, tower_cpu = dict.fromkeys(STAGES, 0.0), 0, 0.0
    made: list[tuple[ClipSource, SampleMeta, dict[int, np.ndarray]]] = []
    with SourceReader(DecodeChild(), folder) as reader:
        for clip in spread(clips, most):
            request = options.request(clip, tower.pixels)
            if not made:  # warm up: the first clip loads libraries and kernels
                first = reader.read(clip, request)
                if first.clip is not None:
                    with suppress(FeatureRangeError):
                        encode_frames(tower, first.clip.frames, options)
            began = time.perf_counter()
            outcome = reader.read(clip, request)
            decoded, cpu = time.perf_counter(), time.process_time()
            seen()
            if outcome.clip is None:
                continue
            try:
                arrays, _ = encode_frames(tower, outcome.clip.frames, options)
            except FeatureRangeError:
                continue
            spent["decode"] += decoded - began
            spent["tower"] += time.perf_counter() - decoded
            tower_cpu += time.process_time() - cpu
            frames += len(outcome.clip.frames)
            made.append((clip, describe(clip, outcome, outcome.clip, tower, arrays), arrays))
    if not made:
        raise UserError(
            "none of the clips that were tried can be encoded; `preprocess plan` names some"
        )
    scales = {}
    if options.codec == "int8":
        scales = measured([one[2] for one in made], options.strides, options.dtype).channel_scale
    # on the bank's own disk, since that is what is measured
    with TemporaryDirectory(prefix="framebank-bench-", dir=folder) as beside:
        codec = Codec(options.codec, options.dtype, scales)
        began = time.perf_counter()
        with ShardWriter(shard_path(Path(beside), 0), 0, "bench", codec) as writer:
            for clip, meta, arrays in made:
                writer.write(clip.key, meta, arrays)
            nbytes = writer.commit().nbytes
        spent["write"] = time.perf_counter() - began
    each = {stage: seconds / frames for stage, seconds in spent.items()}
    # the threads of a GPU's tower wait; on a CPU they work
    busy = min(max(1.0, tower_cpu / spent["tower"]), cores) if tower.device.type == "cpu" else 0.0
    share = share_of_most((clip, len(meta.timestamps)) for clip, meta, _ in made)
    return Pace(**each, nbytes=nbytes / frames, clips=len(made), frames=frames, cores=cores,
                tower_cores=busy, share=share)  # fmt: skip


def spread(clips: Sequence[ClipSource], most: int) -> list[ClipSource]:
    """Return up to `most` readable clips, spread evenly over the clips sorted by size."""
    good = sorted((clip for clip in clips if clip.frames), key=lambda c: (c.size or 0, c.key))
    # the middles of equal shares: neither the smallest nor the largest file stands for others
    places = (np.arange(min(most, len(good))) + 0.5) * len(good) / max(1, min(most, len(good)))
    return [good[int(place)] for place in places]


# -- the table


def table(pace: Pace, job: Job, asked: Asked) -> list[str]:
    """Return the lines that `preprocess bench` prints."""
    hours = "hours by" if asked.price is None else "hours (cost) by"
    lines = [
        f"{counted(job.clips, 'clip')}, {counted(job.frames, 'frame')}, "
        f"{in_bytes(round(job.frames * pace.nbytes))} in the bank; measured on "
        f"{counted(pace.clips, 'clip')}, {counted(pace.frames, 'frame')}",
        "",
        *_columns(
            ["", "ms a frame", "frames/s", "all frames"],
            [
                [
                    f"{stage}, {worker}",
                    f"{1000 * each:.2f}",
                    f"{1 / each:,.0f}" if each else "",
                    duration(each * job.frames),
                ]
                for stage, worker in zip(
                    STAGES, ("one decoder", "one device", "one disk"), strict=True
                )
                for each in [getattr(pace, stage)]
            ],
        ),
        "",
        *_columns(
            [hours, *(f"{_many(devices, machines)}" for machines, devices in _fleets(asked))],
            [
                [
                    f"{counted(decoders, 'decoder')} a device",
                    *(
                        _cost(
                            pace.seconds(job.frames, decoders, devices, machines),
                            machines * devices,
                            asked,
                        )
                        for machines, devices in _fleets(asked)
                    ),
                ]
                for decoders in asked.decoders
            ],
        ),
        "",
        _advice(pace),
    ]
    return lines


def _fleets(asked: Asked) -> list[tuple[int, int]]:
    return [(machines, devices) for machines in asked.machines for devices in asked.devices]


def _many(devices: int, machines: int) -> str:
    text = counted(devices, "device")
    return text if machines == 1 else f"{machines} x {text}"


def _cost(seconds: float, devices: int, asked: Asked) -> str:
    hours = seconds / 3600
    text = f"{hours:.1f}" if hours >= 0.1 else f"{hours:.2g}"
    return text if asked.price is None else f"{text} ({hours * devices * asked.price:,.2f})"


def _advice(pace: Pace) -> str:
    """Return which stage sets the pace, and what would make it faster."""
    if pace.tower_cores:
        return (
            f"the {counted(pace.cores, 'core')} of this machine decode and run the tower: more "
            "machines, or a GPU"
        )
    if pace.write > pace.tower:
        return "the disk sets the pace: a faster one, or --codec int8"
    fed = f"the {counted(pace.cores, 'core')} of this machine feed {pace.cores // pace.decoders}"
    if pace.decoders == 1:
        return f"the tower sets the pace: one decoder keeps a device busy, and more devices help; {fed}"
    return (
        f"{pace.decoders} decoders, a core each, keep a device busy; fewer, and decoding sets the "
        f"pace; {fed}"
    )


def _columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    every = [list(head), *map(list, rows)]
    widths = [max(len(row[k]) for row in every) for k in range(len(head))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in every
    ]
