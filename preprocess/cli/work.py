"""The commands for many machines: work, finish, merge."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from preprocess.cli.encode import finish_all, held
from preprocess.cli.options import (
    BANK,
    DECODERS,
    DEVICE,
    LOCAL,
    ON,
    TOWERS,
    bytes_bar,
    first_device,
    refuse_address,
)
from preprocess.cli.share import start_of
from shards.text import counted, in_bytes, printable, some

SLURM = """\
#!/bin/bash
# Make the bank {bank}: `bash THIS` submits the array, and after it the job that finishes.
#SBATCH --job-name=framebank
#SBATCH --array=0-3
#   machines at once; any number works, each takes the units that are left
#SBATCH --cpus-per-task=4
# #SBATCH --gpus-per-task=1
# #SBATCH --time=24:00:00
#   remove the first # of the lines you need; an interrupted task continues where it was when requeued
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=framebank-%A_%a.log
set -eu
if [ -z "${{SLURM_ARRAY_TASK_ID:-}}" ]; then
    job=$(sbatch --parsable "$0")
    # it ends as failed (1) if clips are in quarantine: they are listed in its log
    exec sbatch --job-name=framebank-finish --dependency="afterok:$job" \\
        --output=framebank-finish-%j.log --wrap={finish}
fi
exec {work} --share auto
"""


@click.command()
@BANK
@click.option("--share", default="auto", show_default=True,
              help="Where to begin among the units: K/N, or by the scheduler's variables.")  # fmt: skip
@TOWERS
@DECODERS
@click.option("--tower", help="The bank's tower on this machine.  [default: as planned]")
@click.option("--video-root", "roots", multiple=True, type=click.Path(),
              help="Folder of videos that are elsewhere than planned. Repeatable.")  # fmt: skip
@DEVICE
@ON
@click.option("--template", type=click.Choice(["slurm"]),
              help="Print a job script for this bank instead.")  # fmt: skip
def work(
    bank: Path,
    share: str,
    devices: tuple[str, ...] | None,
    procs: int | None,
    decoders: int | None,
    tower: str | None,
    roots: tuple[str, ...],
    device: str,
    engine: str | None,
    address: str | None,
    template: str | None,
) -> None:
    """Encode what is left of the plan of BANK, in parallel with any number of other workers.

    Run it on any machines that share BANK, all at once or one after the other: each unit (a shard) is
    made by the first worker that takes it, and by another one if that worker dies or hangs (noticed
    at once on the same machine, after 45 s on another). Make the plan with `preprocess plan`, and end
    with `preprocess finish`. The bytes are those of one process, on machines that compute alike.

    Exit code 0: no unit is left to take, even if clips were quarantined; 2: wrong usage, or the machine
    failed; 70: a bug in framebank. Finished units are kept.

    \b
    preprocess plan videos/ --out bank --tower google/siglip-so400m-patch14-384
    preprocess work bank                      # here, there and elsewhere
    preprocess finish bank
    preprocess work bank --template slurm > bank.sh && bash bank.sh
    """
    if template:
        click.echo(slurm_script(bank), nl=False)
        return
    from shards.format.plan import planned

    refuse_address(engine, address)
    device, every = first_device(device, devices, engine)
    # both before torch: a wrong share or no plan is said at once
    start, plan = start_of(share, os.environ), planned(bank)
    if engine:
        from preprocess.encode.on_ray import encode_on_ray

        encode_on_ray(bank, tower, roots, procs, address, decoders)
        report_units(bank)
        return
    from preprocess.encode.run import work as encode_left

    how: dict[str, Any] = {"procs": procs, "decoders": decoders, "start": start}
    summary = encode_left(bank, tower, roots, device, devices=every, plan=plan, **how)
    click.echo(
        f"{bank}: {counted(summary.clips, 'clip')}, {counted(summary.frames, 'frame')}, "
        f"{in_bytes(summary.nbytes)} in {summary.seconds:.1f} s; "
        f"{counted(len(summary.failures), 'clip')} failed"
    )
    if summary.advice:
        click.echo(f"  {summary.advice}")
    report_units(bank)


def report_units(bank: Path) -> None:
    """Print how many units of a plan are made, and who works on the others."""
    from shards.format.beside import banks_of
    from shards.format.commits import committed
    from shards.format.plan import planned
    from shards.write.lease import holders

    units = [(one, unit) for one in banks_of(bank) for unit in range(len(planned(one).units))]
    left = sum(not committed(*unit) for unit in units)
    if not left:
        click.echo(f"all {len(units)} units are made; `preprocess finish {bank}`")
        return
    workers = [writer for one in banks_of(bank) for writer in holders(one).values()]
    who = some([printable(str(writer)) for writer in workers])
    click.echo(
        f"{left} of {len(units)} units are being made elsewhere: {who}"
        if workers
        # its worker was stopped since, or clips were planned
        else f"{left} of {len(units)} units are not made; run `preprocess work {bank}` again"
    )


def slurm_script(bank: Path) -> str:
    """Return a job script that makes a bank on a Slurm cluster, with this machine's Python and path."""
    # absolute, both: the script may be submitted from any folder, and this Python has framebank
    path = shlex.quote(str(bank.absolute()))
    command = f"{shlex.quote(sys.executable)} -m preprocess"
    finish = shlex.quote(f"{command} finish {path}")
    return SLURM.format(bank=path, work=f"{command} work {path}", finish=finish)


@click.command()
@BANK
def finish(bank: Path) -> None:
    """Write the catalogue, the quarantine and bank.json of BANK, when all units of its plan are made.

    Exit code 0: all done; 1: some clips failed and are listed; 2: wrong usage, or units are left, or
    are being made (by whom is printed).

    \b
    preprocess finish bank
    """
    finish_all(bank)


@click.command()
@click.argument("banks", nargs=-1, required=True, type=LOCAL)
@click.option("--out", required=True, type=LOCAL, help="The new bank's folder.")
def merge(banks: tuple[Path, ...], out: Path) -> None:
    """Join BANKS of the same features, without a common clip, into a new one. Nothing is encoded.

    Shards are hard links where possible, so that they take no space twice, and copies elsewhere; BANKS
    are not changed. Of a bank whose plan is not done yet the finished units are taken: a plan may be
    copied to machines without a shared disk, each of which makes a part of it. Clips that none of them
    has made are named.

    \b
    preprocess merge bank-a bank-b --out bank
    """
    from shards.care.merge import merge as join
    from shards.format.quarantine import read_quarantine

    with bytes_bar(banks, "merge") as bar:
        manifest = join(banks, out, bar.update)
    click.echo(f"{held(out, manifest)}; {counted(len(read_quarantine(out)), 'clip')} in quarantine")
