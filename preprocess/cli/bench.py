"""`preprocess bench`: estimate the time and cost of encoding by measuring its stages."""

from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import click

from preprocess.cli.encode import prepared, print_skips
from preprocess.cli.options import INPUTS, LOCAL, WHAT
from shards.errors import UserError


class Counts(click.ParamType):
    """`1,2,4` -> (1, 2, 4)."""

    name = "n,n"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
            self.fail(f"positive integers such as 1,2,4 are needed, got {value!r}", param, ctx)
        return tuple(map(int, parts))


@click.command()
@INPUTS
@WHAT
@click.option("--out", type=LOCAL, help="Folder on the disk of the bank.  [default: temporary]")
@click.option("--clips", "most", type=click.IntRange(min=1), default=8, show_default=True,
              help="Clips to measure on.")  # fmt: skip
@click.option("--decoders", type=Counts(), default="1,2,4,8", show_default=True,
              help="Decoders per device: rows of the table.")  # fmt: skip
@click.option("--devices", type=Counts(),
              help="Devices per machine: columns of the table.  [default: 1,8; on a CPU 1]")  # fmt: skip
@click.option("--machines", type=Counts(), default="1,4", show_default=True,
              help="Machines: columns of the table.")  # fmt: skip
@click.option(
    "--price", type=click.FloatRange(min=0), help="Price per device and hour, in any currency."
)
def bench(
    inputs: tuple[str, ...],
    out: Path | None,
    most: int,
    decoders: tuple[int, ...],
    devices: tuple[int, ...] | None,
    machines: tuple[int, ...],
    price: float | None,
    **flags: Any,
) -> None:
    """Measure decoding, tower and writing separately on INPUTS, and estimate the hours for all of them.

    Some clips of small to large files are decoded, encoded and written to a temporary shard: each
    stage alone and warmed up, with one decoder and one device of this machine. The slowest stage sets
    the pace of a run; from the three the table derives the hours for other numbers of decoders,
    devices and machines like these, and with --price the cost. Start-up, 5 to 10 s per process, is
    not included. `preprocess plan` prints bytes and shards.

    \b
    preprocess bench videos/ --tower google/siglip-so400m-patch14-384 --price 2.5
    preprocess bench videos/ --tower ./tower --frames 16 --decoders 1,4,16 --devices 8 --machines 1,2,4
    """
    # writing is measured on the bank's disk where --out names one: /tmp may be memory
    folder = out or Path(gettempdir())
    if not folder.is_dir():
        raise UserError("no such folder", where=f"--out {folder}")
    found, options, _ = prepared(inputs, folder, shard_size=1, prune=False, **flags)

    from tqdm import tqdm

    from preprocess.encode.bench import Asked, Job, measure_pace, table
    from preprocess.encode.estimate import expected_frames
    from preprocess.encode.tower import Loading, measured
    from preprocess.sources.probe import probe
    from shards.forked import cores

    # the tower loads in a thread while headers are read
    loading = Loading(options)
    clips = probe(found.clips, {}, options.sampling)
    tower, options = loading.tower()
    if choice := measured(tower, options, None):  # as encode would take it
        options = replace(options, tower_dtype=choice.dtype)
    print_skips(found, None)  # they are listed in a bank, which there is none of
    devices = devices or ((1,) if tower.device.type == "cpu" else (1, 8))
    with tqdm(
        total=min(most, len(clips)), desc="bench", unit="clip", leave=False, disable=None
    ) as bar:
        pace = measure_pace(clips, tower, options, folder, most, cores(sharers=1), bar.update)
    job = Job(len(clips), expected_frames(clips, pace.share))
    for line in table(pace, job, Asked(decoders, devices, machines, price)):
        click.echo(line)
