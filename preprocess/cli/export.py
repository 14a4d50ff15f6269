"""`preprocess export` and `preprocess index`: what others read beside the shards, and the catalogue."""

from pathlib import Path

import click

FORMATS = ("wids", "hf")


@click.command()
@click.argument("form", metavar="FORMAT", type=click.Choice(FORMATS))
@click.argument("bank", type=click.Path(path_type=Path))
def export(form: str, bank: Path) -> None:
    """Write an index file into BANK by which others read its shards; nothing is copied.

    \b
    preprocess export wids bank     wids.json, for wids.ShardListDataset("bank/wids.json")
    preprocess export hf bank       README.md, for datasets.load_dataset("bank", streaming=True)

    Stock webdataset, tarfile and GNU tar need none.
    """
    from shards.format.manifest import read_manifest
    from shards.read.export import dead_samples, write_hf, write_wids

    click.echo({"wids": write_wids, "hf": write_hf}[form](bank))
    dead = dead_samples(read_manifest(bank))
    if dead:
        click.echo(f"note: {dead} samples of older videos or pruned clips lie in the shards still")


@click.command()
@click.argument("bank", type=click.Path(path_type=Path))
@click.option("--rebuild", is_flag=True, help="Write it anew, from shards and commit records.")
def index(bank: Path, rebuild: bool) -> None:
    """Check the catalogue of BANK, or write it anew.

    It is rebuilt, with bank.json, from the shards, their commit records and plan.json, and comes
    out as the encoder wrote it. A shard that is not as it was committed is refused by name:
    `preprocess repair` mends those.
    """
    if rebuild:
        from preprocess.encode.rebuild import rebuild as rebuild_index

        click.echo(f"{bank}: catalogue and bank.json are written, of {rebuild_index(bank)} clips")
        return
    from shards.read.bank import Bank

    click.echo(f"{bank}: the catalogue is whole, of {len(Bank.open(bank))} clips")
