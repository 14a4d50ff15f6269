"""The maintenance commands: verify, repair, status, gc."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from preprocess.cli.encode import compare_sides
from preprocess.cli.options import BANK, DEVICE, bytes_bar
from shards.errors import UserError

if TYPE_CHECKING:
    from preprocess.care.repair import Repaired
    from shards.care.inventory import Damage
    from shards.write.lock import Writer


@click.command()
@BANK
@click.option("--deep", is_flag=True, help="Read every byte and compare every checksum.")
def verify(bank: Path, deep: bool) -> None:
    """Find what in BANK is damaged, by file, clip and stream.

    By default it checks that all files exist with their sizes, and that headers, descriptions, index,
    catalogue and commit records agree. This finds the damage of a broken copy, a deleted file or
    another tool, in seconds. To find a single flipped bit, too, --deep reads every byte, at the speed
    of the disk. Nothing is changed; `preprocess repair BANK` repairs what is found.

    Exit code 0: no damage; 1: damage was found and is listed; 2: wrong usage.

    \b
    preprocess verify bank
    preprocess verify bank --deep
    """
    from shards.care.verify import verify as check
    from shards.format.beside import banks_of
    from shards.write.lease import holders
    from shards.write.lock import writer_of

    banks, found = banks_of(bank), []
    with bytes_bar(banks, "verify") as bar:
        # all are verified before anything is printed: lines would tear the bar apart
        for one in banks:
            # a whole bank is held by its lock, single units by leases of workers
            writer = writer_of(one) or next(iter(holders(one).values()), None)
            found.append((one, writer, check(one, deep, bar.update)))
    sound = [_print_verified(*each, deep=deep) for each in found]
    if len(banks) > 1:
        sound.append(_verify_beside(bank))
    if not all(sound):
        raise SystemExit(1)


def _verify_beside(bank: Path) -> bool:
    """Say which strides beside a bank are not read with it; return whether that could be read."""
    from shards.format.beside import read_sides
    from shards.read.bank import Bank
    from shards.storage import LocalFiles
    from shards.text import printable

    try:
        read_sides(LocalFiles(bank))
        # without bank.json the run is not finished, and nothing is read with it yet
        missing = Bank.open(bank).missing if (bank / "bank.json").exists() else {}
    except UserError as error:
        click.echo(printable(str(error)))
        return False
    for stride, why in missing.items():
        click.echo(f"note: stride {stride} is not read with the bank: {printable(why)}")
    return True


def _print_verified(
    bank: Path, writer: "Writer | None", damages: "Sequence[Damage]", *, deep: bool
) -> bool:
    """Print what is damaged in a bank; return whether it is sound. writer: who writes there."""
    from shards.care.garbage import leftovers
    from shards.care.inventory import read_inventory
    from shards.text import counted, printable

    if writer:
        click.echo(f"note: {writer} writes here; finished shards were checked")
    # leftovers are known by the plan: with a damaged one everything would look like one
    elif not any(damage.file in ("plan.json", "bank.json") for damage in damages):
        pieces = leftovers(read_inventory(bank))
        if pieces:
            click.echo(
                f"note: {counted(len(pieces), 'leftover')}; `preprocess gc {bank} --dry-run` lists them"
            )
    for damage in damages:
        click.echo(printable(str(damage)))
    if not damages:
        made = ""
        if not (bank / "bank.json").exists():
            # of a run that is not finished, what is there may be sound, and be nothing
            found = read_inventory(bank)
            made = (
                f"{len(found.commits):,} of {counted(len(found.planned), 'planned shard')} made: "
            )
        click.echo(
            f"{bank}: {made}sound" + (", every byte" if deep else "; --deep reads every byte")
        )
        return True
    keys = {(damage.file, damage.key) for damage in damages if damage.key}
    files = {damage.file for damage in damages}
    remedies = {damage.remedy for damage in damages}
    click.echo(
        f"{bank}: {counted(len(damages), 'damage')} in {counted(len(files), 'file')}, "
        f"{counted(len(keys), 'clip')}; "
        f"`preprocess repair {bank}` "
        + ("encodes what must be encoded again" if "encode" in remedies else "needs no tower")
    )
    return False


@click.command()
@BANK
@click.option("--tower", help="The bank's tower: its folder or Hub name.  [default: as recorded]")
@DEVICE
@click.option(
    "--video-root",
    "video_roots",
    multiple=True,
    type=click.Path(),
    help="Folder that contains videos which have moved. Repeatable.",
)
def repair(bank: Path, tower: str | None, device: str, video_roots: tuple[str, ...]) -> None:
    """Repair what is damaged in BANK, encoding only the clips that must be.

    Every byte of BANK is verified. A clip whose bytes are intact is copied; only others are decoded and
    encoded once more. On the machine and libraries that made the bank this gives the same bytes, which
    is checked. If a video is missing or was changed, it is named and its sample stays damaged;
    `preprocess encode` banks the new video. Index, catalogue and manifest are rebuilt from the shards,
    without a tower. A BANK of an older format gets the metadata of the current one: its features stay
    as they are, nothing is encoded.

    Exit code 0: all is repaired; 1: some damage remains and is listed; 2: wrong usage.

    \b
    preprocess repair bank
    preprocess repair bank --tower ./tower --video-root /data/videos
    """
    from shards.care.inventory import refuse_no_bank
    from shards.format.beside import banks_of

    refuse_no_bank(bank)  # before torch is imported
    from preprocess.encode.tower import start_torch

    device = start_torch(device)
    from preprocess.care.repair import repair as run

    whole = True
    for one in banks_of(bank):
        with bytes_bar([one], "verify") as bar:
            done = run(one, tower, device, video_roots, bar.update)
        whole = _print_repaired(one, done) and whole
    # what was repaired may be read together once more: the record of that is made of the present files
    compare_sides(bank, "preprocess repair")
    if not whole:
        raise SystemExit(1)


def _print_repaired(bank: Path, done: "Repaired") -> bool:
    """Say what a repair found and did; return whether nothing remains."""
    from shards.text import counted, printable

    for damage in done.damages:
        click.echo(f"found: {printable(str(damage))}")
    for note in done.notes:
        click.echo(f"note: {printable(note)}")
    click.echo(
        f"{bank}: {counted(len(done.damages), 'damage')}, "
        f"{counted(len(done.encoded), 'clip')} encoded again, "
        f"{counted(len(done.files), 'file')} written"
    )
    for damage in done.remaining:
        click.echo(f"remains: {printable(str(damage))}")
    for key in done.lost:
        click.echo(
            f"remains: {key}: lost with its commit record; `preprocess encode` banks it again"
        )
    return not (done.remaining or done.lost)


@click.command()
@BANK
def status(bank: Path) -> None:
    """Print the progress of BANK: units, clips, rate, who writes it, what failed.

    May be run at any time from another terminal, also while BANK is being written: nothing is locked
    and nothing is changed.

    \b
    preprocess status bank
    watch -n 10 preprocess status bank
    """
    from shards.care.status import status as look
    from shards.care.status import table
    from shards.format.beside import banks_of

    click.echo("\n\n".join(table(look(one)) for one in banks_of(bank)))


@click.command()
@BANK
@click.option("--dry-run", is_flag=True, help="List what would be removed, and remove nothing.")
def gc(bank: Path, dry_run: bool) -> None:
    """Remove files from BANK that nothing refers to.

    These were left by killed writers: journals of finished shards, temporary files, shards of no unit
    of the plan. Nothing is removed that BANK/bank.json lists or that a run needs to continue. Shards
    whose clips were all superseded or pruned are listed and kept.

    \b
    preprocess gc bank --dry-run
    preprocess gc bank
    """
    from shards.format.beside import banks_of

    for one in banks_of(bank):
        _collect_of(one, dry_run)


def _collect_of(bank: Path, dry_run: bool) -> None:
    from shards.care.garbage import collect, dead_shards, leftovers
    from shards.care.inventory import read_inventory
    from shards.text import in_bytes, printable
    from shards.write.lock import writer_of

    inventory = read_inventory(bank)
    writer = writer_of(bank)
    if dry_run and writer:
        click.echo(f"note: {writer} writes here; some of these may be its own")
    # collect takes the bank's lock: a writer's files are no leftovers
    pieces = leftovers(inventory) if dry_run else collect(bank)
    for piece in pieces:
        name = printable(str(piece.path.relative_to(bank)))
        click.echo(f"{in_bytes(piece.nbytes):>10}  {name}: {piece.why}")
    total = in_bytes(sum(piece.nbytes for piece in pieces))
    done = "can be removed" if dry_run else "removed"
    click.echo(f"{total:>10}  {done}, {len(pieces)} in all")
    for name in dead_shards(inventory):
        click.echo(
            f"note: shards/{name} holds no clip that is served; bank.json lists it, it stays"
        )
