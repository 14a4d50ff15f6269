"""`preprocess derive`: make a smaller bank from a bank, without videos or a tower."""

from pathlib import Path

import click

from preprocess.cli.encode import failed, held
from preprocess.cli.options import BANK, LOCAL, Strides
from shards.format.features import CODECS


@click.command()
@BANK
@click.option("--out", required=True, type=LOCAL, help="The new bank's folder.")
@click.option("--stride", "strides", type=Strides(),
              help="Strides of BANK, or multiples of them.  [default: those of BANK]")  # fmt: skip
@click.option("--codec", type=click.Choice(CODECS),
              help="How features are stored.  [default: as in BANK]")  # fmt: skip
@click.option("--frames", type=click.IntRange(min=1),
              help="Largest number of frames of a clip, chosen uniformly.  [default: all]")  # fmt: skip
@click.option("--shard-size", type=click.IntRange(min=1), default=512, show_default=True,
              help="Largest size of a shard, in MB.")  # fmt: skip
def derive(
    bank: Path,
    out: Path,
    strides: tuple[int, ...] | None,
    codec: str | None,
    frames: int | None,
    shard_size: int,
) -> None:
    """Make a new bank from BANK, with coarser strides, fewer frames or another codec.

    Neither a video nor the tower is needed. A stride of BANK is copied; a multiple of one is pooled
    from its cells, which were rounded when they were banked, so it equals what `encode` makes within
    that rounding (exactly with pool max). Frames are chosen as training chooses them. From int8 only
    int8 of the same strides can be made.

    Rerunning continues where it was stopped, and adds clips that BANK has gained since. The new bank
    has its own fingerprint, trains like any other, and is extended by this command only. Exit codes
    are those of encode.

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
    # clips that failed in the source are failures of the new bank, too: it does not have them
    failed(out, read_quarantine(out))
