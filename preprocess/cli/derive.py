"""`preprocess derive`: of a bank another one, without videos and tower."""

from pathlib import Path

import click

from preprocess.cli.encode import failed, held
from preprocess.cli.options import BANK, LOCAL, Strides
from shards.format.features import CODECS


@click.command()
@BANK
@click.option("--out", required=True, type=LOCAL, help="The new bank's folder.")
@click.option("--stride", "strides", type=Strides(),
              help="Banked strides, or multiples of them.  [default: those of BANK]")  # fmt: skip
@click.option("--codec", type=click.Choice(CODECS),
              help="How features are stored.  [default: as in BANK]")  # fmt: skip
@click.option("--frames", type=click.IntRange(min=1),
              help="Of each clip at most, of those banked, uniformly.  [default: all]")  # fmt: skip
@click.option("--shard-size", type=click.IntRange(min=1), default=512, show_default=True,
              help="MB of a shard, at most.")  # fmt: skip
def derive(
    bank: Path,
    out: Path,
    strides: tuple[int, ...] | None,
    codec: str | None,
    frames: int | None,
    shard_size: int,
) -> None:
    """Make of BANK another one of coarser strides, fewer frames or another codec.

    Neither a video nor the tower is needed. A stride that BANK has is copied; a multiple of one is
    pooled from its cells, which were rounded when they were banked: the same as `encode` makes, within
    that rounding (of pool max, exactly). Frames are chosen as training chooses them. What int8 has
    rounded gives int8 alone, of the same strides.

    Rerunning goes on where it was stopped, and takes over what BANK has got since. The new bank has a
    fingerprint of its own, trains as any other, and grows by this command only. Exit codes are those of
    encode.

    \b
    preprocess derive bank --stride 8 --codec int8 --frames 8 --out small
    preprocess derive bank --stride 4,16 --out coarse
    """
    from tqdm import tqdm

    from preprocess.derive.run import derive as run
    from preprocess.derive.target import Asked
    from shards.format.quarantine import read_quarantine

    with tqdm(total=0, unit="clip", desc="derive", leave=False, disable=None) as bar:
        manifest = run(bank, out, Asked(strides, codec, frames), shard_size << 20, bar)
    click.echo(held(out, manifest))
    failed(out, read_quarantine(out))
