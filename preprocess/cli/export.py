"""`preprocess export`: index files for other readers of the shards."""

from pathlib import Path

import click

from preprocess.cli.options import LOCAL

FORMATS = ("wids", "hf")


@click.command()
@click.argument("form", metavar="FORMAT", type=click.Choice(FORMATS))
@click.argument("bank", type=LOCAL)
def export(form: str, bank: Path) -> None:
    """Write an index file into BANK that other readers of its shards need; nothing is copied.

    \b
    preprocess export wids bank     wids.json, for wids.ShardListDataset("bank/wids.json")
    preprocess export hf bank       README.md, for datasets.load_dataset("bank"), streaming or not

    Stock webdataset, tarfile and GNU tar need no index. Strides beside BANK get an index file of their
    own.
    """
    from shards.format.beside import banks_of
    from shards.format.manifest import read_manifest
    from shards.read.export import write_hf, write_wids

    for one in banks_of(bank):
        click.echo({"wids": write_wids, "hf": write_hf}[form](one))
        dead = read_manifest(one).dead_samples
        if dead:
            click.echo(
                f"note: {dead} samples of older videos or pruned clips are still in the shards"
            )
